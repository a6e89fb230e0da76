import Convert
import DiskImage
import HostKit

/// Paces what passes through it by several ceilings.
final class PacedSource: ByteSource {
    private let source: any ByteSource
    private let limits: [RateLimit]
    private let stop: StopFlag

    init(_ source: any ByteSource, _ limits: [RateLimit], _ stop: StopFlag) {
        (self.source, self.limits, self.stop) = (source, limits, stop)
    }

    var name: String { source.name }
    var length: UInt64? { source.length }

    func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        let count = try source.read(into: buffer)
        for limit in limits { try limit.take(count, stop: stop) }
        return count
    }
}

/// As `PacedSource`, for a disk that many threads read in ranges: together they keep to the ceilings.
struct PacedDisk: DiskSource {
    private let disk: any DiskSource
    private let limits: [RateLimit]
    private let stop: StopFlag

    init(_ disk: any DiskSource, _ limits: [RateLimit], _ stop: StopFlag) {
        (self.disk, self.limits, self.stop) = (disk, limits, stop)
    }

    var capacity: UInt64 { disk.capacity }
    var formatName: String { disk.formatName }
    var files: [SourceFile] { disk.files }
    var identity: [String] { disk.identity }

    func requireUnchanged() throws { try disk.requireUnchanged() }

    func makeForwardReader(_ stream: any ByteSource) throws -> VMDK.ForwardReader? {
        try disk.makeForwardReader(PacedSource(stream, limits, stop))
    }

    func makeReader() throws -> sending any DiskReader { Reader(try disk.makeReader(), limits, stop) }

    private final class Reader: DiskReader {
        private let reader: any DiskReader
        private let limits: [RateLimit]
        private let stop: StopFlag

        init(_ reader: sending any DiskReader, _ limits: [RateLimit], _ stop: StopFlag) {
            (self.reader, self.limits, self.stop) = (reader, limits, stop)
        }

        func nextData(from offset: UInt64) throws -> UInt64? { try reader.nextData(from: offset) }

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> ChunkContent {
            for limit in limits { try limit.take(buffer.count, stop: stop) }
            return try reader.read(at: offset, into: buffer)
        }
    }
}
