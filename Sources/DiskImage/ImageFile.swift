import CLinux
import Glibc
package import HostKit
import MigrationModel
import Synchronization

/// The file behind an image that is being written: large aligned writes bypass the page cache (O_DIRECT), which costs
/// a third of the CPU time of buffered ones and leaves the host's cache to others. Where the file system refuses, they
/// are buffered, written back at once and dropped from the cache after each `synchronizeData`.
package final class ImageFile: Sendable {
    /// Offsets, lengths and addresses of direct writes are multiples of this.
    static let alignment = 4096

    private struct Extension {
        /// Everything before it is allocated or written.
        var end: UInt64 = 0
        var isRefused = false
    }

    package let file: File
    private let direct: File?
    private let directWrites: DirectWrites?
    private let refusesDirect: Atomic<Bool>
    private let reserved = Mutex(Extension())
    /// Buffered ranges not yet dropped from the page cache.
    private let cached = Mutex<[Range<UInt64>]>([])

    package init(_ path: String) throws {
        file = try File(path, O_RDWR | O_CREAT)
        direct = try? File(path, O_RDWR | flotilla_o_direct())
        directWrites = direct.map { DirectWrites($0) }
        refusesDirect = Atomic(direct == nil)
        reserved.withLock { $0.end = (try? file.size) ?? 0 }
    }

    package var path: String { file.path }
    /// False once the file system refused direct writes.
    package var isDirect: Bool { !refusesDirect.load(ordering: .relaxed) }

    /// Writes memory that need not be contiguous to one place; each piece starts and, but for the last, ends on
    /// `alignment`.
    func write(_ pieces: [UnsafeRawBufferPointer], at offset: UInt64) throws {
        var offset = offset
        var vectors: [iovec] = []
        var tail: UnsafeRawBufferPointer?
        for piece in pieces where !piece.isEmpty {
            let aligned = isDirect ? piece.count / Self.alignment * Self.alignment : piece.count
            if aligned > 0 {
                vectors.append(iovec(iov_base: UnsafeMutableRawPointer(mutating: piece.baseAddress), iov_len: aligned))
            }
            if aligned < piece.count { tail = UnsafeRawBufferPointer(rebasing: piece[aligned...]) }
        }
        let count = UInt64(vectors.reduce(0) { $0 + $1.iov_len })
        if !vectors.isEmpty {
            let request = DirectWrites.Request(offset: offset, pieces: vectors)
            let isWritten = isDirect && directWrites?.write([request]).isEmpty == true
            if !isWritten { try write(&vectors, at: offset) }
        }
        offset += count
        if let tail { try file.write(tail, at: offset) }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws { try write([bytes], at: offset) }

    /// Writes memory to several places, all at once where that goes.
    func write(_ runs: [(offset: UInt64, bytes: UnsafeRawBufferPointer)]) throws {
        var rest = runs
        if isDirect, let directWrites {
            let whole = runs.filter { $0.bytes.count % Self.alignment == 0 }
            let missed = directWrites.write(
                whole.map {
                    let base = UnsafeMutableRawPointer(mutating: $0.bytes.baseAddress)
                    return DirectWrites.Request(
                        offset: $0.offset, pieces: [iovec(iov_base: base, iov_len: $0.bytes.count)])
                })
            rest = missed.map { whole[$0] } + runs.filter { $0.bytes.count % Self.alignment != 0 }
        }
        for run in rest { try write(run.bytes, at: run.offset) }
    }

    private func write(_ vectors: inout [iovec], at offset: UInt64) throws {
        let start = offset
        var offset = offset
        while !vectors.isEmpty {
            let isDirect = isDirect
            let target = isDirect ? direct ?? file : file
            let count = pwritev(
                target.descriptor, vectors, Int32(min(vectors.count, 1024)), Int(offset))
            if count < 0 {
                if errno == EINTR { continue }
                if errno == EINVAL && isDirect {
                    refusesDirect.store(true, ordering: .relaxed)
                    continue
                }
                throw systemError("write at byte \(offset)", path)
            }
            offset += UInt64(count)
            var rest = count
            while let first = vectors.first, rest >= first.iov_len {
                rest -= first.iov_len
                vectors.removeFirst()
            }
            if rest > 0, let base = vectors[0].iov_base {
                vectors[0] = iovec(iov_base: base + rest, iov_len: vectors[0].iov_len - rest)
                // A short direct write that doesn't end on a block (space ran out): the rest goes the other way.
                if isDirect, rest % Self.alignment != 0 { refusesDirect.store(true, ordering: .relaxed) }
            }
        }
        guard !isDirect else { return }
        _ = flotilla_start_writeback(file.descriptor, Int64(start), Int64(offset - start))
        let range = start..<offset
        cached.withLock { $0.append(range) }
    }

    /// Reads into memory that starts on `alignment`, past the page cache when the length allows. Returns the count.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        let isAligned = buffer.count % Self.alignment == 0 && offset % UInt64(Self.alignment) == 0
        return try (isAligned && isDirect ? direct ?? file : file).read(at: offset, into: buffer)
    }

    /// Allocates ahead, in steps, so that the writers that follow neither extend the file nor search for space one by
    /// one. Best effort: a file system that can't, or has no room left, answers with the writes themselves.
    func reserve(upTo end: UInt64, step: UInt64) {
        reserved.withLock { state in
            guard end > state.end, !state.isRefused else { return }
            let target = end + step
            if flotilla_fallocate(file.descriptor, Int64(state.end), Int64(target - state.end)) == 0 {
                state.end = target
            } else {
                state.isRefused = true
            }
        }
    }

    /// Everything written so far is on stable storage when this returns.
    package func synchronizeData() throws {
        let ranges = cached.withLock { ranges in
            defer { ranges = [] }
            return ranges
        }
        try file.synchronizeData()
        for range in ranges {
            _ = flotilla_fadvise_dontneed(file.descriptor, Int64(range.lowerBound), Int64(range.count))
        }
    }
}
