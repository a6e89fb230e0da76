package import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf

/// The libvirt domain of a migrated VM, as text. Pure: the same inputs give the same bytes.
///
/// Reference: https://libvirt.org/formatdomain.html
package struct DomainXML: Sendable {
    package var manifest: Manifest
    package var options: DeployOptions
    /// "kvm", "qemu" or "test".
    package var domainType: String
    /// Devices to hand over, each the functions that stay together on one guest slot (`DeviceMatch.devices`).
    package var devices: [[PciFunction]] = []
    /// vGPUs that exist, each on a guest slot of its own after the devices'.
    package var vgpus: [DomainVgpu] = []
    /// The host's memory nodes; pinning needs more than one.
    package var numaNodes: [NumaNode] = []
    /// Ids of disks whose file system takes no O_DIRECT (`disksWithoutDirectIO`): those go through the page cache.
    package var bufferedDisks: Set<String> = []
    /// The host has swtpm (`tpmEmulatorInstalled`). Without, the VM's TPM is left out.
    package var tpmEmulator = true
    /// Of the host's libvirt; empty: not known.
    private let libvirtVersion: [Int]
    /// Knows `<maxphysaddr>`.
    private var hasAddressWidth: Bool { isLibvirt([8, 7]) }
    /// Knows the mode "restrictive" of memory.
    var hasRestrictive: Bool { isLibvirt([7, 9]) }
    /// Where virtlogd records the serial console; absolute. Nil: not recorded.
    package var consoleLog: String?

    package init(manifest: Manifest, options: DeployOptions, host: HostProfile) {
        self.manifest = manifest
        self.options = options
        domainType = host.domainType
        numaNodes = host.numaNodes
        libvirtVersion = host.libvirtVersion.split(separator: ".").compactMap { Int($0) }
    }

    private func isLibvirt(_ version: [Int]) -> Bool {
        libvirtVersion.isEmpty || !libvirtVersion.lexicographicallyPrecedes(version)
    }

    /// Attribute of the domain's metadata.
    static let definitionDigest = "definition-sha256"
    package static let metadataNamespace = "https://flotilla.dev/xmlns/domain/1"

    static let qemuNamespace = "http://libvirt.org/schemas/domain/qemu/1.0"

    var vm: VirtualMachine { manifest.vm }
    var isKVM: Bool { domainType == "kvm" }
    /// For a guest that can't boot from q35. One that gets a device of the host needs q35's PCI Express all the same.
    package var isI440FX: Bool { vm.isLegacy && !hasHostDevices }
    var secureBoot: Bool { vm.firmware == .efi && vm.secureBoot }
    package var name: String { options.domainName(for: manifest.vm) }

    /// The source's BIOS UUID when it is to be kept, else one made from the migration's id (RFC 9562 version 8), so
    /// that repeating a deploy redefines the same domain.
    package func uuid() throws -> String {
        guard options.keepUuid else {
            var bytes = Array(Digest.hash(.sha256, Array("flotilla domain \(manifest.migrationID)".utf8)).prefix(16))
            bytes[6] = bytes[6] & 0x0f | 0x80
            bytes[8] = bytes[8] & 0x3f | 0x80
            let text = Array(hex(bytes))
            return [0..<8, 8..<12, 12..<16, 16..<20, 20..<32].map { String(text[$0]) }.joined(separator: "-")
        }
        let uuid = vm.biosUuid.lowercased()
        let groups = uuid.split(separator: "-", omittingEmptySubsequences: false)
        guard groups.map(\.count) == [8, 4, 4, 4, 12],
            groups.allSatisfy({ $0.allSatisfy { $0.isASCII && $0.isHexDigit } })
        else {
            throw MigrationError(
                .invalidArgument, "VM \(vm.name): \"\(vm.biosUuid)\" is not a UUID", hint: "deploy without keeping it")
        }
        return uuid
    }

    /// - Throws: `invalidArgument` naming what in the manifest can't be expressed, `failedPrecondition` for a disk
    ///   that is not converted or a network that is not mapped.
    package func text() throws -> String {
        try text([
            "xmlns:flotilla": Self.metadataNamespace, "id": manifest.migrationID,
            "manifest-sha256": manifestDigest(manifest),
        ])
    }

    /// As `text`, with a digest of all that the guest gets, by which a domain that runs is known to be this one.
    func document() throws -> (text: String, digest: String) {
        let digest = hex(Digest.hash(.sha256, Array(try text(["xmlns:flotilla": Self.metadataNamespace]).utf8)))
        let text = try text([
            "xmlns:flotilla": Self.metadataNamespace, "id": manifest.migrationID,
            "manifest-sha256": manifestDigest(manifest), Self.definitionDigest: digest,
        ])
        return (text, digest)
    }

    private func text(_ metadata: KeyValuePairs<String, String>) throws -> String {
        guard isValidDomainName(name) else {
            throw MigrationError(.invalidArgument, "\"\(name)\" can't be a domain's name")
        }
        guard !manifest.migrationID.isEmpty else {
            throw MigrationError(.invalidArgument, "VM \(vm.name): the manifest has no migration id")
        }
        let memory = vm.memory.bytes / 1024
        guard memory > 0 else {
            throw MigrationError(.invalidArgument, "VM \(vm.name): the manifest states no memory size")
        }
        let uuid = try uuid()
        var xml = XMLWriter()
        let window = largeWindow
        let needsArguments = window != nil && vm.firmware == .efi
        try xml.element(
            "domain",
            needsArguments ? ["type": domainType, "xmlns:qemu": Self.qemuNamespace] : ["type": domainType]
        ) { xml in
            xml.element("name", text: name)
            xml.element("uuid", text: uuid)
            let title = String(vm.name.prefix(256).map { $0.isNewline ? " " : $0 })
            if !title.isEmpty { xml.element("title", text: title) }
            if !vm.annotation.isEmpty { xml.element("description", text: String(vm.annotation.prefix(8192))) }
            xml.element("metadata") { xml in
                xml.element("flotilla:migration", metadata)
            }
            xml.element("memory", ["unit": "KiB"], text: "\(memory)")
            writeMemory(&xml)
            writeCPUs(&xml)
            writeOS(&xml)
            writeFeatures(&xml)
            writeCPU(&xml)
            writeClock(&xml)
            xml.element("on_poweroff", text: "destroy")
            xml.element("on_reboot", text: "restart")
            // A crashed guest must end as "crashed", not restart forever before anyone has seen it.
            xml.element("on_crash", text: "destroy")
            try xml.element("devices") { xml in
                let boot = bootOrder()
                try writeDisks(&xml, boot)
                try writeControllers(&xml)
                try writeNICs(&xml, boot)
                writeConsole(&xml)
                writePlatform(&xml)
                try writeHostdevs(&xml)
                writeVgpus(&xml)
            }
            if needsArguments, let window { writeFirmwareWindow(&xml, window) }
        }
        return xml.text
    }

    private func writeOS(_ xml: inout XMLWriter) {
        let machine: KeyValuePairs = ["arch": "x86_64", "machine": isI440FX ? "pc" : "q35"]
        guard vm.firmware == .efi else {
            xml.element("os") { $0.element("type", machine, text: "hvm") }
            return
        }
        xml.element("os", ["firmware": "efi"]) { xml in
            xml.element("type", machine, text: "hvm")
            // Said outright: left to libvirt, it may take a Secure Boot firmware that refuses the guest's loader.
            xml.element("firmware") { xml in
                xml.element("feature", ["enabled": secureBoot ? "yes" : "no", "name": "enrolled-keys"])
                xml.element("feature", ["enabled": secureBoot ? "yes" : "no", "name": "secure-boot"])
            }
        }
    }

    private func writeFeatures(_ xml: inout XMLWriter) {
        xml.element("features") { xml in
            xml.element("acpi")
            xml.element("apic")
            // Both are KVM's; QEMU's emulation knows neither.
            if isKVM && hasHyperV { writeHyperV(&xml) }
            if isKVM && vm.hypervisorHidden { xml.element("kvm") { $0.element("hidden", ["state": "on"]) } }
            if secureBoot { xml.element("smm", ["state": "on"]) }
        }
    }

    /// Windows makes use of Hyper-V's interfaces since Vista and Server 2008.
    private var hasHyperV: Bool { vm.isWindows && !vm.isLegacy }

    private func writeHyperV(_ xml: inout XMLWriter) {
        xml.element("hyperv", ["mode": "custom"]) { xml in
            for feature in ["relaxed", "vapic"] { xml.element(feature, ["state": "on"]) }
            xml.element("spinlocks", ["state": "on", "retries": "8191"])
            for feature in ["vpindex", "runtime", "synic", "stimer", "reset"] { xml.element(feature, ["state": "on"]) }
            // Older GPU drivers look for Microsoft's own signature.
            if vm.hypervisorHidden { xml.element("vendor_id", ["state": "on", "value": "flotilla"]) }
        }
    }

    private func writeCPU(_ xml: inout XMLWriter) {
        let count = max(1, vm.cpu.count)
        let asked = max(1, vm.cpu.coresPerSocket)
        let cores = count % asked == 0 ? asked : 1
        let topology: KeyValuePairs = [
            "sockets": "\(count / cores)", "dies": "1", "cores": "\(cores)", "threads": "1",
        ]
        xml.element("cpu", ["mode": isKVM ? "host-passthrough" : "maximum"]) { xml in
            // Else QEMU gives it 40 bits, 1 TiB: less than memory and the registers of some GPUs take.
            if isKVM, hasAddressWidth, largeWindow != nil || vm.memory.bytes > 512 << 30 {
                xml.element("maxphysaddr", ["mode": "passthrough"])
            }
            xml.element("topology", topology)
        }
    }

    /// Windows keeps local time in the real-time clock, everything else UTC, unless the source says.
    private func writeClock(_ xml: inout XMLWriter) {
        let utc = vm.hasClockUtc ? vm.clockUtc : !vm.isWindows
        xml.element("clock", ["offset": utc ? "utc" : "localtime"]) { xml in
            xml.element("timer", ["name": "rtc", "tickpolicy": "catchup"])
            xml.element("timer", ["name": "pit", "tickpolicy": "delay"])
            xml.element("timer", ["name": "hpet", "present": "no"])
            if isKVM && hasHyperV { xml.element("timer", ["name": "hypervclock", "present": "yes"]) }
        }
    }
}

/// SHA-256 of the manifest's deterministic binary form, hexadecimal.
package func manifestDigest(_ manifest: Manifest) throws -> String {
    var options = BinaryEncodingOptions()
    options.useDeterministicOrdering = true
    let bytes: [UInt8] = try manifest.serializedBytes(options: options)
    return hex(Digest.hash(.sha256, bytes))
}
