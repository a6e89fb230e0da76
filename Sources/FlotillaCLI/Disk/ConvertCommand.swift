import ArgumentParser
import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel

struct DiskConvertCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert", abstract: "Converts one disk image to qcow2 or raw.",
        discussion: """
            SRC is a VMDK of any kind, given by its descriptor if it has one, a raw disk (with -f raw), or anything
            qemu-img reads; - reads a streamOptimized VMDK from standard input. It is only read.

            DST appears when it is complete and on stable storage, and never replaces a file. Until then the work is in
            DST.flotilla; after an interruption the same command with --resume continues there.
            """)

    @Argument(help: ArgumentHelp("The image to convert, or -.", valueName: "src"), completion: .file())
    var source: String

    @Argument(help: ArgumentHelp("The image to make.", valueName: "dst"), completion: .file())
    var target: String

    @Option(name: .shortAndLong, help: ArgumentHelp("SRC's format (default: by content).", valueName: "format"))
    var from: DiskFormatArgument?

    @Option(name: [.customShort("O"), .long], help: "DST's format: qcow2 or raw.")
    var output: DiskImageFormat = .qcow2

    @Option(help: "Compress the clusters of a qcow2 image: zstd or zlib[:level].")
    var compress: CompressionArgument?

    @Option(help: ArgumentHelp("Converting threads (default: twice the processors and 2, at most 16).", valueName: "n"))
    var jobs: Int?

    @Option(help: ArgumentHelp("Read no faster than this many bytes per second; K, M, G.", valueName: "bytes"))
    var rate: ByteCountArgument?

    @Option(help: "Digests of source and content: sha256 or none.")
    var checksum: DiskConversion.Checksum = .sha256

    @Flag(help: "Continue an interrupted run.")
    var resume = false

    @Flag(help: "Print progress and result as JSON, one object per line.")
    var json = false

    func validate() throws {
        if compress != nil && output == .raw { throw ValidationError("--compress goes with -O qcow2") }
        if let jobs, !(1...64).contains(jobs) { throw ValidationError("--jobs takes 1 to 64") }
        if source == "-" && resume { throw ValidationError("standard input can't be resumed") }
    }

    private struct Report: Encodable {
        var path: String
        var format: String
        var capacityBytes: UInt64?
        var allocatedBytes: UInt64
        var sourceBytes: UInt64?
        var sourceSHA256: String?
        var contentSHA256: String?
        var directWrites: Bool?
        var notice: String?
    }

    func run() async throws {
        let target = try absolute(target)
        let work = "\(target).flotilla"
        if Files.exists(target) && !(resume && Files.exists(work)) {
            throw MigrationError(.alreadyExists, "\(target) exists", hint: "move it away or choose another name")
        }
        if Files.exists(work) && !resume {
            throw MigrationError(
                .failedPrecondition, "\(work) holds what an interrupted run left",
                hint: "continue it with --resume, or delete that folder")
        }
        let view = DiskProgressView(title: Files.name(of: target), output: OutputStyle(json: json))
        let report = try await interruptible("convert") { stop in
            try Files.createDirectories(work)
            do {
                let report = try convert(to: target, work, view, stop)
                try Files.remove(work)
                return report
            } catch let error as MigrationError where !error.keepsCheckpoint {
                try? Files.remove(work)
                throw error
            }
        }
        view.finish()
        if json { return Console.line(try jsonLine(report)) }
        Console.line("\(report.path): \(report.format), \(byteText(report.allocatedBytes)) on disk")
        if let digest = report.sourceSHA256 { Console.line("  source sha256   \(digest)") }
        if let digest = report.contentSHA256 { Console.line("  content sha256  \(digest)") }
        if report.directWrites == false {
            Console.line("  written through the page cache: the file system takes no direct writes")
        }
        if let notice = report.notice { Console.line("  \(notice)") }
    }

    private func convert(
        to target: String, _ work: String, _ view: DiskProgressView, _ stop: StopFlag
    ) throws -> Report {
        var options = DiskConversion.Options()
        options.threads = jobs
        options.compression = compress?.compression
        options.checksum = checksum
        options.rateLimit = rate.map { RateLimit(bytesPerSecond: $0.bytes) }
        let format: TargetFormat = output == .raw ? .raw : .qcow2
        let conversion: DiskConversion
        if source == "-" {
            conversion = DiskConversion(
                stream: DiskConversion.Stream(name: "standard input") {
                    DescriptorSource(STDIN_FILENO, name: "standard input", stop: $0)
                }, targetFormat: format, workDirectory: work, name: "disk", finalPath: target, options: options)
        } else {
            switch try DiskArgument(source, format: from) {
            case .own(let region, let sourceFormat):
                conversion = DiskConversion(
                    source: region, sourceFormat: sourceFormat, targetFormat: format, workDirectory: work,
                    name: "disk", finalPath: target, options: options)
            case .foreign(let image):
                let partial = "\(work)/disk.partial"
                try Files.remove(partial)
                try image.convert(
                    to: partial, format, options: options, bytesPerSecond: rate?.bytes, stop: stop
                ) { view.show(done: UInt64($0 * 10_000), total: 10_000, written: 0) }
                try Files.publish(partial, as: target)
                return Report(
                    path: target, format: format.rawValue, allocatedBytes: try allocatedBytes(target),
                    notice: "\(image.format.rawValue) was read by qemu-img")
            }
        }
        let result = try conversion.run(stop: stop) {
            view.show(done: $0.doneBytes, total: $0.capacity, written: $0.writtenBytes)
        }
        return Report(
            path: result.path, format: result.format.rawValue, capacityBytes: result.capacity,
            allocatedBytes: result.allocatedBytes, sourceBytes: result.sourceBytes,
            sourceSHA256: result.sourceSHA256, contentSHA256: result.contentDigest,
            directWrites: result.directWrites, notice: text(of: result.notice))
    }

    private func text(of notice: DiskConversion.Notice) -> String? {
        switch notice {
        case .fresh: nil
        case .resumed: "continued from its checkpoint"
        case .restarted: "started over: its source changed since the interrupted run"
        case .alreadyPublished: "was finished by an earlier run"
        }
    }

    private func allocatedBytes(_ path: String) throws -> UInt64 {
        UInt64(try File(path, O_RDONLY).status().st_blocks) * 512
    }
}

extension DiskConversion.Checksum: ExpressibleByArgument {}
