import Glibc

/// Standard output and error, unbuffered: what was said is said, whatever happens next. A reader that went away is
/// not an error of the migration.
enum Console {
    static func out(_ text: String) { write(text, to: STDOUT_FILENO) }
    static func line(_ text: String) { out("\(text)\n") }
    static func complain(_ text: String) { write("\(text)\n", to: STDERR_FILENO) }

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
