import Glibc
import HostKit
import TestKit
import Testing

/// A server that a test started, ended with it.
final class Daemon {
    let pid: pid_t
    /// The file its output goes to.
    let output: String

    init(_ arguments: String..., output: String) throws {
        self.output = output
        var pointers: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) } + [nil]
        defer { for pointer in pointers { free(pointer) } }
        let file = try File(output, O_RDWR | O_CREAT | O_APPEND)
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, file.descriptor, 1)
        posix_spawn_file_actions_adddup2(&actions, file.descriptor, 2)
        var pid: pid_t = 0
        try #require(posix_spawnp(&pid, arguments[0], &actions, nil, &pointers, environ) == 0, "\(arguments[0])")
        self.pid = pid
    }

    deinit {
        kill(pid, SIGKILL)
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0 && errno == EINTR {}
    }

    func said() throws -> String { String(decoding: try Files.read(output), as: UTF8.self) }

    /// What it leaves in a file once it is ready.
    func waits(for path: String) async throws {
        let ready: Bool? = try await eventually { Files.exists(path) ? true : nil }
        let text = try said()
        try #require(ready != nil, "\(text)")
    }
}

/// A folder served over HTTP.
struct DiskServer {
    let daemon: Daemon
    let base: String

    /// - Parameter certificate: PEM with key, for HTTPS.
    init(_ folder: TemporaryFolder, certificate: String? = nil) async throws {
        // .../Tests/ConvertTests/Daemon.swift
        let tests = Files.parent(of: Files.parent(of: #filePath))
        let port = folder.file("port")
        let server = "\(tests)/testbeds/http/serve"
        daemon =
            if let certificate {
                try Daemon(
                    server, folder.path, "--port-file", port, "--certificate", certificate,
                    output: folder.file("served"))
            } else {
                try Daemon(server, folder.path, "--port-file", port, output: folder.file("served"))
            }
        try await daemon.waits(for: port)
        let number = String(decoding: try Files.read(port), as: UTF8.self)
        base = "\(certificate == nil ? "http" : "https")://127.0.0.1:\(number)"
    }
}
