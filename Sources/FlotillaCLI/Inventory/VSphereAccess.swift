import ArgumentParser
import Download
import Export
import Glibc
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
    func server(of url: VSphereURL) throws -> VIMServer {
        if let ca, !Files.exists(ca) {
            throw MigrationError(
                .notFound, "CA file \(ca) is not there",
                hint: "a vCenter's is in https://\(url.authority)/certs/download.zip; --fingerprint goes as well")
        }
        let trust = try trust()
        if let passwordFile {
            _ = try VIMServer.password(inFile: passwordFile)
            return VIMServer(authority: url.authority, user: url.user, trust: trust, passwordFile: passwordFile)
        }
        let password = try askForPassword("Password of \(url.user) at \(url.authority): ")
        return VIMServer(authority: url.authority, user: url.user, trust: trust) { password }
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

/// Checks a source as `validate` does.
func validateSource(_ text: String) throws {
    do {
        if VSphereURL.isOne(text) { _ = try VSphereURL(parsing: text) } else { _ = try SourceURL(parsing: text) }
    } catch let error as MigrationError where error.code != .unimplemented {
        throw ValidationError(error.description)
    }
}

/// Asks on the terminal, without echo.
private func askForPassword(_ prompt: String) throws -> String {
    let descriptor = open("/dev/tty", O_RDWR | O_CLOEXEC)
    guard descriptor >= 0 else {
        throw MigrationError(
            .invalidArgument, "there is no terminal to ask for a password", hint: "name a file with --password-file")
    }
    defer { close(descriptor) }
    var before = termios()
    guard tcgetattr(descriptor, &before) == 0 else { throw systemError("read the settings of", "/dev/tty") }
    var quiet = before
    quiet.c_lflag &= ~tcflag_t(ECHO)
    tcsetattr(descriptor, TCSAFLUSH, &quiet)
    defer {
        tcsetattr(descriptor, TCSAFLUSH, &before)
        write(descriptor, "\n", 1)
    }
    let clean = prompt.map { $0.isNewline || $0 == "\u{1B}" ? "?" : $0 }
    let text = Array(String(clean).utf8)
    write(descriptor, text, text.count)
    var line: [UInt8] = []
    var byte: UInt8 = 0
    while line.count < 1024, read(descriptor, &byte, 1) == 1, byte != UInt8(ascii: "\n") { line.append(byte) }
    guard !line.isEmpty, let password = String(validating: line, as: UTF8.self) else {
        throw MigrationError(.invalidArgument, "no password was given")
    }
    return password
}
