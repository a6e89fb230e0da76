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
                manifest = try await blockingCancellable("export") { stop in
                    try configuration.requireSource(source.path)
                    return try captureManifest(
                        from: source, vmName: vmName, stop: stop, allow: { try configuration.requireSource($0) })
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
                try await blocking("convert") {
                    for disk in request.manifest.disks { try configuration.requireSource(disk.source.path) }
                    try requireUnchanged(request.manifest)
                }
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
            let origin = try origin(of: request)
            let folder = try await blocking("convert") { try work.adopt(fence: call.fence, of: origin) }
            let export =
                isRemote
                ? try await blockingCancellable("export") { stop in
                    try configuration.openExport(request.manifest, task: call.task, stop: stop)
                } : nil
            var works: [DiskWork] = []
            do {
                let place = DiskPlace(format: format, work: folder, pool: pool.path, domain: request.domainName)
                // All disks are complete and verified before the first gets its final name.
                var notices: [DiskConversion.Notice] = []
                var findings: [Finding] = []
                var disks = request.manifest.disks
                do {
                    works = try await blocking("convert") {
                        try request.manifest.disks.map { disk in
                            guard let export else { return try DiskWork(disk, configuration, place) }
                            return try DiskWork(disk, of: export, request.manifest, configuration, place)
                        }
                    }
                    for (index, work) in works.enumerated() {
                        do {
                            notices.append(try await fetch(work, export, request.manifest, writer))
                            try await take(work, &disks[index], writer)
                        } catch var error as MigrationError {
                            error.message = "\(work.disk.text): \(error.message)"
                            throw error
                        }
                    }
                    if let export {
                        try await blockingCancellable("export") { try export.requireUnchanged(stop: $0) }
                    } else {
                        try await blocking("convert") { try requireUnchanged(request.manifest) }
                    }
                } catch {
                    guard let export, let left = await end(export, isDone: false, writer),
                        var failure = error as? MigrationError
                    else { throw error }
                    failure.message += "; besides, \(left.message)"
                    throw failure
                }
                if let export, let left = await end(export, isDone: true, writer) { findings.append(left.finding) }
                try await permit("publish-disks", call)
                for (index, work) in works.enumerated() {
                    let notice = notices[index]
                    let result = try await blocking("publish") {
                        let result = try work.conversion.publish(notice)
                        try work.staging?.keep()
                        return result
                    }
                    disks[index].take(result, isSource: work.foreign == nil)
                    try await writer.step(work.disk.id, "written to \(result.path)")
                }
                try await writer.write(
                    .with { [disks, findings] in
                        $0.result = .with { ($0.disks, $0.findings) = (disks, findings) }
                    })
            } catch let error as MigrationError where !error.keepsCheckpoint {
                // Nothing of this attempt can be of use to another.
                // What can't be tidied up now is the next attempt's; the person must hear of the cause.
                try? await blocking("convert") { [works] in
                    for each in works {
                        try each.conversion.withdraw()
                        try each.staging?.withdraw()
                    }
                    try work.remove()
                }
                throw error
            }
            return [:]
        }
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
        DeployService.Method.Undeploy.descriptor.fullyQualifiedMethod: UndeployRequest.self,
    ]
    guard let request = requests[method] else { return }
    do { _ = try request.init(serializedBytes: body) } catch {
        throw MigrationError(.invalidArgument, "its body is no \(request.protoMessageName)")
    }
}
