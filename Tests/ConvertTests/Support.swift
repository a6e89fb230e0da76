import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

extension TemporaryFolder {
    func file(_ name: String) -> String { "\(path)/\(name)" }
}

/// Runs a program found in PATH; fails the test unless it exits with 0.
func run(_ arguments: String...) throws { try run(arguments) }

func run(_ arguments: [String]) throws {
    let output = try File("/tmp/flotilla-output-\(getpid())-\(UInt64.random(in: 0 ... .max))", O_RDWR | O_CREAT)
    defer { try? Files.remove(output.path) }
    let pid = try start(arguments, output: output)
    var status: Int32 = 0
    while waitpid(pid, &status, 0) < 0 { try #require(errno == EINTR) }
    if status != 0 {
        let text = String(decoding: try Files.read(output.path), as: UTF8.self)
        Issue.record("\(arguments.joined(separator: " ")): status \(status)\n\(text)")
    }
}

/// Starts a program found in PATH; the caller waits for it.
///
/// - Parameter output: gets what it prints.
func start(_ arguments: [String], output: File) throws -> pid_t {
    var pointers: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) }
    defer { for pointer in pointers { free(pointer) } }
    pointers.append(nil)
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, output.descriptor, 1)
    posix_spawn_file_actions_adddup2(&actions, output.descriptor, 2)
    // Threads of the test runner block signals; a child must hear them.
    var attributes = posix_spawnattr_t()
    posix_spawnattr_init(&attributes)
    defer { posix_spawnattr_destroy(&attributes) }
    var none = sigset_t()
    sigemptyset(&none)
    posix_spawnattr_setsigmask(&attributes, &none)
    posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
    var pid: pid_t = 0
    try #require(posix_spawnp(&pid, arguments[0], &actions, &attributes, pointers, environ) == 0)
    return pid
}

/// Repeatable pseudo-random numbers (SplitMix64).
struct Seeded: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return z ^ z >> 31
    }
}

/// Makes a sparse raw disk: random bytes at its start and end, over 2 and 4 GiB if it is that large, and some
/// incompressible, compressible and single-sector pieces at places drawn from `seed`.
func makeRawDisk(_ path: String, size: UInt64, seed: UInt64) throws {
    let file = try File(path, O_RDWR | O_CREAT | O_TRUNC)
    try file.truncate(to: size)
    var random = Seeded(state: seed)
    func put(_ offset: UInt64, _ count: Int, compressible: Bool) throws {
        let start = min(offset, size - 512) / 512 * 512
        var words = (0..<count / 8).map { _ in compressible ? 0x0101_0101_0101_0101 : random.next() }
        words[0] = random.next() | 1
        try words.withUnsafeBytes {
            try file.write(UnsafeRawBufferPointer(rebasing: $0[..<min(count, Int(size - start))]), at: start)
        }
    }
    try put(0, 200 << 10, compressible: false)
    try put(size, 512, compressible: false)
    for edge: UInt64 in [2 << 30, 4 << 30] where edge < size { try put(edge - 4096, 70 << 10, compressible: false) }
    for piece in 0..<10 {
        let offset = UInt64.random(in: 0..<size, using: &random)
        let count = [512, 4096, 64 << 10, 300 << 10, 1 << 20][piece % 5]
        try put(offset, count, compressible: piece % 2 == 0)
    }
}

/// The content digest of a raw image, computed as the documentation says, apart from the code under test.
func documentedDigest(_ raw: String) throws -> String {
    let file = try File(raw, O_RDONLY)
    let total = Digest()
    var offset: UInt64 = 0
    let size = try file.size
    func digest(_ chunk: [UInt8]) -> [UInt8] {
        let blocks = stride(from: 0, to: chunk.count, by: 65536).map { Array(chunk[$0...].prefix(65536)) }
        return Digest.hash(.sha256, blocks.flatMap { Digest.hash(.sha256, $0) })
    }
    let zeros = digest([UInt8](repeating: 0, count: 4 << 20))
    while offset < size {
        let count = min(4 << 20, size - offset)
        let data = lseek(file.descriptor, Int(offset), 3)
        if count == 4 << 20, data < 0 || UInt64(data) >= offset + count {
            total.update(zeros)
        } else {
            total.update(digest(try file.readExactly(at: offset, count: Int(count))))
        }
        offset += count
    }
    return hex(total.finalize())
}
