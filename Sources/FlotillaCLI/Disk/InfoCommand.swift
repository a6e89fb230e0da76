import ArgumentParser
import Convert
import DiskImage
import MigrationModel

struct DiskInfoCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info", abstract: "Says what a disk image is and what it consists of.")

    @Argument(help: ArgumentHelp("The image.", valueName: "file"), completion: .file())
    var file: String

    @Option(name: .shortAndLong, help: ArgumentHelp("Its format (default: by content).", valueName: "format"))
    var from: DiskFormatArgument?

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
        var files: [Part]
    }

    func run() async throws {
        switch try DiskArgument(file, format: from) {
        case .foreign(let image): Console.line(try await interruptible("info") { try image.info(stop: $0) })
        case .own(let region, let format):
            let disk = try format.open(region)
            let report = Report(
                format: disk.formatName, capacityBytes: disk.capacity,
                files: disk.files.map {
                    Report.Part(path: $0.path, bytes: $0.length, allocatedBytes: $0.allocatedBytes)
                })
            if json { return Console.line(try jsonLine(report)) }
            Console.line("\(report.format), \(byteText(report.capacityBytes)) (\(report.capacityBytes) bytes)")
            for part in report.files {
                Console.line("  \(part.path)  \(byteText(part.bytes)), \(byteText(part.allocatedBytes)) on disk")
            }
        }
    }
}
