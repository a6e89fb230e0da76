import Glibc
import HostKit

extension HostSetup {
    /// Programs that carry changes of these files into the boot, as argument vectors.
    package static func commands(root: String, for paths: [String]) -> [[String]] {
        var commands: [[String]] = []
        if paths.contains(where: { $0.hasPrefix("/etc/default/grub") }) {
            if let update = program("update-grub", root) {
                commands.append([update])
            } else if let make = program("grub2-mkconfig", root) ?? program("grub-mkconfig", root) {
                commands.append([make, "-o", grubTarget(root)])
            }
        }
        if paths.contains(commandLine), let refresh = program("proxmox-boot-tool", root) {
            // To the EFI partitions, which are not mounted.
            commands.append([refresh, "refresh"])
        }
        if paths.contains(where: [rules, modprobe, hook, dracut].contains) {
            if let update = program("update-initramfs", root) {
                commands.append([update, "-u", "-k", "all"])
            } else if let dracut = program("dracut", root), !isImage(root) {
                commands.append([dracut, "--force", "--regenerate-all"])
            }
        }
        return commands
    }

    /// What somebody has to run besides, to carry changes of these files into the boot or out of it.
    package static func notes(root: String, for paths: [String]) -> [String] {
        var notes: [String] = []
        let isWords = paths.contains { path in
            path == commandLine || path.hasPrefix("/etc/default/grub") || entryFolders.contains(Files.parent(of: path))
        }
        let mkinitcpio = program("mkinitcpio", root) != nil
        let unified = ["/boot/efi/EFI/Linux", "/efi/EFI/Linux", "/boot/EFI/Linux"]
        for folder in unified where isWords {
            if ((try? Files.list("\(root)\(folder)")) ?? []).contains(where: { $0.hasSuffix(".efi") }) {
                notes.append(
                    "\(folder) holds unified kernel images, which carry their command line: make them again "
                        + (mkinitcpio ? "(mkinitcpio -P)" : "(kernel-install add, or dracut --uefi)"))
            }
        }
        if paths.contains(where: [rules, modprobe].contains), isImage(root) {
            notes.append(
                "this system is an image, which brings its initramfs: have one made here, with what was written, before the "
                    + "reboot (rpm-ostree initramfs --enable)")
        } else if paths.contains(where: [rules, modprobe].contains), commands(root: root, for: [rules]).isEmpty {
            notes.append(
                "neither update-initramfs nor dracut is here: make the initramfs again with the program that makes it"
                    + (mkinitcpio ? " (mkinitcpio -P)" : ""))
        }
        let booting = ["/etc/default/grub"] + unified + HostSetup.entries(below: root)
        if paths.contains(commandLine), !booting.contains(where: { Files.exists("\(root)\($0)") }),
            commands(root: root, for: [commandLine]).isEmpty
        {
            notes.append(
                "\(commandLine) is read when a kernel is installed, and nothing was found that boots by it (a partition "
                    + "that is not mounted?): kernel-install add, then look for the words where this system boots from")
        }
        // An initrd is made for each of its entries, in a folder of its own, which dracut leaves alone.
        if !paths.isEmpty, program("sdbootutil", root) != nil {
            notes.append(
                "sdbootutil makes the boot entries here, each with an initrd of its own: run sdbootutil mkinitrd "
                    + "(earlier versions: sdbootutil add-all-kernels) before the reboot")
        }
        return notes
    }

    /// OSTree's: /usr can't be written, and an initramfs that dracut leaves in /boot is nobody's.
    private static func isImage(_ root: String) -> Bool { Files.isDirectory("\(root)/ostree/repo") }

    /// The file that GRUB boots by. Red Hat's until 8 has it on the EFI partition, as its link says; later there is a stub,
    /// which reads the other.
    private static func grubTarget(_ root: String) -> String {
        let efi = "/boot/efi/EFI"
        let onEFI = ((try? Files.list("\(root)\(efi)")) ?? []).sorted().map { "\(efi)/\($0)/grub.cfg" }
        let link = Sysfs(root: root).linkPath("etc/grub2-efi.cfg") ?? ""
        let named = onEFI.filter { link.hasSuffix($0) }
        let targets = named + ["/boot/grub2/grub.cfg", "/boot/grub/grub.cfg"] + onEFI
        return targets.first { Files.exists("\(root)\($0)") } ?? "/boot/grub/grub.cfg"
    }

    /// Where one of these commands writes GRUB's configuration; nil for the others.
    static func grubConfiguration(of command: [String], below root: String) -> String? {
        guard let program = command.first else { return nil }
        if program.hasSuffix("-mkconfig") { return command.last }
        guard Files.name(of: program) == "update-grub" else { return nil }
        // A script of one line; which file that names is its distribution's doing.
        let script = (try? Files.read("\(root)\(program)", limit: 1 << 20)) ?? []
        let words = String(decoding: script, as: UTF8.self).split { " \t\n\"'=".contains($0) }
        let named = zip(words, words.dropFirst()).first {
            ["-o", "--output"].contains($0) && $1.hasPrefix("/") && $1.hasSuffix("grub.cfg")
        }
        if let named { return String(named.1) }
        let targets = ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"]
        return targets.first { Files.exists("\(root)\($0)") } ?? targets[0]
    }

    static func program(_ name: String, _ root: String) -> String? {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map { "\($0)/\(name)" }.first { access("\(root)\($0)", X_OK) == 0 }
    }
}
