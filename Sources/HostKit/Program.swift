import Glibc
import MigrationModel
import Synchronization

/// Other programs, run with an argument vector, never through a shell.
package enum Program {
    package struct Outcome: Sendable {
        /// Exit code; of a killed process, minus the signal.
        package var status: Int32
        /// Standard output and error, together at most about 1 MiB.
        package var output: String
        /// There was more.
        package var isCut = false
    }

    private static let limit = 1 << 20

    /// Where a program lies: the first of the usual folders, `PATH` not asked, that has an executable of that name.
    package static func find(
        _ name: String, in folders: [String] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    ) -> String? {
        folders.map { "\($0)/\(name)" }.first { access($0, X_OK) == 0 }
    }

    /// Runs a program to its end with empty standard input and a session of its own. Blocks.
    ///
    /// - Throws: `deadlineExceeded` when it had to be killed, which one that the kernel holds may survive; `notFound` when there is none.
    package static func run(_ path: String, _ arguments: [String], limit: Duration = .seconds(60)) throws -> Outcome {
        let name = Files.name(of: path)
        var ends: [Int32] = [0, 0]
        guard pipe(&ends) == 0 else { throw systemError("pipe for", path) }
        let reading = ends[0]
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 2)
        posix_spawn_file_actions_addclose(&actions, ends[0])
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        posix_spawnattr_setflags(&attributes, Int16(0x80))  // POSIX_SPAWN_SETSID
        var argv = ([path] + arguments).map { strdup($0) } + [nil]
        defer { for text in argv { free(text) } }

        var pid: pid_t = 0
        let spawned = posix_spawn(&pid, path, &actions, &attributes, &argv, environ)
        close(ends[1])
        guard spawned == 0 else {
            close(reading)
            throw systemError("start", path, errno: spawned)
        }
        let child = pid
        let output = Mutex<[UInt8]>([])
        let ended = MonotonicSemaphore()
        let status = Mutex<Int32>(0)
        let (isKilled, isCut) = (StopFlag(), StopFlag())
        spawnThread(name) {
            var raw: Int32 = 0
            // Ends with the last writer, which may be a child that outlives the program: wait for the program first.
            _ = fcntl(reading, F_SETFL, O_NONBLOCK)
            var isOver = false
            while !isKilled.isSet {
                let piece = [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
                    count = max(0, read(reading, buffer.baseAddress, 4096))
                }
                output.withLock { if $0.count < Self.limit { $0 += piece } else { isCut.set() } }
                if !piece.isEmpty { continue }
                if isOver { break }
                let waited = waitpid(child, &raw, WNOHANG)
                isOver = waited == child || (waited < 0 && errno != EINTR)
                if !isOver {
                    var one = pollfd(fd: reading, events: Int16(POLLIN), revents: 0)
                    // A closed pipe polls ready at once; then only the end of the program is still to come.
                    if poll(&one, 1, 20) > 0, one.revents & Int16(POLLIN) == 0 {
                        while waitpid(child, &raw, 0) < 0 && errno == EINTR {}
                        isOver = true
                    }
                }
            }
            close(reading)
            // Reaped whenever it ends, though nobody may wait for it any more.
            while !isOver { isOver = waitpid(child, &raw, 0) == child || errno != EINTR }
            status.withLock { $0 = raw }
            ended.signal()
        }
        if !ended.wait(for: limit) {
            kill(-child, SIGKILL)
            isKilled.set()
            let message = "\(path) did not end within \(limit.components.seconds) s and was killed"
            guard !ended.wait(for: .seconds(5)) else {
                throw MigrationError(.deadlineExceeded, message)
            }
            throw MigrationError(
                .deadlineExceeded, "\(message), but process \(child) lives on: the kernel holds it",
                hint: "/proc/\(child)/stack and dmesg tell what it waits for, mostly a disk or a driver")
        }
        let raw = status.withLock { $0 }
        return Outcome(
            status: raw & 0x7f == 0 ? (raw >> 8) & 0xff : -(raw & 0x7f),
            output: output.withLock { String(decoding: $0, as: UTF8.self) }, isCut: isCut.isSet)
    }
}
