import CNBD
import Glibc
import HostKit
import MigrationModel

/// One connection to an NBD export, one command at a time. It owns the libnbd handle. Waiting ends within a tenth of a
/// second once the flag is set; the connection is closed then, since libnbd may still be sending our memory.
///
/// Whoever took it from the pool owns it, so it is `@unchecked Sendable` like the C handle it wraps.
final class NBDConnection: @unchecked Sendable {
    private let uri: String
    private let stop: StopFlag
    private var handle: OpaquePointer?

    /// Connects and negotiates.
    init(_ uri: String, _ stop: StopFlag) throws {
        self.uri = uri
        self.stop = stop
        guard let handle = nbd_create() else {
            throw MigrationError(.resourceExhausted, "\(uri): libnbd can't be set up")
        }
        self.handle = handle
        // The URI is the person's own, and so are the key files it may name.
        nbd_set_uri_allow_local_file(handle, true)
        guard nbd_aio_connect_uri(handle, uri) == 0 else { throw failure("connect") }
        while nbd_aio_is_ready(handle) == 0 {
            guard nbd_aio_is_dead(handle) == 0, nbd_aio_is_closed(handle) == 0 else { throw failure("connect") }
            try advance("connect")
        }
    }

    deinit { close() }

    private func close() {
        if let handle { nbd_close(handle) }
        handle = nil
    }

    /// What the server said about the export.
    func ask(_ question: (OpaquePointer) -> Int64) throws -> UInt64 {
        let answer = question(try opened())
        guard answer >= 0 else { throw failure("ask about it") }
        return UInt64(answer)
    }

    /// Sends a command and waits for it. Memory that it names must live that long.
    ///
    /// - Parameters:
    ///   - what: "write 4096 bytes at byte 0".
    ///   - send: starts it and returns libnbd's number for it.
    func run(_ what: @autoclosure () -> String, _ send: (OpaquePointer) -> Int64) throws {
        let handle = try opened()
        let cookie = send(handle)
        guard cookie > 0 else { throw failure(what()) }
        while true {
            switch nbd_aio_command_completed(handle, UInt64(cookie)) {
            case 0: try advance(what())
            case 1: return
            default: throw failure(what())
            }
        }
    }

    private func opened() throws -> OpaquePointer {
        try stop.check()
        guard let handle else { throw MigrationError(.unavailable, "\(uri): the connection is gone", hint: again) }
        return handle
    }

    private func advance(_ what: @autoclosure () -> String) throws {
        do {
            try stop.check()
            guard nbd_poll(handle, 100) >= 0 else { throw failure(what()) }
        } catch {
            close()
            throw error
        }
    }

    private let again = "run the same command again with --resume: it continues"

    /// The calling thread's last error in libnbd.
    private func failure(_ what: String) -> MigrationError {
        let number = nbd_get_errno()
        let text = nbd_get_error().map { String(cString: $0) } ?? String(cString: strerror(number))
        let (code, hint): (MigrationError.Code, String?) =
            switch number {
            case ENOSPC, EDQUOT: (.resourceExhausted, "free some space on the server; \(again)")
            case EPERM, EACCES, EROFS: (.permissionDenied, "the server decides who may write to the export")
            case EINVAL: (.invalidArgument, nil)
            case EIO: (.internal, "look at the server's log and its disk")
            default: (.unavailable, "look whether the server runs and has this export")
            }
        return MigrationError(code, "\(uri): \(what): \(text)", hint: hint)
    }
}
