package import FlotillaProtocol

/// Everything known beforehand that keeps a VM from being deployed on a host (BLOCKED), or arrives changed
/// (WARNING). Pure, and judged on the profile as it was captured; empty means nothing was found.
///
/// - Parameters:
///   - pool: name of the pool the disks go to.
///   - diskFormat: "qcow2" or "raw".
package func preflight(
    manifest: Manifest, options: DeployOptions, pool: String, diskFormat: String = "qcow2", host: HostProfile
) -> [Finding] {
    // What the target gets of a TPM is told below.
    (manifest.findings + sourceFindings(manifest))
        .filter { !($0.subject == "vm" && $0.severity == .warning && $0.message.contains("TPM")) || !manifest.vm.tpm }
        + domainFindings(manifest, options, host)
        + sizeFindings(manifest.vm, host)
        + firmwareFindings(manifest.vm, host)
        + networkFindings(manifest, options, host)
        + poolFindings(manifest, pool, diskFormat, host)
        + deviceFindings(manifest, options, host)
        + guestFindings(manifest.vm, options)
        + startFindings(manifest, options)
}

/// The part of `preflight` that needs no host: networks without a mapping, devices that no host can serve, what the
/// guest gets differently. A whole GPU is left open: which host has it isn't known.
package func hostlessFindings(manifest: Manifest, options: DeployOptions) -> [Finding] {
    let unmapped = manifest.nics.filter { options.mapping(for: $0.network) == nil }.map {
        Finding.blocked(
            $0.id, "\($0.id): network \"\($0.network)\" is mapped to nothing",
            remedy: "map it, for example `--network '\($0.network)=bridge:br0'`")
    }
    let served =
        options.gpu == .gpuDrop
        ? droppedFindings(manifest)
        : wantedDevices(manifest, options.gpuMappings).map {
            unsupportedBacking($0)
                ?? .warning(
                    $0.id, "\($0.text) needs a host with the same device, and no host was given to look at",
                    remedy: "give the hosts' profiles with `--hosts`")
        } + mappingFindings(manifest, options.gpuMappings)
    return unmapped + served + guestFindings(manifest.vm, options)
}

private func domainFindings(_ manifest: Manifest, _ options: DeployOptions, _ host: HostProfile) -> [Finding] {
    let name = options.domainName(for: manifest.vm)
    guard isValidDomainName(name) else {
        return [
            .blocked(
                "vm", "\"\(name.prefix(80))\" can't be a domain's name",
                remedy: "use letters, digits, '.', '_', '+' and '-', beginning with a letter or digit, 64 at most")
        ]
    }
    if let taken = host.domains.first(where: { $0.name == name && !isOwn($0, manifest) }) {
        return [
            .blocked(
                "vm", "host \(host.name) already has a domain \(name) (\(taken.uuid)), which is not this migration's",
                remedy: "choose another name, or rename or undefine that domain")
        ]
    }
    let uuid = manifest.vm.biosUuid.lowercased()
    if options.keepUuid,
        let taken = host.domains.first(where: { $0.uuid.lowercased() == uuid && !isOwn($0, manifest) })
    {
        return [
            .blocked(
                "vm", "domain \(taken.name) of host \(host.name) already has the UUID \(uuid) of this VM",
                remedy: "deploy without keeping the UUID, or undefine that domain")
        ]
    }
    return []
}

private func isOwn(_ domain: DomainSummary, _ manifest: Manifest) -> Bool {
    !manifest.migrationID.isEmpty && domain.migrationID == manifest.migrationID
}

private func sizeFindings(_ vm: VirtualMachine, _ host: HostProfile) -> [Finding] {
    var findings: [Finding] = []
    if host.memoryBytes > 0, vm.memory.bytes > host.memoryBytes {
        findings.append(
            .blocked(
                "vm", "the VM has \(size(vm.memory.bytes)) of memory, host \(host.name) only \(size(host.memoryBytes))",
                remedy: "choose a larger host"))
    }
    if host.cpus > 0, vm.cpu.count > host.cpus {
        findings.append(
            .warning(
                "vm", "the VM has \(vm.cpu.count) CPUs, host \(host.name) only \(host.cpus)",
                remedy: "choose a larger host, or expect the VM to be slow"))
    }
    return findings
}

private func firmwareFindings(_ vm: VirtualMachine, _ host: HostProfile) -> [Finding] {
    guard vm.firmware == .efi else { return [] }
    if vm.secureBoot, !host.secureBootFirmware {
        return [
            .blocked(
                "vm", "the VM uses Secure Boot and host \(host.name) has no firmware for it",
                remedy: "install the host's OVMF package with the enrolled-keys variant")
        ]
    }
    guard !host.efiFirmware else { return [] }
    return [
        .blocked(
            "vm", "the VM boots with EFI and host \(host.name) has no EFI firmware",
            remedy: "install the host's OVMF package (Debian: ovmf, Fedora: edk2-ovmf)")
    ]
}

