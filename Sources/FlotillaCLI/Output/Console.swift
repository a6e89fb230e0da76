import Dispatch
import Glibc

/// Standard output and error. Written in order by a queue of its own, so that a reader who pauses (a pager) stops no
/// heartbeat; a reader that went away is not an error of the migration.
enum Console {
    private static let queue = DispatchQueue(label: "console")

    static func out(_ text: String) { queue.async { write(text, to: STDOUT_FILENO) } }
    static func line(_ text: String) { out("\(text)\n") }
    static func complain(_ text: String) { queue.async { write("\(text)\n", to: STDERR_FILENO) } }

    /// Everything said so far is written when this returns.
    static func flush() { queue.sync {} }

    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        text.withUTF8 { bytes in
            var rest = UnsafeRawBufferPointer(bytes)
            while !rest.isEmpty {
                let count = Glibc.write(descriptor, rest.baseAddress, rest.count)
                if count < 0 && errno != EINTR { return }
                if count > 0 { rest = UnsafeRawBufferPointer(rebasing: rest[count...]) }
            }
        }
    }
}
