import FlotillaProtocol
import FoundationEssentials
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf

/// A migration's way from stage to stage.
extension Transitions {
    /// - Parameter spoken: what was said of the end; nil when nobody did.
    mutating func finish(_ task: TaskRecord, _ outcome: TaskMachine.Outcome, _ spoken: TaskEnded?) throws {
        guard var migration = try store.migration(id: task.migrationID), !migration.state.isFinal else { return }
        switch outcome {
        case .failure(let code):
            var ended = spoken ?? task.unspokenEnd
            if ended.code == 0 { ended.code = Int32(code) }
            if task.stage == .undeploy { return try finishTakingBack(&migration, failure: ended) }
            if !isReplaced, try mayBeLeft(task, spoken), try takeBack(&migration, because: ended) { return }
            migration.state = ended.finalState
            migration.error = ended
            try save(migration)
        case .success:
            do {
                try advance(&migration, after: task, spoken ?? TaskEnded())
            } catch let error as MigrationError {
                migration.state = .failed
                migration.error = TaskEnded(error)
                try save(migration)
            }
        }
    }

    private mutating func advance(
        _ migration: inout MigrationRecord, after task: TaskRecord, _ ended: TaskEnded
    ) throws {
        let stage = task.stage
        switch stage {
        case .export:
            let last: ExportUpdate = try decode(ended.result, stage)
            guard case .result(let result) = last.update else { throw resultMissing(stage) }
            try afterExport(&migration, result.manifest)
        case .convert:
            let last: ConvertUpdate = try decode(ended.result, stage)
            guard case .result(let result) = last.update, result.disks.count == migration.manifest?.disks.count else {
                throw resultMissing(stage)
            }
            migration.manifest?.disks = result.disks
            migration.findings += result.findings
            try startDeploy(&migration, .deploy)
        case .deploy:
            let last: DeployUpdate = try decode(ended.result, stage)
            guard case .result(let result) = last.update else { throw resultMissing(stage) }
            // A check tells how the domain is now; how it was made and proved stays.
            let mode = try DeployRequest(serializedBytes: task.request).mode
            if mode == .deploy { try noteDone(task) }
            if mode == .check, migration.result?.domainUuid == result.domainUuid {
                migration.result?.domainState = result.domainState
            } else {
                migration.result = result
            }
            migration.findings += result.findings
            migration.state = migration.request.dryRun ? .ready : .done
            try save(migration)
        case .undeploy:
            let last: DeployUpdate = try decode(ended.result, stage)
            guard case .result(let result) = last.update else { throw resultMissing(stage) }
            migration.findings += result.findings
            migration.result = nil
            try finishTakingBack(&migration, failure: nil)
        }
    }

    /// Of a convert that had ended well when its worker heard that it was cancelled: the next run goes on with its images.
    func keepDisks(of task: TaskRecord, _ ended: TaskEnded) throws {
        guard task.stage == .convert, ended.code == 0, var migration = try store.migration(id: task.migrationID),
            let last = try? ConvertUpdate(serializedBytes: ended.result), case .result(let result) = last.update,
            let manifest = migration.manifest, try manifest.source.fingerprint == task.convertedFingerprint,
            result.disks.count == manifest.disks.count
        else { return }
        migration.manifest?.disks = result.disks
        migration.findings += result.findings
        try store.save(migration)
        var task = task
        task.machine.countAsDone()
        try store.save(task)
    }

    private func decode<Update: SwiftProtobuf.Message>(_ result: Data, _ stage: Stage) throws -> Update {
        do { return try Update(serializedBytes: result) } catch { throw resultMissing(stage) }
    }

    private func resultMissing(_ stage: Stage) -> MigrationError {
        MigrationError(
            .internal, "the \(stage.rawValue) task ended well but without a result that can be read",
            hint: "are coordinator and worker of the same version?")
    }

