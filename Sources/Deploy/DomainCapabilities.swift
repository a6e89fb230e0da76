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
