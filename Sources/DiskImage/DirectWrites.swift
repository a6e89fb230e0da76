import CLinux
import Glibc
import HostKit
import Synchronization

/// Direct writes by many threads to one file, submitted and then waited for. ext4 holds the file's lock while pwrite(2)
/// waits for a write into a hole (before Linux 6.3 also into reserved space), so that the threads' writes go to the disk
/// one by one. This way it holds the lock only until it has found the blocks.
final class DirectWrites: Sendable {
    /// Pieces of memory that go to one place of the file.
    struct Request {
        let offset: UInt64
        let pieces: [iovec]

        var count: Int { pieces.reduce(0) { $0 + $1.iov_len } }
    }

    /// Kernel contexts that no thread uses right now.
    private let contexts = Mutex<[UInt]>([])
    private let file: File

    /// - Parameter file: opened with O_DIRECT.
    init(_ file: File) { self.file = file }

    deinit { for context in contexts.withLock({ $0 }) { flotilla_aio_free(context) } }

    /// Returns the indices of the requests that were not, or not wholly, written, for the caller to write in the ordinary
    /// way, which tells why it fails. Those are all of them where the system has no asynchronous I/O, or too many users of
    /// it already (`fs.aio-max-nr`).
    func write(_ requests: [Request]) -> [Int] {
        guard !requests.isEmpty, let context = take() else { return Array(requests.indices) }
        let pieces = requests.flatMap(\.pieces)
        var missed: [Int] = []
        var isUsable = true
        pieces.withUnsafeBufferPointer { pieces in
            var next = pieces.baseAddress
            for start in stride(from: 0, to: requests.count, by: Int(FLOTILLA_AIO_DEPTH)) {
                let batch = start..<min(start + Int(FLOTILLA_AIO_DEPTH), requests.count)
                var writes = batch.map { index in
                    defer { next = next.map { $0 + requests[index].pieces.count } }
                    return flotilla_write(
                        pieces: next, count: Int32(requests[index].pieces.count),
                        offset: Int64(requests[index].offset), result: -1)
                }
                let submitted = isUsable ? flotilla_aio_write(context, file.descriptor, &writes, Int32(batch.count)) : 0
                if submitted < 0 { isUsable = false }
                missed += batch.filter {
                    $0 - start >= Int(submitted) || writes[$0 - start].result != requests[$0].count
                }
            }
        }
        if isUsable { contexts.withLock { $0.append(context) } }
        return missed
    }

    private func take() -> UInt? {
        if let context = contexts.withLock({ $0.popLast() }) { return context }
        let context = flotilla_aio_context()
        return context == 0 ? nil : context
    }
}
