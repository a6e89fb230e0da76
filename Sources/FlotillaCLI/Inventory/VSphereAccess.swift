import ArgumentParser
import Download
import Export
import HostKit
import MigrationModel
import VSphere

/// How to reach the vCenter or ESXi server that a vsphere:// source names.
struct VSphereAccess: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "File with the password for a vsphere:// source, readable by its owner only (default: ask on the terminal).",
            valueName: "file"), completion: .file())
    var passwordFile: String?

    @Option(
        help: ArgumentHelp(
            "Trust these authorities of a vsphere:// source, a PEM file, not the system's.", valueName: "file"),
        completion: .file())
    var ca: String?

    @Option(
        help: ArgumentHelp(
            "Trust the vsphere:// source whose certificate has this SHA-256 fingerprint.", valueName: "hex"))
    var fingerprint: String?

    func validate() throws {
        if ca != nil && fingerprint != nil { throw ValidationError("--ca and --fingerprint exclude each other") }
        do { _ = try trust() } catch let error as MigrationError { throw ValidationError(error.description) }
    }

    private func trust() throws -> ServerTrust {
        if let fingerprint { return .fingerprint(try CertificateFingerprint(fingerprint, .sha256)) }
        return ca.map { .authorities($0) } ?? .system
    }

    /// The server of a source. Asks for the password if no file holds it.
    ///
    /// - Parameter tellsRetries: on standard error, for commands that else say nothing until they are done.
    func server(of url: VSphereURL, tellsRetries: Bool = false) throws -> VIMServer {
        if let ca { try requireCertificates(inFile: ca, of: url) }
        let trust = try trust()
        var server: VIMServer
        if let passwordFile {
            _ = try VIMServer.password(inFile: passwordFile)
            server = VIMServer(authority: url.authority, user: url.user, trust: trust, passwordFile: passwordFile)
        } else {
            let password = try PasswordPrompt.ask("Password of \(url.user) at \(url.authority): ")
            server = VIMServer(authority: url.authority, user: url.user, trust: trust) { password }
        }
        if tellsRetries { server.willRetry = { Console.complain("flotilla: \($0)") } }
        return server
    }

    private func requireCertificates(inFile path: String, of url: VSphereURL) throws {
        let hint = "a vCenter's is in https://\(url.authority)/certs/download.zip; --fingerprint goes as well"
        guard Files.exists(path) else {
            throw MigrationError(.notFound, "CA file \(path) is not there", hint: hint)
        }
        let text = String(decoding: try Files.read(path, limit: 16 << 20), as: UTF8.self)
        guard text.contains("CERTIFICATE-----") else {
            throw MigrationError(
                .invalidArgument, "CA file \(path) holds no certificate in PEM form",
                hint: "`openssl x509 -inform DER -in \(path)` prints one that is in DER form; \(hint)")
        }
    }
}

/// How VMs of a vsphere:// source are read.
struct VSphereTransfer: ParsableArguments {
    @Flag(help: "Move running VMs of a vsphere:// source as a snapshot finds them, which is removed afterwards.")
    var snapshot = false

    @Option(
        help: "How their disks are read: nfc (compressed, under a lease) or datastore (flat files, resumable).")
    var via: VSphereURL.Transfer?

    @Flag(help: "Keep their disks as they come, VMDK files beside the images; needs that much more room in the pool.")
    var staged = false

    func apply(to url: inout VSphereURL) throws {
        if staged { url.isStaged = true }
        if snapshot { url.snapshot = true }
        if let via { url.transfer = via }
        guard !url.isStaged || url.transfer == .nfc else {
            throw ValidationError("--staged keeps what comes through nfc: it doesn't go with --via datastore")
        }
    }
}

extension VSphereURL.Transfer: ExpressibleByArgument {}

/// Checks an option that names a VM against the source, which may name one itself.
func validateVM(_ name: String?, of source: String) throws {
    guard let name else { return }
    guard !name.isEmpty else { throw ValidationError("--vm '' names no VM") }
    guard VSphereURL.isOne(source), let named = try? VSphereURL(parsing: source).vm, named != name else { return }
    throw ValidationError("\(source.withoutPassword.printable) names another VM than --vm '\(name.printable)'")
}

/// Checks a source as `validate` does.
func validateSource(_ text: String) throws {
    do {
        if VSphereURL.isOne(text) { _ = try VSphereURL(parsing: text) } else { _ = try SourceURL(parsing: text) }
    } catch let error as MigrationError where error.code != .unimplemented {
        throw ValidationError(error.description)
    }
}
