import Foundation
import HostKit
import TestKit
import Testing

extension Integration {
    /// `flotilla gpu` on the recorded tree of a machine with an IOMMU.
    @Suite(.serialized) struct GPU {
        private let folder: TemporaryFolder
        private var tree: String { "\(folder.path)/sys" }

        init() throws {
            folder = try TemporaryFolder("sys", "root/etc/kernel")
            try require(
                "tar", "xzf", "\(Environment.testbeds)/../PassthroughTests/Fixtures/sysfs-q35-vtd.tgz", "-C", tree)
            try Files.writeAtomically(Array("root=x\n".utf8), to: "\(folder.path)/root/etc/kernel/cmdline")
        }

        private func gpu(_ arguments: String...) throws -> Outcome {
            try run(Environment.flotilla(), ["gpu"] + arguments)
        }

        private func snapshot() throws -> String {
            try require(
                "bash", "-c",
                "find \"$0\" -printf '%p %y %l %s %m %T@\\n' | sort; find \"$0\" -type f | sort | xargs md5sum",
                folder.path)
        }

        @Test func listAndCheck() throws {
            let text = try gpu("list", "--sysfs-root", tree + "/")
            #expect(text.status == 0 && text.output.contains("├─ 0000:01:00.0  [1234:1111]"), "\(text.errors)")
            #expect(text.output.contains("IOMMU group 11, 2 functions\n"))
            let json = try gpu("list", "--json", "--sysfs-root", tree)
            let listing = try #require(try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [String: Any])
            let groups = try #require(listing["groups"] as? [[String: Any]])
            #expect(groups.compactMap { $0["group"] as? Int } == [11, 18])
            #expect(try gpu("check", "06:00.0", "--sysfs-root", tree).status == 0)
            let boot = try gpu("check", "0b:00.0", "--sysfs-root", tree)
            #expect(boot.status == 3 && boot.output.contains("not the boot display"))
            let nowhere = try gpu("list", "--sysfs-root", "\(folder.path)/root")
            #expect(nowhere.status == 1 && nowhere.errors.contains("holds no bus/pci/devices"))
        }

        /// Of a GPU with virtual functions once, and how many of those are left for each type.
        @Test func vgpuTypesAreListedOnce() throws {
            for part in ["0000:03:00.1", "0000:03:00.2"] {
                let folder = "\(tree)/bus/pci/devices/\(part)/nvidia"
                try Files.createDirectories(folder)
                let isFree = part.hasSuffix("1")
                let whole = isFree ? "1428 : NVIDIA H200X-141C\n" : ""
                let types = "ID    : vGPU Name\n\(whole)1430 : NVIDIA H200X-70C\n"
                try Files.writeAtomically(Array(types.utf8), to: "\(folder)/creatable_vgpu_types")
                try Files.writeAtomically(Array("0\n".utf8), to: "\(folder)/current_vgpu_type")
            }
            let text = try gpu("list", "--all", "--sysfs-root", tree).output
            let lines = text.split(separator: "\n").map { $0.drop { "│├└─ ".contains($0) } }
            let title = "vGPU types (vendor-vfio, on 2 virtual functions):"
            let at = try #require(lines.firstIndex { $0 == title }, "\(text)")
            #expect(
                lines[(at + 1)...(at + 2)] == [
                    "NVIDIA H200X-141C (1428), free on 1", "NVIDIA H200X-70C (1430), free on 2",
                ])
            #expect(lines.count { $0.contains("H200X") } == 2)
            #expect(lines[..<at].last { $0.hasPrefix("0000:") }?.hasPrefix("0000:03:00.0") == true)
            // Whoever reads JSON finds them where the kernel has them.
            let json = try gpu("list", "--all", "--json", "--sysfs-root", tree).output
            #expect(json.components(separatedBy: "H200X-70C").count == 3)
        }

