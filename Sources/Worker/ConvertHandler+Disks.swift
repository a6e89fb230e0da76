import Convert
import DiskImage
import FlotillaProtocol
import GRPCCore
import HostKit
import MigrationModel
import SwiftProtobuf
import VSphere

/// What a worker tells of a disk on its way.
private struct DiskReport {
    /// "downloading", "reading", "converting", or one of those below.
    var phase: String
    var done: UInt64
    var total: UInt64
    var written: UInt64 = 0

    static let waiting = "waiting for a transfer slot"
    static let verifying = "verifying"

    /// A line that tells of the phase when it begins, where it may last and nothing else does.
    var step: String? {
        switch phase {
        case Self.waiting: "waits for a transfer slot: others read from that host"
        case Self.verifying: "reads the source for its checksum"
        default: nil
        }
    }
}

extension ConvertHandler {
    /// Converts one disk; one that comes from a server as often as it takes.
    func fetch(
        _ work: DiskWork, _ export: VMExport?, _ manifest: Manifest, _ writer: RPCWriter<ConvertUpdate>
    ) async throws -> DiskConversion.Notice {
        let disk = work.disk
        @Sendable func check(_ report: DiskConversion.Progress) throws {
            // Of another size than the VM's: another disk. Nothing of it may go further.
            guard report.capacity == disk.capacityBytes || disk.capacityBytes == 0 else {
                throw MigrationError(
                    .failedPrecondition,
                    "the disk that came has \(report.capacity) bytes, the VM's has \(disk.capacityBytes)",
                    hint: "look at the VM on the source, then migrate it again")
            }
        }
        guard let export else { return try await run(work, writer) { try check($0) } }
        let total = manifest.disks.reduce(0) { $0 &+ $1.capacityBytes }
        let before = manifest.disks.prefix { $0.id != disk.id }.reduce(0) { $0 &+ $1.capacityBytes }
        let url = try VSphereURL(parsing: manifest.source.url)
        let source = try configuration.vsphere.source(of: url, host: configuration.host)
        let slots = configuration.vsphere.slots(source, manifest)
        var retries = TransferRetries()
        while true {
            do {
                @Sendable func came(_ bytes: UInt64) {
                    let done = Double(before &+ min(bytes, disk.capacityBytes)) / Double(max(1, total))
                    export.report(percent: Int(done * 100))
                }
                return try await run(work, writer, slots, staged: came) { report in
                    try check(report)
                    // A staged disk has come when its conversion begins.
                    came(work.staging == nil ? report.doneBytes : disk.capacityBytes)
                }
            } catch let error as MigrationError {
                guard !Task.isCancelled, let pause = retries.pause(after: error, isRanges: url.transfer == .datastore)
                else { throw error }
                // What was kept of it is as damaged as it came.
                if error.code == .dataLoss { try await blocking("convert") { try work.staging?.discard() } }
                try await writer.step(disk.id, "again in \(pause) s: \(error.message)")
                try await Task.sleep(for: .seconds(pause))
            }
        }
    }

    /// The digest of a file that was read by another program, which must be the promised one.
    func take(
        _ work: DiskWork, _ disk: inout Disk, _ writer: RPCWriter<ConvertUpdate>
    ) async throws {
        guard let image = work.foreign else { return }
        let (digest, bytes) = try await reporting(work.disk, writer) { reports in
            try await blockingCancellable("convert") { stop in
                try work.disk.check(image, stop: stop) {
                    reports.yield(DiskReport(phase: DiskReport.verifying, done: $0, total: $1))
                }
            }
        }
        disk.source.sha256 = digest
        disk.source.streamBytes = bytes
    }

    /// What is left on the server is said, and is no reason to throw the disks away.
    ///
    /// - Returns: what is left; nil when nothing is.
    func end(_ export: VMExport, isDone: Bool, _ writer: RPCWriter<ConvertUpdate>) async -> MigrationError? {
        let left = try? await blockingCancellable("export") { export.end(isDone: isDone, hurry: $0) }
        guard let left = left ?? nil else { return nil }
        try? await writer.step("source", "\(left)")
        return left
    }

    /// - Parameters:
    ///   - staged: hears of the bytes of a disk that is kept as it comes.
    ///   - check: sees each report of the conversion before anyone else and may end it.
    private func run(
        _ work: DiskWork, _ writer: RPCWriter<ConvertUpdate>, _ slots: TransferSlots? = nil,
        staged: @escaping @Sendable (UInt64) -> Void = { _ in },
        check: @escaping @Sendable (DiskConversion.Progress) throws -> Void
    ) async throws -> DiskConversion.Notice {
        let phase = work.foreign == nil ? "downloading" : "reading"
        let notice = try await reporting(work.disk, writer) { reports in
            work.staging?.observe {
                // Of a stream that says nothing of its length this is the least that has come of the disk.
                let share = $1 > 0 ? Double($0) / Double($1) * Double(work.disk.capacityBytes) : Double($0)
                staged(UInt64(share))
                reports.yield(DiskReport(phase: phase, done: $0, total: $1))
            }
            return try await blockingCancellable("convert") { stop in
                func convert() throws -> DiskConversion.Notice {
                    var failure: (any Error)?
                    let notice = try work.conversion.convert(stop: stop) { report in
                        do {
                            try check(report)
                            reports.yield(
                                DiskReport(
                                    phase: "converting", done: report.doneBytes, total: report.capacity,
                                    written: report.writtenBytes))
                        } catch {
                            failure = error
                            stop.set(error as? MigrationError ?? MigrationError(.internal, "\(error)"))
                        }
                    }
                    if let failure { throw failure }
                    return notice
                }
                guard let slots else { return try convert() }
                return try slots.with(
                    stop, waiting: { reports.yield(DiskReport(phase: DiskReport.waiting, done: 0, total: 0)) }, convert)
            }
        }
        if let text = notice.text { try await writer.step(work.disk.id, text) }
        return notice
    }

    /// Passes on what the work on a disk reports, the latest where that comes fast.
    private func reporting<Value: Sendable>(
        _ disk: Disk, _ writer: RPCWriter<ConvertUpdate>,
        _ body: (AsyncStream<DiskReport>.Continuation) async throws -> Value
    ) async throws -> Value {
        let (reports, continuation) = AsyncStream<DiskReport>.makeStream(bufferingPolicy: .bufferingNewest(1))
        return try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                var phase = ""
                for await report in reports {
                    if report.phase != phase, let step = report.step { try await writer.step(disk.id, step) }
                    phase = report.phase
                    try await writer.progress(disk.id, report)
                }
            }
            defer { continuation.finish() }
            return try await body(continuation)
        }
    }
}

extension RPCWriter<ConvertUpdate> {
    func step(_ subject: String, _ message: String) async throws {
        try await write(
            .with {
                $0.step = .with {
                    $0.subject = subject
                    $0.message = message
                }
            })
    }

    fileprivate func progress(_ subject: String, _ report: DiskReport) async throws {
        try await write(
            .with {
                $0.progress = .with {
                    $0.subject = subject
                    $0.phase = report.phase
                    $0.bytesDone = report.done
                    $0.bytesTotal = report.total
                    $0.bytesWritten = report.written
                }
            })
    }
}
