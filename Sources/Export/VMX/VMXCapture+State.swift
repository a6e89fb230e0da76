import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf

extension VMXCapture {
    /// Power state and snapshots, from the VMX and the files beside it.
    mutating func captureState() throws {
        manifest.vm.powerState = .poweredOff
        if let state = file.text("checkpoint.vmState") {
            manifest.vm.powerState = .suspended
            manifest.block(
                "vm", "the VM is suspended (\(state.printable)); its memory can't be carried",
                remedy: "resume it on the source and shut it down")
        }
        // Workstation's lock folders, and ESXi's lock files on NFS.
        let locks = try Files.list(folder.path).filter { $0.lowercased().hasSuffix(".lck") || $0.hasPrefix(".lck-") }
        if !locks.isEmpty {
            manifest.vm.powerState = .poweredOn
            manifest.block(
                "vm", "the VM's files are in use: \(locks.prefix(4).map(\.printable).joined(separator: ", "))",
                remedy: "shut the VM down; a lock left by a crash goes when the VM is started and shut down once")
        } else if try file.flag("cleanShutdown") == false {
            manifest.warn(
                "vm", "the VM was not shut down cleanly (cleanShutdown = FALSE): it may be running or have crashed",
                remedy: "make sure it is off; the guest's file systems are checked at its next boot")
        }
        try captureSnapshots()
    }

    private mutating func captureSnapshots() throws {
        let snapshotFile = (name.lowercased().hasSuffix(".vmx") ? String(name.dropLast(4)) : name) + ".vmsd"
        guard folder.exists(snapshotFile) else { return }
        let region = try folder.file(snapshotFile, owner: file.name, remedy: VMDKChain.remedy)
        let list = try VMXFile(region.read(limit: VMXFile.sizeLimit, name: region.path), name: region.path)
        let current = list.text("snapshot.current")
        let count = min(try list.number("snapshot.numSnapshots") ?? 0, 1000)
        for index in 0..<count {
            let prefix = "snapshot\(index)"
            guard let identifier = list.text("\(prefix).uid") else { continue }
            var snapshot = Snapshot()
            snapshot.name = list["\(prefix).displayName"] ?? ""
            snapshot.moid = identifier
            snapshot.current = identifier == current
            // Microseconds since 1970, in two signed halves.
            if let high = list.text("\(prefix).createTimeHigh").flatMap({ Int32($0) }),
                let low = list.text("\(prefix).createTimeLow").flatMap({ Int32($0) })
            {
                let microseconds = Int64(high) << 32 | Int64(UInt32(bitPattern: low))
                snapshot.createdAt.seconds = microseconds / 1_000_000
                snapshot.createdAt.nanos = Int32(microseconds % 1_000_000) * 1000
            }
            manifest.vm.snapshots.append(snapshot)
        }
        if !manifest.vm.snapshots.isEmpty {
            manifest.warn(
                "vm", "it has \(manifest.vm.snapshots.count) snapshots; only its current state is carried",
                remedy: "delete (consolidate) the snapshots on the source, or go on without them")
        }
    }
}
