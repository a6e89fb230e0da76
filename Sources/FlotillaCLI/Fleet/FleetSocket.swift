import ArgumentParser
import FlotillaProtocol
import GRPCCore
import GRPCNIOTransportHTTP2Posix
import Glibc
import HostKit
import Messaging
import MigrationModel

/// The coordinator's API: gRPC on a Unix socket that only the coordinator's user and root can open.
struct FleetSocket {
    static let standard = "/run/flotilla/coordinator.sock"

    let path: String

    /// Clears the way for a server. Whoever calls it holds the coordinator's lock, so a socket in the way is stale.
    init(path: String) throws {
        guard path.utf8.count < 108 else {
            throw MigrationError(.invalidArgument, "socket \(path): a Unix socket's path has at most 107 bytes")
        }
        try Files.createDirectories(Files.parent(of: path), mode: 0o755)
        // Files that this process makes are its own.
        umask(0o077)
        var info = stat()
        if lstat(path, &info) == 0 {
            guard info.st_mode & S_IFMT == S_IFSOCK else {
                throw MigrationError(
                    .alreadyExists, "\(path) is in the way of the API's socket", hint: "move it away or set 'socket'")
            }
            try Files.remove(path)
        }
        self.path = path
    }
}

/// How a command reaches the coordinator.
struct FleetOptions: ParsableArguments {
    typealias Client = CoordinatorService.Client<HTTP2ClientTransport.Posix>

    @Option(help: ArgumentHelp("The coordinator's socket.", valueName: "path"), completion: .file())
    var socket = FleetSocket.standard

    func connect<Value: Sendable>(
        _ body: @escaping @Sendable (Client) async throws -> Value
    ) async throws -> Value {
        guard Files.exists(socket) else {
            throw MigrationError(
                .unavailable, "there is no coordinator at \(socket)",
                hint: "start flotilla coordinator, or name its socket with --socket")
        }
        let transport = try HTTP2ClientTransport.Posix(
            target: .unixDomainSocket(path: socket), transportSecurity: .plaintext)
        do {
            return try await withGRPCClient(transport: transport) { client in
                try await body(Client(wrapping: client))
            }
        } catch let error as RPCError {
            var error = MigrationError(error)
            // A socket that nobody serves, or one that ended meanwhile.
            if error.code == .unavailable, error.hint == nil {
                error.hint = "see whether flotilla coordinator runs, then try again"
            }
            throw error
        }
    }
}
