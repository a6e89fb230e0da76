import Convert
import DiskImage
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Synchronization
import VSphere

/// A disk's file that is made in the task's folder before it is converted: a VMDK that is to be kept, or the raw disk
/// that qemu-img reads out of a format of its own. It has its name once it is complete and on stable storage.
final class Staging: Sendable {
    /// A total of 0 is not known.
    typealias Report = (_ done: UInt64, _ total: UInt64) -> Void

    let format: DiskFormat
    private let path: String
    /// Where it stays when all is done; nil for one that goes with the task's folder.
    private let keptPath: String?
    /// Writes the file at a path that doesn't exist, and syncs it.
    private let make: @Sendable (_ path: String, StopFlag, Report) throws -> Void
    private struct State {
        var report: (@Sendable (UInt64, UInt64) -> Void)?
        /// Whether a file that is there holds what this attempt wants.
        var isCurrent: Bool
    }

    private let state: Mutex<State>

    /// - Parameter isLasting: whether the file of an earlier attempt is as good. One that came from a server isn't:
    ///   nothing proves that the VM has the same content now, nor that all disks are of one moment.
    init(
        path: String, format: DiskFormat, keptAs keptPath: String?, isLasting: Bool,
        make: @escaping @Sendable (String, StopFlag, Report) throws -> Void
    ) {
        (self.path, self.format, self.keptPath, self.make) = (path, format, keptPath, make)
        state = Mutex(State(isCurrent: isLasting))
    }

    /// `report` hears of the file as it grows.
    func observe(_ report: @escaping @Sendable (_ done: UInt64, _ total: UInt64) -> Void) {
        state.withLock { $0.report = report }
    }

    /// The disk in the file, which is made if it isn't there.
    func open(_ stop: StopFlag) throws -> any DiskSource {
        if !state.withLock({ $0.isCurrent }) { try Files.remove(path) }
        if !Files.exists(path) {
            // An earlier attempt's, whose image is gone.
            if let keptPath, try KeptFile(of: path)?.isThere(keptPath) == true { try Files.remove(keptPath) }
            if let keptPath, Files.exists(keptPath) {
                throw MigrationError(
                    .alreadyExists, "\(keptPath) exists, and the source's disk would be kept there",
                    hint: "move it away, or leave --staged out")
            }
            let partial = "\(path).partial"
            try Files.remove(partial)
            let report = state.withLock { $0.report }
            try make(partial, stop) { report?($0, $1) }
            try Files.publish(partial, as: path)
        }
        state.withLock { $0.isCurrent = true }
        return StagedDisk(disk: try format.open(FileRegion(path: path)))
    }

    /// Has the next attempt make it again.
    func discard() throws { try Files.remove(path) }

    /// Gives a file that is kept its final name, unless an earlier attempt did.
    func keep() throws {
        guard let keptPath, Files.exists(path) || !Files.exists(keptPath) else { return }
        try KeptFile(path, name: Files.name(of: keptPath)).save()
        try Files.publish(path, as: keptPath)
    }

    /// Takes back what `keep` did, in this attempt or an earlier one.
    func withdraw() throws {
        guard let keptPath, try KeptFile(of: path)?.isThere(keptPath) == true else { return }
        try Files.publish(keptPath, as: path)
    }
}

/// The same content under whatever fence its folder is named for.
private struct StagedDisk: DiskSource {
    let disk: any DiskSource

    var capacity: UInt64 { disk.capacity }
    var formatName: String { disk.formatName }
    var files: [SourceFile] { disk.files }
    var identity: [String] {
        files.map { "\($0.identity.device) \($0.identity.inode) \($0.length) \($0.identity.modifiedNanoseconds)" }
    }

    func requireUnchanged() throws { try disk.requireUnchanged() }
    func makeReader() throws -> sending any DiskReader { try disk.makeReader() }
    func makeForwardReader(_ stream: any ByteSource) throws -> VMDK.ForwardReader? {
        try disk.makeForwardReader(stream)
    }
}

extension Staging {
    /// An image that qemu-img reads for us.
    convenience init(_ image: QEMUImage, of disk: Disk, work: String, rate: RateLimit?) {
        self.init(path: "\(work)/\(disk.id).raw", format: .raw, keptAs: nil, isLasting: true) { path, stop, report in
            try image.convert(
                to: path, .raw, options: .init(), bytesPerSecond: rate?.bytesPerSecond, stop: stop
            ) { share in
                report(UInt64(share * Double(disk.capacityBytes)), disk.capacityBytes)
            }
        }
    }

    /// A disk that comes from a server once, front to back.
    ///
    /// - Parameter open: its bytes from the beginning.
    convenience init(
        _ disk: Disk, work: String, keptAs keptPath: String,
        open: @escaping @Sendable (StopFlag) throws -> sending any ByteSource
    ) {
        self.init(
            path: "\(work)/\(disk.id).vmdk", format: .vmdk, keptAs: keptPath, isLasting: false
        ) { path, stop, report in
            let source = try open(stop)
            let file = try File(path, O_WRONLY | O_CREAT | O_EXCL, mode: 0o600)
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 4 << 20, alignment: 4096)
            defer { buffer.deallocate() }
            var done: UInt64 = 0
            while true {
                let count = try source.read(into: buffer)
                if count == 0 { break }
                try file.write(UnsafeRawBufferPointer(rebasing: buffer[..<count]), at: done)
                done += UInt64(count)
                report(done, source.length ?? 0)
            }
            try file.synchronize()
        }
    }
}

extension Disk {
    /// How qemu-img reads it, where this program can't.
    func foreignImage(at resolved: String) -> QEMUImage? {
        QEMUImage.Format(rawValue: source.format).map { QEMUImage(path: resolved, format: $0, isResolved: true) }
    }

    /// SHA-256 and length of the file, which must have the digests it was promised to have.
    func check(
        _ image: QEMUImage, stop: StopFlag, _ report: Staging.Report
    ) throws -> (sha256: String, bytes: UInt64) {
        var digests: [String: Digest] = ["sha256": Digest(.sha256)]
        for promise in source.expected where digests[promise.algorithm] == nil {
            guard let algorithm = Digest.Algorithm(rawValue: promise.algorithm) else {
                throw MigrationError(.invalidArgument, "\(id): unknown digest \"\(promise.algorithm)\"")
            }
            digests[promise.algorithm] = Digest(algorithm)
        }
        let file = try image.open()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 4 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        let size = UInt64(try file.status().st_size)
        var bytes: UInt64 = 0
        while true {
            try stop.check()
            if bytes.isMultiple(of: 64 << 20) { report(bytes, size) }
            let count = try file.read(at: bytes, into: buffer)
            if count == 0 { break }
            for digest in digests.values { digest.update(UnsafeRawBufferPointer(rebasing: buffer[..<count])) }
            bytes += UInt64(count)
        }
        let found = digests.mapValues { hex($0.finalize()) }
        for promise in source.expected where found[promise.algorithm] != promise.hex.lowercased() {
            throw MigrationError(
                .dataLoss,
                "\(source.path): its \(promise.algorithm) is \(found[promise.algorithm] ?? ""), not \(promise.hex)",
                hint: "copy the file again")
        }
        return (found["sha256"] ?? "", bytes)
    }
}
