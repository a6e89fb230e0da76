package import FlotillaProtocol

/// What a manifest's own fields say against the move, besides the findings its capture wrote down: a manifest from
/// elsewhere may have lost them. Each is left out where a finding about the same object speaks of it already.
package func sourceFindings(_ manifest: Manifest) -> [Finding] {
    var findings = SourceFindings(known: manifest.findings)
    let vm = manifest.vm
    findings.add(
        vm.encrypted, .blocked, "vm", "encrypted", "the VM is encrypted; its disks can't be read without its keys",
        "decrypt it on the source")
    findings.add(
        vm.powerState == .suspended, .blocked, "vm", "suspended", "the VM is suspended; its memory can't be carried",
        "resume it on the source and shut it down")
    findings.add(
        vm.powerState == .poweredOn && manifest.source.kind != .ova, .blocked, "vm", "running",
        "the VM is running, and what it writes while it is moved would be lost",
        "shut it down on the source and capture it again")
    findings.add(
        !vm.snapshots.isEmpty, .warning, "vm", "snapshot",
        "it has \(vm.snapshots.count) snapshots; only its current state is carried",
        "delete (consolidate) the snapshots on the source, or go on without them")
    findings.add(
        vm.tpm, .warning, "vm", "TPM", "its virtual TPM's secrets can't be carried; the target gets an empty TPM 2.0",
        "have recovery keys (BitLocker, LUKS) at hand, or suspend the encryption before moving")
    for disk in manifest.disks {
        let name = disk.label.isEmpty ? disk.id : "\(disk.id) (\(disk.label))"
        findings.add(
            disk.rawDeviceMapping == "physicalMode", .blocked, disk.id, "raw device",
            "\(name) is a raw device mapping in physical mode, which can't be exported",
            "convert it to a virtual disk on the source (vmkfstools -i), or attach the LUN to the target")
        findings.add(
            disk.rawDeviceMapping == "virtualMode", .warning, disk.id, "raw device",
            "\(name) is a raw device mapping in virtual mode; its LUN's content becomes an image",
            "make sure that nothing else writes to the LUN, or attach it to the target yourself")
        findings.add(
            !["", "vmdk", "raw", "qcow2", "qed", "vdi", "vhdx", "vpc"].contains(disk.source.format), .blocked, disk.id,
            "image, which",
            "\(name) is a \(disk.source.format) image, which a migration doesn't read",
            "make a raw disk of it with `flotilla disk convert -O raw`, and name that in the manifest")
        findings.add(
            disk.shared, .blocked, disk.id, "shared", "\(name) is shared with other VMs",
            "move the cluster's data to storage of the target, or stop sharing the disk")
        findings.add(
            disk.mode.hasPrefix("independent_nonpersistent"), .warning, disk.id, "forgets",
            "\(name) forgets its changes at power-off; on the target it keeps them",
            "make it persistent on the source if that is what you want")
        findings.add(
            disk.mode == "independent_persistent", .warning, disk.id, "independent",
            "\(name) is an independent disk: no snapshot of the VM covers it",
            "keep the VM shut down until the migration is done")
    }
    return findings.found
}

private struct SourceFindings {
    let known: [Finding]
    var found: [Finding] = []

    /// - Parameter word: by which a finding that says the same is known.
    mutating func add(
        _ isSo: Bool, _ severity: Finding.Severity, _ subject: String, _ word: String, _ message: String,
        _ remedy: String
    ) {
        guard isSo, !known.contains(where: { $0.subject == subject && $0.message.contains(word) }) else { return }
        found.append(.make(severity, subject, message, remedy: remedy))
    }
}
