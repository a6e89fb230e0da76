/// What the headers of an answer say (RFC 9110).
package struct HTTPResponse {
    package private(set) var status = 0
    /// Of the whole resource, in bytes, where told.
    private(set) var total: UInt64?
    /// The bytes in a 206.
    private(set) var range: ClosedRange<UInt64>?
    /// Tells this content from any other, for `If-Range`: a strong ETag, else the date of the last change.
    var validator: String? { tag ?? changed }
    private(set) var isEncoded = false
    /// The empty line came: nothing will be added.
    private(set) var isComplete = false
    /// "text/xml", lower case.
    package private(set) var mediaType = ""
    /// "name=value" of each cookie set.
    package private(set) var cookies: [String] = []
    private var tag: String?
    private var changed: String?

    /// Of interim and redirecting answers only the last one's lines count.
    mutating func take(line: String) {
        if line.hasPrefix("HTTP/") {
            self = HTTPResponse()
            status = line.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
            return
        }
        guard let colon = line.firstIndex(of: ":") else {
            isComplete = status >= 200 && !(300..<400).contains(status) || status == 304
            return
        }
        let value = line[line.index(after: colon)...].drop { $0 == " " || $0 == "\t" }
        switch line[..<colon].lowercased() {
        case "etag" where value.hasPrefix("\""): tag = String(value)
        case "last-modified": changed = String(value)
        case "content-length" where status == 200: total = UInt64(value)
        case "content-encoding": isEncoded = value.lowercased() != "identity"
        case "content-range": takeRange(value)
        case "content-type":
            mediaType = value.lowercased().prefix { $0 != ";" }.filter { !$0.isWhitespace }
        case "set-cookie" where cookies.count < 16: cookies.append(String(value.prefix { $0 != ";" }))
        default: break
        }
    }

    /// "bytes 0-1023/146515", of a 416 "bytes */146515".
    private mutating func takeRange(_ value: Substring) {
        let parts = value.split { " -/".contains($0) }
        if parts.count == 3, parts[0] == "bytes", parts[1] == "*" { total = UInt64(parts[2]) }
        guard parts.count == 4, parts[0] == "bytes", let first = UInt64(parts[1]), let last = UInt64(parts[2]),
            first <= last
        else { return }
        range = first...last
        total = UInt64(parts[3])
    }
}
