import Convert
import Deploy
import DiskImage
import Export
import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import VSphere

/// Where a task's disks are made and go.
struct DiskPlace {
    var format: TargetFormat
    /// The task's folder.
    var work: String
    var pool: String
    var domain: String

    func path(of disk: Disk, _ format: String) -> String {
        targetPath(pool: pool, domain: domain, disk: disk.id, format: format)
    }
}

/// One disk's way: perhaps into a file on this host first, then into an image.
struct DiskWork: Sendable {
    let disk: Disk
    let conversion: DiskConversion
    let staging: Staging?
    /// Set for an image that qemu-img reads for us.
    let foreign: QEMUImage?

    init(
        _ disk: Disk, _ origin: DiskConversion.Source, _ place: DiskPlace, _ options: DiskConversion.Options,
        staging: Staging? = nil, foreign: QEMUImage? = nil
    ) throws {
        guard isDiskID(disk.id) else { throw MigrationError(.invalidArgument, "\"\(disk.id)\" is not a disk id") }
        self.disk = disk
        self.staging = staging
        self.foreign = foreign
        conversion = DiskConversion(
            origin, to: .file(place.format, path: place.path(of: disk, place.format.rawValue)),
            workDirectory: place.work, name: disk.id, options: options)
    }

    /// Of one captured disk that lies on this host.
    init(_ disk: Disk, _ configuration: WorkerConfiguration, _ place: DiskPlace) throws {
        var options = DiskConversion.Options()
        options.rateLimit = configuration.rateLimit
        let path = try configuration.requireSource(disk.source.path)
        if let image = disk.foreignImage(at: path) {
            let staging = Staging(image, of: disk, work: place.work, rate: configuration.rateLimit)
            try self.init(
                disk, .disk(name: disk.source.path) { try staging.open($0) }, place, options, staging: staging,
                foreign: image)
            return
        }
        guard let format = DiskFormat(rawValue: disk.source.format) else {
            throw MigrationError(
                .unimplemented, "\(disk.id): source format \"\(disk.source.format)\" is not read by this version")
        }
        for digest in disk.source.expected {
            guard let algorithm = Digest.Algorithm(rawValue: digest.algorithm) else {
                throw MigrationError(.invalidArgument, "\(disk.id): unknown digest \"\(digest.algorithm)\"")
            }
            options.expectedDigests[algorithm] = digest.hex
        }
        let region = FileRegion(
            path: path, offset: disk.source.offset, length: disk.source.length == 0 ? nil : disk.source.length,
            isResolved: true)
        try self.init(disk, .file(region, format), place, options)
    }
}

/// Names become file names: "disk" and a number, as captures make them.
func isDiskID(_ id: String) -> Bool { id.hasPrefix("disk") && id.count > 4 && Int(id.dropFirst(4)) != nil }

extension Disk {
    /// "disk1 (web-disk2.vmdk)".
    var text: String { "\(id) (\(source.member.isEmpty ? Files.name(of: source.path) : source.member))" }

    /// - Parameter isSource: whether what was converted is the source's own file.
    mutating func take(_ result: DiskConversion.Result, isSource: Bool) {
        if isSource {
            source.sha256 = result.sourceSHA256 ?? ""
            source.streamBytes = result.sourceBytes
        }
        source.contentSha256 = result.contentDigest ?? ""
        source.contentChunkBytes = UInt64(Chunk.size)
        target = .with {
            $0.path = result.path
            $0.format = result.format.rawValue
            $0.allocatedBytes = result.allocatedBytes
        }
    }
}

extension DiskConversion.Notice {
    /// What a person should know; nil for the usual.
    var text: String? {
        switch self {
        case .fresh: nil
        case .resumed: "continued from its checkpoint"
        case .restarted: "started over: its source changed since the interrupted run"
        case .alreadyPublished: "was finished by an earlier run"
        }
    }
}

extension MigrationError {
    /// Of what is left on a source, for the end.
    var finding: Finding {
        .with {
            $0.severity = .warning
            $0.subject = "source"
            $0.message = cause.map { "\(message): \($0)" } ?? message
            $0.remedy = hint ?? ""
        }
    }
}

/// Throws `failedPrecondition` when the source is not what was captured.
func requireUnchanged(_ manifest: Manifest) throws {
    guard try fingerprint(of: manifest) == manifest.source.fingerprint else {
        throw MigrationError(
            .failedPrecondition, "\(manifest.source.path) or one of its files changed since it was captured",
            hint: "make sure that nothing writes to it and run the same command again")
    }
}

extension Manifest {
    /// "2 CPUs, 512 MiB, EFI, 2 disks (384 MiB), 2 NICs, 1 GPU".
    var summary: String {
        let bytes = disks.reduce(0) { $0 &+ $1.capacityBytes }
        var parts = [
            counted(Int(vm.cpu.count), "CPU"), byteText(vm.memory.bytes), vm.firmware == .efi ? "EFI" : "BIOS",
        ]
        parts.append("\(counted(disks.count, "disk")) (\(byteText(bytes)))")
        parts.append(counted(nics.count, "NIC"))
        if !gpus.isEmpty { parts.append(counted(gpus.count, "GPU")) }
        if !otherDevices.isEmpty { parts.append(counted(otherDevices.count, "other device")) }
        return parts.joined(separator: ", ")
    }
}

private func counted(_ count: Int, _ noun: String) -> String { "\(count) \(noun)\(count == 1 ? "" : "s")" }

/// What a conversion's files are made from and for. Each snapshot is of another moment, which no fingerprint tells.
func origin(of request: ConvertRequest) throws -> String {
    let source = request.manifest.source
    let parts = [source.fingerprint, request.format, request.domainName]
    return (try isSnapshot(source) ? parts + ["\(UInt64.random(in: 0 ... .max))"] : parts).joined(separator: "\n")
}

private func isSnapshot(_ source: ManifestSource) throws -> Bool {
    try source.kind == .vsphere && VSphereURL(parsing: source.url).snapshot
}

/// The disks of an earlier conversion when all of their images are there; nil when none is, so that they are to be
/// converted. Anything between is for a person to decide. Blocking.
func keptDisks(_ request: ConvertRequest, _ pool: PoolFolder, _ format: TargetFormat) throws -> [Disk]? {
    let disks = request.manifest.disks
    let there = disks.filter { $0.hasTarget && Files.isRegular($0.target.path) }
    guard let first = there.first else { return nil }
    let again =
        "undefine domain \(request.domainName) and remove its disks, then run the same command again to convert anew"
    guard there.count == disks.count else {
        let gone = disks.filter { disk in !there.contains { $0.id == disk.id } }.map { $0.target.path }
        throw MigrationError(
            .failedPrecondition,
            "of the converted disks \(gone.joined(separator: ", ")) is gone, \(first.target.path) is not",
            hint: again)
    }
    guard try !isSnapshot(request.manifest.source) else {
        throw MigrationError(
            .failedPrecondition, "\(first.target.path) was converted from an earlier snapshot of the VM", hint: again)
    }
    guard request.convertedFingerprint == request.manifest.source.fingerprint else {
        throw MigrationError(
            .failedPrecondition,
            "\(request.manifest.source.path) changed since \(first.target.path) was converted from it",
            hint: again)
    }
    for disk in disks {
        let path = targetPath(pool: pool.path, domain: request.domainName, disk: disk.id, format: format.rawValue)
        guard disk.target.path == path else {
            throw MigrationError(
                .failedPrecondition, "\(disk.id) was converted to \(disk.target.path) already, not to \(path)",
                hint: again)
        }
    }
    return disks
}