    private mutating func afterExport(_ migration: inout MigrationRecord, _ captured: Manifest) throws {
        let request = migration.request
        let options = try settledOptions(of: migration, for: captured.vm)
        guard let host = try store.host(request.host)?.profile else {
            throw MigrationError(
                .unavailable, "host \(request.host) has not told of itself yet", hint: "is its worker running?")
        }
        let earlier = migration.manifest
        let convert = try store.task(id: Stage.convert.taskID(ofMigration: migration.id))
        let wasConverted = convert?.machine.state == .succeeded
        // Of the source that the disks were made from. What was captured since, for a dry run or before a refusal, is not.
        let converted = try wasConverted ? convert?.convertedFingerprint ?? "" : ""
        let isDeployed = migration.result != nil && host.domains.contains { $0.migrationID == migration.id }
        var manifest = captured
        manifest.migrationID = migration.id
        if wasConverted, let earlier { manifest.keepTargets(of: earlier) }
        migration.findings.removeAll { $0.subject != MigrationRecord.requestSubject }
        let findings = preflight(
            manifest: manifest, options: options, pool: request.pool, diskFormat: request.format,
            host: try manifest.gpus.isEmpty && manifest.otherDevices.isEmpty
                ? host : withoutPromised(host, besides: migration))

        if wasConverted, isDeployed, let earlier {
            // A domain is in use that was made from the source as it was: a changed one must not pass for done.
            guard converted == captured.source.fingerprint else {
                throw MigrationError(
                    .failedPrecondition, "\(request.sourceURL) changed since \(earlier.vm.name) was migrated from it",
                    hint: "undefine domain \(options.domainName) and remove its disks, then run the same command again "
                        + "to migrate it anew")
            }
            migration.findings += findings.filter { $0.severity != .blocked }
            return try startDeploy(&migration, .check)
        }
        // Whatever was done is gone.
        migration.result = nil
        migration.manifest = manifest
        migration.findings += findings
        if migration.isBlocked {
            let error = MigrationError(.failedPrecondition, "preflight found what is in the way")
            if try takeBack(&migration, because: TaskEnded(error)) { return }
            migration.state = .preflightBlocked
            return try save(migration)
        }
        if request.dryRun {
            migration.manifest?.planTargets(request, options, on: host)
            return try startDeploy(&migration, .dryRun)
        }
        migration.state = .converting
        try save(migration)
        try start(
            .convert, of: migration,
            ConvertRequest.with {
                $0.manifest = manifest
                $0.convertedFingerprint = converted
                $0.pool = request.pool
                $0.format = request.format
                $0.domainName = options.domainName
            })
    }

    /// The host without the devices that migrations which are further on will take: known before a disk is converted.
    private func withoutPromised(_ host: HostProfile, besides migration: MigrationRecord) throws -> HostProfile {
        var host = host
        for other in try store.migrations(in: [.converting, .deploying])
        where other.id != migration.id && other.request.host == migration.request.host && !other.request.dryRun {
            if let manifest = other.manifest { host.take(manifest, other.request.options.settled(for: manifest.vm)) }
        }
        return host
    }

    /// A domain that has a name already keeps it, whatever would be made of the VM's name today.
    func settledOptions(of migration: MigrationRecord, for vm: VirtualMachine) throws -> DeployOptions {
        var options = migration.request.options
        let earlier = domainName(for: vm.name, tellsScriptsApart: false)
        if options.domainName.isEmpty, earlier != domainName(for: vm.name),
            let task = try store.task(id: Stage.convert.taskID(ofMigration: migration.id)),
            try ConvertRequest(serializedBytes: task.request).domainName == earlier
        {
            options.domainName = earlier
        }
        return options.settled(for: vm)
    }

    private mutating func startDeploy(_ migration: inout MigrationRecord, _ mode: DeployMode) throws {
        migration.state = .deploying
        try save(migration)
        let manifest = migration.manifest ?? Manifest()
        let options = try settledOptions(of: migration, for: manifest.vm)
        let isDoneBefore = try wasDone(migration.id)
        try start(
            .deploy, of: migration,
            DeployRequest.with {
                $0.manifest = manifest
                $0.options = options
                $0.mode = mode
                $0.doneBefore = isDoneBefore
            })
    }

