package import FlotillaProtocol
import Glibc
package import HostKit
import MigrationModel
import Passthrough

extension LibvirtDomain {
    /// From the domain's flotilla metadata; nil when the domain is not ours.
    package func migrationID() throws -> String? { try migration("id") }

    fileprivate func migration(_ attribute: String) throws -> String? {
        guard let element = try metadata(namespace: DomainXML.metadataNamespace) else { return nil }
        return try XMLTree.parse(element, of: "the metadata of domain \(name)").attributes[attribute]
    }

    /// Starts it; one that runs is fine.
    package func start() throws {
        guard try !state().isActive else { return }
        do {
            try create()
        } catch let error as MigrationError {
            // Someone else was faster.
            guard try state().isActive else { throw error }
        }
    }
}

/// Everything done to one migration's domain. Blocking, and safe to repeat after a crash at any point.
package struct Deployment: Sendable {
    package let connection: LibvirtConnection
    package let migrationID: String

    package init(connection: LibvirtConnection, migrationID: String) {
        self.connection = connection
        self.migrationID = migrationID
    }

    /// Defines the domain, or redefines this migration's own. One that runs and is defined like this stays as it is.
    ///
    /// - Throws: `alreadyExists` when another domain has the name or UUID, `failedPrecondition` when ours runs as it was
    ///   defined otherwise or has another name now, `invalidArgument` with libvirt's words when it refuses the document.
    package func define(_ domain: DomainXML) throws -> LibvirtDomain {
        guard domain.manifest.migrationID == migrationID else {
            throw MigrationError(.invalidArgument, "domain \(domain.name) is of another migration's manifest")
        }
        let (xml, digest) = try domain.document()
        if let existing = try find(domain.name) {
            if try existing.state().isActive {
                // What is defined now would be true only after its next start.
                guard try existing.migration(DomainXML.definitionDigest) == digest else {
                    throw MigrationError(
                        .failedPrecondition,
                        "domain \(domain.name) runs as this migration defined it before, and is to be defined otherwise now",
                        hint: "shut it down, or take the migration back (flotilla migrate … --rollback, or "
                            + "flotilla migration rollback \(migrationID)), then run the same command again")
                }
                return existing
            }
            // In place where the UUID stays.
            if try existing.uuid() != domain.uuid() { return try replace(existing, with: xml) }
        } else if let namesake = try connection.domain(uuid: domain.uuid()) {
            throw MigrationError(
                .alreadyExists, "domain \(namesake.name) already has the UUID \(try domain.uuid()) of \(domain.name)",
                hint: "deploy without keeping the UUID, or undefine that domain")
        }
        return try connection.define(xml, name: domain.name)
    }

    /// libvirt has no two domains of one name, so that the earlier one goes first; it comes back when the new one is refused.
    private func replace(_ earlier: LibvirtDomain, with xml: String) throws -> LibvirtDomain {
        let before = try earlier.xml(withSecrets: true)
        try earlier.undefine()
        do { return try connection.define(xml, name: earlier.name) } catch {
            _ = try? connection.define(before, name: earlier.name)
            throw error
        }
    }

    /// Asks the guest of this migration's domain to end, and waits until it has.
    ///
    /// - Throws: `failedPrecondition` when it runs on.
    package func shutDown(
        _ name: String, within limit: Duration = .seconds(60), stop: StopFlag
    ) throws {
        guard let domain = try find(name), try domain.state().isActive else { return }
        try domain.shutdown()
        let end = ContinuousClock().now + limit
        while try domain.state().isActive {
            guard ContinuousClock().now < end else {
                throw MigrationError(
                    .failedPrecondition, "domain \(name) still runs: its guest did not shut down within \(limit)",
                    hint: "shut it down from within, or cut its power with --force; nothing else was changed")
            }
            try stop.wait(for: .milliseconds(200))
        }
    }

    /// Stops and removes this migration's domain, its NVRAM and saved state; disks stay, and libvirt gives managed
    /// devices back to the host. A domain that is gone already is fine.
    package func undefine(_ name: String) throws {
        guard let domain = try find(name) else { return }
        do {
            if try domain.state().isActive { try domain.destroy() }
            try domain.undefine()
        } catch {
            // Someone else was faster.
            guard try connection.domain(named: name) == nil else { throw error }
        }
    }

    /// The state of this migration's domain, in virsh's words. Throws `notFound` when it is gone.
    package func state(of name: String) throws -> String {
        guard let domain = try find(name) else {
            throw MigrationError(.notFound, "domain \(name) is gone", hint: "run the same command again to define it")
        }
        return "\(try domain.state())"
    }

    /// This migration's domain; nil when it has none.
    ///
    /// - Throws: `alreadyExists` when another domain has the name, `failedPrecondition` when ours has another name now.
    package func find(_ name: String) throws -> LibvirtDomain? {
        if let domain = try connection.domain(named: name) {
            try requireOwn(domain)
            return domain
        }
        for domain in try connection.domains() {
            // One that goes meanwhile is not the one.
            do { guard try domain.migrationID() == migrationID else { continue } } catch let error as MigrationError
                where error.code == .notFound
            { continue }
            throw MigrationError(
                .failedPrecondition, "domain \(name) of migration \(migrationID) is called \(domain.name) now",
                hint: "rename it back (virsh domrename \(domain.name) \(name)), then run the same command again")
        }
        return nil
    }

    private func requireOwn(_ domain: LibvirtDomain) throws {
        let owner = try domain.migrationID()
        guard owner == migrationID else {
            throw MigrationError(
                .alreadyExists,
                "domain \(domain.name) (\(try domain.uuid())) "
                    + (owner.map { "belongs to migration \($0)" } ?? "was not made by a migration"),
                hint: "choose another domain name, or rename that domain")
        }
    }
}

