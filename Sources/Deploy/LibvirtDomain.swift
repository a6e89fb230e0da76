import CLibvirt
import Glibc
import MigrationModel

/// One of a connection's domains; retains its connection. Calls block.
package final class LibvirtDomain: Sendable {
    package let connection: LibvirtConnection
    package let name: String
    // Owned: freed in deinit, before the connection it retains.
    nonisolated(unsafe) private let pointer: OpaquePointer

    init(owning pointer: OpaquePointer, of connection: LibvirtConnection) {
        self.pointer = pointer
        self.connection = connection
        name = virDomainGetName(pointer).map { String(cString: $0) } ?? ""
    }

    deinit { virDomainFree(pointer) }

    package func uuid() throws -> String {
        let text = try [CChar](unsafeUninitializedCapacity: Int(VIR_UUID_STRING_BUFLEN)) { buffer, count in
            guard let base = buffer.baseAddress, virDomainGetUUIDString(pointer, base) == 0 else {
                throw libvirtError("UUID of domain \(name)")
            }
            count = Int(VIR_UUID_STRING_BUFLEN)
        }
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    package func state() throws -> DomainState {
        var state: Int32 = 0
        guard virDomainGetState(pointer, &state, nil, 0) == 0 else { throw libvirtError("state of domain \(name)") }
        return DomainState(rawValue: state) ?? .noState
    }

    /// The persistent definition.
    ///
    /// - Parameters:
    ///   - withSecrets: also what libvirt shows to nobody who may only look, such as a console's password.
    ///   - running: as it runs now instead, where it does.
    package func xml(withSecrets: Bool = false, running: Bool = false) throws -> String {
        let flags =
            (running ? 0 : VIR_DOMAIN_XML_INACTIVE.rawValue) | (withSecrets ? VIR_DOMAIN_XML_SECURE.rawValue : 0)
        guard let text = takeString(virDomainGetXMLDesc(pointer, UInt32(flags))) else {
            throw libvirtError("definition of domain \(name)")
        }
        return text
    }

    /// The element of this namespace in the metadata of the persistent definition, or of a transient domain's only one; nil
    /// without one.
    func metadata(namespace: String) throws -> String? {
        let isTransient = virDomainIsPersistent(pointer) == 0
        let scope = isTransient ? VIR_DOMAIN_AFFECT_LIVE.rawValue : VIR_DOMAIN_AFFECT_CONFIG.rawValue
        let text = virDomainGetMetadata(
            pointer, Int32(VIR_DOMAIN_METADATA_ELEMENT.rawValue), namespace, scope)
        if let text = takeString(text) { return text }
        guard lastLibvirtError().0 == VIR_ERR_NO_DOMAIN_METADATA else {
            throw libvirtError("metadata of domain \(name)")
        }
        return nil
    }

    func create() throws {
        guard virDomainCreate(pointer) == 0 else { throw libvirtError("start domain \(name)") }
    }

    /// Asks the guest to end, through its agent or ACPI; returns at once.
    func shutdown() throws {
        guard virDomainShutdown(pointer) == 0 else {
            // It ended meanwhile.
            if try !state().isActive { return }
            throw libvirtError("shut down domain \(name)")
        }
    }

    /// Cuts the power.
    package func destroy() throws {
        guard virDomainDestroy(pointer) == 0 else { throw libvirtError("stop domain \(name)") }
    }

    /// Removes the definition with its NVRAM file, saved state and snapshot records; disks stay.
    package func undefine() throws {
        let basic = VIR_DOMAIN_UNDEFINE_MANAGED_SAVE.rawValue | VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA.rawValue
        let all =
            basic | VIR_DOMAIN_UNDEFINE_NVRAM.rawValue | VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA.rawValue
        if virDomainUndefineFlags(pointer, all) == 0 { return }
        // The test driver has neither NVRAM nor checkpoints, and says so.
        guard lastLibvirtError().0 == VIR_ERR_INVALID_ARG, virDomainUndefineFlags(pointer, basic) == 0 else {
            throw libvirtError("undefine domain \(name)")
        }
    }

    /// Sends a QMP command to the guest agent and returns its answer.
    package func agentCommand(_ command: String, seconds: Int32) throws -> String {
        guard let answer = takeString(virDomainQemuAgentCommand(pointer, command, seconds, 0)) else {
            throw libvirtError("guest agent of domain \(name)")
        }
        return answer
    }
}

/// libvirt's numbers and virsh's words.
package enum DomainState: Int32, Sendable, CustomStringConvertible {
    case noState = 0
    case running, blocked, paused, shutdown, shutOff, crashed, suspended

    package var description: String {
        switch self {
        case .noState: "no state"
        case .running: "running"
        case .blocked: "idle"
        case .paused: "paused"
        case .shutdown: "in shutdown"
        case .shutOff: "shut off"
        case .crashed: "crashed"
        case .suspended: "pmsuspended"
        }
    }

    /// Its guest goes on; idle is how some hypervisors call one that waits.
    package var isRunning: Bool { self == .running || self == .blocked }

    /// It has a process; a paused one too.
    package var isActive: Bool { self != .shutOff && self != .crashed && self != .noState }
}