private func networkFindings(_ manifest: Manifest, _ options: DeployOptions, _ host: HostProfile) -> [Finding] {
    manifest.nics.flatMap { nic -> [Finding] in
        var findings: [Finding] = []
        switch options.mapping(for: nic.network)?.target {
        case nil:
            findings.append(
                .blocked(
                    nic.id, "\(nic.id): network \"\(nic.network)\" is mapped to nothing on host \(host.name)",
                    remedy: "map it, for example `--network '\(nic.network)=\(example(host))'`"))
        case .network(let name) where !host.networks.contains(name):
            findings.append(
                .blocked(
                    nic.id,
                    "\(nic.id): host \(host.name) has no libvirt network \(name); it has \(list(host.networks))",
                    remedy: "define it, or map \"\(nic.network)\" to another"))
        case .bridge(let name) where !host.bridges.contains(name):
            findings.append(
                .blocked(
                    nic.id, "\(nic.id): host \(host.name) has no bridge \(name); it has \(list(host.bridges))",
                    remedy: "create it, or map \"\(nic.network)\" to another"))
        default: break
        }
        if nic.model == "sriov" {
            findings.append(
                .warning(
                    nic.id, "\(nic.id): the SR-IOV virtual function becomes an emulated NIC on the mapped network",
                    remedy: "expect less throughput; the MAC address is kept"))
        }
        return findings
    }
}

private func example(_ host: HostProfile) -> String {
    host.bridges.first.map { "bridge:\($0)" } ?? "network:\(host.networks.first ?? "default")"
}

private func list(_ names: [String]) -> String {
    names.isEmpty ? "none" : names.prefix(16).joined(separator: ", ")
}

private func deviceFindings(_ manifest: Manifest, _ options: DeployOptions, _ host: HostProfile) -> [Finding] {
    guard options.gpu != .gpuDrop else { return droppedFindings(manifest) }
    if manifest.vm.isLegacy, !(manifest.gpus + manifest.otherDevices).isEmpty {
        return [
            .blocked(
                "vm",
                "the guest (\(manifest.vm.guestID)) does not boot from a machine with PCI Express, which a device of the host "
                    + "needs", remedy: "migrate it without the device (--gpu drop)")
        ]
    }
    return deviceMatch(manifest: manifest, options: options, host: host).findings
        + mappingFindings(manifest, options.gpuMappings)
}

private func droppedFindings(_ manifest: Manifest) -> [Finding] {
    (manifest.gpus + manifest.otherDevices).map {
        .warning($0.id, "\($0.text) is left out, as asked", remedy: "the guest starts without this device")
    }
}

/// The devices to hand over under the GPU policy. With "drop" every assigned device is left out, GPU or not: nothing of
/// the host is handed over. Otherwise each must be served. Devices that this migration's domain already holds are free.
package func deviceMatch(manifest: Manifest, options: DeployOptions, host: HostProfile) -> DeviceMatch {
    guard options.gpu != .gpuDrop else { return DeviceMatch(entries: []) }
    let name = options.domainName(for: manifest.vm)
    let isOwn = host.domains.contains { $0.name == name && Passthrough.isOwn($0, manifest) }
    let wanted = wantedDevices(manifest, options.gpuMappings)
    return matchDevices(wanted, on: host, for: isOwn ? name : "", migration: manifest.migrationID)
}

/// Two machines with one identity, and writes that only the old one gets.
private func startFindings(_ manifest: Manifest, _ options: DeployOptions) -> [Finding] {
    guard options.start, manifest.source.kind == .vsphere, manifest.vm.powerState == .poweredOn else { return [] }
    return [
        .blocked(
            "vm", "it runs on the source, and must not run here at the same time",
            remedy: "shut it down on the source and run the same command again, or leave --start out")
    ]
}

private func guestFindings(_ vm: VirtualMachine, _ options: DeployOptions) -> [Finding] {
    var findings: [Finding] = []
    if vm.tpm {
        findings.append(
            .warning(
                "vm", "the TPM's state can't be read from the source: the VM gets a new, empty TPM 2.0",
                remedy:
                    "have recovery keys at hand for whatever is sealed to it (BitLocker, LUKS), and swtpm installed on the host"
            ))
    }
    if vm.isLegacy {
        findings.append(
            .warning(
                "vm",
                "the guest (\(vm.guestID)) is older than PCI Express: it gets an i440fx machine"
                    + (options.diskBus(for: vm) == .ide ? ", IDE disks and RTL8139 NICs" : ""),
                remedy:
                    "where it never had IDE disks, give it one on the source and start it once, so that its driver is "
                    + "there at the first boot"))
    } else if vm.isWindows {
        findings.append(
            options.diskBus(for: vm) == .sata
                ? .warning(
                    "vm", "Windows has no virtio drivers yet: its disks are attached by SATA and its NICs are e1000e",
                    remedy: "install the virtio-win drivers in the guest, then deploy with disk bus virtio")
                : .warning(
                    "vm", "Windows boots from this disk bus only with virtio drivers installed",
                    remedy: "make sure they were installed on the source, or deploy with disk bus sata"))
    }
    return findings
}
