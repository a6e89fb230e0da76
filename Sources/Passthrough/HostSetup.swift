import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel

/// What a host needs to boot with its IOMMU on and, if asked, with some devices waiting at vfio-pci: as changes of files,
/// and the programs that carry them into the boot. Looking changes nothing.
package struct HostSetup: Sendable {
    package struct FileChange: Sendable {
        /// Below the root: "/etc/default/grub".
        package var path: String
        /// Nil: not there.
        package var before: [UInt8]?
        package var after: [UInt8]?
        var mode: UInt32 = 0o644

        package var diff: String { unifiedDiff(path, before: before, after: after) }
    }

    package private(set) var changes: [FileChange] = []
    /// Argument vectors, to run after the files are written.
    package private(set) var commands: [[String]] = []
    /// What a person should know.
    package private(set) var notes: [String] = []
    package let parameters: [String]
    private let kernel: KernelParameters

    /// An empty root is this host's "/".
    let root: String

    /// - Parameters:
    ///   - devices: bound at boot; complete slots.
    ///   - amd: the CPU's maker; nil: not known. Then it is prepared as for Intel's, whose word AMD's driver ignores.
    ///   - arm: the CPU is one of Arm's architecture.
    /// - Throws: `failedPrecondition` when no known boot loader is there or one's file can't be understood.
    package init(
        root: String, devices: [DeviceFunction], in tree: DeviceTree?, amd: Bool?, arm: Bool = false
    ) throws {
        self.root = root
        kernel = KernelParameters(amd: amd ?? false, arm: arm)
        parameters = kernel.wanted
        if amd == nil && !arm {
            notes.append("the device tree does not say who made the CPU: intel_iommu=on does nothing on one of AMD's")
        }
        try planBootLoaders()
        let named = Set(devices.map(\.address))
        let earlier = devices.isEmpty ? [] : preparedEarlier(tree).filter { !named.contains($0.address) }
        if !earlier.isEmpty {
            let addresses = earlier.map { "\($0.address)" }.joined(separator: ", ")
            notes.append("prepared before, and kept (--revert takes all back): \(addresses)")
        }
        try planModules((devices + earlier).sorted { $0.address < $1.address }, tree)
        try planInitramfs(devices)
        if let tree {
            for member in blockingMembers(of: devices + earlier, in: tree) {
                notes.append(
                    "\(member.function.text) shares IOMMU group \(member.function.iommuGroup) with what is prepared: unless it "
                        + "is taken from the host too, no VM can have any of that group")
            }
        }
        changes.removeAll { $0.before == $0.after }
        let paths = changes.map(\.path)
        let stale = staleMenu()
        commands = Self.commands(root: root, for: paths + stale)
        notes += Self.notes(root: root, for: paths)
        if !stale.isEmpty, !paths.contains(where: { $0.hasPrefix("/etc/default/grub") }) {
            notes.append("GRUB's menu lacks what its settings have: it has to be made again")
        }
        if commands.isEmpty, paths.contains(where: { $0.hasPrefix("/etc/default/grub") }) {
            notes.append("there is no update-grub or grub-mkconfig here: make GRUB's configuration again by hand")
        }
    }

    private func read(_ path: String) -> [UInt8]? { try? Files.read("\(root)\(path)", limit: 1 << 20) }
    private func text(_ path: String) -> String? { read(path).map { String(decoding: $0, as: UTF8.self) } }
    private func has(_ path: String) -> Bool { Files.exists("\(root)\(path)") }

    /// Throws `failedPrecondition` for a text that has lost bytes, because they were not in UTF-8.
    private mutating func change(_ path: String, to text: String?, mode: UInt32 = 0o644) throws {
        let before = read(path)
        if let text, text.unicodeScalars.contains("\u{fffd}") {
            // As it was.
            if let before, String(decoding: before, as: UTF8.self) == text { return }
            let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
            let number = lines.firstIndex { $0.unicodeScalars.contains("\u{fffd}") }.map { $0 + 1 } ?? 1
            throw MigrationError(
                .failedPrecondition,
                "\(root)\(path), line \(number), is not in UTF-8: writing the file would change bytes of that line",
                hint: "write that line in UTF-8 or ASCII, or add \"\(parameters.joined(separator: " "))\" by hand; "
                    + "then run the same command again")
        }
        changes.append(FileChange(path: path, before: before, after: text.map { Array($0.utf8) }, mode: mode))
    }

    // MARK: - Boot loaders

    static let entryFolders = ["/boot/loader/entries", "/boot/efi/loader/entries", "/efi/loader/entries"]

    /// Boot Loader Specification entries, one for each kernel.
    static func entries(below root: String) -> [String] {
        entryFolders.flatMap { folder in
            ((try? Files.list("\(root)\(folder)")) ?? []).filter { $0.hasSuffix(".conf") }.map { "\(folder)/\($0)" }
        }
    }

    /// Below another root an absolute link is one into this host. Throws `failedPrecondition` for such a file of a boot
    /// loader, which would be overlooked or be another's.
    private func requireNoLinksOut() throws {
        guard !root.isEmpty else { return }
        let top = try Files.canonical(root)
        let files = ["/etc/default/grub.d", "/etc/default/grub", Self.commandLine] + Self.entries(below: root)
        for path in files + Self.entryFolders {
            var link = ""
            for part in path.split(separator: "/") {
                link += "/\(part)"
                guard let target = Sysfs(root: root).linkPath(String(link.dropFirst())), target.hasPrefix("/"),
                    !target.hasPrefix("\(root)/"), !target.hasPrefix("\(top)/")
                else { continue }
                throw MigrationError(
                    .failedPrecondition,
                    "\(root)\(link) is a link to \(target), which leads out of \(root), into this host",
                    hint: "make it a link relative to its folder")
            }
        }
    }

    private mutating func planBootLoaders() throws {
        try requireNoLinksOut()
        var isKnown = false
        if let grub = text("/etc/default/grub") {
            isKnown = true
            try planGRUB(grub)
        }
        for path in Self.entries(below: root) {
            guard let entry = text(path) else { continue }
            isKnown = true
            try change(path, to: kernel.edited(entry: entry))
        }
        if let line = text(Self.commandLine) ?? newCommandLine() {
            isKnown = true
            try change(Self.commandLine, to: kernel.edited(file: line))
        }
        guard isKnown else {
            throw MigrationError(
                .failedPrecondition,
                "no boot loader that this program knows: neither /etc/default/grub, nor loader/entries, nor "
                    + "/etc/kernel/cmdline",
                hint: "add \"\(kernel.wanted.joined(separator: " "))\" to the kernel's command line by hand")
        }
    }

    static let commandLine = "/etc/kernel/cmdline"

    /// Where Debian's hook has kernel-install write the entries anew as often as the initramfs is made, it must not take the
    /// running kernel's command line for them: that has none of the words yet. Nil where that is not so.
    private mutating func newCommandLine() -> String? {
        guard has("/etc/initramfs/post-update.d/systemd-boot") else { return nil }
        if let general = text("/usr/lib/kernel/cmdline") { return general }
        let known = Self.entries(below: root).compactMap { path in
            text(path).flatMap(kernel.options(ofEntry:)).map { (path: path, options: $0) }
        }
        guard let (entry, options) = known.last, !options.contains("$") else { return nil }
        notes.append("\(Self.commandLine) is made of what \(entry) has: kernel-install writes entries of it")
        return options + "\n"
    }

    /// Whether a boot loader's file, written anew by a program, has the words all the same.
    func isMet(_ path: String, by text: String) -> Bool {
        Self.entryFolders.contains(Files.parent(of: path)) && kernel.edited(entry: text) == text
    }

    /// GRUB's settings, where the menu that is made of them lacks the words: it was not made again since.
    private func staleMenu() -> [String] {
        let settings = "/etc/default/grub"
        return Self.commands(root: root, for: [settings]).contains { command in
            guard has(settings), let menu = Self.grubConfiguration(of: command, below: root),
                let bytes = try? Files.read("\(root)\(menu)", limit: 1 << 24)
            else { return false }
            return !kernel.entriesWithout(inGRUB: String(decoding: bytes, as: UTF8.self)).isEmpty
        } ? [settings] : []
    }

    /// What makes GRUB's configuration. That it reads drop-ins of /etc/default is its distribution's doing (Debian's is one);
    /// GRUB's own does not.
    private func grubScripts() -> [String] {
        let programs = ["grub2-mkconfig", "grub-mkconfig"].compactMap { Self.program($0, root) }
        let libraries = ["grub2", "grub"].map { "/usr/share/\($0)/grub-mkconfig_lib" }
        return (programs + libraries).compactMap(text)
    }

    /// Whether the kernel of this command line, that of /proc/cmdline, was started with the words.
    package func isMet(byRunning line: String) -> Bool {
        let words = KernelParameters.ofKernel(line[...]).split(whereSeparator: \.isWhitespace).map(String.init)
        return parameters.allSatisfy(words.contains)
    }

    /// What a person does where the words got lost, without the place.
    var wordsHint: String {
        "add \"\(parameters.joined(separator: " "))\", and take out what undoes it (intel_iommu=off, iommu=off),"
    }

    /// Entries of a GRUB configuration made of these settings, that lack the words.
    func entriesWithout(inGRUB text: String) -> [String] { kernel.entriesWithout(inGRUB: text) }

    private mutating func planGRUB(_ grub: String) throws {
        let own = Self.grubDropIn
        let isFolderRead = (grubScripts() + [grub]).contains { $0.contains("default/grub.d") }
        let dropIns = (isFolderRead ? (try? Files.list("\(root)/etc/default/grub.d")) ?? [] : [])
            .filter { $0.hasSuffix(".cfg") }.map { "/etc/default/grub.d/\($0)" }.filter { $0 != own }.sorted()
        // Sorted by name, as grub-mkconfig reads them.
        let later = dropIns.compactMap(text)
        let words = kernel.grubWords([grub] + later)
        let missing = kernel.wanted.filter { !words.contains($0) }
        if kernel.isMet(by: words) {
            // Somebody wrote it there already.
            try change(own, to: text(own))
        } else if isFolderRead, has("/etc/default/grub.d"), !kernel.isOpposed(words),
            !kernel.isEnded([grub] + dropIns.filter { $0 < own }.compactMap(text))
        {
            let addition = Self.head + "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX \(missing.joined(separator: " "))\"\n"
            try change(own, to: addition)
            var texts = [grub] + dropIns.filter { $0 < own }.compactMap(text) + [addition]
            for name in dropIns where name > own {
                texts += [text(name)].compactMap(\.self)
                guard !kernel.isMet(by: kernel.grubWords(texts)) else { continue }
                throw MigrationError(
                    .failedPrecondition,
                    "\(name) is read after \(own) and sets the kernel's command line anew: what is added would be lost",
                    hint: "have it keep what was there (GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX …\"), add "
                        + "\"\(missing.joined(separator: " "))\" to it, or give it a name that sorts before")
            }
        } else {
            guard let edited = kernel.edited(grub: grub), kernel.isMet(by: kernel.grubWords([edited] + later)) else {
                throw MigrationError(
                    .failedPrecondition,
                    "/etc/default/grub or a file in grub.d sets the kernel's command line in a way this program can't "
                        + "edit",
                    hint: wordsHint + " in GRUB_CMDLINE_LINUX and GRUB_CMDLINE_LINUX_DEFAULT by hand")
            }
            try change("/etc/default/grub", to: edited)
        }
    }

    // MARK: - Devices

    static let rules = "/etc/udev/rules.d/10-flotilla-vfio.rules"
    static let modprobe = "/etc/modprobe.d/flotilla-vfio.conf"
    static let hook = "/etc/initramfs-tools/hooks/flotilla-vfio"
    static let dracut = "/etc/dracut.conf.d/90-flotilla-vfio.conf"
    static let modules = "/etc/modules-load.d/flotilla-vfio.conf"
    static let grubDropIn = "/etc/default/grub.d/90-flotilla-gpu.cfg"
    /// Files of this program's name: nobody else's text in them is kept, and reverting takes them away.
    static let own = [rules, modprobe, hook, dracut, modules, grubDropIn]
    private static let head = "# Written by `flotilla gpu prepare`; `flotilla gpu prepare --revert` takes it away.\n"

    /// Those of earlier runs that are still there.
    private func preparedEarlier(_ tree: DeviceTree?) -> [DeviceFunction] {
        let lines = (text(Self.rules) ?? "").split(separator: "\n")
        return (tree?.functions ?? []).filter { device in lines.contains { $0 == Self.rule(device) } }
    }

    private static func rule(_ device: DeviceFunction) -> String {
        let id = device.function.id
        return "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"\(device.address)\", "
            + "ATTR{vendor}==\"0x\(padded(id.vendor, 4))\", ATTR{device}==\"0x\(padded(id.device, 4))\", "
            + "ATTR{driver_override}=\"vfio-pci\""
    }

    private mutating func planModules(_ devices: [DeviceFunction], _ tree: DeviceTree?) throws {
        try change(Self.modules, to: Self.head + "vfio-pci\n")
        guard !devices.isEmpty else { return }
        var rules =
            Self.head + "# These functions wait for a VM. The ids keep another card in the slot with its own driver.\n"
        for device in devices { rules += Self.rule(device) + "\n" }
        try change(Self.rules, to: rules)

        var modprobe = Self.head
        let chosen = Set(devices.map(\.address))
        // By id only what goes as a whole: a twin that stays with the host would lose its driver.
        let ids = Set(devices.map(\.function.id.text)).filter { id in
            tree?.functions.allSatisfy { $0.function.id.text != id || chosen.contains($0.address) } ?? false
        }
        if !ids.isEmpty { modprobe += "options vfio-pci ids=\(ids.sorted().joined(separator: ","))\n" }
        for device in devices where isBuiltIn(device.function.driver, tree) {
            notes.append(
                "\(device.function.driver) is built into the kernel and takes \(device.address) before any rule counts: the bind "
                    + "or deploy takes it over then")
        }
        // By the modules' names, which modprobe knows: xhci_hcd's is xhci_pci. What is built in has none.
        var drivers = Set(
            devices.map(\.function.driver).filter { !$0.isEmpty && !isVfio(driver: $0) }.map { driver in
                tree?.sysfs.linkName("bus/pci/drivers/\(driver)/module") ?? driver
            })
        // After a reboot they have vfio-pci: who had them before is known from the last time.
        for line in (text(Self.modprobe) ?? "").split(separator: "\n") {
            let words = line.split(separator: " ")
            if words.count == 4, words[0] == "softdep", words[2...] == ["pre:", "vfio-pci"] {
                drivers.insert(String(words[1]))
            }
        }
        if devices.contains(where: { $0.function.id.vendor == 0x10de && $0.isGPU }) {
            drivers.formUnion(["nvidia", "nouveau"])
        }
        for driver in drivers.sorted() { modprobe += "softdep \(driver) pre: vfio-pci\n" }
        if drivers.contains("nouveau"),
            !(tree?.functions.contains { !chosen.contains($0.address) && $0.function.driver == "nouveau" } ?? false)
        {
            modprobe += "blacklist nouveau\n"
        }
        try change(Self.modprobe, to: modprobe)
    }

    /// The kernel has it without a file of its own, which modprobe would load: only a loaded one has a state.
    package func isBuiltIn(_ driver: String, _ tree: DeviceTree?) -> Bool {
        guard let sysfs = tree?.sysfs, let module = sysfs.linkName("bus/pci/drivers/\(driver)/module") else {
            return false
        }
        return sysfs.exists("module/\(module)") && !sysfs.exists("module/\(module)/initstate")
    }

    private mutating func planInitramfs(_ devices: [DeviceFunction]) throws {
        guard !devices.isEmpty else { return }
        // That of dracut's package knows none of initramfs-tools' hooks.
        let isDracut = Self.program("dracut", root) != nil && Self.program("mkinitramfs", root) == nil
        if !isDracut, Self.program("update-initramfs", root) != nil {
            try change(
                Self.hook,
                to: "#!/bin/sh\n" + Self.head
                    + "[ \"$1\" = prereqs ] && exit 0\n. /usr/share/initramfs-tools/hook-functions\n"
                    + "manual_add_modules vfio-pci\nmkdir -p \"$DESTDIR/etc/udev/rules.d\"\n"
                    + "cp -p \(Self.rules) \"$DESTDIR/etc/udev/rules.d/\"\n", mode: 0o755)
        } else if isDracut {
            try change(
                Self.dracut,
                to: Self.head + "add_drivers+=\" vfio-pci \"\ninstall_items+=\" \(Self.rules) \(Self.modprobe) \"\n")
        } else {
            notes.append("drivers in the initramfs come before the binding: add vfio_pci to what it loads first")
        }
    }
}