/// Ids of the manifest's disks whose images can't be opened with O_DIRECT: tmpfs before Linux 6.6, some FUSE and
/// overlay file systems. A disk that can't be opened at all is not listed; starting the domain says why.
package func disksWithoutDirectIO(_ manifest: Manifest) -> Set<String> {
    Set(
        manifest.disks.filter { disk in
            let descriptor = open(disk.target.path, O_RDONLY | openDirect | O_CLOEXEC)
            guard descriptor < 0 else {
                close(descriptor)
                return false
            }
            return errno == EINVAL
        }.map(\.id))
}

/// O_DIRECT, which Swift's Glibc leaves out and whose value depends on the architecture.
#if arch(arm64)
    private let openDirect: Int32 = 0o200000
#else
    private let openDirect: Int32 = 0o40000
#endif

/// Whether libvirt can give a domain a TPM: it refuses to define one with a TPM without swtpm and the program that makes its
/// state, which is another package's (swtpm-tools).
///
/// - Parameter folders: where to look for the program.
package func tpmEmulatorInstalled(in folders: [String] = ["/usr/bin", "/usr/local/bin", "/bin"]) -> Bool {
    ["swtpm", "swtpm_setup"].allSatisfy { name in folders.contains { Files.exists("\($0)/\(name)") } }
}

/// What arrives differently for reasons of this very host, for the deploy's result: disks without direct I/O, a TPM
/// that had to be left out.
package func placementFindings(_ domain: DomainXML) -> [Finding] {
    var findings = domain.manifest.disks.filter { domain.bufferedDisks.contains($0.id) }.map { disk in
        Finding.make(
            .note, disk.id,
            "\(disk.target.path): the file system takes no direct I/O; the disk goes through the page cache",
            remedy: "use a pool on ext4, XFS, NFS or a block device for better throughput")
    }
    if domain.manifest.vm.tpm, !domain.tpmEmulator {
        findings.append(
            .warning(
                "vm",
                "the VM has a TPM and this host has no swtpm with swtpm_setup: the domain is defined without a TPM",
                remedy: "install swtpm and swtpm-tools, then deploy again"))
    }
    return findings
}
