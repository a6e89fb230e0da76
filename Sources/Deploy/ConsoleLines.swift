/// Cuts a serial console's bytes into lines of text. Terminal control sequences (ECMA-48) are taken out, a carriage
/// return starts its line over, and bytes that are not UTF-8 become U+FFFD. A line longer than 8 KiB is cut there.
struct ConsoleLines {
    static let longestLine = 8192

    private enum State {
        case text
        case escape
        /// After ESC [, until a byte 0x40...0x7e.
        case control
        /// After ESC ] (title), ESC P, X, ^ or _, until BEL or ESC.
        case string
        /// After ESC and one of the bytes that take another: ESC ( B.
        case intermediate
    }

    private var state = State.text
    private var bytes: [UInt8] = []
    private var overwrite = false

    /// What stands on the line that has not ended: a login prompt never does.
    var partial: String { String(decoding: bytes, as: UTF8.self) }

    /// Returns the lines that `chunk` completes.
    mutating func append(_ chunk: some Sequence<UInt8>) -> [String] {
        var lines: [String] = []
        for byte in chunk {
            switch state {
            case .text: if let line = text(byte) { lines.append(line) }
            case .escape:
                state =
                    switch byte {
                    case UInt8(ascii: "["): .control
                    case UInt8(ascii: "]"), UInt8(ascii: "P"), UInt8(ascii: "X"), UInt8(ascii: "^"), UInt8(ascii: "_"):
                        .string
                    case 0x20...0x2f: .intermediate
                    case 0x1b: .escape
                    default: .text
                    }
            case .control:
                // A line feed inside means the sequence was torn: the text matters more.
                if byte == 0x0a || byte == 0x1b {
                    state = byte == 0x1b ? .escape : .text
                    if byte == 0x0a, let line = text(byte) { lines.append(line) }
                } else if (0x40...0x7e).contains(byte) {
                    state = .text
                }
            case .string:
                if byte == 0x07 { state = .text }
                if byte == 0x1b { state = .escape }
                if byte == 0x0a {
                    state = .text
                    if let line = text(byte) { lines.append(line) }
                }
            case .intermediate: if !(0x20...0x2f).contains(byte) { state = .text }
            }
        }
        return lines
    }

    private mutating func text(_ byte: UInt8) -> String? {
        switch byte {
        case 0x0a: return endLine()
        case 0x0d: overwrite = true
        case 0x1b: state = .escape
        case 0x08: if !bytes.isEmpty { bytes.removeLast() }
        case 0x09, 0x20...0x7e, 0x80...:
            if overwrite {
                bytes.removeAll(keepingCapacity: true)
                overwrite = false
            }
            bytes.append(byte)
            if bytes.count >= Self.longestLine { return endLine() }
        default: break
        }
        return nil
    }

    private mutating func endLine() -> String {
        defer {
            bytes.removeAll(keepingCapacity: true)
            overwrite = false
        }
        return partial
    }
}
