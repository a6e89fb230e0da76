import CDeflate
import CZstd
import MigrationModel

/// How the clusters of a qcow2 image are compressed.
package enum Compression: Sendable, Equatable, CustomStringConvertible {
    /// libdeflate's levels, 1 to 12. Every reader of qcow2 knows it. Level 4 costs less than a third of what `qemu-img
    /// convert -c` does and leaves 5% less, since its window isn't cut to 4 KiB.
    case zlib(level: Int = 4)
    /// QEMU 5.1 and later.
    case zstd

    package var description: String {
        switch self {
        case .zlib(let level): "zlib:\(level)"
        case .zstd: "zstd"
        }
    }
}

/// Compresses and decompresses single clusters. One thread at a time: whoever took it from the pool owns it, so it is
/// `@unchecked Sendable` like the C handles it wraps.
final class ClusterCodec: @unchecked Sendable {
    private enum Handles {
        case zlib(compressor: OpaquePointer, decompressor: OpaquePointer)
        case zstd(OpaquePointer)
    }

    /// QEMU's own choice, zstd's default.
    private static let zstdLevel: Int32 = 3
    /// What a cluster can take when it doesn't compress.
    static let bound = max(
        libdeflate_deflate_compress_bound(nil, Chunk.clusterSize), ZSTD_compressBound(Chunk.clusterSize))

    private let handles: Handles
    /// Room for a chunk's compressed clusters, on a page boundary.
    let room: UnsafeMutableRawBufferPointer

    init(_ compression: Compression) {
        switch compression {
        case .zlib(let level):
            guard let compressor = libdeflate_alloc_compressor(Int32(min(max(level, 1), 12))),
                let decompressor = libdeflate_alloc_decompressor()
            else { preconditionFailure("out of memory") }
            handles = .zlib(compressor: compressor, decompressor: decompressor)
        case .zstd:
            guard let context = ZSTD_createCCtx() else { preconditionFailure("out of memory") }
            handles = .zstd(context)
        }
        room = .allocate(
            byteCount: Chunk.clusters * ((Self.bound + 1) / 2 * 2) + ImageFile.alignment, alignment: ImageFile.alignment
        )
    }

    deinit {
        room.deallocate()
        switch handles {
        case .zlib(let compressor, let decompressor):
            libdeflate_free_compressor(compressor)
            libdeflate_free_decompressor(decompressor)
        case .zstd(let context): ZSTD_freeCCtx(context)
        }
    }

    /// Returns the compressed size. `output` has `bound` bytes, so it always fits: data that doesn't compress is
    /// stored in the method's own frame.
    func compress(_ cluster: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) throws -> Int {
        switch handles {
        case .zlib(let compressor, _):
            let count = libdeflate_deflate_compress(
                compressor, cluster.baseAddress, cluster.count, output.baseAddress, output.count)
            guard count > 0 else { throw MigrationError(.internal, "deflate: a cluster didn't fit its bound") }
            return count
        case .zstd(let context):
            let count = ZSTD_compressCCtx(
                context, output.baseAddress, output.count, cluster.baseAddress, cluster.count, Self.zstdLevel)
            guard ZSTD_isError(count) == 0 else {
                throw MigrationError(.internal, "zstd: \(String(cString: ZSTD_getErrorName(count)))")
            }
            return count
        }
    }

    /// Fills `output`, a cluster. Returns false when the input, which may have a byte of padding, isn't one.
    func decompress(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Bool {
        switch handles {
        case .zlib(_, let decompressor):
            var consumed = 0
            return libdeflate_deflate_decompress_ex(
                decompressor, input.baseAddress, input.count, output.baseAddress, output.count, &consumed, nil)
                == LIBDEFLATE_SUCCESS
        case .zstd:
            let size = ZSTD_findFrameCompressedSize(input.baseAddress, input.count)
            guard ZSTD_isError(size) == 0 else { return false }
            return ZSTD_decompress(output.baseAddress, output.count, input.baseAddress, size) == output.count
        }
    }
}
