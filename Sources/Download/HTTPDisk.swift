package import DiskImage
import Glibc
package import HostKit
import MigrationModel

/// A raw disk on a web server, read in ranges by many threads, each over a connection of its own. Every answer must be
/// about the same content.
package struct HTTPDisk: DiskSource {
    package let formatName = "raw over HTTP"
    package let capacity: UInt64
    package let files: [SourceFile] = []
    /// Bytes on the server; the rest of the capacity, less than a sector, reads as zero.
    fileprivate let size: UInt64
    fileprivate let validator: String?
    fileprivate let location: HTTPLocation
    fileprivate let stop: StopFlag

    /// Throws `unimplemented` for a server that doesn't answer ranges.
    package init(_ location: HTTPLocation, stop: StopFlag) throws {
        let transfer = try HTTPTransfer(location, stop)
        var response = HTTPResponse()
        var retries = Retries(location, stop)
        while true {
            do {
                response = try transfer.start((0, 0), validator: nil)
                // A session's server knows ranges; a proxy before it may not.
                guard location.headers == nil || response.status != 200 else {
                    throw HTTPTransfer.Interrupted(lasting: "the server answered a range with everything")
                }
                break
            } catch let interruption as HTTPTransfer.Interrupted {
                guard interruption.isLasting, location.headers != nil else {
                    throw MigrationError(.unavailable, "\(location.name): \(interruption.reason)")
                }
                try retries.failed(interruption)
            }
        }
        guard response.status == 206, response.range == 0...0, let size = response.total, size > 0 else {
            throw MigrationError(
                .unimplemented, "\(location.name): the server doesn't answer ranges, which reading a raw disk takes",
                hint: "download the file and convert that")
        }
        guard size <= Chunk.maximumCapacity else {
            throw MigrationError(.outOfRange, "\(location.name): \(size) bytes are too much for a disk")
        }
        self.location = location
        self.stop = stop
        self.size = size
        validator = response.validator
        capacity = (size + 511) / 512 * 512
    }

    /// Without a validator nothing proves that another run sees the same.
    package var identity: [String] {
        [location.url, "\(size)", validator ?? "unknown \(UInt64.random(in: 0 ... .max))"]
    }

    /// Each answer was checked.
    package func requireUnchanged() {}

    package func makeForwardReader(_ stream: any ByteSource) -> VMDK.ForwardReader? { nil }

    package func makeReader() throws -> sending any DiskReader {
        Reader(self, try HTTPTransfer(location, stop))
    }

    private final class Reader: DiskReader {
        private let disk: HTTPDisk
        private let transfer: HTTPTransfer

        init(_ disk: HTTPDisk, _ transfer: HTTPTransfer) {
            self.disk = disk
            self.transfer = transfer
        }

        func nextData(from offset: UInt64) -> UInt64? { offset < disk.size ? offset : nil }

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> ChunkContent {
            guard offset < disk.size else { return .zero }
            let wanted = Int(min(UInt64(buffer.count), disk.size - offset))
            var done = 0
            var retries = Retries(disk.location, disk.stop)
            while done < wanted {
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<wanted])
                do {
                    try read(at: offset + UInt64(done), part) {
                        done += $0
                        retries.succeeded()
                    }
                } catch let interruption as HTTPTransfer.Interrupted {
                    try retries.failed(interruption)
                }
            }
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[wanted...])
            if let base = rest.baseAddress { memset(base, 0, rest.count) }
            return .data
        }

        /// One request. Bytes it delivered before it broke off are good.
        private func read(
            at offset: UInt64, _ buffer: UnsafeMutableRawBufferPointer, _ didRead: (Int) -> Void
        ) throws {
            let last = offset + UInt64(buffer.count) - 1
            let response = try transfer.start((offset, last), validator: disk.validator)
            // Taking it for the range would corrupt the disk; the next answer may be one.
            if response.status == 200, response.total == disk.size, response.validator == disk.validator {
                throw HTTPTransfer.Interrupted(lasting: "the server answered a range with everything")
            }
            guard response.status == 206, response.range == offset...last, response.total == disk.size,
                response.validator == disk.validator
            else {
                throw MigrationError(
                    .failedPrecondition, "\(disk.location.name) changed on the server while it was read",
                    hint: "make sure that nothing writes to it, then start over")
            }
            var done = 0
            while done < buffer.count {
                let count = try transfer.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...]))
                guard count > 0 else { throw HTTPTransfer.Interrupted(reason: "an answer was shorter than it said") }
                done += count
                didRead(count)
            }
            // Its end, so that the connection can take the next request.
            var spare: UInt8 = 0
            _ = try withUnsafeMutableBytes(of: &spare) { try transfer.read(into: $0) }
        }
    }
}
