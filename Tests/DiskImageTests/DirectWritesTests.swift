import CLinux
import Glibc
import HostKit
import TestKit
import Testing

@testable import DiskImage

@Suite struct DirectWritesTests {
    private static let block = ImageFile.alignment

    /// More writes than the kernel takes at once, some of several pieces, leaving holes.
    @Test func whatIsWrittenAtOnceIsThere() throws {
        let folder = try TemporaryFolder("direct")
        let path = "\(folder.path)/image"
        let image = try ImageFile(path)
        guard image.isDirect else { return }
        let count = Int(FLOTILLA_AIO_DEPTH) * 2 + 3
        try image.file.truncate(to: UInt64(count * 2 * Self.block))
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count * Self.block, alignment: Self.block)
        defer { memory.deallocate() }
        for index in memory.indices { memory[index] = UInt8(truncatingIfNeeded: index / Self.block &+ index &+ 1) }
        let writes = DirectWrites(try File(path, O_RDWR | flotilla_o_direct()))
        let missed = writes.write(
            try (0..<count).map { index in
                let start = try #require(memory.baseAddress) + index * Self.block
                let half = Self.block / 2
                return DirectWrites.Request(
                    offset: UInt64(index * 2 * Self.block),
                    pieces: [iovec(iov_base: start, iov_len: half), iovec(iov_base: start + half, iov_len: half)])
            })
        #expect(missed.isEmpty)
        let bytes = try Files.read(path)
        for index in 0..<count {
            let place = index * 2 * Self.block
            #expect(
                bytes[place..<place + Self.block].elementsEqual(memory[index * Self.block..<(index + 1) * Self.block]))
            #expect(bytes[place + Self.block..<place + 2 * Self.block].allSatisfy { $0 == 0 })
        }
    }

    /// A file that can't be written: every write is handed back, for the ordinary way to say why.
    @Test func whatCannotBeWrittenIsHandedBack() throws {
        let folder = try TemporaryFolder("direct")
        try Files.writeAtomically([UInt8](repeating: 1, count: Self.block), to: "\(folder.path)/image")
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.block, alignment: Self.block)
        defer { memory.deallocate() }
        zero(memory)
        let writes = DirectWrites(try File("\(folder.path)/image", O_RDONLY))
        let request = DirectWrites.Request(
            offset: 0, pieces: [iovec(iov_base: memory.baseAddress, iov_len: memory.count)])
        #expect(writes.write([request, request]) == [0, 1])
        #expect(try Files.read("\(folder.path)/image").allSatisfy { $0 == 1 })
    }
}
