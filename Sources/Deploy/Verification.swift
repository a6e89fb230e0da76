import Glibc
package import HostKit
import MigrationModel

/// Checks that `pattern` is a regular expression, before anything is done that it is to verify.
///
/// The syntax is Swift's, which takes POSIX extended expressions and most of Perl's; a line matches when the pattern
/// is found anywhere in it.
package func validateConsolePattern(_ pattern: String) throws { _ = try compile(pattern) }

private func compile(_ pattern: String) throws -> Regex<AnyRegexOutput> {
    guard !pattern.isEmpty, pattern.utf8.count <= 4096 else {
        throw MigrationError(
            .invalidArgument, "the console pattern is \(pattern.isEmpty ? "empty" : "longer than 4096 bytes")",
            hint: "for example 'login:'")
    }
    do {
        return try Regex(pattern).matchingSemantics(.unicodeScalar)
    } catch {
        throw MigrationError(.invalidArgument, "\"\(pattern)\" is not a regular expression: \(error)")
    }
}

/// Waits until a line of the guest's serial console matches, and returns that line. Lines written before the call
/// count: the log is read from its beginning. A line without an end (a login prompt) counts once the console has been
/// quiet for a quarter of a second.
///
/// - Parameters:
///   - logPath: absolute path of the log that the domain's XML names.
///   - domainState: asked about once a second; a domain without a process ends the wait.
///   - progress: gets the newest console line, at most once a second.
/// - Throws: `deadlineExceeded` after `timeout`, `failedPrecondition` when the domain died, both with the last
///   console lines; the stop flag's reason.
package func waitForConsole(
    logPath: String, pattern: String, timeout: Duration, stop: StopFlag,
    domainState: () throws -> DomainState, progress: (String) -> Void
) throws -> String {
    let regex = try compile(pattern)
    let log = try ConsoleLog(logPath)
    let clock = ContinuousClock()
    let deadline = clock.now + timeout
    var nextCheck = clock.now
    var lines = ConsoleLines()
    var recent: [String] = []
    var state = DomainState.running

    func match(_ line: String) -> Bool { (try? regex.firstMatch(in: line)) != nil }
    func consume() throws -> String? {
        while true {
            try stop.check()
            let bytes = try log.read()
            if bytes.isEmpty { return nil }
            for line in lines.append(bytes) where !line.allSatisfy(\.isWhitespace) {
                if match(line) { return line }
                recent.append(line)
                if recent.count > 40 { recent.removeFirst(20) }
            }
            if clock.now >= deadline { return nil }
        }
    }
    func failure(_ code: MigrationError.Code, _ message: String, _ hint: String) -> MigrationError {
        let last = (recent + [lines.partial]).filter { !$0.isEmpty }.suffix(10).joined(separator: "\n  ")
        return MigrationError(
            code, "\(message); \(last.isEmpty ? "the console stayed empty" : "the console's last lines:\n  \(last)")",
            hint: hint)
    }

    while true {
        if let line = try consume() { return line }
        if clock.now >= nextCheck {
            state = try domainState()
            nextCheck = clock.now + .seconds(1)
            if let newest = (recent + [lines.partial]).last(where: { !$0.isEmpty }) { progress(newest) }
        }
        let quiet = !log.wait(milliseconds: 250)
        let expired = clock.now >= deadline
        guard quiet || expired || !state.isActive else { continue }
        // What was written between the last look and the domain's end still counts.
        if let line = try consume() { return line }
        if !lines.partial.isEmpty, match(lines.partial) { return lines.partial }
        guard state.isActive else {
            throw failure(
                .failedPrecondition, "the domain is \(state) before its console matched \"\(pattern)\"",
                "look at the domain's log in /var/log/libvirt/qemu")
        }
        if expired {
            throw failure(
                .deadlineExceeded, "the console did not match \"\(pattern)\" within \(timeout)",
                "check that the guest has a console on ttyS0 (kernel argument console=ttyS0)")
        }
    }
}

/// Waits until the guest's QEMU agent answers a ping, and returns what it answered. libvirt reports an agent that has
/// not started at once, so this asks again every second.
///
/// - Parameter ask: sends a command to the agent and returns its answer; nil: through libvirt.
/// - Throws: `deadlineExceeded` after `timeout`, `failedPrecondition` when the domain died.
package func waitForAgent(
    _ domain: LibvirtDomain, timeout: Duration, stop: StopFlag, ask: ((String) throws -> String)? = nil,
    progress: (String) -> Void
) throws -> String {
    let deadline = ContinuousClock().now + timeout
    let ping = #"{"execute":"guest-ping"}"#
    while true {
        try stop.check()
        do {
            return try ask?(ping) ?? domain.agentCommand(ping, seconds: 5)
        } catch let error as MigrationError {
            let state = try domain.state()
            guard state.isActive else {
                throw MigrationError(
                    .failedPrecondition, "domain \(domain.name) is \(state) before its guest agent answered",
                    hint: "look at the domain's log in /var/log/libvirt/qemu", cause: error)
            }
            guard [.unavailable, .deadlineExceeded, .failedPrecondition, .internal].contains(error.code) else {
                throw error
            }
            guard ContinuousClock().now < deadline else {
                throw MigrationError(
                    .deadlineExceeded, "the guest agent of domain \(domain.name) did not answer within \(timeout)",
                    hint: "check that qemu-guest-agent is installed and running in the guest", cause: error)
            }
            progress(error.message)
        }
        for _ in 0..<10 where !stop.isSet { poll(nil, 0, 100) }
    }
}
