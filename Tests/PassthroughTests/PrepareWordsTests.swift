import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// What is written where, down to the byte.
@Suite struct PrepareWordsTests {
    static let entry = "/boot/loader/entries/a.conf"

    /// Bytes that are no UTF-8 are not written anew as something else.
    @Test(arguments: ["/etc/default/grub", entry, "/etc/kernel/cmdline"]) func bytesOfAnotherEncoding(_ path: String)
        throws
    {
        let rig = try SetupRig(["/etc/kernel/keep": ""])
        func write(_ words: String) throws {
            let line =
                switch path {
                case Self.entry: "options root=x"
                case "/etc/default/grub": "GRUB_CMDLINE_LINUX=\"root=x"
                default: "root=x"
                }
            let text = path == "/etc/kernel/cmdline" ? "" : "# T\u{e9}st\nlinux /vmlinuz\n"
            let latin = (text + line + " name=\u{e9}" + words + (path == "/etc/default/grub" ? "\"\n" : "\n"))
                .unicodeScalars.map { UInt8($0.value) }
            try Files.createDirectories(Files.parent(of: "\(rig.root)\(path)"))
            try Files.writeAtomically(latin, to: "\(rig.root)\(path)")
        }
        try write("")
        let error = failure { try rig.setup() }
        #expect(error?.code == .failedPrecondition)
        #expect(error?.message.contains("\(path), line 1, is not in UTF-8") == true)
        #expect(error?.hint?.contains("intel_iommu=on iommu=pt") == true)
        // What has the words stays as it is.
        try write(" intel_iommu=on iommu=pt")
        #expect(try !rig.setup().changes.contains { $0.path == path })
    }
}
