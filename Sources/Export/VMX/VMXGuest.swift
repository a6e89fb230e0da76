/// Guest operating system names.
enum VMXGuest {
    /// The vSphere API's identifier for a VMX file's `guestOS`: "ubuntu-64" is "ubuntu64Guest".
    static func identifier(_ guest: String) -> String {
        if guest.hasSuffix("Guest") || guest.hasPrefix("otherGuest") { return guest }
        if let known = irregular[guest.lowercased()] { return known }
        guard guest.hasSuffix("-64") else { return guest + "Guest" }
        let base = String(guest.dropLast(3))
        // A name that ends in a digit keeps it apart from the 64.
        return base.last?.isNumber == true || base.hasSuffix("srv") ? "\(base)_64Guest" : "\(base)64Guest"
    }

    private static let irregular: [String: String] = [
        "other": "otherGuest", "other-64": "otherGuest64", "otherlinux": "otherLinuxGuest",
        "otherlinux-64": "otherLinux64Guest", "other26xlinux-64": "other26xLinux64Guest",
        "other3xlinux-64": "other3xLinux64Guest", "other4xlinux-64": "other4xLinux64Guest",
        "other5xlinux-64": "other5xLinux64Guest", "other6xlinux-64": "other6xLinux64Guest",
        "vmware-photon-64": "vmwarePhoton64Guest", "amazonlinux2-64": "amazonlinux2_64Guest",
        "windows7srv-64": "windows7Server64Guest", "windows8srv-64": "windows8Server64Guest",
        "windows9srv-64": "windows9Server64Guest", "longhorn-64": "winLonghorn64Guest",
        "winnetstandard-64": "winNetStandard64Guest", "winnetenterprise-64": "winNetEnterprise64Guest",
    ]

    /// The readable name out of the tools' report: `architecture='X86' bitness='64' prettyName='Ubuntu 22.04'`.
    static func prettyName(_ detail: String) -> String? {
        guard let start = detail.range(of: "prettyName='") else { return nil }
        let name = detail[start.upperBound...].prefix { $0 != "'" }
        return name.isEmpty ? nil : String(name)
    }
}

extension String {
    /// First occurrence of `text`, without Foundation.
    fileprivate func range(of text: String) -> Range<String.Index>? {
        var start = startIndex
        while start < endIndex {
            if self[start...].hasPrefix(text) { return start..<index(start, offsetBy: text.count) }
            start = index(after: start)
        }
        return nil
    }
}
