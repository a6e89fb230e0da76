import Foundation
import HostKit
import TestKit
import Testing

/// `flotilla disk`, the program itself.
@Suite(.serialized) struct DiskCommandTests {
    private let folder: TemporaryFolder
    private var raw: String { "\(folder.path)/made.raw" }
    private var image: String { "\(folder.path)/image.qcow2" }

    /// A raw disk of 48 MiB, every 4 MiB of it with data.
    init() throws {
        folder = try TemporaryFolder()
        let file = try File(raw, O_RDWR | O_CREAT)
        try file.truncate(to: 48 << 20)
        for index in 0..<12 as Range<UInt64> {
            try file.write([UInt8](repeating: UInt8(index + 1), count: 100_000), at: index << 22 | 4096)
        }
    }

    private func flotilla(_ arguments: String..., killAfter: Double? = nil, signal: Int32 = SIGKILL) throws -> Outcome {
        try run(try Environment.flotilla(), ["disk"] + arguments, killAfter: killAfter, signal: signal)
    }

    @Test func anInterruptedConversionIsContinued() throws {
        // 6 s at this rate.
        let first = try flotilla(
            "convert", "-f", "raw", raw, image, "--rate", "8M", "--json", killAfter: 2.5, signal: SIGINT)
        #expect(first.status == 4, "\(first.output)\(first.errors)")
        #expect(first.seconds < 3.5)
        #expect(first.errors.contains("--resume"))
        #expect(!Files.exists(image) && Files.exists("\(image).flotilla"))
        let refused = try flotilla("convert", "-f", "raw", raw, image)
        #expect(refused.status == 1 && refused.errors.contains("--resume"))
        let second = try flotilla("convert", "-f", "raw", raw, image, "--resume")
        #expect(second.status == 0 && second.output.contains("continued"), "\(second.output)\(second.errors)")
        #expect(!Files.exists("\(image).flotilla"))
        try require("qemu-img", "check", image)
        try require("qemu-img", "compare", "-f", "raw", raw, image)
    }

    /// A computer's time may be set at any moment: a wall clock that is an hour ahead of the kernel's lets no wait last longer.
    @Test func pausesKeepToTheMonotonicClock() throws {
        let tests = #filePath.split(separator: "/").dropLast(2).map { "/\($0)" }.joined()
        let (clock, shift) = ("\(folder.path)/clock.so", "\(folder.path)/shift")
        try require("cc", "-shared", "-fPIC", "-o", clock, "\(tests)/faults/clock.c")
        try Files.writeAtomically(Array("3600".utf8), to: shift)
        let outcome = try run(
            Environment.flotilla(), ["disk", "convert", "-f", "raw", raw, image, "--rate", "24M"],
            environment: ["LD_PRELOAD": clock, "FLOTILLA_CLOCK": shift], limit: 60)
        #expect(outcome.status == 0 && outcome.seconds > 1, "\(outcome.errors)")
    }

    @Test(arguments: [
        ["--cluster-size", "48K"], ["--cluster-size", "4K", "-O", "raw"], ["--compress", "zstd", "-O", "raw"],
        ["--cluster-size", "4K", "--compress", "zstd"], ["--rate", "0"],
    ])
    func whatDoesNotGoTogetherIsUsage(_ options: [String]) throws {
        let outcome = try run(try Environment.flotilla(), ["disk", "convert", "-f", "raw", raw, image] + options)
        #expect(outcome.status == 2, "\(outcome.errors)")
        #expect(!Files.exists(image) && !Files.exists("\(image).flotilla"))
    }

    @Test(.enabled(if: getuid() == 0)) func aDeviceIsATargetWithItsStateElsewhere() throws {
        let backing = "\(folder.path)/backing"
        try File(backing, O_RDWR | O_CREAT).truncate(to: 52 << 20)
        let device = try require("/usr/sbin/losetup", "--find", "--show", backing).filter { !$0.isNewline }
        defer { _ = try? run("/usr/sbin/losetup", ["--detach", device]) }
        let state = "\(folder.path)/state"
        let first = try flotilla(
            "convert", "-f", "raw", raw, device, "--state", state, "--rate", "8M", killAfter: 2.5, signal: SIGINT)
        #expect(first.status == 4, "\(first.output)\(first.errors)")
        #expect(try flotilla("info", device).output.contains("unfinished image"))
        let second = try flotilla("convert", "-f", "raw", raw, device, "--state", state, "--resume")
        #expect(second.status == 0 && second.output.contains("continued"), "\(second.output)\(second.errors)")
        #expect(try Files.list("\(state)/disk") == [])
        try require("/usr/bin/cmp", "--bytes=\(48 << 20)", raw, device)
        #expect(try flotilla("convert", "-f", "raw", raw, "/dev/no-such-device").status == 1)
    }
}
