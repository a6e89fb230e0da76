import ArgumentParser
import Convert
import DiskImage
import Download
import FoundationEssentials
import Glibc
import HostKit
import MigrationModel

struct DiskCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "disk", abstract: "Converts and compares disk images on this host; no fleet needed.",
        subcommands: [DiskConvertCommand.self, DiskInfoCommand.self, DiskVerifyCommand.self])
}

/// A disk image named on the command line.
enum DiskArgument {
    case own(FileRegion, DiskFormat)
    case foreign(QEMUImage)
    case web(HTTPLocation, DiskFormat)
    /// Standard input: a streamOptimized VMDK.
    case input

    /// - Parameters:
    ///   - format: what the person says it is; nil tells it by its content, raw excepted.
    ///   - authorities: for a URL.
    init(_ text: String, format: DiskFormatArgument?, authorities: String? = nil) throws {
        if text == "-" || HTTPLocation.isOne(text) {
            switch format {
            case .foreign(let format)?:
                throw MigrationError(
                    .unimplemented, "\(format.rawValue) images are read from files only", hint: "download it first")
            case .own(.raw)? where text == "-":
                throw MigrationError(.unimplemented, "standard input takes streamOptimized VMDKs only")
            case .own(.vmdk)?, .own(.raw)?, nil:
                let kind: DiskFormat = if case .own(let own)? = format { own } else { .vmdk }
                self = text == "-" ? .input : .web(try HTTPLocation(text, authorities: authorities), kind)
            }
            return
        }
        let path = try absolute(text)
        switch format {
        case .own(let format)?: self = .own(FileRegion(path: path), format)
        case .foreign(let format)?: self = .foreign(QEMUImage(path: path, format: format))
        case nil:
            if let foreign = try QEMUImage.detect(path) {
                self = .foreign(foreign)
            } else {
                let region = FileRegion(path: path)
                self = .own(region, try DiskFormat.detect(region))
            }
        }
    }

    /// The disk, where this program reads it itself and more than once; nil otherwise.
    func open(_ stop: StopFlag) throws -> (any DiskSource)? {
        switch self {
        case .own(let region, let format): try format.open(region)
        case .web(let location, .raw): try HTTPDisk(location, stop: stop)
        case .foreign, .input, .web: nil
        }
    }
}

enum DiskFormatArgument: ExpressibleByArgument {
    case own(DiskFormat)
    case foreign(QEMUImage.Format)

    init?(argument: String) {
        if let format = DiskFormat(rawValue: argument) {
            self = .own(format)
        } else if let format = QEMUImage.Format(rawValue: argument) {
            self = .foreign(format)
        } else {
            return nil
        }
    }

    static var allValueStrings: [String] {
        DiskFormat.allCases.map(\.rawValue) + QEMUImage.Format.allCases.map(\.rawValue)
    }
}

/// "zstd", "zlib" or "zlib:9".
struct CompressionArgument: ExpressibleByArgument {
    let compression: Compression

    init?(argument: String) {
        let parts = argument.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        switch (parts.first, parts.count) {
        case ("zstd", 1): compression = .zstd
        case ("zlib", 1): compression = .zlib()
        case ("zlib", 2):
            guard let level = Int(parts[1]), (1...12).contains(level) else { return nil }
            compression = .zlib(level: level)
        default: return nil
        }
    }

    static var allValueStrings: [String] { ["zstd", "zlib", "zlib:9"] }
}

/// "1000000", "200K", "50M", "1G": binary units.
struct ByteCountArgument: ExpressibleByArgument {
    let bytes: UInt64

    init?(argument: String) {
        let shift: [Character: UInt64] = ["K": 10, "M": 20, "G": 30]
        let unit = argument.last.flatMap { shift[Character($0.uppercased())] }
        guard let number = UInt64(unit == nil ? argument[...] : argument.dropLast()), number > 0, number < 1 << 32
        else { return nil }
        bytes = number << (unit ?? 0)
    }
}

/// One line of JSON, keys sorted.
func jsonLine(_ value: some Encodable) throws -> String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return String(decoding: try encoder.encode(value), as: UTF8.self)
}

/// Runs blocking work on a thread of its own; a first SIGINT or SIGTERM stops it.
func interruptible<Value: Sendable>(
    _ name: String, _ body: @escaping @Sendable (StopFlag) throws -> Value
) async throws -> Value {
    let signals = Signals(SIGINT, SIGTERM)
    let stop = StopFlag()
    return try await withThrowingTaskGroup(of: Void.self) { group in
        group.addTask {
            await signals.first()
            if !Task.isCancelled { stop.set(MigrationError(.cancelled, "interrupted")) }
        }
        defer { group.cancelAll() }
        return try await blockingCancellable(name, stop: stop, body)
    }
}
