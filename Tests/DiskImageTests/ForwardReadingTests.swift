import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import DiskImage

/// Bytes in memory that come in pieces of odd sizes, as from a pipe.
final class TrickleSource: ByteSource {
    let name = "trickle"
    private let bytes: [UInt8]
    private var position = 0
    private var random: Seeded

    init(_ bytes: [UInt8], seed: UInt64 = 7) {
        self.bytes = bytes
        random = Seeded(state: seed)
    }

    var isAtEnd: Bool { position == bytes.count }

    func read(into buffer: UnsafeMutableRawBufferPointer) -> Int {
        let count = min(Int(random.next() % 3000) + 1, buffer.count, bytes.count - position)
        buffer.copyBytes(from: bytes[position..<position + count])
        position += count
        return count
    }
}

extension VMDK.ForwardReader {
    /// The whole disk as the guest sees it; meant for small ones.
    func contents() throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(capacity))
        let block = makeBlock()
        let inflater = GrainInflater()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
        defer { buffer.deallocate() }
        while try next(block) {
            let chunk = Chunk(index: block.index, capacity: capacity)
            var last = 0
            try inflater.inflate(block, chunk, into: buffer) {
                #expect($0 >= last)
                last = $0
            }
            #expect(last == chunk.count)
            bytes.replaceSubrange(Int(chunk.offset)..<Int(chunk.offset) + chunk.count, with: buffer[..<chunk.count])
        }
        return bytes
    }
}

@Suite struct ForwardReadingTests {
    /// Grains of 4 KiB over several chunks and tables, with holes.
    private func wide(_ style: SyntheticVMDK.Style) -> SyntheticVMDK {
        var random = Seeded(state: 99)
        var vmdk = SyntheticVMDK()
        vmdk.style = style
        vmdk.capacity = 20_000
        for grain in [0, 1, 2, 511, 512, 1023, 1024, 1025, 2047, 2499] as [UInt64] {
            vmdk.grains[grain] = random.bytes(4096)
        }
        return vmdk
    }

    /// Where the last table entry with that value lies.
    private func lastPlace(of entry: UInt32, in bytes: [UInt8]) -> Int? {
        let wanted: [UInt8] = little(entry)
        var place = bytes.count / 4 * 4 - 4
        while place >= 0 {
            if bytes[place..<place + 4].elementsEqual(wanted) { return place }
            place -= 4
        }
        return nil
    }

    @Test(arguments: [SyntheticVMDK.Style.stream, .streamWithoutFooter], [1, 2, 3] as [UInt64])
    func readsAPipe(_ style: SyntheticVMDK.Style, _ seed: UInt64) throws {
        var vmdk = wide(style)
        let source = TrickleSource(vmdk.bytes(), seed: seed)
        #expect(try VMDK.ForwardReader(source).contents() == vmdk.expected)
        #expect(source.isAtEnd)
    }

    @Test(arguments: [SyntheticVMDK.Style.stream, .streamWithoutFooter])
    func readsAFileAlongItsTables(_ style: SyntheticVMDK.Style) throws {
        let folder = try TemporaryFolder()
        var vmdk = wide(style)
        let disk = try DiskFormat.vmdk.open(FileRegion(path: try folder.write(vmdk.bytes(), "disk.vmdk")))
        let source = try FileSource(disk.files[0])
        let reader = try #require(try disk.makeForwardReader(source))
        #expect(try reader.contents() == vmdk.expected)
    }

    @Test func onlyStreamsAreReadForward() throws {
        let folder = try TemporaryFolder()
        var vmdk = wide(.sparse)
        let bytes = vmdk.bytes()
        let disk = try DiskFormat.vmdk.open(FileRegion(path: try folder.write(bytes, "disk.vmdk")))
        #expect(try disk.makeForwardReader(TrickleSource(bytes)) == nil)
        let error = failure { _ = try VMDK.ForwardReader(TrickleSource(bytes)) }
        #expect(error?.code == .invalidArgument && error?.hint?.contains("path") == true)
        let foreign = failure {
            _ = try VMDK.ForwardReader(TrickleSource([0x51, 0x46, 0x49, 0xFB] + [UInt8](repeating: 0, count: 600)))
        }
        #expect(foreign?.code == .unimplemented)
    }

    /// Every cut is noticed, unless only padding behind the last grain is gone.
    @Test(arguments: [SyntheticVMDK.Style.stream, .streamWithoutFooter])
    func truncationIsFound(_ style: SyntheticVMDK.Style) throws {
        var vmdk = wide(style)
        let bytes = vmdk.bytes()
        let padding = style == .stream ? 0 : 511
        for length in stride(from: bytes.count - 1, through: 4, by: -1999) {
            let error = failure {
                let reader = try VMDK.ForwardReader(TrickleSource(Array(bytes[..<length])))
                #expect(try reader.contents() == vmdk.expected)
            }
            #expect(error?.code == .dataLoss || bytes.count - length <= padding, "cut to \(length)")
        }
    }

