import FlotillaProtocol
import HostKit
import MigrationModel

extension Binder {
    /// What `release` would do, as pairs of a function and the driver it goes back to; nil: whichever the kernel picks.
    package struct ReleasePlan: Sendable {
        package var functions: [(address: String, driver: String?)]
        /// As far as it is known before what the kernel makes of them.
        package var writes: [SysfsWrite]
        var records: [BindRecord]
    }

    package func plan(
        release addresses: [PciAddress], owner: GPUOwner? = nil, observe: () throws -> DeviceTree
    ) throws -> ReleasePlan {
        let tree = try observe()
        let handover = try Handover(addresses, in: tree)
        let asked = Set(handover.functions.map(\.function.address))
        let journaled = try journal.read()
        // Group members that were taken along go back with the last function they were taken for.
        let along = journaled.filter { record in
            !asked.contains(record.address) && !record.requested.isEmpty && record.requested.allSatisfy(asked.contains)
        }
        let devices = handover.functions + along.compactMap { PciAddress($0.address).flatMap { tree[$0] } }
        try refuse(
            devices.filter { isVfio(driver: $0.function.driver) }.flatMap {
                useObstacles(of: $0, consent: [.console, .use], owner: owner)
            })

        let known = Dictionary(journaled.map { ($0.address, $0) }) { first, _ in first }
        let records: [BindRecord] = devices.compactMap { device in
            if let record = known[device.function.address] { return record }
            guard isVfio(driver: device.function.driver) else { return nil }
            // Bound by somebody else, or at boot: nobody wrote down from which driver, so the kernel shall choose.
            return BindRecord(
                address: device.function.address, driver: Self.anyDriver, override: "", phase: .bound,
                requested: [device.function.address])
        }
        return ReleasePlan(
            functions: records.map { ($0.address, $0.driver == Self.anyDriver ? nil : $0.driver) },
            writes: records.sorted { $0.address < $1.address }.flatMap { writes(restoring: $0) }, records: records)
    }

    /// The function's way back, from where it is now.
    private func writes(restoring record: BindRecord) -> [SysfsWrite] {
        let (address, now) = (record.address, driver(of: record.address))
        let override = sysfs.text("bus/pci/devices/\(address)/driver_override").map { $0 == "(null)" ? "" : $0 }
        let first = override == record.override ? [] : [Self.override(address, with: record.override)]
        if now == record.driver { return first }
        let isKernelsChoice = record.driver == Self.anyDriver && !isVfio(driver: now)
        let forgetting = record.driver == Self.anyDriver ? self.forgetting(address, in: now) : []
        return first + forgetting + (now.isEmpty || isKernelsChoice ? [] : [Self.unbind(address)])
            + (record.driver.isEmpty ? [] : [Self.probe(address)])
    }

    /// A driver that has the function's id from its boot options would take it back. Others that it has stay with it.
    private func forgetting(_ address: String, in driver: String) -> [SysfsWrite] {
        let (folder, list) = ("bus/pci/devices/\(address)", "bus/pci/drivers/\(driver)/\(Self.removeID)")
        guard isVfio(driver: driver), sysfs.exists(list), let vendor = sysfs.number("\(folder)/vendor"),
            let device = sysfs.number("\(folder)/device")
        else { return [] }
        let id = "\(String(vendor, radix: 16)) \(String(device, radix: 16))"
        return [SysfsWrite(attribute: list, text: "\(id)\n")]
    }

    private static let removeID = "remove_id"

    /// Gives functions, with all that was bound with them, back to the drivers they had. What is with its driver already
    /// stays. Returns what changed.
    ///
    /// - Parameters:
    ///   - wanted: of those that would go, only these; nil: all.
    ///   - before: is given the addresses that go, once nothing is refused any more and before the first is moved.
    /// - Throws: `failedPrecondition` when it is refused: nothing was changed. Else what failed; the next call of any kind
    ///   tries again.
    package func release(
        _ addresses: [PciAddress], only wanted: Set<String>? = nil, owner: GPUOwner? = nil,
        before: ([String]) throws -> Void = { _ in }, observe: () throws -> DeviceTree
    ) throws -> [Change] {
        try exclusively {
            let records = try plan(release: addresses, owner: owner, observe: observe).records.filter {
                wanted?.contains($0.address) ?? true
            }
            guard !records.isEmpty else { return [] }
            let chosen = Set(records.map(\.address))
            let others = try journal.read().filter { !chosen.contains($0.address) }.map { record in
                var record = record
                record.requested.removeAll(where: chosen.contains)
                return record
            }
            let releasing = records.map { record in
                var record = record
                record.phase = .releasing
                return record
            }
            try before(chosen.sorted())
            try journal.write(others + releasing)
            Failpoint.gpuJournaled.hit()
            let changes = try restore(releasing)
            Failpoint.gpuDone.hit()
            return changes
        }
    }

