import MigrationModel

/// Programmatic units of CIM (DSP0004, annex C): "byte * 2^30", "hertz * 10^6", and the plain names older writers use.
enum AllocationUnits {
    /// Bytes in one unit. Plain names count in powers of two, as every writer of OVF means them.
    static func bytes(_ text: String, owner: String) throws -> UInt64 {
        try multiplier(
            text, base: ["byte", "bytes"],
            names: [
                "kb": 1 << 10, "kib": 1 << 10, "kilobyte": 1 << 10, "kilobytes": 1 << 10,
                "mb": 1 << 20, "mib": 1 << 20, "megabyte": 1 << 20, "megabytes": 1 << 20,
                "gb": 1 << 30, "gib": 1 << 30, "gigabyte": 1 << 30, "gigabytes": 1 << 30,
                "tb": 1 << 40, "tib": 1 << 40, "terabyte": 1 << 40, "terabytes": 1 << 40,
            ], owner: owner)
    }

    static func hertz(_ text: String, owner: String) throws -> UInt64 {
        try multiplier(
            text, base: ["hertz", "hz"], names: ["mhz": 1_000_000, "megahertz": 1_000_000, "ghz": 1_000_000_000],
            owner: owner)
    }

    private static func multiplier(
        _ text: String, base: Set<String>, names: [String: UInt64], owner: String
    ) throws -> UInt64 {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(.invalidArgument, "\(owner): allocation units '\(text.printable)' \(why)")
        }
        let factors = text.lowercased().split(separator: "*", omittingEmptySubsequences: false).map {
            String($0).trimmed
        }
        guard let first = factors.first, factors.count <= 8 else { throw refuse("are empty") }
        var product: UInt64
        if base.contains(first) || first.isEmpty && factors.count == 1 {
            product = 1
        } else if let named = names[first] {
            product = named
        } else {
            throw refuse("are not known")
        }
        for factor in factors.dropFirst() {
            let parts = factor.split(separator: "^", omittingEmptySubsequences: false).map { String($0).trimmed }
            guard parts.count <= 2, let number = parts.first.flatMap({ UInt64($0) }), number > 0 else {
                throw refuse("are malformed")
            }
            guard let exponent = parts.count == 2 ? Int(parts[1]) : 1, (0...63).contains(exponent) else {
                throw refuse("have an unusable exponent")
            }
            for _ in 0..<exponent {
                let (next, overflow) = product.multipliedReportingOverflow(by: number)
                guard !overflow else { throw refuse("exceed 2^63") }
                product = next
            }
        }
        return product
    }
}
