import FoundationEssentials
import Glibc
import HostKit
import MigrationModel

/// Runs a program in a guest through its QEMU agent (`guest-exec`), without a shell, and returns what it printed.
///
/// - Parameters:
///   - program: its path, or a name that the agent finds in its `PATH`.
///   - ask: sends a command to the agent and returns its answer.
///   - deed: what for, "list its PCI devices".
/// - Throws: `failedPrecondition` when the agent may not run programs or the program fails, `deadlineExceeded`.
func runInGuest(
    _ program: String, _ arguments: [String], to deed: String, hint: String, timeout: Duration, stop: StopFlag,
    ask: (String) throws -> String
) throws -> String {
    let command = Command(arguments: Command.Arguments(path: program, arg: arguments))
    let started: Started = try answer(ask(String(decoding: JSONEncoder().encode(command), as: UTF8.self)))
    let deadline = ContinuousClock().now + timeout
    while true {
        try stop.check()
        let status: Status = try answer(
            ask(#"{"execute":"guest-exec-status","arguments":{"pid":\#(started.pid)}}"#))
        if status.exited {
            let errors = status.text(\.errors).split(whereSeparator: \.isNewline).last.map { ": \($0.prefix(300))" }
            guard status.exitcode == 0 else {
                throw MigrationError(
                    .failedPrecondition, "the guest could not \(deed) (exit \(status.exitcode ?? -1))\(errors ?? "")",
                    hint: hint)
            }
            return status.text(\.output)
        }
        guard ContinuousClock().now < deadline else {
            throw MigrationError(.deadlineExceeded, "the guest did not \(deed) within \(timeout)", hint: hint)
        }
        // The agent has no way to wait for the program's end.
        poll(nil, 0, 100)
    }
}

private struct Command: Encodable {
    struct Arguments: Encodable {
        var path: String
        var arg: [String]
        var captureOutput = true

        private enum CodingKeys: String, CodingKey {
            case path, arg
            case captureOutput = "capture-output"
        }
    }

    var execute = "guest-exec"
    var arguments: Arguments
}

private struct Started: Decodable { var pid: Int }

private struct Status: Decodable {
    var exited: Bool
    var exitcode: Int?
    var output: String?
    var errors: String?

    private enum CodingKeys: String, CodingKey {
        case exited, exitcode
        case output = "out-data"
        case errors = "err-data"
    }

    func text(_ data: KeyPath<Status, String?>) -> String {
        String(decoding: self[keyPath: data].flatMap { Data(base64Encoded: $0) } ?? Data(), as: UTF8.self)
    }
}

private struct Answer<Value: Decodable>: Decodable { var `return`: Value }

private func answer<Value: Decodable>(_ text: String) throws -> Value {
    // A guest is not trusted: libvirt bounds the answer at 10 MB, what is wanted has a few hundred bytes.
    guard text.utf8.count <= 1 << 20, let answer = try? JSONDecoder().decode(Answer<Value>.self, from: Data(text.utf8))
    else {
        throw MigrationError(.failedPrecondition, "the guest agent gave an answer that can't be read")
    }
    return answer.return
}
