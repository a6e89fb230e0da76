package import FlotillaProtocol
import SwiftProtobuf

/// What nvidia-smi tells of a GPU's instances, and where another one fits.
///
/// Source: NVIDIA's MIG user guide, "Listing GPU Instance Profiles", "Creating GPU Instances"; an instance occupies whole
/// memory slices, and can begin only at those that its profile lists (NVML: nvmlGpuInstancePlacement_t).
extension Mig {
    /// - Parameters:
    ///   - profiles: what `nvidia-smi mig -lgip` prints.
    ///   - placements: of `-lgipp`; empty where it does not know that.
    ///   - instances: of `-lgi`.
    ///   - gpu: its number, where the tables are of all GPUs.
    ///   - vgpus: the types that its driver knows.
    init(
        profiles: String, placements: String, instances: String, of gpu: String? = nil, vgpus: [SupportedVgpu] = []
    ) {
        self.init()
        enabled = true
        let lines = placements.split(separator: "\n").filter { line in
            gpu.map { line.split(separator: " ").dropFirst().first == $0[...] } ?? true
        }
        let places = Dictionary(lines.compactMap(migPlacement)) { first, _ in first }
        self.profiles = migRows(profiles, of: gpu).compactMap { row in
            guard row.count > 2 else { return nil }
            let counts = row[2].split(separator: "/").compactMap { UInt32($0) }
            guard counts.count == 2 else { return nil }
            var profile = MigProfile.with {
                ($0.name, $0.id, $0.free, $0.total) = (row[0], row[1], counts[0], counts[1])
                if let place = places[row[1]] { ($0.starts, $0.size) = place }
            }
            for type in vgpus where type.instance == row[1] {
                // Older drivers only tell how many the whole GPU holds.
                let most = type.mostPerInstance > 0 ? type.mostPerInstance : type.most / max(counts[1], 1)
                profile.vgpus[VgpuProfile(type.name).key] = max(most, 1)
            }
            return profile
        }
        self.instances = migRows(instances, of: gpu).compactMap { row in
            let place = row.count > 3 ? row[3].split(separator: ":").compactMap { UInt32($0) } : []
            guard place.count == 2 else { return nil }
            return .with { ($0.name, $0.id, $0.start, $0.size) = (row[0], row[2], place[0], place[1]) }
        }
    }

    func profile(_ name: String) -> MigProfile? { profiles.first { $0.name == name } }

    /// Where an instance of this name fits beside those there are: the place that leaves the most others possible, the
    /// highest of equals. Nil for none.
    func start(for name: String) -> UInt32? {
        guard let profile = profile(name), hasLeft(profile) else { return nil }
        return profile.starts.filter { isFree($0, profile.size) }
            .map { start in (start, possibilities(beside: start, profile.size)) }
            .max { ($0.1, $0.0) < ($1.1, $1.0) }?.0
    }

    /// One more of it would be made, without moving another.
    func hasRoom(for name: String) -> Bool {
        guard let profile = profile(name) else { return false }
        return profile.starts.isEmpty ? profile.free > 0 : start(for: name) != nil
    }

    /// How many more of it would be made, if nothing else were.
    package func room(for name: String) -> Int {
        var left = self
        var count = 0
        while count < 64, left.hasRoom(for: name) {
            left.add(name)
            count += 1
        }
        return count
    }

    /// Becomes what it is with one more of it, where there is room.
    ///
    /// - Parameter start: its place; nil: the one that leaves most room.
    mutating func add(_ name: String, at start: UInt32? = nil) {
        guard let index = profiles.firstIndex(where: { $0.name == name }) else { return }
        let start = start ?? self.start(for: name) ?? 0
        if profiles[index].free > 0 { profiles[index].free -= 1 }
        instances.append(.with { ($0.name, $0.start, $0.size) = (name, start, profiles[index].size) })
    }

    /// Places for instances of these names on an empty GPU, in their order. Nil when they don't fit, or places are not known.
    func packing(of names: [String]) -> [MigInstance]? {
        let order = names.indices.sorted { (profile(names[$0])?.size ?? 0, $1) > (profile(names[$1])?.size ?? 0, $0) }
        var empty = self
        empty.instances = []
        func place(_ rest: ArraySlice<Int>, _ mig: Mig) -> [Int: MigInstance]? {
            guard let index = rest.first else { return [:] }
            guard let profile = mig.profile(names[index]), mig.hasLeft(profile) else { return nil }
            for start in profile.starts where mig.isFree(start, profile.size) {
                var next = mig
                let instance = MigInstance.with { ($0.name, $0.start, $0.size) = (profile.name, start, profile.size) }
                next.instances.append(instance)
                if var found = place(rest.dropFirst(), next) {
                    found[index] = instance
                    return found
                }
            }
            return nil
        }
        return place(order[...], empty).map { found in names.indices.compactMap { found[$0] } }
    }

    private func hasLeft(_ profile: MigProfile) -> Bool {
        instances.count { $0.name == profile.name } < profile.total
    }

    private func isFree(_ start: UInt32, _ size: UInt32) -> Bool {
        !instances.contains { $0.start < start + size && start < $0.start + $0.size }
    }

    private func possibilities(beside start: UInt32, _ size: UInt32) -> Int {
        var after = self
        after.instances.append(.with { ($0.start, $0.size) = (start, size) })
        return after.profiles.reduce(0) { sum, profile in
            sum + profile.starts.count { after.isFree($0, profile.size) }
        }
    }
}

/// "GPU  0 Profile ID 19 Placements: {0,1,2,3,4,5,6}:1"
private func migPlacement(_ line: Substring) -> (String, (starts: [UInt32], size: UInt32))? {
    let numbers = line.split { !$0.isNumber }.compactMap { UInt32($0) }
    guard line.contains("Profile ID"), numbers.count >= 4, let size = numbers.last, size > 0 else { return nil }
    return ("\(numbers[1])", (Array(numbers[2...].dropLast()), size))
}

/// Words after "MIG" of each row of nvidia-smi's tables: "|   0  MIG 1g.5gb       19     7/7 …".
func migRows(_ output: String, of gpu: String? = nil) -> [[String]] {
    output.split(separator: "\n").compactMap { line in
        let words = line.split { $0.isWhitespace || $0 == "|" }.map(String.init)
        guard words.count >= 4, words[1] == "MIG", UInt32(words[0]) != nil, UInt32(words[3]) != nil,
            gpu == nil || words[0] == gpu
        else { return nil }
        return Array(words.dropFirst(2))
    }
}

/// Distinct orders, at most 5040 (seven instances are all that a GPU has), the largest first ones first: those leave
/// the fewest holes.
func orderings(_ names: [String]) -> [[String]] {
    var result: [[String]] = []
    func extend(_ order: [String], _ rest: [String]) {
        if rest.isEmpty { return result.append(order) }
        for name in Set(rest).sorted(by: >) {
            var left = rest
            if let index = left.firstIndex(of: name) { left.remove(at: index) }
            extend(order + [name], left)
        }
    }
    extend([], Array(names.prefix(7)))
    return result
}
