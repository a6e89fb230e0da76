import DiskImage
import Glibc
import HostKit
import MigrationModel

/// The fuzzed function: the input is one VMDK, or several files separated by lines "=====": `disk.vmdk`, `disk-1.vmdk`,
/// `disk-2.vmdk` …, as extents of a descriptor and snapshots need them. It is opened and read through every path there
/// is. A `MigrationError` is a fine answer; a trap, a hang, an allocation by what the input claims, or two paths that
/// read different disks are not.
func readEveryWay(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let input = UnsafeBufferPointer(start: start, count: count)
    let files = split(input)
    for (index, bytes) in files.enumerated() { scene.put(bytes, index) }
    scene.keep(files.count)
    var seen: [(path: String, disk: Reading)] = []
    attempt { seen.append(("tables", try readByTables(FileRegion(path: scene.path(0))))) }
    if files.count == 1 {
        attempt { if let disk = try readFileForward() { seen.append(("file, forward", disk)) } }
        attempt {
            let reader = try VMDK.ForwardReader(PieceSource(input))
            seen.append(("stream", try readForward(reader)))
        }
        if count % 4 == 0 {
            attempt {
                let region = try scene.putInArchive(files[0])
                seen.append(("archive", try readByTables(region)))
            }
        }
    }
    // A reading that was cut short tells nothing about the others.
    let whole = seen.filter(\.disk.isWhole)
    for other in whole.dropFirst() where other.disk != whole[0].disk {
        fatalError("\(whole[0].path) and \(other.path) read different disks: \(whole[0].disk) and \(other.disk)")
    }
    return 0
}

/// What was read: enough to compare, bounded whatever the disk claims.
struct Reading: Equatable {
    static let limit = 4
    var capacity: UInt64
    /// CRC-32 of each chunk that isn't all zeros.
    var chunks: [UInt64: UInt32] = [:]
    var isWhole = false
}

/// Any other error than `MigrationError` and the forward reader's own is a bug.
private func attempt(_ body: () throws -> Void) {
    do { try body() } catch let error {
        if error is VMDK.ForwardReader.NotSequential { return }
        guard let error = error as? MigrationError else { fatalError("unexpected error: \(error)") }
        precondition(error.code != .internal, error.message)
    }
}

private nonisolated(unsafe) let buffer = UnsafeMutableRawBufferPointer.allocate(
    byteCount: Chunk.size, alignment: 4096)

extension Reading {
    fileprivate mutating func add(_ chunk: Chunk) {
        let bytes = UnsafeRawBufferPointer(rebasing: buffer[..<chunk.count])
        if !isZero(bytes) { chunks[chunk.index] = crc32(bytes) }
    }
}

private func readByTables(_ region: FileRegion) throws -> Reading {
    _ = try DiskFormat.detect(region)
    let disk = try DiskFormat.vmdk.open(region)
    let reader = try disk.makeReader()
    var result = Reading(capacity: disk.capacity)
    var position: UInt64 = 0
    for _ in 0..<Reading.limit {
        guard let data = try reader.nextData(from: position) else {
            result.isWhole = true
            break
        }
        precondition(data >= position && data < disk.capacity)
        let chunk = Chunk(index: data / UInt64(Chunk.size), capacity: disk.capacity)
        let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count])
        if try reader.read(at: chunk.offset, into: part) == .data { result.add(chunk) }
        position = chunk.offset + UInt64(chunk.count)
    }
    // A read that begins and ends within grains.
    if disk.capacity > 2048 {
        _ = try reader.read(at: 512, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<1024]))
    }
    return result
}

private func readFileForward() throws -> Reading? {
    let disk = try DiskFormat.vmdk.open(FileRegion(path: scene.path(0)))
    guard disk.files.count == 1, let reader = try disk.makeForwardReader(FileSource(disk.files[0])) else { return nil }
    return try readForward(reader)
}

private func readForward(_ reader: VMDK.ForwardReader) throws -> Reading {
    let block = reader.makeBlock()
    let inflater = GrainInflater()
    var result = Reading(capacity: reader.capacity)
    for _ in 0..<Reading.limit {
        guard try reader.next(block) else {
            result.isWhole = true
            break
        }
        let chunk = Chunk(index: block.index, capacity: reader.capacity)
        try inflater.inflate(block, chunk, into: buffer) { _ in }
        result.add(chunk)
    }
    return result
}

/// The input as a stream, in pieces that don't fit its structures.
private final class PieceSource: ByteSource {
    let name = "stream"
    private let bytes: UnsafeBufferPointer<UInt8>
    private var position = 0

    init(_ bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

    func read(into target: UnsafeMutableRawBufferPointer) -> Int {
        let count = min(1021, target.count, bytes.count - position)
        target.copyBytes(from: bytes[position..<position + count])
        position += count
        return count
    }
}

private func split(_ input: UnsafeBufferPointer<UInt8>) -> [Slice<UnsafeBufferPointer<UInt8>>] {
    let line = "\n=====\n"
    var files: [Slice<UnsafeBufferPointer<UInt8>>] = []
    var start = 0
    var position = 0
    while position + line.utf8.count <= input.count, files.count < 7 {
        guard input[position] == 0x0A, input[position..<position + line.utf8.count].elementsEqual(line.utf8) else {
            position += 1
            continue
        }
        files.append(input[start..<position + 1])
        position += line.utf8.count
        start = position
    }
    files.append(input[start...])
    return files
}

/// The files of one input, in memory; the next input overwrites them.
private struct Scene {
    private let folder: String
    private nonisolated(unsafe) static var open: [Int: File] = [:]

    init() {
        folder = "/dev/shm/flotilla-fuzz-\(getpid())"
        mkdir(folder, 0o700)
        atexit { try? Files.remove("/dev/shm/flotilla-fuzz-\(getpid())") }
    }

    func path(_ index: Int) -> String { index == 0 ? "\(folder)/disk.vmdk" : "\(folder)/disk-\(index).vmdk" }

    func put(_ bytes: Slice<UnsafeBufferPointer<UInt8>>, _ index: Int, at offset: UInt64 = 0) {
        do {
            let file = try Self.open[index] ?? File(path(index), O_RDWR | O_CREAT)
            Self.open[index] = file
            try file.truncate(to: 0)
            try file.write(UnsafeRawBufferPointer(UnsafeBufferPointer(rebasing: bytes)), at: offset)
        } catch { fatalError("\(error)") }
    }

    /// Removes what an earlier input had more.
    func keep(_ count: Int) {
        for index in Self.open.keys where index >= count {
            unlink(path(index))
            Self.open[index] = nil
        }
    }

    func putInArchive(_ bytes: Slice<UnsafeBufferPointer<UInt8>>) throws -> FileRegion {
        put(bytes, 9, at: 1536)
        return FileRegion(path: path(9), offset: 1536, length: UInt64(bytes.count))
    }
}

private let scene = Scene()
