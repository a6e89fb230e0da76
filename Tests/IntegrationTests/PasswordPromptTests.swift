import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// The question for a vSphere password, on a terminal of its own.
@Suite struct PasswordPromptTests {
    /// A pseudo-terminal and a process that has it for its controlling one.
    private final class Terminal {
        let master: Int32
        /// Held open, so that the settings last.
        private let slave: Int32
        let pid: pid_t
        private var isEnded = false
        private(set) var shown = ""

        init(_ arguments: [String]) throws {
            master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC)
            // TIOCSPTLCK and TIOCGPTN of asm-generic/ioctls.h.
            var (lock, number): (Int32, UInt32) = (0, 0)
            try #require(
                master >= 0 && ioctl(master, 0x4004_5431, &lock) == 0 && ioctl(master, 0x8004_5430, &number) == 0)
            let path = "/dev/pts/\(number)"
            slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC)
            try #require(slave >= 0)
            var attributes = posix_spawnattr_t()
            posix_spawnattr_init(&attributes)
            defer { posix_spawnattr_destroy(&attributes) }
            // The first terminal that a session's leader opens becomes its own.
            let ownSession: Int16 = 0x80  // POSIX_SPAWN_SETSID of spawn.h
            posix_spawnattr_setflags(&attributes, ownSession)
            var actions = posix_spawn_file_actions_t()
            posix_spawn_file_actions_init(&actions)
            defer { posix_spawn_file_actions_destroy(&actions) }
            for descriptor in 0...2 as ClosedRange<Int32> {
                posix_spawn_file_actions_addopen(&actions, descriptor, path, O_RDWR, 0)
            }
            var argv = arguments.map { strdup($0) } + [nil]
            defer { for text in argv { free(text) } }
            var pid: pid_t = 0
            try #require(posix_spawn(&pid, arguments[0], &actions, &attributes, &argv, environ) == 0)
            self.pid = pid
            _ = fcntl(master, F_SETFL, O_NONBLOCK)
        }

        deinit {
            if !isEnded {
                kill(pid, SIGKILL)
                waitpid(pid, nil, 0)
            }
            close(slave)
            close(master)
        }

        var echoes: Bool {
            var settings = termios()
            return tcgetattr(slave, &settings) == 0 && settings.c_lflag & tcflag_t(ECHO) != 0
        }

        func type(_ text: String) { _ = Array(text.utf8).withUnsafeBytes { write(master, $0.baseAddress, $0.count) } }

        private func readMore() {
            var buffer = [UInt8](repeating: 0, count: 4096)
            let count = read(master, &buffer, buffer.count)
            if count > 0 { shown += String(decoding: buffer[..<count], as: UTF8.self) }
        }

        func waits(for text: String) async throws {
            let found: Bool? = try await eventually {
                readMore()
                return shown.contains(text) ? true : nil
            }
            try #require(found != nil, "\(shown)")
        }

        /// Exit code; of a killed process, minus the signal.
        func end() async throws -> Int32 {
            var status: Int32 = 0
            let ended: Bool? = try await eventually {
                readMore()
                return waitpid(pid, &status, WNOHANG) == pid ? true : nil
            }
            try #require(ended != nil, "\(shown)")
            isEnded = true
            readMore()
            return status & 0x7f == 0 ? status >> 8 & 0xff : -(status & 0x7f)
        }
    }

    private func ask() async throws -> Terminal {
        // Nothing listens on port 1: the answer is followed by an error.
        let terminal = try Terminal([try Environment.flotilla(), "inventory", "vsphere://me@127.0.0.1:1/"])
        #expect(terminal.echoes)
        try await terminal.waits(for: "Password of me at 127.0.0.1:1: ")
        #expect(!terminal.echoes)
        return terminal
    }

    @Test func thePasswordIsNotEchoed() async throws {
        let terminal = try await ask()
        terminal.type("geheim\n")
        #expect(try await terminal.end() != 0)
        #expect(terminal.shown.contains("127.0.0.1:1") && !terminal.shown.contains("geheim"), "\(terminal.shown)")
        #expect(!terminal.shown.contains("no password"), "\(terminal.shown)")
        #expect(terminal.echoes)
    }

    /// Ctrl-C, Ctrl-\\, and signals from elsewhere.
    @Test(arguments: ["\u{3}", "\u{1C}", "TERM", "HUP"]) func anInterruptedQuestionLeavesTheTerminalAsItWas(
        _ how: String
    ) async throws {
        let terminal = try await ask()
        terminal.type("gehe")
        switch how {
        case "TERM": kill(terminal.pid, SIGTERM)
        case "HUP": kill(terminal.pid, SIGHUP)
        default: terminal.type(how)
        }
        #expect(try await terminal.end() == 4)
        #expect(terminal.echoes && !terminal.shown.contains("gehe"), "\(terminal.shown)")
    }

    /// Stopped, the shell has its echo; continued, the question is asked again.
    @Test func aStoppedQuestionIsAskedAgain() async throws {
        let terminal = try await ask()
        kill(terminal.pid, SIGTSTP)
        var status: Int32 = 0
        let stopped: Bool? = try await eventually {
            waitpid(terminal.pid, &status, WNOHANG | WUNTRACED) == terminal.pid ? true : nil
        }
        try #require(stopped != nil && status & 0xff == 0x7f)
        #expect(terminal.echoes)
        kill(terminal.pid, SIGCONT)
        let silent: Bool? = try await eventually { terminal.echoes ? nil : true }
        try #require(silent != nil)
        terminal.type("geheim\n")
        #expect(try await terminal.end() != 0)
        #expect(terminal.echoes && !terminal.shown.contains("geheim"), "\(terminal.shown)")
    }

    @Test(arguments: [
        ("\n", "no password was given"), ("\u{4}", "no password was given"),
        (String(repeating: "x", count: 1100) + "\n", "more than 1024 bytes"),
    ])
    func anAnswerThatIsNoPasswordIsRefused(_ answer: String, _ words: String) async throws {
        let terminal = try await ask()
        terminal.type(answer)
        #expect(try await terminal.end() != 0)
        #expect(terminal.shown.contains(words), "\(terminal.shown)")
    }

    @Test func withoutATerminalAFileIsWanted() throws {
        let done = try run(
            "/usr/bin/setsid", ["--wait", try Environment.flotilla(), "inventory", "vsphere://me@127.0.0.1:1/"])
        #expect(done.status != 0 && done.errors.contains("--password-file"), "\(done)")
    }
}
