/// Guest identifiers for packages not written by VMware, from CIM_OperatingSystem.OSType.
enum OVFGuest {
    /// Empty when the number says nothing useful.
    static func identifier(cim number: String, description: String) -> String {
        if let known = types[number] { return known }
        // VirtualBox describes with its own names: Ubuntu_64, Windows2019_64.
        let lower = description.lowercased()
        let wide = lower.contains("64")
        for (word, name) in [
            ("ubuntu", "ubuntu"), ("debian", "debian10_"), ("centos", "centos"), ("fedora", "fedora"),
            ("suse", "sles"), ("linux", "otherLinux"), ("windows", "windows9_"), ("freebsd", "freebsd"),
        ] where lower.contains(word) {
            return wide ? "\(name)64Guest" : (name.hasSuffix("_") ? String(name.dropLast()) : name) + "Guest"
        }
        return ""
    }

    private static let types: [String: String] = [
        "36": "otherLinuxGuest", "101": "otherLinux64Guest", "93": "ubuntuGuest", "94": "ubuntu64Guest",
        "95": "debian10Guest", "96": "debian10_64Guest", "79": "rhel7Guest", "80": "rhel7_64Guest",
        "82": "slesGuest", "83": "slesGuest", "85": "sles64Guest", "106": "centosGuest", "107": "centos64Guest",
        "42": "freebsdGuest", "78": "freebsd64Guest", "103": "windows7Server64Guest", "105": "windows7_64Guest",
        "112": "windows8_64Guest", "113": "windows8Server64Guest", "115": "windows9_64Guest",
        "116": "windows9_64Guest", "117": "windows9Server64Guest",
    ]
}
