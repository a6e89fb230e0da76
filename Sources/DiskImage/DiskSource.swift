package import Glibc
package import HostKit
import MigrationModel

/// A virtual disk that is read, never written. Immutable after opening, so every thread makes a reader of its own.
package protocol DiskSource: Sendable {
    /// Guest-visible bytes, a multiple of 512 and at most `Chunk.maximumCapacity`.
    var capacity: UInt64 { get }
    /// For people: "VMDK streamOptimized", "raw".
    var formatName: String { get }
    /// The files (or parts of files) that hold the disk, in stream order: the descriptor first, then its extents.
    /// Empty for a disk that is in no file of this host.
    var files: [SourceFile] { get }
    /// What tells this content of the disk from any other, a line per fact.
    var identity: [String] { get }
    /// Throws `failedPrecondition` when the content isn't what it was on opening.
    func requireUnchanged() throws
    func makeReader() throws -> sending any DiskReader
    /// A reader that goes through the disk's only file front to back, for formats laid out that way; nil for others.
    ///
    /// - Parameter stream: the bytes of that file's region.
    func makeForwardReader(_ stream: any ByteSource) throws -> VMDK.ForwardReader?
}

extension DiskSource {
    package var identity: [String] {
        files.flatMap {
            let id = $0.identity
            return [$0.path, "\($0.offset) \($0.length) \(id.inode) \(id.size) \(id.modifiedNanoseconds)"]
        }
    }

    package func requireUnchanged() throws {
        for file in files where try FileIdentity(path: file.path) != file.identity {
            throw MigrationError(
                .failedPrecondition, "\(file.path) changed while it was converted",
                hint: "make sure that nothing writes to it, e.g. power the VM off, and run the same command again")
        }
    }
}

/// One thread's access to a `DiskSource`: owns its descriptors, table caches and decompressor.
package protocol DiskReader: AnyObject {
    /// The first guest byte at or after `offset` that may differ from zero; nil when only zeros follow. Answered from
    /// the format's tables or the file system's extent map, without reading data.
    func nextData(from offset: UInt64) throws -> UInt64?

    /// Reads `buffer.count` guest bytes at `offset`; the range lies within the capacity.
    ///
    /// After `.zero` the buffer's content is unspecified: nothing was read, the guest sees zeros.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> ChunkContent
}

package enum ChunkContent: Sendable, Equatable {
    case zero
    case data
}

/// The unit of work, of checkpoints and of the content digest: 4 MiB of guest address space, 64 clusters of 64 KiB.
package struct Chunk: Sendable, Equatable {
    package static let size = 4 << 20
    package static let clusterSize = 64 << 10
    package static let clusters = size / clusterSize
    /// 1 PiB. Larger claims come from damaged or hostile headers (vSphere stops at 62 TiB).
    package static let maximumCapacity: UInt64 = 1 << 50

    package let index: UInt64
    /// Bytes in it: `size`, or less for the disk's last chunk.
    package let count: Int

    /// `index` lies within a disk of `capacity` bytes.
    package init(index: UInt64, capacity: UInt64) {
        self.index = index
        count = Int(min(UInt64(Chunk.size), capacity - index * UInt64(Chunk.size)))
    }

    /// The guest address of its first byte.
    package var offset: UInt64 { index * UInt64(Chunk.size) }

    /// Chunks in a disk of `capacity` bytes.
    package static func total(capacity: UInt64) -> UInt64 { (capacity + UInt64(size) - 1) / UInt64(size) }
}

/// Where an image lies: a whole file, or part of one (a tar member of an OVA, read in place).
package struct FileRegion: Sendable, Equatable {
    package var path: String
    package var offset: UInt64
    /// nil: to the end of the file.
    package var length: UInt64?
    /// Whether `path` has no links, and is not to be followed through any that appear.
    package var isResolved = false

    package init(path: String, offset: UInt64 = 0, length: UInt64? = nil, isResolved: Bool = false) {
        self.path = path
        self.offset = offset
        self.length = length
        self.isResolved = isResolved
    }
}

/// A region as it was found on opening.
package struct SourceFile: Sendable, Equatable {
    package let path: String
    package let offset: UInt64
    package let length: UInt64
    package let identity: FileIdentity
    /// What the whole file occupies on disk, in bytes; less than its size when it has holes.
    package let allocatedBytes: UInt64
    /// As the region's.
    package let isResolved: Bool

    /// Opens it again.
    func open() throws -> File { try FileRegion(path: path, isResolved: isResolved).open().0 }
}

/// Tells whether a file is still the same one with the same content.
package struct FileIdentity: Sendable, Equatable {
    package let device: UInt64
    package let inode: UInt64
    package let size: UInt64
    package let modifiedNanoseconds: Int64

    package init(_ info: stat) {
        device = UInt64(info.st_dev)
        inode = UInt64(info.st_ino)
        size = UInt64(max(0, info.st_size))
        modifiedNanoseconds = Int64(info.st_mtim.tv_sec) &* 1_000_000_000 &+ Int64(info.st_mtim.tv_nsec)
    }

    /// The identity `path` has now.
    package init(path: String) throws {
        var info = stat()
        guard stat(path, &info) == 0 else { throw systemError("stat", path) }
        self.init(info)
    }
}

extension FileRegion {
    /// Opens the file for reading and checks that the region lies in it. Only regular files: opening a FIFO or a
    /// device that a hostile descriptor names must not hang or have effects.
    package func open() throws -> (File, SourceFile) {
        let flags = O_RDONLY | O_NONBLOCK
        let file = try isResolved ? File(resolved: path, flags) : File(path, flags)
        let info = try file.status()
        guard info.st_mode & S_IFMT == S_IFREG else {
            throw MigrationError(.invalidArgument, "\(path): not a regular file")
        }
        let size = UInt64(max(0, info.st_size))
        let available = size > offset ? size - offset : 0
        let wanted = length ?? available
        guard wanted <= available, offset <= size else {
            throw MigrationError.truncated(
                path, "bytes \(offset) to \(offset &+ wanted) hold the disk, the file ends at \(size)",
                missing: wanted - min(wanted, available))
        }
        let source = SourceFile(
            path: path, offset: offset, length: wanted, identity: FileIdentity(info),
            allocatedBytes: UInt64(max(0, info.st_blocks)) * 512, isResolved: isResolved)
        return (file, source)
    }
}

extension MigrationError {
    static func truncated(_ name: String, _ what: String, missing: UInt64? = nil) -> MigrationError {
        let amount = missing.map { ", \($0) bytes are missing" } ?? ""
        return MigrationError(
            .dataLoss, "\(name): truncated: \(what)\(amount)", hint: "copy or export the file again")
    }

    static func damaged(_ name: String, _ what: String) -> MigrationError {
        MigrationError(.dataLoss, "\(name): damaged: \(what)", hint: "copy or export the file again")
    }

    static func malformed(_ name: String, _ what: String) -> MigrationError {
        MigrationError(.invalidArgument, "\(name): \(what)")
    }
}
