import CLibvirt
import Glibc
import MigrationModel

/// The calling thread's last libvirt error as a `MigrationError`. Call it right after the failed call, on the same
/// thread: libvirt keeps one error per thread.
func libvirtError(_ operation: String, hint: String? = nil) -> MigrationError {
    let (number, domain, message) = lastLibvirtError()
    return MigrationError(errorCode(number, from: domain), "\(operation): libvirt: \(message)", hint: hint)
}

func errorCode(_ number: virErrorNumber, from domain: virErrorDomain) -> MigrationError.Code {
    switch number {
    case VIR_ERR_NO_DOMAIN, VIR_ERR_NO_NETWORK, VIR_ERR_NO_DOMAIN_METADATA: .notFound
    case VIR_ERR_DOM_EXIST: .alreadyExists
    case VIR_ERR_AUTH_FAILED, VIR_ERR_AUTH_CANCELLED, VIR_ERR_AUTH_UNAVAILABLE: .unauthenticated
    case VIR_ERR_OPERATION_DENIED, VIR_ERR_ACCESS_DENIED: .permissionDenied
    case VIR_ERR_XML_ERROR, VIR_ERR_XML_DETAIL, VIR_ERR_XML_INVALID_SCHEMA, VIR_ERR_INVALID_ARG: .invalidArgument
    case VIR_ERR_NO_SUPPORT, VIR_ERR_CONFIG_UNSUPPORTED, VIR_ERR_ARGUMENT_UNSUPPORTED: .unimplemented
    case VIR_ERR_OPERATION_INVALID, VIR_ERR_OPERATION_UNSUPPORTED: .failedPrecondition
    case VIR_ERR_OPERATION_TIMEOUT: .deadlineExceeded
    case VIR_ERR_AGENT_UNRESPONSIVE, VIR_ERR_NO_CONNECT, VIR_ERR_RPC: .unavailable
    case VIR_ERR_NO_MEMORY, VIR_ERR_RESOURCE_BUSY: .resourceExhausted
    // The client's own socket says these of a daemon that hung up (src/rpc/virnetsocket.c, virnetclient.c): it is
    // restarted under those who use it.
    case VIR_ERR_SYSTEM_ERROR where domain == VIR_FROM_RPC, VIR_ERR_INTERNAL_ERROR where domain == VIR_FROM_RPC:
        .unavailable
    default: .internal
    }
}

func lastLibvirtError() -> (virErrorNumber, virErrorDomain, String) {
    guard let error = virGetLastError() else { return (VIR_ERR_OK, VIR_FROM_NONE, "no error was reported") }
    return (
        virErrorNumber(UInt32(error.pointee.code)), virErrorDomain(UInt32(error.pointee.domain)),
        error.pointee.message.map { String(cString: $0) } ?? "unknown error"
    )
}

/// Copies and frees a string that libvirt allocated.
func takeString(_ text: UnsafeMutablePointer<CChar>?) -> String? {
    guard let text else { return nil }
    defer { free(text) }
    return String(cString: text)
}
