import Foundation
import Glibc
import HostKit
import MigrationModel
import Testing

@testable import Deploy

@Suite struct ConsoleTests {
    @Test(arguments: [
        ("plain\nlines\n", ["plain", "lines"], ""), ("crlf\r\nnext", ["crlf"], "next"),
        ("10%\r20%\r100%\n", ["100%"], ""), ("\u{1b}[2J\u{1b}[1;32mok\u{1b}[0m\n", ["ok"], ""),
        ("\u{1b}]0;title\u{7}shell\u{1b}(B\n", ["shell"], ""), ("\u{1b}P+q\u{1b}\\x\n", ["x"], ""),
        ("a\u{8}b\u{0}\u{7}\tc\n", ["b\tc"], ""), ("\u{1b}[torn\nnext\n", ["orn", "next"], ""),
        ("\u{1b}[12\nnext\n", ["", "next"], ""), ("", [], ""), ("demo login: ", [], "demo login: "),
    ])
    func cutsLines(_ input: String, _ lines: [String], _ rest: String) {
        var whole = ConsoleLines()
        #expect(whole.append(input.utf8) == lines && whole.partial == rest)
        // Torn anywhere, the result is the same.
        var torn = ConsoleLines()
        #expect(input.utf8.flatMap { torn.append([$0]) } == lines && torn.partial == rest)
    }

    @Test func bytesOfAnyKindAreText() {
        var lines = ConsoleLines()
        #expect(lines.append([0xff, 0x41, 0xc3, 0x0a]) == ["\u{FFFD}A\u{FFFD}"])
        let long = lines.append(repeatElement(0x78, count: 20_000))
        #expect(long.map(\.utf8.count) == [8192, 8192] && lines.partial.count == 20_000 - 2 * 8192)
    }

    private func wait(
        _ path: String, _ pattern: String, timeout: Duration = .seconds(10), stop: StopFlag = StopFlag(),
        state: () throws -> DomainState = { .running }
    ) throws -> String {
        try waitForConsole(
            logPath: path, pattern: pattern, timeout: timeout, stop: stop, domainState: state, progress: { _ in })
    }

    private func error(_ body: () throws -> String) -> MigrationError? {
        #expect(throws: MigrationError.self) { try body() }
    }

    @Test func findsWhatIsThereAlready() throws {
        try withFolder { folder in
            let path = "\(folder)/console"
            try Files.writeAtomically(Array("boot\r\nservice ready (42)\r\nservice ready (43)\r\n".utf8), to: path)
            #expect(try wait(path, #"ready \([0-9]+\)$"#) == "service ready (42)")
            #expect(try wait(path, "^[[:alpha:]]+$") == "boot")
        }
    }

    @Test func followsAGrowingLogThroughItsRotation() throws {
        try withFolder { folder in
            let path = "\(folder)/console"
            let writer = Thread {
                let steps: [(String, Bool)] = [
                    ("SeaBIOS\r\n", false), ("Linux ver", false), ("sion 6.1\r\n", false), ("rest", true),
                    ("after rotation\r\ndemo lo", false), ("gin: ", false),
                ]
                for (text, rotates) in steps {
                    usleep(20_000)
                    guard let file = try? File(path, O_WRONLY | O_CREAT | O_APPEND), let size = try? file.size else {
                        return
                    }
                    try? file.write(Array(text.utf8), at: size)
                    if rotates { rename(path, "\(path).0") }
                }
            }
            writer.start()
            let line = try wait(path, "login: $")
            #expect(line == "demo login: ")
        }
    }

    @Test func aDeadDomainEndsTheWait() throws {
        try withFolder { folder in
            let path = "\(folder)/console"
            try Files.writeAtomically(Array("Kernel panic - not syncing\r\nend".utf8), to: path)
            let failure = error { try wait(path, "login:", state: { .shutOff }) }
            #expect(failure?.code == .failedPrecondition)
            #expect(failure?.message.contains("shut off") == true && failure?.message.contains("Kernel panic") == true)
            #expect(failure?.message.hasSuffix("end") == true)
            // What it wrote before it died still counts.
            #expect(try wait(path, "^end$", state: { .shutOff }) == "end")
        }
    }

    @Test func timeRunsOut() throws {
        try withFolder { folder in
            let failure = error { try wait("\(folder)/console", "login:", timeout: .milliseconds(50)) }
            #expect(failure?.code == .deadlineExceeded && failure?.message.contains("stayed empty") == true)
            let stop = StopFlag()
            stop.set()
            let cancelled = error { try wait("\(folder)/console", "login:", stop: stop) }
            #expect(cancelled?.code == .cancelled)
            let missing = error { try wait("\(folder)/missing/console", "x") }
            #expect(missing?.code == .notFound)
            struct Gone: Error {}
            #expect(throws: Gone.self) { try wait("\(folder)/console", "x", state: { throw Gone() }) }
        }
    }

    @Test(arguments: [
        ("login:", true), ("^(a|b)+ [0-9]{2}$", true), ("(", false), ("[z-a]", false), ("", false), ("*", false),
    ])
    func checksPatterns(_ pattern: String, _ valid: Bool) {
        if valid {
            #expect(throws: Never.self) { try validateConsolePattern(pattern) }
        } else {
            let error = #expect(throws: MigrationError.self) { try validateConsolePattern(pattern) }
            #expect(error?.code == .invalidArgument)
        }
    }
}
