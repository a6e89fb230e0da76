import Convert
import DiskImage
import Dispatch
import Download
import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import Synchronization
import TestKit
import Testing
import VSphere

@testable import Worker

/// What burdens a source is bounded, for all disks together. Only lower bounds of time are asserted: a busy computer is
/// slower than any ceiling.
@Suite struct TransferLimitTests {
    private let stop = StopFlag()

    private func source(_ authority: String, host: UInt64?, datastore: UInt64?) -> VSphereSource {
        var source = VSphereSource(VIMServer(authority: authority, user: "me", trust: .system) { "geheim" })
        (source.hostRate, source.datastoreRate) = (host, datastore)
        return source
    }

    private func manifest(onHost host: String) -> Manifest { .with { $0.source.hostMoid = host } }

    private func disk(on datastore: String) -> Disk { .with { $0.datastore = datastore } }

    /// Seconds until all have come.
    private func time(_ bodies: [@Sendable () throws -> Void]) throws -> Double {
        let group = DispatchGroup()
        let failures = Mutex<[String]>([])
        let start = ContinuousClock.now
        for body in bodies {
            group.enter()
            spawnThread("transfer") {
                do { try body() } catch { failures.withLock { $0.append("\(error)") } }
                group.leave()
            }
        }
        group.wait()
        #expect(failures.withLock { $0 } == [])
        return Double((ContinuousClock.now - start).milliseconds) / 1000
    }

    @Test func ceilingsAreSharedByWhatTheyAreFor() throws {
        let (one, other) = (source("vc", host: 1000, datastore: 500), source("other", host: 1000, datastore: 500))
        let sources = VSphereSources([one, other])
        let first = sources.limits(one, manifest(onHost: "host-1"), disk(on: "ssd"))
        #expect(first.map(\.bytesPerSecond) == [1000, 500])
        let cases: [(VSphereSource, String, String, [Bool])] = [
            (one, "host-1", "ssd", [true, true]), (one, "host-1", "hdd", [true, false]),
            (one, "host-2", "ssd", [false, true]), (one, "host-2", "hdd", [false, false]),
            (other, "host-1", "ssd", [false, false]),
        ]
        for (source, host, datastore, isShared) in cases {
            let limits = sources.limits(source, manifest(onHost: host), disk(on: datastore))
            #expect(zip(first, limits).map { $0 === $1 } == isShared, "\(source.server.authority) \(host) \(datastore)")
        }
        let free = source("free", host: nil, datastore: nil)
        #expect(sources.limits(free, manifest(onHost: "host-1"), disk(on: "ssd")).isEmpty)
    }

    /// Streams of two machines on one host, and one elsewhere: the two take the time of their bytes together.
    @Test(arguments: [true, false]) func aCeilingHoldsForStreamsTogether(_ isHost: Bool) throws {
        let rate: UInt64 = 8 << 20
        let server = source("vc", host: isHost ? rate : nil, datastore: isHost ? nil : rate)
        let sources = VSphereSources([server])
        let bytes = 2 << 20
        let seconds = try time(
            (0..<3).map { index in
                { [stop] in
                    let place = index < 2 ? "a" : "b"
                    let limits = sources.limits(
                        server, .with { $0.source.hostMoid = place }, .with { $0.datastore = place })
                    let paced = PacedSource(Zeros(bytes), limits, stop)
                    var buffer = [UInt8](repeating: 0, count: 100_000)
                    while try buffer.withUnsafeMutableBytes({ try paced.read(into: $0) }) > 0 {}
                }
            })
        #expect(seconds >= Double(2 * bytes) / Double(rate) * 0.95)
    }

    /// Ranges, read by several threads.
    @Test func aCeilingHoldsForRangesTogether() throws {
        let rate: UInt64 = 16 << 20
        let disk = PacedDisk(BlankDisk(), [RateLimit(bytesPerSecond: rate), RateLimit(bytesPerSecond: rate * 4)], stop)
        let seconds = try time(
            (0..<4).map { index in
                {
                    let reader = try disk.makeReader()
                    var buffer = [UInt8](repeating: 0, count: 1 << 20)
                    for part in 0..<2 {
                        _ = try buffer.withUnsafeMutableBytes {
                            try reader.read(at: UInt64(index * 2 + part) << 20, into: $0)
                        }
                    }
                }
            })
        #expect(seconds >= Double(8 << 20) / Double(rate) * 0.95)
    }

    @Test func noMoreTransfersRunThanThereAreSlots() throws {
        let slots = TransferSlots(2)
        let state = Mutex((now: 0, most: 0, all: 0))
        let both = DispatchSemaphore(value: 0)
        _ = try time(
            (0..<5).map { _ in
                { [stop] in
                    try slots.with(stop) {
                        let now = state.withLock { state in
                            state = (state.now + 1, max(state.most, state.now + 1), state.all + 1)
                            return state.now
                        }
                        // The first waits for a second: two do run at once.
                        if now == 2 { both.signal() } else { _ = both.wait(timeout: .now() + 5) }
                        both.signal()
                        state.withLock { $0.now -= 1 }
                    }
                }
            })
        #expect(state.withLock { $0.most } == 2 && state.withLock { $0.all } == 5)
    }

    @Test func aSlotIsFreedByAnErrorAndAWaiterCanBeStopped() throws {
        let slots = TransferSlots(1)
        struct Broken: Error {}
        for _ in 0..<3 { #expect(throws: Broken.self) { try slots.with(stop) { throw Broken() } } }
        try slots.with(stop) {
            let waiter = StopFlag()
            waiter.set(MigrationError(.cancelled, "no more"))
            var waits = 0
            let end = failure { try slots.with(waiter, waiting: { waits += 1 }) { Issue.record("it ran") } }
            #expect(end?.message == "no more" && waits == 1)
        }
        #expect(try slots.with(stop) { 7 } == 7)
    }

    /// One count for all machines of an ESXi host, another for the next.
    @Test func slotsAreThoseOfTheHost() {
        let server = source("vc", host: nil, datastore: nil)
        let sources = VSphereSources([server])
        let first = sources.slots(server, manifest(onHost: "host-1"))
        #expect(first === sources.slots(server, manifest(onHost: "host-1")))
        #expect(first !== sources.slots(server, manifest(onHost: "host-2")))
        #expect(first !== sources.slots(source("other", host: nil, datastore: nil), manifest(onHost: "host-1")))
    }
}

private final class Zeros: ByteSource {
    let name = "zeros"
    private var left: Int

    init(_ count: Int) { left = count }

    func read(into buffer: UnsafeMutableRawBufferPointer) -> Int {
        let count = min(left, buffer.count)
        left -= count
        return count
    }
}

private struct BlankDisk: DiskSource {
    let capacity: UInt64 = 64 << 20
    let formatName = "blank"
    let files: [SourceFile] = []
    let identity = ["blank"]

    func requireUnchanged() {}
    func makeForwardReader(_ stream: any ByteSource) -> VMDK.ForwardReader? { nil }
    func makeReader() -> sending any DiskReader { Reader() }

    private final class Reader: DiskReader {
        func nextData(from offset: UInt64) -> UInt64? { offset }
        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) -> ChunkContent { .data }
    }
}
