import Convert
import Deploy
import DiskImage
import Export
import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf
import VSphere

/// The three stages as gRPC services: ordinary handlers that know nothing of queues. Each reads its request, works
/// through the stage's own module on a blocking thread, and streams progress and at last a result.
///
/// What every handler keeps to: it may be run again after a crash at any point, with a larger fence; it stops soon
/// after its Swift task is cancelled; it asks for a permit right before what can't be taken back.
struct ExportHandler: ExportService.ServiceProtocol {
    let configuration: WorkerConfiguration

    func export(
        request: ServerRequest<ExportRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ExportUpdate> {
        try CallIdentity(request.metadata).require(.export, ofMigration: request.message.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            let vmName = request.vmName.isEmpty ? nil : request.vmName
            var manifest: Manifest
            if VSphereURL.isOne(request.sourceURL) {
                manifest = try await blockingCancellable("export") { stop in
                    try configuration.capture(request.sourceURL, vmName: vmName, stop: stop)
                }
            } else {
                let source = try SourceURL(parsing: request.sourceURL)
                try configuration.requireSource(source.path)
                manifest = try await blockingCancellable("export") { stop in
                    try captureManifest(
                        from: source, vmName: vmName, stop: stop, allow: configuration.requireSource)
                }
            }
            manifest.migrationID = request.migrationID
            manifest.capturedAt = Moment.now.timestamp
            manifest.createdBy = "flotilla \(version)"
            try await configuration.record(manifest)
            Failpoint.exportManifestWritten.hit()
            try await writer.write(
                .with {
                    $0.step = .with { [manifest] in
                        $0.subject = manifest.vm.name
                        $0.message = manifest.summary
                    }
                })
            try await writer.write(.with { [manifest] in $0.result = .with { $0.manifest = manifest } })
            return [:]
        }
    }
}

struct ConvertHandler: ConvertService.ServiceProtocol {
    let configuration: WorkerConfiguration
    let permit: @Sendable (String, CallIdentity) async throws -> Void

