import ArgumentParser
import Convert
import DiskImage
import Download
import HostKit
import MigrationModel
import Volumes

struct DiskInfoCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info", abstract: "Says what a disk image is and what it consists of.",
        discussion: "Of a block device or an NBD export: what it holds, as `flotilla disk convert` sees its targets.")

    @Argument(
        help: ArgumentHelp("The image or its URL; a block device or NBD export.", valueName: "file"),
        completion: .file())
    var file: String

    @Option(name: .shortAndLong, help: ArgumentHelp("Its format (default: by content).", valueName: "format"))
    var from: DiskFormatArgument?

    @Option(
        help: ArgumentHelp("Trust these authorities of an https URL, a PEM file, not the system's.", valueName: "file"),
        completion: .file())
    var cacert: String?

    @Flag(help: "Print JSON.")
    var json = false

    private struct Report: Encodable {
        struct Part: Encodable {
            var path: String
            var bytes: UInt64
            var allocatedBytes: UInt64
        }
        var format: String
        var capacityBytes: UInt64
        var files: [Part] = []
        /// Of a volume.
        var holds: String?
        var usedBy: String?
    }

    func run() async throws {
        if DiskPlace.isVolume(file) { return try await describeVolume() }
        let argument = try DiskArgument(file, format: from, authorities: cacert)
        if case .foreign(let image) = argument {
            return Console.line(try await interruptible("info") { try image.info(stop: $0) })
        }
        let report = try await interruptible("info") { try Self.report(argument, $0) }
        try show(report)
    }

    private func describeVolume() async throws {
        let report = try await interruptible("info") { stop in
            let volume: any Volume
            var report = Report(format: "block device", capacityBytes: 0)
            if NBDExport.isOne(file) {
                volume = try NBDExport(file, stop: stop)
                report.format = "NBD export"
            } else {
                let device = try BlockDevice(reading: file)
                report.usedBy = device.use
                volume = device
            }
            report.capacityBytes = volume.size
            report.holds =
                try isUnfinished(volume) ? "an unfinished image of an interrupted conversion" : volume.contents()
            return report
        }
        try show(report)
    }

    private func show(_ report: Report) throws {
        if json { return Console.line(try jsonLine(report)) }
        Console.line("\(report.format), \(byteText(report.capacityBytes)) (\(report.capacityBytes) bytes)")
        for part in report.files {
            Console.line("  \(part.path)  \(byteText(part.bytes)), \(byteText(part.allocatedBytes)) on disk")
        }
        if DiskPlace.isVolume(file) { Console.line("  holds \(report.holds ?? "nothing that is known")") }
        if let user = report.usedBy { Console.line("  in use: \(user)") }
    }

    private static func report(_ argument: DiskArgument, _ stop: StopFlag) throws -> Report {
        if case .web(let location, .vmdk) = argument {
            // The headers in front tell all there is to know.
            let stream = try VMDK.ForwardReader(try HTTPSource(location, stop: stop))
            return Report(format: "VMDK streamOptimized", capacityBytes: stream.capacity)
        }
        guard let disk = try argument.open(stop) else {
            throw MigrationError(.invalidArgument, "nothing is known of a stream before it was read")
        }
        return Report(
            format: disk.formatName, capacityBytes: disk.capacity,
            files: disk.files.map { Report.Part(path: $0.path, bytes: $0.length, allocatedBytes: $0.allocatedBytes) })
    }
}
