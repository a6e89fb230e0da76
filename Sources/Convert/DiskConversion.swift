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
package struct DiskConversion: Sendable {
    package let source: FileRegion
    package let sourceFormat: DiskFormat
    package let targetFormat: TargetFormat
    /// Exists, on the file system of `finalPath`, and used by nothing else at the same time.
    package let workDirectory: String
    /// Names the partial image and its checkpoint: "disk0".
    package let name: String
    package let finalPath: String
    package var options = Options()
    /// Where the disk's bytes come from instead of the file `source`, which then only names them.
    package private(set) var stream: Stream?

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
        /// Shared by the conversions that together must not read faster.
        package var rateLimit: RateLimit?
        /// A checkpoint is due when this many image bytes were written since the last, and at the latest every
        /// `checkpointSeconds`.
        package var checkpointBytes: UInt64 = 256 << 20
        package var checkpointSeconds: Double = 2

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
    }

    package struct Result: Sendable, Equatable {
        package var path: String
        package var format: TargetFormat
        /// Guest bytes.
        package var capacity: UInt64
        /// What the image occupies on disk.
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

    package init(
        source: FileRegion, sourceFormat: DiskFormat, targetFormat: TargetFormat, workDirectory: String, name: String,
        finalPath: String, options: Options = Options()
    ) {
        self.source = source
        self.sourceFormat = sourceFormat
        self.targetFormat = targetFormat
        self.workDirectory = workDirectory
        self.name = name
        self.finalPath = finalPath
        self.options = options
    }

    /// Converts a stream. What an interrupted run left is thrown away: nothing proves that it came from the same bytes.
    package init(
        stream: Stream, targetFormat: TargetFormat, workDirectory: String, name: String, finalPath: String,
        options: Options = Options()
    ) {
        self.init(
            source: FileRegion(path: stream.name), sourceFormat: .vmdk, targetFormat: targetFormat,
            workDirectory: workDirectory, name: name, finalPath: finalPath, options: options)
        self.stream = stream
    }

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
        if Files.exists(finalPath) {
            _ = try published(log)
            return (.alreadyPublished, nil)
        }
        let disk = stream == nil ? try sourceFormat.open(source) : nil
        let (feed, capacity) = try feed(disk, stop)
        let binding = CheckpointLog.Binding(
            region: source, format: sourceFormat, capacity: capacity, files: disk?.files, target: targetFormat,
            options: options)
        let notice = try prepare(log, binding)
        let writer = try targetFormat.writer(partialPath, capacity: capacity, compression: options.compression)
        Failpoint.convertImageCreated.hit()

        let conversion = try ConversionRun(
            disk, feed, writer, log, options: options, stop: stop)
        let outcome = try conversion.run(progress)

        try requireUnchanged(disk?.files ?? [])
        let finished = CheckpointLog.Finished(
            image: FileIdentity(try writer.image.file.status()), sourceBytes: outcome.source.bytes,
            sourceSHA256: outcome.source.sha256, contentDigest: outcome.contentDigest)
        try log.append(finished)
        return (notice, writer.image.isDirect)
    }

    /// One that goes front to back where the disk is laid out so, and has just one file.
    ///
    /// - Parameter disk: nil for a stream.
    private func feed(_ disk: (any DiskSource)?, _ stop: StopFlag) throws -> (any ChunkFeed, capacity: UInt64) {
        let blocks = options.threadCount + 2
        guard let disk else {
            guard let stream,
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
        let hasher = SourceHasher(
            files: disk.files, name: source.path, expected: options.expectedDigests,
            isWanted: options.checksum == .sha256)
        return (try ChunkQueue(disk, hasher), disk.capacity)
    }

    /// Gives the completed image its final name. One that has it already is fine.
    ///
    /// - Parameter notice: what `convert` returned.
    package func publish(_ notice: Notice) throws -> Result {
        let log = try CheckpointLog(checkpointPath)
        defer { log.unlock() }
        if Files.exists(finalPath) {
            let (finished, capacity) = try published(log)
            return try result(finished, capacity: capacity, notice: .alreadyPublished)
        }
        guard let contents = try log.read(), let finished = contents.finished,
            finished.isImage(try FileIdentity(path: partialPath))
        else {
            throw MigrationError(.internal, "\(partialPath) is not complete: it can't become \(finalPath)")
        }
        do {
            try Files.publish(partialPath, as: finalPath)
        } catch let error as MigrationError where error.code == .alreadyExists {
            throw taken
        }
        Failpoint.convertDiskPublished.hit()
        return try result(finished, capacity: contents.binding.capacity, notice: notice)
    }

    /// Takes a published image back under its temporary name, for when the work it belongs to fails as a whole. Does
    /// nothing unless the final name holds this conversion's own result.
    package func withdraw() throws {
        let log = try CheckpointLog(checkpointPath)
        defer { log.unlock() }
        guard Files.exists(finalPath), let finished = try log.read()?.finished,
            finished.isImage(try FileIdentity(path: finalPath))
        else { return }
        try Files.publish(finalPath, as: partialPath)
    }

    private var taken: MigrationError {
        MigrationError(
            .alreadyExists, "\(finalPath) exists and isn't this conversion's result",
            hint: "move it away or choose another target; it was not touched")
    }

    /// The final name is taken: fine if by this very conversion.
    private func published(_ log: CheckpointLog) throws -> (CheckpointLog.Finished, capacity: UInt64) {
        guard let contents = try log.read(), contents.binding.target == targetFormat,
            let finished = contents.finished, finished.isImage(try FileIdentity(path: finalPath))
        else { throw taken }
        try Files.synchronizeDirectory(of: finalPath)
        return (finished, contents.binding.capacity)
    }

    /// Decides whether an interrupted run can be continued, and clears the ground if not.
    private func prepare(
        _ log: CheckpointLog, _ binding: CheckpointLog.Binding
    ) throws -> Notice {
        let contents = try log.read()
        if let contents, contents.binding == binding, Files.exists(partialPath) {
            try log.cutTornTail()
            return .resumed
        }
        // A header alone promises nothing: the run died before it created its image.
        let promised = contents.map { $0.binding != binding || $0.hasChunks } ?? log.isUnreadable
        let leftOvers = promised || Files.exists(partialPath)
        try Files.remove(partialPath)
        try log.start(binding)
        return leftOvers ? .restarted : .fresh
    }

    private func requireUnchanged(_ files: [SourceFile]) throws {
        for file in files where try FileIdentity(path: file.path) != file.identity {
            throw MigrationError(
                .failedPrecondition, "\(file.path) changed while it was converted",
                hint: "make sure that nothing writes to it, e.g. power the VM off, and run the same command again")
        }
    }

    private func result(
        _ finished: CheckpointLog.Finished, capacity: UInt64, notice: Notice
    ) throws -> Result {
        let image = try File(finalPath, O_RDONLY).status()
        return Result(
            path: finalPath, format: targetFormat, capacity: capacity,
            allocatedBytes: UInt64(image.st_blocks) * 512, sourceBytes: finished.sourceBytes,
            sourceSHA256: finished.sourceSHA256.map { hex($0) }, contentDigest: finished.contentDigest.map { hex($0) },
            notice: notice)
    }
}