    func convert(
        request: ServerRequest<ConvertRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ConvertUpdate> {
        let call = try CallIdentity(request.metadata)
        try call.require(.convert, ofMigration: request.message.manifest.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            let pool = try configuration.pool(named: request.pool)
            guard isValidDomainName(request.domainName) else {
                throw MigrationError(.invalidArgument, "\"\(request.domainName)\" can't be a domain's name")
            }
            guard let format = TargetFormat(rawValue: request.format) else {
                throw MigrationError(.invalidArgument, "target format \"\(request.format)\" is neither qcow2 nor raw")
            }
            let isRemote = request.manifest.source.kind == .vsphere
            if !isRemote {
                for disk in request.manifest.disks { try configuration.requireSource(disk.source.path) }
                try await blocking("convert") { try requireUnchanged(request.manifest) }
            }

            if let kept = try await blocking("convert", { try keptDisks(request, pool, format) }) {
                if isRemote {
                    try await blockingCancellable("convert") { stop in
                        try configuration.requireUnchangedVM(request.manifest, stop: stop)
                    }
                }
                try await writer.write(.with { $0.result = .with { $0.disks = kept } })
                return [:]
            }

            let work = WorkDirectory(pool: pool.path, task: call.task)
            let folder = try await blocking("convert") { try work.adopt(fence: call.fence) }
            let export =
                isRemote
                ? try await blockingCancellable("export") { stop in
                    try configuration.openExport(request.manifest, task: call.task, stop: stop)
                } : nil
            var conversions: [DiskConversion] = []
            do {
                conversions = try request.manifest.disks.map {
                    if let export {
                        return try DiskConversion(
                            $0, of: export, request.manifest, configuration, format: format, work: folder,
                            pool: pool.path, domain: request.domainName)
                    }
                    return try DiskConversion(
                        $0, format: format, work: folder, pool: pool.path, domain: request.domainName,
                        rateLimit: configuration.rateLimit)
                }
                // All disks are complete and verified before the first gets its final name.
                var notices: [DiskConversion.Notice] = []
                do {
                    for (disk, conversion) in zip(request.manifest.disks, conversions) {
                        do {
                            notices.append(try await fetch(disk, conversion, export, request.manifest, writer))
                        } catch var error as MigrationError {
                            error.message = "\(disk.text): \(error.message)"
                            throw error
                        }
                    }
                } catch {
                    if let export { await end(export, isDone: false, writer) }
                    throw error
                }
                if let export { await end(export, isDone: true, writer) }
                try await permit("publish-disks", call)
                var disks = request.manifest.disks
                for (index, conversion) in conversions.enumerated() {
                    let notice = notices[index]
                    let result = try await blocking("publish") { try conversion.publish(notice) }
                    disks[index].take(result)
                    try await writer.step(conversion.name, "written to \(result.path)")
                }
                try await writer.write(.with { [disks] in $0.result = .with { $0.disks = disks } })
            } catch let error as MigrationError where !error.keepsCheckpoint {
                // Nothing of this attempt can be of use to another.
                // What can't be tidied up now is the next attempt's; the person must hear of the cause.
                try? await blocking("convert") { [conversions] in
                    for conversion in conversions { try conversion.withdraw() }
                    try work.remove()
                }
                throw error
            }
            return [:]
        }
    }

    /// Converts one disk; one that comes from a server as often as it takes.
    private func fetch(
        _ disk: Disk, _ conversion: DiskConversion, _ export: VMExport?, _ manifest: Manifest,
        _ writer: RPCWriter<ConvertUpdate>
    ) async throws -> DiskConversion.Notice {
        guard let export else { return try await run(conversion, writer) { _ in } }
        let total = manifest.disks.reduce(0) { $0 &+ $1.capacityBytes }
        let before = manifest.disks.prefix { $0.id != disk.id }.reduce(0) { $0 &+ $1.capacityBytes }
        let source = try configuration.vsphere.source(
            of: VSphereURL(parsing: manifest.source.url), host: configuration.host)
        let slots = configuration.vsphere.slots(source, manifest)
        let isRanges = try VSphereURL(parsing: manifest.source.url).transfer == .datastore
        var retries = TransferRetries()
        while true {
            do {
                return try await run(conversion, writer, slots) { report in
                    // Of another size than the VM's: another disk. Nothing of it may go further.
                    guard report.capacity == disk.capacityBytes else {
                        throw MigrationError(
                            .failedPrecondition,
                            "the server sent a disk of \(report.capacity) bytes, the VM's has \(disk.capacityBytes)",
                            hint: "look at the VM on the source, then migrate it again")
                    }
                    let done = Double(before &+ report.doneBytes) / Double(max(1, total))
                    export.report(percent: Int(done * 100))
                }
            } catch let error as MigrationError {
                guard !Task.isCancelled, let pause = retries.pause(after: error, isRanges: isRanges) else {
                    throw error
                }
                try await writer.step(conversion.name, "again in \(pause) s: \(error.message)")
                try await Task.sleep(for: .seconds(pause))
            }
        }
    }

    /// What is left on the server is said, and is no reason to throw the disks away.
    private func end(_ export: VMExport, isDone: Bool, _ writer: RPCWriter<ConvertUpdate>) async {
        let left = try? await blocking("export") { export.end(isDone: isDone) }
        if let left = left ?? nil { try? await writer.step("source", "\(left)") }
    }

    /// - Parameter check: sees each report before anyone else and may end the conversion.
    private func run(
        _ conversion: DiskConversion, _ writer: RPCWriter<ConvertUpdate>, _ slots: TransferSlots? = nil,
        check: @escaping @Sendable (DiskConversion.Progress) throws -> Void
    ) async throws -> DiskConversion.Notice {
        let (reports, continuation) = AsyncStream<DiskConversion.Progress>.makeStream(
            bufferingPolicy: .bufferingNewest(1))
        let notice = try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                for await report in reports {
                    try await writer.write(
                        .with {
                            $0.progress = .with {
                                $0.subject = conversion.name
                                $0.phase = "converting"
                                $0.bytesDone = report.doneBytes
                                $0.bytesTotal = report.capacity
                                $0.bytesWritten = report.writtenBytes
                            }
                        })
                }
            }
            defer { continuation.finish() }
            return try await blockingCancellable("convert") { stop in
                func convert() throws -> DiskConversion.Notice {
                    var failure: (any Error)?
                    let notice = try conversion.convert(stop: stop) { report in
                        do {
                            try check(report)
                            continuation.yield(report)
                        } catch {
                            failure = error
                            stop.set(error as? MigrationError ?? MigrationError(.internal, "\(error)"))
                        }
                    }
                    if let failure { throw failure }
                    return notice
                }
                return try slots?.with(stop, convert) ?? convert()
            }
        }
        if let text = notice.text { try await writer.step(conversion.name, text) }
        return notice
    }
}

extension RPCWriter<ConvertUpdate> {
    fileprivate func step(_ subject: String, _ message: String) async throws {
        try await write(
            .with {
                $0.step = .with {
                    $0.subject = subject
                    $0.message = message
                }
            })
    }
}

extension CallIdentity {
    /// Throws unless the call is the stage's task of this migration: ids become file names.
    func require(_ stage: Stage, ofMigration id: String) throws {
        guard task == stage.taskID(ofMigration: id) else {
            throw MigrationError(.invalidArgument, "task \(task) is not the \(stage.rawValue) of migration '\(id)'")
        }
    }
}

/// Throws `invalidArgument` for a body that is no request of its method.
@Sendable func requireRequest(method: String, body: [UInt8]) throws {
    let requests: [String: any SwiftProtobuf.Message.Type] = [
        ExportService.Method.Export.descriptor.fullyQualifiedMethod: ExportRequest.self,
        ConvertService.Method.Convert.descriptor.fullyQualifiedMethod: ConvertRequest.self,
        DeployService.Method.Deploy.descriptor.fullyQualifiedMethod: DeployRequest.self,
    ]
    guard let request = requests[method] else { return }
    do { _ = try request.init(serializedBytes: body) } catch {
        throw MigrationError(.invalidArgument, "its body is no \(request.protoMessageName)")
    }
}
