package import DiskImage
import Glibc
package import HostKit
import MigrationModel

/// Turns one source disk into a finished image, resuming what an interrupted run of the same conversion left behind.
///
/// Until it is complete, verified and on stable storage the image is `<name>.partial` in the work directory, next to
/// its log `<name>.checkpoint`; then it appears under its final name in one step that never replaces a file. The log
/// stays: it proves, should the process die right after publishing, that the published file is ours. Whoever owns the
/// work directory deletes it once the result is recorded elsewhere.
///
/// On a volume the image grows in its place, marked as unfinished; `<name>.partial` is then the image's first chunk, and
/// publishing copies that.
package struct DiskConversion: Sendable {
    /// The file that holds the disk, or, where it isn't one, whatever names it.
    package let source: FileRegion
    package let sourceFormat: DiskFormat
    package let targetFormat: TargetFormat
    /// Exists, on the file system of `finalPath`, and used by nothing else at the same time.
    package let workDirectory: String
    /// Names the partial image and its checkpoint: "disk0".
    package let name: String
    /// A volume's name where that is the target.
    package let finalPath: String
    package var options = Options()
    /// Whether the source is compared when its image was published already. Without it whoever owns the work directory
    /// must know that everything there is of this source.
    package var comparesPublished = false
    /// Whether a volume may be overwritten that seems to hold something.
    package var overwrites = false
    private let origin: Source
    /// What is written instead of a file.
    let volume: (any Volume)?

    /// Where a disk comes from.
    package enum Source: Sendable {
        case file(FileRegion, DiskFormat)
        case stream(Stream)
        /// One that this program finds at a name of its own kind, such as a URL. Opened once, on the thread that
        /// converts; reads end when the flag is set.
        case disk(name: String, open: @Sendable (StopFlag) throws -> any DiskSource)
    }

    package enum Target: Sendable {
        case file(TargetFormat, path: String)
        /// Raw. The work directory may be anywhere.
        case volume(any Volume)
    }

    /// A streamOptimized VMDK that comes once, front to back: a pipe, a download.
    package struct Stream: Sendable {
        /// For messages.
        package let name: String
        /// Called once, on the thread that converts; reads end when the flag is set.
        package let open: @Sendable (StopFlag) throws -> sending any ByteSource

        package init(name: String, open: @escaping @Sendable (StopFlag) throws -> sending any ByteSource) {
            self.name = name
            self.open = open
        }
    }

    package struct Options: Sendable {
        /// Digests the source stream must have, lower or upper case hex, as an OVF manifest lists them. The stream is
        /// the source's files one after the other; for a VMDK with extents beside it the descriptor comes first.
        package var expectedDigests: [Digest.Algorithm: String] = [:]
        /// Converting threads; nil means twice the machine's processors and 2, since some always wait for their
        /// writes, but no more than 16: each takes up to 13 MiB. One more reads or hashes the source.
        package var threads: Int?
        /// `none` leaves out the digests of source and content that nobody expects.
        package var checksum = Checksum.sha256
        /// Compresses the clusters of a qcow2 image.
        package var compression: Compression?
        /// Of a qcow2 image.
        package var geometry = QCOW2.Geometry.standard
        /// Shared by the conversions that together must not read faster.
        package var rateLimit: RateLimit?
        /// From one checkpoint to the next, at least: to sync a disk stalls all writes to it, so the pause is also 20
        /// times what the last one took.
        package var checkpointSeconds: Double = 2
        /// A checkpoint is due when this many image bytes were written since the last; nil means 256 MiB where writes
        /// go through the page cache, which is emptied then, and no bound where they bypass it.
        package var checkpointBytes: UInt64?

        package init() {}

        var threadCount: Int { max(2, threads ?? min(16, 2 * max(1, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN)))) + 2)) }
    }

    package enum Checksum: String, Sendable, CaseIterable {
        case sha256, none
    }

    package struct Progress: Sendable, Equatable {
        /// Guest bytes dealt with, holes included; reaches `capacity`.
        package var doneBytes: UInt64
        /// Guest bytes of the disk.
        package var capacity: UInt64
        /// Guest bytes dealt with that were read, i.e. weren't known to be holes.
        package var dataBytes: UInt64
        /// Bytes written to the image by this run.
        package var writtenBytes: UInt64
        /// Guest bytes taken over from an interrupted run.
        package var resumedBytes: UInt64
        /// Of tables or zeros that are written when all data is; both 0 before that, and where it takes no time.
        package var finishedBytes: UInt64 = 0
        package var finishBytes: UInt64 = 0
    }

    package struct Result: Sendable, Equatable {
        package var path: String
        package var format: TargetFormat
        /// Guest bytes.
        package var capacity: UInt64
        /// What the image occupies on disk; a volume's size.
        package var allocatedBytes: UInt64
        /// Length of the source stream.
        package var sourceBytes: UInt64
        /// SHA-256 of the source stream, hex. nil when nobody asked for it and reading it whole would have cost far
        /// more than the disk's data: a source file with more holes than data.
        package var sourceSHA256: String?
        /// `ContentDigest` of what the guest sees, hex; nil where digests weren't wanted.
        package var contentDigest: String?
        /// Whether the image bypassed the page cache; nil when it was finished by an earlier run.
        package var directWrites: Bool?
        package var notice: Notice
    }

    package enum Notice: String, Sendable {
        /// Converted from the beginning.
        case fresh
        /// Continued an interrupted run.
        case resumed
        /// The source changed since an interrupted run, or a part of what that left is missing or unreadable: it was
        /// thrown away.
        case restarted
        /// An earlier run had already published the image.
        case alreadyPublished
    }

    /// What an interrupted run left of a stream is thrown away: nothing proves that it came from the same bytes.
    package init(
        _ source: Source, to target: Target, workDirectory: String, name: String, options: Options = Options()
    ) {
        origin = source
        (self.source, sourceFormat) =
            switch source {
            case .file(let region, let format): (region, format)
            case .stream(let stream): (FileRegion(path: stream.name), .vmdk)
            case .disk(let name, _): (FileRegion(path: name), .raw)
            }
        (targetFormat, finalPath, volume) =
            switch target {
            case .file(let format, let path): (format, path, nil)
            case .volume(let volume): (.raw, volume.name, volume)
            }
        self.workDirectory = workDirectory
        self.name = name
        self.options = options
    }

    package init(
        source: FileRegion, sourceFormat: DiskFormat, targetFormat: TargetFormat, workDirectory: String, name: String,
        finalPath: String, options: Options = Options()
    ) {
        self.init(
            .file(source, sourceFormat), to: .file(targetFormat, path: finalPath), workDirectory: workDirectory,
            name: name, options: options)
    }

    package init(
        stream: Stream, targetFormat: TargetFormat, workDirectory: String, name: String, finalPath: String,
        options: Options = Options()
    ) {
        self.init(
            .stream(stream), to: .file(targetFormat, path: finalPath), workDirectory: workDirectory, name: name,
            options: options)
    }

    /// Whether the result is a file, not a volume.
    package var isFile: Bool { volume == nil }

    package var partialPath: String { "\(workDirectory)/\(name).partial" }
    package var checkpointPath: String { "\(workDirectory)/\(name).checkpoint" }

    /// Converts and publishes.
    package func run(
        stop: StopFlag = StopFlag(), progress: (Progress) -> Void = { _ in }
    ) throws -> Result {
        let (notice, directWrites) = try makeImage(stop, progress)
        var result = try publish(notice)
        result.directWrites = directWrites
        return result
    }

    /// Brings the image to completion under its temporary name, on stable storage and verified. Blocks the calling
    /// thread, which should be one of its own; `progress` is called on it, once at the start, at most five times a second, and
    /// once at the end.
    ///
    /// Throws `dataLoss` for a damaged source or one whose digest differs, `alreadyExists` when something else has the
    /// final name, `failedPrecondition` when the source changes meanwhile, `resourceExhausted` when space runs out, and
    /// the flag's reason when it is set. After an error the work directory holds what a next run needs to continue.
    package func convert(
        stop: StopFlag = StopFlag(), progress: (Progress) -> Void = { _ in }
    ) throws -> Notice {
        try makeImage(stop, progress).notice
    }

    private func makeImage(
        _ stop: StopFlag, _ progress: (Progress) -> Void
    ) throws -> (notice: Notice, directWrites: Bool?) {
        guard !name.isEmpty, !name.contains("/"), name != ".", name != ".." else {
            throw MigrationError(.invalidArgument, "conversion name \"\(name)\" is not a file name")
        }
        let log = try CheckpointLog(checkpointPath)
        defer { log.unlock() }
        if try isPublished(log) {
            _ = try published(log)
            if comparesPublished {
                let disk = try openDisk(stop)
                guard try log.read(stop: stop)?.binding == makeBinding(disk?.identity, disk?.capacity ?? 0) else {
                    throw another
                }
            }
            return (.alreadyPublished, nil)
        }
        let disk = try openDisk(stop)
        let (feed, capacity) = try feed(disk, stop)
        let binding = makeBinding(disk?.identity, capacity)
        let notice = try prepare(log, binding, stop)
        let writer = try makeWriter(capacity)
        Failpoint.convertImageCreated.hit()

        let conversion = try ConversionRun(
            disk, feed, writer, log, options: options, stop: stop)
        let outcome = try conversion.run(progress)

        try disk?.requireUnchanged()
        let sourceBytes = disk.map { $0.files.isEmpty ? $0.capacity : outcome.source.bytes } ?? outcome.source.bytes
        let finished = CheckpointLog.Finished(
            image: try writer.identity, sourceBytes: sourceBytes,
            sourceSHA256: outcome.source.sha256, contentDigest: outcome.contentDigest)
        try log.append(finished)
        return (notice, writer.isDirect)
    }

    /// nil for a stream.
    private func openDisk(_ stop: StopFlag) throws -> (any DiskSource)? {
        switch origin {
        case .file: try sourceFormat.open(source)
        case .disk(_, let open): try open(stop)
        case .stream: nil
        }
    }

    /// - Parameter identity: nil for a stream.
    private func makeBinding(_ identity: [String]?, _ capacity: UInt64) -> CheckpointLog.Binding {
        CheckpointLog.Binding(
            region: source, format: sourceFormat, capacity: capacity, identity: identity, target: targetFormat,
            volume: volume, options: options)
    }

    private func makeWriter(_ capacity: UInt64) throws -> any DiskWriter {
        if let volume { return Raw.VolumeWriter(volume, capacity: capacity, headPath: partialPath) }
        return try targetFormat.writer(
            partialPath, capacity: capacity, compression: options.compression, geometry: options.geometry)
    }

    /// One that goes front to back where the disk is laid out so, and has just one file.
    ///
    /// - Parameter disk: nil for a stream.
    private func feed(_ disk: (any DiskSource)?, _ stop: StopFlag) throws -> (any ChunkFeed, capacity: UInt64) {
        let blocks = options.threadCount + 2
        guard let disk else {
            guard case .stream(let stream) = origin,
                let forward = try ForwardFeed(
                    try stream.open(stop), disk: nil, options: options, blocks: blocks, stop: stop)
            else { throw MigrationError(.internal, "\(source.path): neither a disk nor a stream") }
            return (forward, forward.capacity)
        }
        if disk.files.count == 1,
            let forward = try ForwardFeed(
                try FileSource(disk.files[0]), disk: disk, options: options, blocks: blocks, stop: stop)
        {
            return (forward, disk.capacity)
        }
        if disk.files.isEmpty, !options.expectedDigests.isEmpty {
            throw MigrationError(
                .unimplemented, "\(source.path): a disk that is read in ranges can't be checked against a digest",
                hint: "download it and convert the file")
        }
        let hasher = SourceHasher(
            files: disk.files, name: source.path, expected: options.expectedDigests,
            isWanted: options.checksum == .sha256 && !disk.files.isEmpty)
        return (try ChunkQueue(disk, hasher), disk.capacity)
    }

    /// Decides whether an interrupted run can be continued, and clears the ground if not.
    private func prepare(
        _ log: CheckpointLog, _ binding: CheckpointLog.Binding, _ stop: StopFlag
    ) throws -> Notice {
        let contents = try log.read(stop: stop)
        let place = volume.map { self.place($0, binding) }
        try place?.requireRoom(binding.capacity)
        if let contents, contents.binding == binding, try place?.isUnfinished ?? Files.exists(partialPath) {
            try log.cutTornTail()
            return .resumed
        }
        // A header alone promises nothing: the run died before it created its image.
        let promised = contents.map { $0.binding != binding || $0.hasChunks } ?? log.isUnreadable
        let leftOvers = promised || Files.exists(partialPath)
        if !overwrites { try place?.requireEmpty() }
        try Files.remove(partialPath)
        try log.start(binding)
        try place?.begin()
        return leftOvers ? .restarted : .fresh
    }
}
