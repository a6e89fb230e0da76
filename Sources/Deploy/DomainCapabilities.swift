import Glibc
import HostKit

/// "+64055:+64055", the user and group of domains (https://libvirt.org/formatcaps.html, security model "dac").
func qemuUser(inCapabilities document: String) -> (user: uid_t, group: gid_t)? {
    let models = (try? XMLTree.parse(document, of: "the capabilities"))?.all("host", "secmodel") ?? []
    let dac = models.first { $0.all("model").first?.text == "dac" }
    let label = dac?.all("baselabel").first { ["kvm", "qemu"].contains($0.attributes["type"] ?? "") }?.text
    let ids = (label ?? "").split(separator: ":").map { uid_t($0.drop { $0 == "+" }) }
    guard ids.count == 2, let user = ids[0], let group = ids[1] else { return nil }
    return (user, group)
}

/// The first folder on the way to this one that the user can't enter; nil where it can, or that can't be told: only root may
/// ask, and the kernel answers, which knows of access lists and of what an NFS server makes of it.
func folderClosed(to user: (user: uid_t, group: gid_t), on path: String) -> String? {
    guard user.user != 0, geteuid() == 0, let setpriv = Program.find("setpriv"), let test = Program.find("test") else {
        return nil
    }
    func isClosed(_ folder: String) -> Bool {
        let ids = ["--reuid", "\(user.user)", "--regid", "\(user.group)", "--init-groups"]
        let outcome = try? Program.run(setpriv, ids + [test, "-x", folder])
        // What `setpriv` itself can't do it says.
        return outcome?.status == 1 && outcome?.output.isEmpty == true
    }
    guard isClosed(path) else { return nil }
    var folder = ""
    for part in path.split(separator: "/") {
        folder += "/\(part)"
        if isClosed(folder) { return folder }
    }
    return path
}

/// What a hypervisor offers q35 domains (https://libvirt.org/formatdomaincaps.html).
struct DomainCapabilities: Sendable, Equatable {
    var efi = false
    var secureBoot = false

    init(_ document: String) throws {
        let os = try XMLTree.parse(document, of: "the domain capabilities").all("os")
        func values(_ elements: [XMLTree], _ name: String) -> [String] {
            elements.flatMap { $0.all("enum") }.filter { $0.attributes["name"] == name }.flatMap {
                $0.all("value").map(\.text)
            }
        }
        efi = values(os, "firmware").contains("efi")
        secureBoot = efi && values(os.flatMap { $0.all("loader") }, "secure").contains("yes")
    }
}
