import Glibc
import HostKit
import MigrationModel

/// Asks on the terminal, without echo. Whatever ends the question, the terminal is afterwards as it was before.
enum PasswordPrompt {
    private static let limit = 1024

    /// Blocks until a line came.
    ///
    /// - Throws: `invalidArgument` without a terminal or a password, `cancelled` at a signal that would end the process.
    static func ask(_ prompt: String) throws -> String {
        let terminal = open("/dev/tty", O_RDWR | O_CLOEXEC)
        guard terminal >= 0 else {
            throw MigrationError(
                .invalidArgument, "there is no terminal to ask for a password",
                hint: "name a file with --password-file")
        }
        defer { close(terminal) }
        let clean = prompt.map { $0.isNewline || $0 == "\u{1B}" ? "?" : $0 }
        let answer = try Interruptions.caught { try line(from: terminal, Array(String(clean).utf8)) }
        guard answer.count <= limit else {
            throw MigrationError(.invalidArgument, "the password has more than \(limit) bytes")
        }
        guard !answer.isEmpty, let password = String(validating: answer, as: UTF8.self) else {
            throw MigrationError(.invalidArgument, "no password was given")
        }
        return password
    }

    private static func line(from terminal: Int32, _ prompt: [UInt8]) throws -> [UInt8] {
        while true {
            var before = termios()
            guard tcgetattr(terminal, &before) == 0 else { throw systemError("read the settings of", "/dev/tty") }
            var quiet = before
            quiet.c_lflag &= ~tcflag_t(ECHO)
            guard tcsetattr(terminal, TCSAFLUSH, &quiet) == 0 else { throw systemError("silence", "/dev/tty") }
            write(terminal, prompt, prompt.count)
            let result = Result { try read(from: terminal) }
            tcsetattr(terminal, TCSAFLUSH, &before)
            write(terminal, "\n", 1)
            if let line = try result.get() { return line }
            // Stopped by the terminal: whoever continues is asked again.
            raise(SIGSTOP)
        }
    }

    /// nil at the signal that stops a process.
    private static func read(from terminal: Int32) throws -> [UInt8]? {
        var line: [UInt8] = []
        while true {
            var wanted = [
                pollfd(fd: terminal, events: Int16(POLLIN), revents: 0),
                pollfd(fd: Interruptions.pipe.read, events: Int16(POLLIN), revents: 0),
            ]
            guard poll(&wanted, 2, -1) >= 0 || errno == EINTR else { throw systemError("wait for", "/dev/tty") }
            var byte: UInt8 = 0
            if wanted[1].revents != 0, Glibc.read(wanted[1].fd, &byte, 1) == 1 {
                if Int32(byte) == SIGTSTP { return nil }
                throw MigrationError(.cancelled, "interrupted")
            }
            guard wanted[0].revents != 0 else { continue }
            let count = Glibc.read(terminal, &byte, 1)
            if count < 0 && errno == EINTR { continue }
            guard count == 1, byte != UInt8(ascii: "\n") else { return line }
            // The rest of a line that is too long is the password's as well.
            if line.count <= limit { line.append(byte) }
        }
    }
}

/// Signals that would leave a terminal without echo, as bytes of a pipe while somebody asks.
private enum Interruptions {
    static let pipe = makeSignalPipe()
    private static let numbers = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP]

    static func caught<Value>(_ body: () throws -> Value) throws -> Value {
        _ = pipe
        var action = sigaction()
        action.__sigaction_handler.sa_handler = { number in
            var byte = UInt8(truncatingIfNeeded: number)
            write(Interruptions.pipe.write, &byte, 1)
        }
        var before = Array(repeating: sigaction(), count: numbers.count)
        for (index, number) in numbers.enumerated() { sigaction(number, &action, &before[index]) }
        defer { for (index, number) in numbers.enumerated() { sigaction(number, &before[index], nil) } }
        return try body()
    }
}
