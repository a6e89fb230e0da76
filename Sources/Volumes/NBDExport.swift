import CNBD
import DiskImage
import Glibc
package import HostKit
import MigrationModel
import Synchronization

/// A disk behind an NBD server, such as qemu-nbd or nbdkit. Over several connections when the server says that they see
/// each other's writes. NBD has no claim on an export: that nobody else writes to it is the person's to know.
package final class NBDExport: Volume {
    private static let connectionCount = 4
    /// Bytes in one command, unless the server allows fewer.
    private static let largestCommand: UInt64 = 32 << 20

    package let name: String
    package let size: UInt64
    package let blockSize: Int
    package let isDirect = true
    private let zeroes: Bool
    private let limit: Int
    private let stop: StopFlag
    private let idle: Mutex<[NBDConnection]>
    private let idleCount: MonotonicSemaphore

    package static func isOne(_ text: String) -> Bool {
        ["nbd", "nbds", "nbd+unix", "nbds+unix"].contains(text.prefix { $0 != ":" }) && text.contains("://")
    }

    /// Throws `failedPrecondition` for an export that can't be written safely.
    ///
    /// - Parameters:
    ///   - uri: nbd://host/export, nbds://…, nbd+unix:///export?socket=path.
    ///   - stop: ends everything that waits for the server.
    package init(_ uri: String, stop: StopFlag) throws {
        name = uri
        self.stop = stop
        let first = try NBDConnection(uri, stop)
        func answers(_ question: (OpaquePointer) -> Int32) throws -> Bool { try first.ask { Int64(question($0)) } == 1 }
        guard try !answers({ nbd_is_read_only($0) }) else {
            throw MigrationError(.failedPrecondition, "\(uri): the export is read-only", hint: "export it for writing")
        }
        guard try answers({ nbd_can_flush($0) }) else {
            throw MigrationError(
                .failedPrecondition, "\(uri): the server has no flush, so nothing tells when data is safe",
                hint: "turn it on there (nbd-server: flush = true)")
        }
        size = try first.ask { nbd_get_size($0) }
        blockSize = max(512, Int(try first.ask { nbd_get_block_size($0, Int32(LIBNBD_SIZE_MINIMUM)) }))
        guard blockSize <= Chunk.clusterSize else {
            throw MigrationError(.unimplemented, "\(uri): blocks of \(blockSize) bytes are too large")
        }
        let largest = try first.ask { nbd_get_block_size($0, Int32(LIBNBD_SIZE_MAXIMUM)) }
        limit = Int(largest == 0 ? Self.largestCommand : min(largest, Self.largestCommand))
        zeroes = try answers { nbd_can_zero($0) }
        var connections = [first]
        if try answers({ nbd_can_multi_conn($0) }) {
            while connections.count < Self.connectionCount { connections.append(try NBDConnection(uri, stop)) }
        }
        // Not its initial value: libdispatch insists that a semaphore ends no lower than it began.
        idleCount = MonotonicSemaphore(connections.count)
        idle = Mutex(connections)
    }

    package func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
        try forEachPart(buffer.count) { part, connection in
            let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer[part])
            let place = offset + UInt64(part.lowerBound)
            try connection.run("read \(bytes.count) bytes at byte \(place)") {
                nbd_aio_pread($0, bytes.baseAddress, bytes.count, place, nbd_completion_callback(), 0)
            }
        }
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws {
        try forEachPart(bytes.count) { part, connection in
            let bytes = UnsafeRawBufferPointer(rebasing: bytes[part])
            let place = offset + UInt64(part.lowerBound)
            try connection.run("write \(bytes.count) bytes at byte \(place)") {
                nbd_aio_pwrite($0, bytes.baseAddress, bytes.count, place, nbd_completion_callback(), 0)
            }
        }
    }

    package func zero(_ range: Range<UInt64>) throws {
        guard zeroes else {
            let zeros = [UInt8](repeating: 0, count: min(limit, range.count, 4 << 20))
            for offset in stride(from: range.lowerBound, to: range.upperBound, by: zeros.count) {
                try zeros.withUnsafeBytes {
                    let count = min($0.count, Int(range.upperBound - offset))
                    try write(UnsafeRawBufferPointer(rebasing: $0[..<count]), at: offset)
                }
            }
            return
        }
        try withConnection {
            try $0.run("zero \(range.count) bytes at byte \(range.lowerBound)") {
                nbd_aio_zero($0, UInt64(range.count), range.lowerBound, nbd_completion_callback(), 0)
            }
        }
    }

    /// Covers what the other connections wrote: servers that allow several promise that.
    package func flush() throws {
        try withConnection { try $0.run("flush") { nbd_aio_flush($0, nbd_completion_callback(), 0) } }
    }

    package func contents() throws -> String? { try recognise(self) }

    private func forEachPart(_ count: Int, _ body: (Range<Int>, NBDConnection) throws -> Void) throws {
        try withConnection { connection in
            for start in stride(from: 0, to: count, by: limit) {
                try body(start..<min(start + limit, count), connection)
            }
        }
    }

    private func withConnection(_ body: (NBDConnection) throws -> Void) throws {
        while !idleCount.wait(for: .milliseconds(100)) { try stop.check() }
        guard let connection = idle.withLock({ $0.popLast() }) else {
            throw MigrationError(.internal, "\(name): no connection where one was counted")
        }
        defer {
            idle.withLock { $0.append(connection) }
            idleCount.signal()
        }
        try body(connection)
    }
}