    @Test func tablesMustAgreeWithTheGrains() throws {
        var vmdk = wide(.stream)
        let bytes = vmdk.bytes()
        let grain = try #require(vmdk.places[1024])
        // The entry of that grain, in whichever table names it.
        let place = try #require(lastPlace(of: UInt32(grain), in: bytes))
        for value in [0, UInt32(grain) + 1] {
            var bent = bytes
            bent.replaceSubrange(place..<place + 4, with: little(value))
            let error = failure { _ = try VMDK.ForwardReader(TrickleSource(bent)).contents() }
            #expect(error?.code == .dataLoss && error?.message.contains("names other grains") == true)
        }
        let trailing = failure { _ = try VMDK.ForwardReader(TrickleSource(bytes + [0, 0, 1])).contents() }
        #expect(trailing?.message.contains("behind its end-of-stream") == true)
        #expect(try VMDK.ForwardReader(TrickleSource(bytes + [0, 0, 0])).contents() == vmdk.expected)
    }

    @Test func grainsOutOfOrderAreRefusedInAPipeAndFoundThroughTablesInAFile() throws {
        let folder = try TemporaryFolder()
        var vmdk = wide(.stream)
        var bytes = vmdk.bytes()
        let (first, second) = (Int(try #require(vmdk.places[1])) * 512, Int(try #require(vmdk.places[2])) * 512)
        let size = second - first
        let (one, two) = (Array(bytes[first..<second]), Array(bytes[second..<second + size]))
        bytes.replaceSubrange(first..<second + size, with: two + one)
        // Their table entries change places too.
        let place = try #require(lastPlace(of: UInt32(first / 512), in: bytes))
        bytes.replaceSubrange(place..<place + 8, with: little(UInt32(second / 512)) + little(UInt32(first / 512)))
        let error = failure { _ = try VMDK.ForwardReader(TrickleSource(bytes)).contents() }
        #expect(error?.code == .failedPrecondition && error?.message.contains("grain 1 ") == true)
        let disk = try DiskFormat.vmdk.open(FileRegion(path: try folder.write(bytes, "disk.vmdk")))
        #expect(try disk.contents() == vmdk.expected)
        let reader = try #require(try disk.makeForwardReader(TrickleSource(bytes)))
        #expect(throws: VMDK.ForwardReader.NotSequential.self) { _ = try reader.contents() }
    }

    @Test func snapshotDeltasAreRefused() throws {
        var vmdk = wide(.stream)
        vmdk.parentCID = "0badcafe"
        let bytes = vmdk.bytes()
        let error = failure { _ = try VMDK.ForwardReader(TrickleSource(bytes)) }
        #expect(error?.code == .failedPrecondition && error?.message.contains("0badcafe") == true)
    }

    /// Mutations of valid streams: errors are fine, crashes, hangs and large allocations not.
    @Test func mutationsNeverCrash() throws {
        let interesting: [UInt64] = [0, 1, 2, 3, 127, 255, 512, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 63, .max]
        let seconds = getenv("FLOTILLA_FUZZ_SECONDS").flatMap { Double(String(cString: $0)) } ?? 0
        let end = ContinuousClock.now + .seconds(seconds)
        var random = Seeded(state: 31)
        var refused = 0
        var round: UInt64 = 0
        while round < 10 || ContinuousClock.now < end {
            var vmdk = sampleVMDK(round % 2 == 0 ? .stream : .streamWithoutFooter, seed: round)
            let bytes = vmdk.bytes()
            let markers = vmdk.places.values.map { Int($0) * 512 }
            for _ in 0..<100 {
                var bent = bytes
                for _ in 0...Int.random(in: 0..<3, using: &random) {
                    let width = [1, 2, 4, 8][Int.random(in: 0..<4, using: &random)]
                    let areas = [0, 80, 1536, bytes.count - 4096, markers.randomElement(using: &random) ?? 0]
                    let start = areas[Int.random(in: 0..<areas.count, using: &random)]
                    let offset = start + Int.random(in: 0..<(start == 0 ? 80 : 24), using: &random)
                    let value =
                        Bool.random(using: &random)
                        ? interesting[Int.random(in: 0..<interesting.count, using: &random)] : random.next()
                    bent.replaceSubrange(offset..<offset + width, with: little(value).prefix(width))
                }
                let error = failure {
                    let reader = try VMDK.ForwardReader(TrickleSource(bent))
                    let block = reader.makeBlock()
                    let inflater = GrainInflater()
                    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
                    defer { buffer.deallocate() }
                    while try reader.next(block) {
                        let chunk = Chunk(index: block.index, capacity: reader.capacity)
                        try inflater.inflate(block, chunk, into: buffer) { _ in }
                    }
                }
                if error != nil { refused += 1 }
            }
            round += 1
        }
        #expect(refused > 400)
    }
}