    /// The way back of what `plan` would bind.
    func writesBack(after plan: Plan) -> [SysfsWrite] {
        plan.handover.all.filter { !isVfio(driver: $0.function.driver) }.flatMap { device in
            let address = device.function.address
            return [Self.override(address, with: device.driverOverride), Self.unbind(address)]
                + (device.function.driver.isEmpty ? [] : [Self.probe(address)])
        }
    }

    /// Stands in a journal for a driver that nobody knows.
    static let anyDriver = "?"

    /// Brings every function back to its record, as far as possible, and forgets those that are. Throws the first failure.
    ///
    /// - Parameter check: throws for one that is to stay as it is.
    @discardableResult
    func restore(_ records: [BindRecord], check: (BindRecord) throws -> Void = { _ in }) throws -> [Change] {
        var changes: [Change] = []
        var failures: [MigrationError] = []
        var done: Set<String> = []
        // Suppliers first: a consumer's driver does not bind before the one it needs.
        for record in records.sorted(by: { $0.address < $1.address }) {
            do {
                let before = driver(of: record.address)
                try check(record)
                try restore(record)
                done.insert(record.address)
                let now = driver(of: record.address)
                // As it was before: nothing to try again.
                if record.driver == Self.anyDriver, isVfio(driver: now) { failures.append(takenBack(record, by: now)) }
                if now != before { changes.append(Change(address: record.address, from: before, to: now)) }
            } catch {
                failures.append(error as? MigrationError ?? MigrationError(.internal, "\(error)"))
            }
        }
        Failpoint.gpuStep.hit()
        try journal.write(journal.read().filter { !done.contains($0.address) })
        guard failures.isEmpty else {
            throw MigrationError(
                .internal, failures.map(\.message).joined(separator: "; "),
                hint: failures.compactMap(\.hint).first
                    ?? "the kernel's log says why: journalctl -k; the next flotilla gpu command tries again")
        }
        return changes
    }

    private func takenBack(_ record: BindRecord, by driver: String) -> MigrationError {
        MigrationError(
            .internal, "\(driver) took \(record.address) back: its id is among those that driver takes",
            hint: "flotilla gpu prepare --revert and a reboot give it back, if that bound it; else take its id out of "
                + "the options for \(driver) (/etc/modprobe.d, the kernel's command line) and reboot")
    }

    private func restore(_ record: BindRecord) throws {
        let address = record.address
        guard sysfs.exists("bus/pci/devices/\(address)") else { return }  // Taken out meanwhile.
        for write in writes(restoring: record) {
            // Fails where the id is not in that list, which can't be read.
            if write.attribute.hasSuffix("/\(Self.removeID)") { try? step(write) } else { try step(write) }
        }
        if record.driver == Self.anyDriver || driver(of: address) == record.driver { return }
        if record.driver.isEmpty {
            throw MigrationError(.internal, "\(driver(of: address)) does not let go of \(address)")
        }
        // Another driver came first, or the device's id was given to vfio-pci: ask for its own by name.
        if !driver(of: address).isEmpty { try step(Self.unbind(address)) }
        let bind = "bus/pci/drivers/\(record.driver)/bind"
        if sysfs.exists(bind) { try? step(SysfsWrite(attribute: bind, text: "\(address)\n")) }
        guard driver(of: address) == record.driver else {
            let now = driver(of: address)
            throw MigrationError(
                .internal, "\(address) did not go back to \(record.driver): \(now.isEmpty ? "no driver" : now) has it")
        }
    }
}
