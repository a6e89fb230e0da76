import ArgumentParser
import Convert
import DiskImage
import Download
import Glibc
import HostKit
import MigrationModel

struct DiskConvertCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert", abstract: "Converts one disk image to qcow2 or raw.",
        discussion: """
            SRC is a VMDK of any kind, given by its descriptor if it has one, a raw disk (with -f raw), or anything \
            qemu-img reads; - reads a streamOptimized VMDK from standard input. It is only read.

            SRC may be a URL, http or https: a streamOptimized VMDK is converted while it downloads and nothing is \
            kept of it; a raw disk (with -f raw) is read in ranges by all threads. Names and passwords come from \
            ~/.netrc.

            DST appears when it is complete and on stable storage, and never replaces a file. Until then the work is \
            in DST.flotilla; after an interruption the same command with --resume continues there.

            DST may be a block device or an NBD export (nbd://HOST/EXPORT, nbds://, nbd+unix:///EXPORT?socket=PATH), \
            which then holds the raw disk and zeros behind it. A device in use is refused, and so is anything with a \
            file system, partition table, RAID, LVM or LUKS signature, unless --force is given. The first 4 MiB are \
            written last: until then a text there says that the image is unfinished. What --resume needs is kept in \
            the state folder.
            """)

    @Argument(help: ArgumentHelp("The image to convert, its URL, or -.", valueName: "src"), completion: .file())
    var source: String

    @Argument(
        help: ArgumentHelp("The image to make, or a device or NBD export to write.", valueName: "dst"),
        completion: .file())
    var target: String

    @Option(name: .shortAndLong, help: ArgumentHelp("SRC's format (default: by content).", valueName: "format"))
    var from: DiskFormatArgument?

    @Option(
        name: [.customShort("O"), .long],
        help: "DST's format: qcow2 or raw (default: qcow2; raw on devices and exports).")
    var output: DiskImageFormat?

    @Option(help: "Compress the clusters of a qcow2 image: zstd or zlib[:level].")
    var compress: CompressionArgument?

    @Option(
        help: ArgumentHelp("Clusters of a qcow2 image: 512 to 2M, powers of two (default: 64K).", valueName: "bytes"))
    var clusterSize: ByteCountArgument?

    @Option(help: ArgumentHelp("Converting threads (default: twice the processors and 2, at most 16).", valueName: "n"))
    var jobs: Int?

    @Option(help: ArgumentHelp("Read no faster than this many bytes per second; K, M, G.", valueName: "bytes"))
    var rate: ByteCountArgument?

    @Option(help: "Digests of source and content: sha256 or none.")
    var checksum: DiskConversion.Checksum = .sha256

    @Flag(help: "Continue an interrupted run.")
    var resume = false

    @Option(
        help: ArgumentHelp("Trust these authorities of an https SRC, a PEM file, not the system's.", valueName: "file"),
        completion: .file())
    var cacert: String?

    @Flag(help: "Overwrite a device or export that holds something. One in use is refused all the same.")
    var force = false

    @Option(
        help: ArgumentHelp(
            """
            Folder that keeps what --resume needs when DST is no file (default: /var/lib/flotilla, or \
            ~/.local/state/flotilla).
            """,
            valueName: "dir"), completion: .directory)
    var state: String?

    @Flag(help: "Print progress and result as JSON, one object per line.")
    var json = false

    func validate() throws {
        if let clusterSize {
            guard (try? QCOW2.Geometry(clusterSize: clusterSize.bytes)) != nil else {
                throw ValidationError("--cluster-size takes powers of two from 512 to 2M")
            }
            if output == .raw || output == nil && DiskPlace.isVolume(target) {
                throw ValidationError("--cluster-size goes with -O qcow2")
            }
            if compress != nil && clusterSize.bytes != 64 << 10 {
                throw ValidationError("compressed clusters have 64K: --compress doesn't go with --cluster-size")
            }
        }
        if compress != nil && output == .raw { throw ValidationError("--compress goes with -O qcow2") }
        if compress != nil && output == nil && DiskPlace.isVolume(target) {
            throw ValidationError("--compress makes qcow2 images, a device or an export holds a raw one")
        }
        if let jobs, !(1...64).contains(jobs) { throw ValidationError("--jobs takes 1 to 64") }
        if isStream && resume { throw ValidationError("a stream can't be resumed: it is converted from its beginning") }
    }

    private struct Report: Encodable {
        var path: String
        var format: String
        var capacityBytes: UInt64?
        var allocatedBytes: UInt64?
        var sourceBytes: UInt64?
        var sourceSHA256: String?
        var contentSHA256: String?
        var directWrites: Bool?
        var notice: String?
    }

    func run() async throws {
        let place = try DiskPlace(target)
        let work = try place.workFolder(state: state)
        try refuseLeftovers(place, work)
        let view = DiskProgressView(title: Files.name(of: target), output: OutputStyle(json: json))
        let report = try await interruptible("convert") { stop in
            let target = try place.open(output, stop)
            try Files.createDirectories(work)
            do {
                let report = try convert(to: target, work, view, stop)
                try Files.remove(work)
                return report
            } catch var error as MigrationError {
                if isStream || !error.keepsCheckpoint {
                    try? Files.remove(work)
                } else if error.code == .cancelled {
                    error.hint = "continue with the same command and --resume; \(work) has what that needs"
                }
                throw error
            }
        }
        view.finish()
        if json { return Console.line(try jsonLine(report)) }
        let size = report.allocatedBytes.map { "\(byteText($0)) on disk" }
        Console.line("\(report.path): \(report.format), \(size ?? byteText(report.capacityBytes ?? 0))")
        if let digest = report.sourceSHA256 { Console.line("  source sha256   \(digest)") }
        if let digest = report.contentSHA256 { Console.line("  content sha256  \(digest)") }
        if report.directWrites == false {
            Console.line("  written through the page cache: it takes no direct writes")
        }
        if let notice = report.notice { Console.line("  \(notice)") }
    }

    /// Whether the source comes once, front to back.
    private var isStream: Bool {
        if case .own(.raw)? = from { return source == "-" }
        return source == "-" || HTTPLocation.isOne(source)
    }

    private func refuseLeftovers(_ place: DiskPlace, _ work: String) throws {
        // Without its log nothing proves that the file is an earlier run's; the log goes first when a run cleans up.
        if case .file(let path) = place, Files.exists(path), !(resume && Files.exists("\(work)/disk.checkpoint")) {
            if resume { try Files.removeDirectoryIfEmpty(work) }
            throw MigrationError(
                .alreadyExists, "\(path) exists",
                hint: resume
                    ? "if an earlier run finished it, 'flotilla disk verify' says so; else move it away"
                    : "move it away or choose another name")
        }
        if Files.exists(work) && !resume {
            throw MigrationError(
                .failedPrecondition, "\(work) holds what an interrupted run left",
                hint: isStream ? "delete that folder" : "continue it with --resume, or delete that folder")
        }
    }

    private func convert(
        to target: DiskConversion.Target, _ work: String, _ view: DiskProgressView, _ stop: StopFlag
    ) throws -> Report {
        var options = DiskConversion.Options()
        options.threads = jobs
        options.compression = compress?.compression
        options.geometry = try clusterSize.map { try QCOW2.Geometry(clusterSize: $0.bytes) } ?? .standard
        options.checksum = checksum
        options.rateLimit = rate.map { RateLimit(bytesPerSecond: $0.bytes) }
        let origin: DiskConversion.Source
        switch try DiskArgument(source, format: from, authorities: cacert) {
        case .input:
            origin = .stream(
                DiskConversion.Stream(name: "standard input") {
                    DescriptorSource(STDIN_FILENO, name: "standard input", stop: $0)
                })
        case .own(let region, let format): origin = .file(region, format)
        case .web(let location, .vmdk):
            origin = .stream(DiskConversion.Stream(name: location.name) { try HTTPSource(location, stop: $0) })
        case .web(let location, .raw):
            origin = .disk(name: location.name) { try HTTPDisk(location, stop: $0) }
        case .foreign(let image): return try convert(image, to: target, work, options, view, stop)
        }
        var conversion = DiskConversion(origin, to: target, workDirectory: work, name: "disk", options: options)
        conversion.overwrites = force
        conversion.comparesPublished = true
        let result = try conversion.run(stop: stop) { view.show($0) }
        return Report(
            path: result.path, format: result.format.rawValue, capacityBytes: result.capacity,
            allocatedBytes: conversion.isFile ? result.allocatedBytes : nil, sourceBytes: result.sourceBytes,
            sourceSHA256: result.sourceSHA256, contentSHA256: result.contentDigest,
            directWrites: result.directWrites, notice: text(of: result.notice))
    }

    private func convert(
        _ image: QEMUImage, to target: DiskConversion.Target, _ work: String, _ options: DiskConversion.Options,
        _ view: DiskProgressView, _ stop: StopFlag
    ) throws -> Report {
        guard case .file(let format, let path) = target else {
            throw MigrationError(
                .unimplemented, "\(image.path): \(image.format.rawValue) images are converted to files only",
                hint: "convert it to a raw file, and that (-f raw) to \(self.target)")
        }
        let partial = "\(work)/disk.partial"
        try Files.remove(partial)
        try image.convert(to: partial, format, options: options, bytesPerSecond: rate?.bytes, stop: stop) {
            view.show(done: UInt64($0 * 10_000), total: 10_000, written: 0)
        }
        try Files.publish(partial, as: path)
        let allocated = UInt64(try File(path, O_RDONLY).status().st_blocks) * 512
        return Report(
            path: path, format: format.rawValue, allocatedBytes: allocated,
            notice: "\(image.format.rawValue) was read by qemu-img")
    }

    private func text(of notice: DiskConversion.Notice) -> String? {
        switch notice {
        case .fresh: nil
        case .resumed: "continued from its checkpoint"
        case .restarted: "started over: its source changed since the interrupted run, or what that left did"
        case .alreadyPublished: "was finished by an earlier run"
        }
    }
}

extension DiskConversion.Checksum: ExpressibleByArgument {}
