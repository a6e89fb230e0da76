package import DiskImage
import Glibc
import HostKit
import MigrationModel

/// The volume a conversion writes, from unfinished to published. There is nothing to rename: while it is unfinished its
/// first chunk holds a mark instead of the disk's, and publishing replaces the mark.
struct VolumeTarget: Sendable {
    /// The size of the mark; whoever publishes writes these bytes last.
    private static let markSize = 4096
    private static let title = "FLOTILLA: UNFINISHED DISK IMAGE\n"

    let volume: any Volume
    /// The file that keeps the first chunk of a finished image.
    let headPath: String
    /// Ties the mark to one conversion: its binding's.
    let digest: [UInt8]

    /// Plain text, so that whoever looks at the volume knows what it is.
    private var mark: [UInt8] {
        let text = "\(Self.title)conversion \(hex(digest))\nAn interrupted run left it. Continue it, or overwrite it.\n"
        return Array(text.utf8) + [UInt8](repeating: 0, count: Self.markSize - text.utf8.count)
    }

    fileprivate static func isMarked(_ volume: any Volume) throws -> Bool {
        guard volume.size >= UInt64(markSize) else { return false }
        return try volume.read(at: 0, count: markSize).starts(with: title.utf8)
    }

    /// Whether this very conversion has begun here and isn't published.
    var isUnfinished: Bool {
        get throws {
            guard volume.size >= UInt64(Self.markSize) else { return false }
            return try volume.read(at: 0, count: Self.markSize) == mark
        }
    }

    /// Throws `failedPrecondition` for a volume that is too small.
    func requireRoom(_ capacity: UInt64) throws {
        guard volume.size >= max(capacity, UInt64(Self.markSize)) else {
            throw MigrationError(
                .failedPrecondition, "\(volume.name) has \(volume.size) bytes, the disk needs \(capacity)",
                hint: "choose a larger one; nothing was written to it")
        }
    }

    /// Throws `failedPrecondition` when it holds something that may be of use to somebody.
    func requireEmpty() throws {
        guard try !Self.isMarked(volume), let contents = try volume.contents() else { return }
        throw MigrationError(
            .failedPrecondition, "\(volume.name) holds \(contents)",
            hint: "make sure that nobody needs it and overwrite it with --force; nothing was written to it")
    }

    /// Both ends become zeros but for the mark: nothing recognises what was there before.
    func begin() throws {
        let end = UInt64(Chunk.size)
        let zeros = [0..<min(end, volume.size), max(end, volume.size - min(end, volume.size))..<max(end, volume.size)]
        for range in zeros where !range.isEmpty { try volume.zero(range) }
        try volume.flush()
        try volume.write(mark, at: 0)
        try volume.flush()
    }

    /// The first chunk, in whole blocks, at least as long as the mark.
    private func head() throws -> [UInt8] {
        let bytes = try Files.read(headPath)
        let whole = (bytes.count + volume.blockSize - 1) / volume.blockSize * volume.blockSize
        return bytes + [UInt8](repeating: 0, count: max(whole, Self.markSize) - bytes.count)
    }

    /// Whether the volume begins as the finished image does.
    func isPublished() throws -> Bool {
        let head = try head()
        return try volume.read(at: 0, count: head.count) == head
    }

    /// Replaces the mark by the first chunk, its first bytes last. Throws `failedPrecondition` when something else wrote
    /// to the volume meanwhile.
    func publish() throws {
        guard try isUnfinished else {
            throw MigrationError(
                .failedPrecondition, "\(volume.name) was changed by something else while it was converted",
                hint: "find out what writes to it, then start over")
        }
        let head = try head()
        if head.count > Self.markSize { try volume.write(head[Self.markSize...], at: UInt64(Self.markSize)) }
        try volume.flush()
        try volume.write(head.prefix(Self.markSize), at: 0)
        try volume.flush()
    }

    func withdraw() throws {
        try volume.write(mark, at: 0)
        try volume.flush()
    }
}

/// Whether an interrupted conversion left its mark on a volume.
package func isUnfinished(_ volume: any Volume) throws -> Bool { try VolumeTarget.isMarked(volume) }
