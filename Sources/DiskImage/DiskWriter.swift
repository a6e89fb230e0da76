import HostKit
import MigrationModel

/// An image being written by many threads. Chunks arrive in any order; the image becomes valid in `finish`.
package protocol DiskWriter: Sendable {
    var format: TargetFormat { get }
    var capacity: UInt64 { get }
    /// Whether writes bypass the page cache.
    var isDirect: Bool { get }
    /// The file that tells the finished image from others.
    var identity: FileIdentity { get throws }

    /// Writes the clusters of `chunk` whose bits are set in `bitmap` (not 0). They are on stable storage after the next
    /// `synchronizeData()`, not before.
    ///
    /// - Parameter buffer: `Chunk.size` bytes on a page boundary, the first `chunk.count` of them the chunk's, those
    ///   behind overwritten by this call.
    func write(
        _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
    ) throws -> ChunkPlacement

    /// Reads a chunk back as the guest would see it into the first `chunk.count` bytes of `buffer` (`Chunk.size`
    /// bytes). Returns false when the file is too short to hold it.
    func read(_ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer) throws -> Bool

    /// Everything written so far is on stable storage when this returns.
    func synchronizeData() throws

    /// Takes over a chunk that an interrupted run wrote; returns false when its place isn't plausible, or that of one
    /// taken over before. The bitmap isn't empty. Called for the newest chunk first, before any other thread uses the
    /// writer.
    func adopt(_ placement: ChunkPlacement) throws -> Bool

    /// Gives up the place of an adopted chunk whose content turned out wrong.
    func release(_ chunk: Chunk, at placement: ChunkPlacement) throws

    /// Writes the metadata for exactly these chunks and syncs. All other threads are done.
    ///
    /// - Parameter step: called often, with how much of what takes long is done, in bytes; throws to stop.
    func finish(_ placements: any ChunkPlacements, step: (_ done: UInt64, _ total: UInt64) throws -> Void) throws
}

/// A writer whose image is a file of its own.
protocol ImageFileWriter: DiskWriter {
    var image: ImageFile { get }
}

extension ImageFileWriter {
    package var isDirect: Bool { image.isDirect }
    package var identity: FileIdentity { get throws { FileIdentity(try image.file.status()) } }
    package func synchronizeData() throws { try image.synchronizeData() }
}

/// Where a chunk's non-zero clusters lie in an image.
package struct ChunkPlacement: Sendable, Equatable {
    package let index: UInt64
    /// Byte of the image where the clusters begin (qcow2: packed; raw: the chunk's guest address).
    package let hostOffset: UInt64
    /// Bit i: cluster i is stored.
    package let bitmap: UInt64
    /// In a compressed image, the size of each stored cluster in units of 2 bytes; they follow each other. Else empty.
    package let sizes: [UInt16]

    package init(index: UInt64, hostOffset: UInt64, bitmap: UInt64, sizes: [UInt16] = []) {
        self.index = index
        self.hostOffset = hostOffset
        self.bitmap = bitmap
        self.sizes = sizes
    }

    /// Bytes of the image that hold it.
    package var storedBytes: UInt64 {
        sizes.isEmpty ? UInt64(clusterCount * Chunk.clusterSize) : units * UInt64(ImageFile.alignment)
    }

    /// Compressed bytes.
    private var compressedBytes: UInt64 { sizes.reduce(0) { $0 + UInt64($1) * 2 } }
    /// What they take in units of `ImageFile.alignment`.
    var units: UInt64 { (compressedBytes + UInt64(ImageFile.alignment) - 1) / UInt64(ImageFile.alignment) }

    package var clusterCount: Int { bitmap.nonzeroBitCount }
}

extension TargetFormat {
    /// Opens or creates the image for writing. An existing one keeps its content, to be adopted.
    ///
    /// - Parameters:
    ///   - compression: for qcow2 only, and for clusters of the usual size.
    ///   - geometry: for qcow2 only.
    package func writer(
        _ path: String, capacity: UInt64, compression: Compression? = nil, geometry: QCOW2.Geometry = .standard
    ) throws -> any DiskWriter {
        if let compression, self != .qcow2 {
            throw MigrationError(
                .invalidArgument, "\(path): a \(rawValue) image can't be compressed (\(compression))",
                hint: "choose qcow2")
        }
        if compression != nil || self != .qcow2, geometry != .standard {
            throw MigrationError(
                .invalidArgument, "\(path): only a qcow2 image that isn't compressed can have clusters of any size",
                hint: "leave the cluster size out")
        }
        return switch self {
        case .qcow2:
            if let compression {
                try QCOW2.CompressedWriter(path, capacity: capacity, compression: compression)
            } else {
                try QCOW2.Writer(path, capacity: capacity, geometry: geometry)
            }
        case .raw: try Raw.Writer(path, capacity: capacity)
        }
    }
}
