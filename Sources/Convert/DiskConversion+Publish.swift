import DiskImage
import Glibc
import HostKit
import MigrationModel

/// From a complete image to a published one, and back.
extension DiskConversion {
    /// Gives the completed image its final name. One that has it already is fine.
    ///
    /// - Parameter notice: what `convert` returned.
    package func publish(_ notice: Notice) throws -> Result {
        let log = try CheckpointLog(checkpointPath)
        defer { log.unlock() }
        if try isPublished(log) {
            let (finished, capacity) = try published(log)
            return try result(finished, capacity: capacity, notice: .alreadyPublished)
        }
        guard let contents = try log.read(), let finished = contents.finished,
            finished.isImage(try FileIdentity(path: partialPath))
        else {
            throw MigrationError(.internal, "\(partialPath) is not complete: it can't become \(finalPath)")
        }
        do {
            if let volume {
                try place(volume, contents.binding).publish()
            } else {
                try Files.publish(partialPath, as: finalPath)
            }
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
        guard try isPublished(log), let contents = try log.read(), let finished = contents.finished,
            finished.isImage(try FileIdentity(path: evidencePath))
        else { return }
        if let volume {
            try place(volume, contents.binding).withdraw()
        } else {
            try Files.publish(finalPath, as: partialPath)
        }
    }

    /// Removes the images that conversions of this folder published in `folder`, for when nobody wants them any more. What
    /// was written to after it was complete is somebody's, and stays.
    package static func removePublished(workDirectory: String, from folder: String) throws {
        let suffix = ".checkpoint"
        for name in try Files.list(workDirectory) where name.hasSuffix(suffix) {
            let path = "\(workDirectory)/\(name)"
            let log = try CheckpointLog(path)
            defer { log.unlock() }
            guard let finished = try log.read()?.finished else { continue }
            let completed = try FileIdentity(path: path).modifiedNanoseconds
            let images = try Files.list(folder).filter { $0.contains("-\(name.dropLast(suffix.count)).") }
            for image in images.map({ "\(folder)/\($0)" }) where Files.isRegular(image) {
                let identity = try FileIdentity(path: image)
                guard finished.isImage(identity), identity.modifiedNanoseconds <= completed else { continue }
                try Files.remove(image)
                try Files.synchronizeDirectory(of: image)
            }
        }
    }

    /// The file that proves what was published: the image, or what a volume begins with.
    private var evidencePath: String { volume == nil ? finalPath : partialPath }

    func place(_ volume: any Volume, _ binding: CheckpointLog.Binding) -> VolumeTarget {
        VolumeTarget(volume: volume, headPath: partialPath, digest: binding.digest)
    }

    /// Whether the final name is taken, whoever took it; whether a volume holds what this conversion finished.
    func isPublished(_ log: CheckpointLog) throws -> Bool {
        guard let volume else { return Files.exists(finalPath) }
        guard let contents = try log.read(), contents.finished != nil, Files.exists(partialPath) else { return false }
        return try place(volume, contents.binding).isPublished()
    }

    private var taken: MigrationError {
        MigrationError(
            .alreadyExists, "\(finalPath) exists and isn't this conversion's result",
            hint: "move it away or choose another target; it was not touched")
    }

    var another: MigrationError {
        MigrationError(
            .alreadyExists,
            "\(finalPath) exists, and nothing proves that it was made from \(source.path) as that is now with these options",
            hint: "move it away or choose another target; it was not touched")
    }

    /// The final name is taken: fine if by this very conversion.
    func published(_ log: CheckpointLog) throws -> (CheckpointLog.Finished, capacity: UInt64) {
        guard let contents = try log.read(), contents.binding.target == targetFormat,
            let finished = contents.finished, finished.isImage(try FileIdentity(path: evidencePath))
        else { throw taken }
        if volume == nil { try Files.synchronizeDirectory(of: finalPath) }
        return (finished, contents.binding.capacity)
    }

    private func result(
        _ finished: CheckpointLog.Finished, capacity: UInt64, notice: Notice
    ) throws -> Result {
        let allocated = try volume?.size ?? UInt64(File(finalPath, O_RDONLY).status().st_blocks) * 512
        return Result(
            path: finalPath, format: targetFormat, capacity: capacity,
            allocatedBytes: allocated, sourceBytes: finished.sourceBytes,
            sourceSHA256: finished.sourceSHA256.map { hex($0) }, contentDigest: finished.contentDigest.map { hex($0) },
            notice: notice)
    }
}