    /// Makes the stage's task, or runs it again with a new request and larger fence.
    mutating func start(
        _ stage: Stage, of migration: MigrationRecord, _ request: some SwiftProtobuf.Message
    ) throws {
        let body: [UInt8] = try request.serializedBytes()
        var task: TaskRecord
        if let earlier = try store.task(id: stage.taskID(ofMigration: migration.id)) {
            task = earlier
            task.request = body
            task.host = migration.request.host
            (task.startedAt, task.endedAt) = (nil, nil)
            task = try apply(.restart, to: task)
        } else {
            task = TaskRecord(
                migrationID: migration.id, stage: stage, host: migration.request.host, request: body, now: now)
        }
        let hasDeadline = stage != .undeploy && migration.request.hasDeadline
        task.deadline = hasDeadline ? migration.request.deadline.moment : nil
        // Deploys and what takes them back have one order: the host's devices know only the last.
        let rival: Stage? = stage == .deploy ? .undeploy : stage == .undeploy ? .deploy : nil
        if let rival, let other = try store.task(id: rival.taskID(ofMigration: migration.id)) {
            task.machine.outrank(other.machine)
        }
        try store.save(task)
        _ = try apply(.dispatch, to: task)
    }

    mutating func save(_ record: MigrationRecord) throws {
        var record = record
        record.updatedAt = now
        let isNews = try store.migrationState(id: record.id) != record.state
        try store.save(record)
        if isNews { try notify(.of(record, at: now)) }
        try announce(record.id)
    }

    mutating func announce(_ id: String) throws {
        guard isWatched(id), let record = try store.migration(id: id) else { return }
        let migration = try present(record)
        if let last = effects.changed.lastIndex(where: { $0.id == id }) { effects.changed.remove(at: last) }
        effects.changed.append(migration)
    }
}

extension MigrationRecord {
    static let requestSubject = "request"

    /// By what preflight found.
    var isBlocked: Bool { findings.contains { $0.severity == .blocked } }

    /// Says something about the request itself.
    mutating func notice(_ message: String, remedy: String) {
        findings.append(
            .with {
                $0.severity = .note
                $0.subject = Self.requestSubject
                $0.message = message
                $0.remedy = remedy
            })
    }
}

extension TaskRecord {
    /// The fingerprint of the source that a convert was asked for.
    var convertedFingerprint: String {
        get throws { try ConvertRequest(serializedBytes: request).manifest.source.fingerprint }
    }

    /// What is said of an end that no worker reported: nothing of a cancelled task.
    var unspokenEnd: TaskEnded {
        guard case .failed(let code) = machine.state else { return TaskEnded() }
        if let deadline, code == MigrationError.Code.deadlineExceeded.rawValue {
            return .with {
                $0.code = Int32(code)
                $0.message = "the \(stage.rawValue) had not ended by the deadline, \(deadline.timestamp.text)"
                $0.hint = TaskEnded.laterDeadline
            }
        }
        return .with {
            $0.code = Int32(code)
            $0.message =
                "\(machine.losses) attempts at the \(stage.rawValue) were lost together with the worker of \(host)"
            $0.hint =
                "find out in that worker's log what ends it or keeps it from task \(id), then flotilla migration retry "
                + migrationID
        }
    }
}

extension DeployOptions {
    /// With what depends on the VM decided: its domain's name, and no source UUID where there is none.
    func settled(for vm: VirtualMachine) -> DeployOptions {
        var options = self
        options.domainName = domainName(for: vm)
        options.keepUuid = keepUuid && !vm.biosUuid.isEmpty
        return options
    }
}

extension Manifest {
    /// What an earlier conversion of the same disks made.
    fileprivate mutating func keepTargets(of earlier: Manifest) {
        guard disks.map(\.id) == earlier.disks.map(\.id) else { return }
        for (index, disk) in earlier.disks.enumerated() where disk.hasTarget {
            disks[index].target = disk.target
            disks[index].source.sha256 = disk.source.sha256
            disks[index].source.contentSha256 = disk.source.contentSha256
            disks[index].source.contentChunkBytes = disk.source.contentChunkBytes
            disks[index].source.streamBytes = disk.source.streamBytes
        }
    }

    /// Names the images that a conversion would make, for a dry run.
    fileprivate mutating func planTargets(
        _ request: SubmitMigrationRequest, _ options: DeployOptions, on host: HostProfile
    ) {
        let folder = host.pools.first { $0.name == request.pool }?.path ?? request.pool
        for index in disks.indices {
            disks[index].target.format = request.format
            disks[index].target.path = targetPath(
                pool: folder, domain: options.domainName, disk: disks[index].id, format: request.format)
        }
    }
}