        /// Whose devices are whose is asked of libvirt before anything is done to them.
        @Test(.enabled(if: geteuid() == 0)) func libvirtIsAsked() throws {
            let nowhere = "qemu+unix:///system?socket=\(folder.path)/none"
            for command in [["bind", "ff:1f.7"], ["create", "A40-2Q", "--domain", "web"]] {
                let outcome = try run(
                    Environment.flotilla(), ["gpu"] + command + ["--dry-run", "--libvirt", nowhere])
                #expect(outcome.errors.contains("which domains own which devices is not known"), "\(outcome.errors)")
                #expect(outcome.status != 0)
            }
        }

        /// Each says what it would do, or why not, and leaves the tree as it is.
        @Test func dryRuns() throws {
            let before = try snapshot()
            let bind = try gpu("bind", "06:00.0", "--dry-run", "--sysfs-root", tree)
            #expect(
                bind.output.split(separator: "\n").map(String.init) == [
                    "would write vfio-pci to \(tree)/bus/pci/devices/0000:06:00.0/driver_override",
                    "would write 0000:06:00.0 to \(tree)/bus/pci/devices/0000:06:00.0/driver/unbind",
                    "would write 0000:06:00.0 to \(tree)/bus/pci/drivers_probe",
                ])
            #expect(try gpu("bind", "01:00.0", "--dry-run", "--sysfs-root", tree).status == 3)
            let release = try gpu("release", "02:00.0", "--dry-run", "--sysfs-root", tree)
            #expect(release.status == 0)
            #expect(
                release.output.hasPrefix(
                    "0000:02:00.0 would go to the driver the kernel picks\nwould clear \(tree)/bus/"))
            let disable = try gpu("profiles", "--disable", "03:00.0", "--dry-run", "--sysfs-root", tree)
            #expect(disable.output == "would write 0 to \(tree)/bus/pci/devices/0000:03:00.0/sriov_numvfs\n")
            let enable = try gpu("profiles", "--enable", "03:00.0", "--dry-run", "--sysfs-root", tree)
            #expect(enable.status == 0 && enable.output == "so already: nothing to do\n")
            let create = try gpu("create", "A40-2Q", "--domain", "web", "--dry-run", "--sysfs-root", tree)
            #expect(create.status == 75 && create.errors.contains("no GPU of this host has room for a vGPU A40-2Q"))
            let prepare = try gpu(
                "prepare", "06:00.0", "--dry-run", "--root", "\(folder.path)/root", "--sysfs-root", tree)
            #expect(prepare.status == 0 && prepare.output.contains("+root=x intel_iommu=on iommu=pt"))
            #expect(prepare.output.contains("does not tell which processes, domains or disks use devices"))
            let json = try gpu(
                "prepare", "06:00.0", "--dry-run", "--json", "--root", "\(folder.path)/root", "--sysfs-root", tree)
            let report = try #require(
                try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [String: Any])
            #expect((report["changes"] as? [[String: String]])?.first?["diff"]?.contains("intel_iommu=on") == true)
            #expect(report["commands"] is [[String]] && report["needsReboot"] as? Bool == true)
            // One machine's devices, another's files: neither way.
            for mixed in [["--sysfs-root", tree, "--dry-run"], ["--root", "\(folder.path)/root"]] {
                #expect(try run(Environment.flotilla(), ["gpu", "prepare"] + mixed).status == 2, "\(mixed)")
            }
            #expect(try snapshot() == before)
            // What is no dry run changes no recorded tree.
            for refused in [
                ["bind", "06:00.0"], ["release", "02:00.0"], ["reset", "02:00.0"], ["profiles", "--enable", "03:00.0"],
                ["create", "A40-2Q", "--domain", "web"], ["profiles", "--enable-mig", "03:00.0", "--dry-run"],
            ] {
                let outcome = try run(Environment.flotilla(), ["gpu"] + refused + ["--sysfs-root", tree])
                #expect(outcome.status == 2, "\(refused): \(outcome.errors)")
            }
            #expect(try snapshot() == before)
        }
    }
}
