import FlotillaProtocol
import HostKit
import MigrationModel

/// Takes functions from their drivers for vfio-pci and gives them back.
///
/// Every call holds a lock between processes and first finishes what a crash left: a bind under way is undone, a release
/// under way completed. The journal with the original drivers is on disk before the first write to sysfs. sysfs reports
/// no error when a driver refuses a device, so every step is judged by reading the `driver` link back. Blocks; unbinding
/// a driver takes as long as that driver wants.
package struct Binder: Sendable {
    /// A function whose driver was changed. Empty for none.
    package struct Change: Sendable, Encodable, Equatable {
        package var address: String
        package var from: String
        package var to: String

        package init(address: String, from: String, to: String) {
            self.address = address
            self.from = from
            self.to = to
        }
    }

    /// What a bind would do.
    package struct Plan: Sendable {
        package var handover: Handover
        /// In order.
        package var writes: [SysfsWrite]
        package var loadsDriver: Bool
    }

    static let driver = "vfio-pci"

    let sysfs: Sysfs
    let kernel: any SysfsWriter
    let journal: BindJournal
    private let folder: String
    private let proc: String
    private let lock: String
    private let loadDriver: @Sendable () throws -> Void

    /// - Parameters:
    ///   - folder: of the journal and the lock, made when missing; the ledger lies there too.
    ///   - proc: where procfs is mounted.
    ///   - loadDriver: makes `bus/pci/drivers/vfio-pci` appear.
    package init(
        sysfs: Sysfs = Sysfs(), kernel: (any SysfsWriter)? = nil, folder: String = GPULedger.folder,
        boot: String = bootID(), proc: String = "/proc",
        loadDriver: @escaping @Sendable () throws -> Void = loadVfioDriver
    ) {
        self.sysfs = sysfs
        self.kernel = kernel ?? KernelWriter(sysfs)
        journal = BindJournal(path: "\(folder)/bindings.json", boot: boot)
        lock = "\(folder)/bind.lock"
        self.folder = folder
        self.proc = proc
        self.loadDriver = loadDriver
    }

    /// What `bind` would do; changes nothing. Throws what `bind` would refuse with.
    package func plan(
        bind addresses: [PciAddress], consent: Consent = [], owner: GPUOwner? = nil, observe: () throws -> DeviceTree
    ) throws -> Plan {
        let handover = try Handover(binding: addresses, in: observe(), consent: consent, owner: owner)
        let steps = handover.all.filter { !isVfio(driver: $0.function.driver) }
        return Plan(
            handover: handover, writes: bindWrites(steps),
            loadsDriver: !steps.isEmpty && !sysfs.exists("bus/pci/drivers/\(Self.driver)"))
    }

    /// Binds the functions, their slots' other functions and their consumers to vfio-pci: all of them, or, on any
    /// failure, none. Those that are bound already stay. Returns what changed.
    ///
    /// - Parameters:
    ///   - owner: for whom; its own domain and reservations are no obstacle.
    ///   - observe: looks at the host, under the lock.
    /// - Throws: `failedPrecondition` when it is refused: nothing was changed. Anything else when it failed: every function
    ///   is back with its driver, or the message says which is not.
    package func bind(
        _ addresses: [PciAddress], consent: Consent = [], owner: GPUOwner? = nil, observe: () throws -> DeviceTree
    ) throws -> [Change] {
        try exclusively {
            var plan = try plan(bind: addresses, consent: consent, owner: owner, observe: observe)
            if plan.loadsDriver {
                try loadDriver()
                // That takes its time: somebody may use one of them meanwhile.
                plan = try self.plan(bind: addresses, consent: consent, owner: owner, observe: observe)
            }
            let steps = plan.handover.all.filter { !isVfio(driver: $0.function.driver) }
            let slots = plan.handover.requested.map(\.description)
            let before = try journal.read()
            let involved = Set(plan.handover.all.map(\.function.address))
            if let stuck = before.first(where: { $0.phase != .bound && involved.contains($0.address) }) {
                throw MigrationError(
                    .failedPrecondition,
                    "\(stuck.address) is on its way back to \(stuck.driver) since an earlier command, which failed",
                    hint: "flotilla gpu release \(stuck.address) says why")
            }
            guard !steps.isEmpty else {
                try claim(involved, for: slots)
                return []
            }
            let records = steps.map {
                BindRecord(
                    address: $0.function.address, driver: $0.function.driver, override: $0.driverOverride,
                    phase: .binding, requested: slots)
            }
            try journal.write(before.filter { !records.map(\.address).contains($0.address) } + records)
            Failpoint.gpuJournaled.hit()
            do {
                for write in plan.writes { try step(write) }
                Failpoint.gpuStep.hit()
                for record in records { try requireBound(record) }
                try claim(involved, for: slots)
            } catch {
                let cause = error as? MigrationError ?? MigrationError(.internal, "\(error)")
                try undo(records, because: cause)
            }
            Failpoint.gpuDone.hit()
            return records.map { Change(address: $0.address, from: $0.driver, to: Self.driver) }
        }
    }

    /// Finishes what a crash left. Every other call does it first; the worker calls it at start.
    ///
    /// - Throws: what failed; the next call tries again.
    @discardableResult
    package func recover() throws -> [Change] {
        try exclusively {
            let stuck = try journal.read().filter { $0.phase != .bound }
            return stuck.isEmpty ? [] : try finish(stuck)
        }
    }

    // MARK: -

    func exclusively(_ body: () throws -> [Change]) throws -> [Change] {
        try Files.createDirectories(Files.parent(of: lock), mode: 0o700)
        return try FileLock.holding(lock) {
            let unfinished = try journal.read().filter { $0.phase != .bound }
            // What fails keeps its record, and is in the way of nobody else's device.
            let recovered = unfinished.isEmpty ? [] : (try? finish(unfinished)) ?? []
            return try recovered + body()
        }
    }

    /// What a VM has got since stays with it, and keeps its record.
    private func finish(_ unfinished: [BindRecord]) throws -> [Change] {
        let holders = DeviceHolders(proc: proc)
        let reserved = try GPULedger(folder: folder, boot: journal.boot).reservations().filter { $0.state == .reserved }
        return try restore(unfinished) { record in
            let (address, now) = (record.address, driver(of: record.address))
            guard let function = PciAddress(address), now.isEmpty || isVfio(driver: now) else { return }
            let own = GPUResource(function: function, sysfs: sysfs)
            let user =
                holders.vfioUser(of: "bus/pci/devices/\(address)", sysfs: sysfs)
                ?? reserved.first { $0.resource.overlaps(own) }.map { "\($0.owner)" }
            guard let user else { return }
            throw MigrationError(
                .failedPrecondition,
                "\(address) is in use by \(user), and does not go back as an earlier command left it to",
                hint: "stop that virtual machine, or undeploy its domain; then flotilla gpu release \(address)")
        }
    }

    /// All overrides, then the old drivers off (consumers, which have the higher functions, before what they need), then
    /// vfio-pci on.
    private func bindWrites(_ steps: [DeviceFunction]) -> [SysfsWrite] {
        let addresses = steps.map(\.function.address)
        return addresses.map { Self.override($0, with: Self.driver) }
            + steps.reversed().filter { !$0.function.driver.isEmpty }.map { Self.unbind($0.function.address) }
            + addresses.map(Self.probe)
    }

    /// Nothing, as a newline, clears it; a write without a byte may not.
    static func override(_ address: String, with driver: String) -> SysfsWrite {
        SysfsWrite(attribute: "bus/pci/devices/\(address)/driver_override", text: "\(driver)\n")
    }
    static func unbind(_ address: String) -> SysfsWrite {
        SysfsWrite(attribute: "bus/pci/devices/\(address)/driver/unbind", text: "\(address)\n")
    }
    static func probe(_ address: String) -> SysfsWrite {
        SysfsWrite(attribute: "bus/pci/drivers_probe", text: "\(address)\n")
    }

    func step(_ write: SysfsWrite) throws {
        Failpoint.gpuStep.hit()
        // The driver may have let go on its own, with the one it needs.
        if write.attribute.hasSuffix("/driver/unbind") && !sysfs.exists(Files.parent(of: write.attribute)) { return }
        try kernel.write(write.text, to: write.attribute)
    }

    func driver(of address: String) -> String { sysfs.linkName("bus/pci/devices/\(address)/driver") ?? "" }

    private func requireBound(_ record: BindRecord) throws {
        let now = driver(of: record.address)
        guard now == Self.driver else {
            throw MigrationError(
                .internal,
                "the kernel did not bind \(record.address) to \(Self.driver): \(now.isEmpty ? "no driver" : now) has it",
                hint: "the kernel's log says why: journalctl -k | grep vfio")
        }
    }

    private func undo(_ records: [BindRecord], because cause: MigrationError) throws -> Never {
        do { try restore(records) } catch {
            throw MigrationError(
                .internal, "\(cause.message); and giving the functions back failed too: \(error)",
                hint: "run flotilla gpu release for them: it tries again", cause: cause.cause)
        }
        throw MigrationError(
            cause.code == .failedPrecondition ? .internal : cause.code,
            "\(cause.message); every function is back with its own driver", hint: cause.hint, cause: cause.cause)
    }

    /// All are bound now, and needed for these requested functions.
    private func claim(_ addresses: Set<String>, for requested: [String]) throws {
        var records = try journal.read()
        for index in records.indices where addresses.contains(records[index].address) {
            records[index].phase = .bound
            records[index].requested = Set(records[index].requested + requested).sorted()
        }
        try journal.write(records)
    }
}

/// Loads vfio-pci with modprobe, as an argument vector.
package func loadVfioDriver() throws {
    guard let modprobe = Program.find("modprobe") else {
        throw MigrationError(
            .failedPrecondition, "vfio-pci is not loaded, and there is no modprobe to load it", hint: "install kmod")
    }
    let outcome = try Program.run(modprobe, [Binder.driver])
    guard outcome.status == 0 else {
        throw MigrationError(
            .failedPrecondition, "modprobe \(Binder.driver) failed: \(outcome.output.prefix(1000))",
            hint: "install the kernel's full module package")
    }
}
