import CCurl
import Glibc
package import HostKit
import MigrationModel

/// Requests one after the other over a connection that stays open, their bodies pulled by the reader. libcurl does
/// the protocol, in this thread and only while `start`, `post` or `read` runs. One thread at a time.
package final class HTTPTransfer: @unchecked Sendable {
    /// The connection broke or the server is overloaded: the same request may succeed later.
    package struct Interrupted: Error {
        package let reason: String
        /// What it is mostly done by lasts: another attempt may succeed, but if none does it is no use to come back later.
        var isLasting = false

        package init(reason: String) { self.reason = reason }

        init(lasting reason: String) { (self.reason, isLasting) = (reason, true) }

        /// After the last attempt.
        func error(_ name: String) -> MigrationError {
            guard isLasting else {
                return MigrationError(.unavailable, "\(name): \(reason)", hint: "look at the server, then try again")
            }
            return MigrationError(
                .permissionDenied, "\(name): \(reason)",
                hint: "find out what answers in the server's place, as a proxy or a login page does, and let this host "
                    + "reach the server itself")
        }
    }

    /// Initialising libcurl isn't safe from several threads.
    private static let isReady: Bool = curl_global_init(Int(CURL_GLOBAL_ALL)) == CURLE_OK
    private static let room = 2 << 20

    private let location: HTTPLocation
    /// Ends what runs when it is set.
    package var stop: StopFlag
    private let pin = UnsafeMutablePointer<flotilla_pin>.allocate(capacity: 1)
    private let easy: UnsafeMutableRawPointer
    private let multi: UnsafeMutableRawPointer
    private let errorText: UnsafeMutablePointer<CChar>
    private var headers: UnsafeMutablePointer<curl_slist>?
    private var isRunning = false
    private var isPaused = false
    /// Why the transfer ended early; thrown once the bytes that came before are read.
    private var failure: (any Error)?
    private var response = HTTPResponse()
    /// Body bytes that wait for the reader: `buffer[first..<end]`.
    private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: room, alignment: 4096)
    private var first = 0
    private var end = 0
    /// The waiting reader's own memory, which has `filled` bytes: they are copied once. Empty while nobody waits.
    private var target = UnsafeMutableRawBufferPointer(start: nil, count: 0)
    private var filled = 0

    package init(_ location: HTTPLocation, _ stop: StopFlag) throws {
        guard Self.isReady, let easy = curl_easy_init(), let multi = curl_multi_init() else {
            throw MigrationError(.resourceExhausted, "\(location.name): libcurl can't be set up")
        }
        self.location = location
        self.stop = stop
        (self.easy, self.multi) = (easy, UnsafeMutableRawPointer(multi))
        pin.initialize(to: flotilla_pin())
        errorText = .allocate(capacity: Int(CURL_ERROR_SIZE))
        errorText.initialize(repeating: 0, count: Int(CURL_ERROR_SIZE))
        try configure()
    }

    deinit {
        halt()
        curl_easy_cleanup(easy)
        curl_multi_cleanup(multi)
        curl_slist_free_all(headers)
        pin.deallocate()
        errorText.deallocate()
        buffer.deallocate()
    }

    private func configure() throws {
        let me = Unmanaged.passUnretained(self).toOpaque()
        let numbers: [(CURLoption, Int)] = [
            (CURLOPT_NOSIGNAL, 1), (CURLOPT_FOLLOWLOCATION, location.headers == nil ? 1 : 0), (CURLOPT_MAXREDIRS, 5),
            (CURLOPT_SSL_VERIFYPEER, 1),
            (CURLOPT_SSL_VERIFYHOST, 2), (CURLOPT_CONNECTTIMEOUT, 30), (CURLOPT_LOW_SPEED_LIMIT, 1),
            (CURLOPT_LOW_SPEED_TIME, location.patience), (CURLOPT_BUFFERSIZE, 512 << 10), (CURLOPT_TCP_KEEPALIVE, 1),
            (CURLOPT_HTTP_VERSION, Int(CURL_HTTP_VERSION_1_1)),
            (CURLOPT_NETRC, location.headers == nil ? Int(CURL_NETRC_OPTIONAL.rawValue) : 0),
        ]
        var results = numbers.map { flotilla_curl_set_long(easy, $0, $1) }
        results.append(flotilla_curl_set_text(easy, CURLOPT_URL, location.url))
        results.append(flotilla_curl_set_text(easy, CURLOPT_PROTOCOLS_STR, "http,https"))
        // A disk that began under TLS stays there.
        let onward = location.url.lowercased().hasPrefix("https") ? "https" : "http,https"
        results.append(flotilla_curl_set_text(easy, CURLOPT_REDIR_PROTOCOLS_STR, onward))
        results.append(flotilla_curl_set_text(easy, CURLOPT_USERAGENT, "flotilla/\(version)"))
        switch location.trust {
        case .system: break
        case .authorities(let file):
            results.append(flotilla_curl_set_text(easy, CURLOPT_CAINFO, file))
            results.append(flotilla_curl_set_text(easy, CURLOPT_CAPATH, nil))
        case .fingerprint(let fingerprint):
            pin.pointee.length = Int32(fingerprint.bytes.count)
            withUnsafeMutableBytes(of: &pin.pointee.wanted) { $0.copyBytes(from: fingerprint.bytes) }
            results.append(flotilla_curl_set_pin(easy, pin))
        }
        results.append(flotilla_curl_set_pointer(easy, CURLOPT_ERRORBUFFER, errorText))
        results.append(flotilla_curl_set_pointer(easy, CURLOPT_WRITEDATA, me))
        results.append(flotilla_curl_set_pointer(easy, CURLOPT_HEADERDATA, me))
        results.append(
            flotilla_curl_set_sink(easy, CURLOPT_WRITEFUNCTION) { bytes, _, count, context in
                guard let bytes, let context else { return 0 }
                return Unmanaged<HTTPTransfer>.fromOpaque(context).takeUnretainedValue()
                    .takeBody(UnsafeRawBufferPointer(start: bytes, count: count))
            })
        results.append(
            flotilla_curl_set_sink(easy, CURLOPT_HEADERFUNCTION) { bytes, _, count, context in
                guard let bytes, let context else { return 0 }
                let line = String(decoding: UnsafeRawBufferPointer(start: bytes, count: count), as: UTF8.self)
                Unmanaged<HTTPTransfer>.fromOpaque(context).takeUnretainedValue().response
                    .take(line: String(line.prefix { !$0.isNewline }))
                return count
            })
        if let failed = results.first(where: { $0 != CURLE_OK }) {
            throw MigrationError(
                .internal, "\(location.name): libcurl refuses an option: \(String(cString: curl_easy_strerror(failed)))"
            )
        }
    }

    private func takeBody(_ bytes: UnsafeRawBufferPointer) -> Int {
        var direct = 0
        if first == end {
            (first, end) = (0, 0)
            direct = min(bytes.count, target.count - filled)
        }
        // All or nothing; never nothing with an empty buffer, which holds more than libcurl hands over at once.
        let rest = UnsafeRawBufferPointer(rebasing: bytes[direct...])
        guard rest.count <= buffer.count - end else {
            isPaused = true
            return flotilla_curl_pause
        }
        if direct > 0 {
            UnsafeMutableRawBufferPointer(rebasing: target[filled...]).copyMemory(
                from: UnsafeRawBufferPointer(rebasing: bytes[..<direct]))
            filled += direct
        }
        UnsafeMutableRawBufferPointer(rebasing: buffer[end...]).copyMemory(from: rest)
        end += rest.count
        return bytes.count
    }

    /// Sends a request, abandoning the one before, and returns once the answer's headers are there.
    ///
    /// - Parameters:
    ///   - range: nil for everything; without an upper bound up to the end.
    ///   - validator: an answer to a range is wanted only if it still holds.
    /// - Returns: an answer that is a success, or a 416 to a range.
    /// - Throws: `Interrupted` where trying again makes sense.
    func start(_ range: (from: UInt64, through: UInt64?)?, validator: String?) throws -> HTTPResponse {
        prepare()
        let text = range.map { "\($0.from)-\($0.through.map(String.init) ?? "")" }
        _ = flotilla_curl_set_long(easy, CURLOPT_HTTPGET, 1)
        _ = flotilla_curl_set_text(easy, CURLOPT_RANGE, text)
        if range != nil, let validator { headers = curl_slist_append(headers, "If-Range: \(validator)") }
        try awaitHeaders()
        // Whether nothing is left or too little is there, the caller knows.
        if range != nil, response.status == 416 { return response }
        try requireSuccess()
        return response
    }

    /// Sends `body`, abandoning the request before, and returns whatever the server answers once its headers are there.
    ///
    /// - Parameter headers: besides the location's.
    /// - Throws: `Interrupted` when no answer came. The server may have acted all the same.
    package func post(_ body: [UInt8], headers more: [String]) throws -> HTTPResponse {
        try send("POST", to: location.url, body, headers: more)
    }

    /// As `post`, with a method and for an address of the location's server.
    ///
    /// - Parameter body: of a POST.
    package func send(
        _ method: String, to url: String, _ body: [UInt8] = [], headers more: [String]
    ) throws -> HTTPResponse {
        prepare()
        for line in more + ["Expect:"] { headers = curl_slist_append(headers, line) }
        var results = [
            flotilla_curl_set_text(easy, CURLOPT_URL, url), flotilla_curl_set_text(easy, CURLOPT_RANGE, nil),
            flotilla_curl_set_long(easy, method == "POST" ? CURLOPT_POST : CURLOPT_HTTPGET, 1),
            flotilla_curl_set_text(easy, CURLOPT_CUSTOMREQUEST, method == "POST" || method == "GET" ? nil : method),
        ]
        if method == "POST" {
            results.append(flotilla_curl_set_long(easy, CURLOPT_POSTFIELDSIZE, body.count))
            // Without a pointer libcurl would read standard input.
            results.append(
                body.isEmpty
                    ? flotilla_curl_set_text(easy, CURLOPT_COPYPOSTFIELDS, "")
                    : body.withUnsafeBytes {
                        flotilla_curl_set_pointer(
                            easy, CURLOPT_COPYPOSTFIELDS, UnsafeMutableRawPointer(mutating: $0.baseAddress))
                    })
        }
        guard results.allSatisfy({ $0 == CURLE_OK }) else {
            throw MigrationError(.resourceExhausted, "\(location.name): no memory for a request")
        }
        try awaitHeaders()
        return response
    }

    private func prepare() {
        halt()
        (first, end, isPaused, failure, response) = (0, 0, false, nil, HTTPResponse())
        errorText[0] = 0
        curl_slist_free_all(headers)
        headers = nil
        for line in location.headers ?? [] { headers = curl_slist_append(headers, line) }
    }

    private func awaitHeaders() throws {
        _ = flotilla_curl_set_pointer(easy, CURLOPT_HTTPHEADER, headers)
        pin.pointee.shown = 0
        guard curl_multi_add_handle(multi, easy) == CURLM_OK else {
            throw MigrationError(.internal, "\(location.name): libcurl can't start a transfer")
        }
        isRunning = true
        while !response.isComplete, isRunning { try advance() }
        if !response.isComplete, let failure { throw failure }
    }

    /// Returns 0 at the end of the body.
    package func read(into target: UnsafeMutableRawBufferPointer) throws -> Int {
        if first < end {
            let count = min(target.count, end - first)
            target.copyMemory(from: UnsafeRawBufferPointer(rebasing: buffer[first..<first + count]))
            first += count
            return count
        }
        (self.target, filled) = (target, 0)
        defer { (self.target, filled) = (UnsafeMutableRawBufferPointer(start: nil, count: 0), 0) }
        while filled == 0, first == end, isRunning {
            if isPaused {
                isPaused = false
                curl_easy_pause(easy, CURLPAUSE_CONT)
                if filled > 0 || first < end { break }
            }
            try advance()
        }
        if filled == 0, first == end, let failure { throw failure }
        return filled
    }

    /// Lets libcurl work until something happened or a tenth of a second went by.
    private func advance() throws {
        try stop.check()
        var running: Int32 = 0
        guard curl_multi_perform(multi, &running) == CURLM_OK else {
            throw MigrationError(.internal, "\(location.name): libcurl failed")
        }
        if running == 0 {
            let result = flotilla_curl_ended(multi)
            halt()
            if result != Int32(CURLE_OK.rawValue) { failure = error(CURLcode(UInt32(max(0, result)))) }
        } else if first == end, filled == 0, !isPaused {
            curl_multi_poll(multi, nil, 0, 100, nil)
        }
    }

    private func halt() {
        if isRunning { curl_multi_remove_handle(multi, easy) }
        isRunning = false
    }

    private func error(_ result: CURLcode) -> any Error {
        let detail = String(cString: errorText)
        let text = detail.isEmpty ? String(cString: curl_easy_strerror(result)) : detail
        if case .fingerprint(let wanted) = location.trust, pin.pointee.shown != 0,
            result == CURLE_PEER_FAILED_VERIFICATION || result == CURLE_SSL_CONNECT_ERROR
        {
            let bytes = withUnsafeBytes(of: pin.pointee.seen) { Array($0.prefix(wanted.algorithm.rawValue)) }
            let seen = CertificateFingerprint(bytes, wanted.algorithm)
            if seen != wanted {
                return MigrationError(
                    .unauthenticated,
                    "\(location.name): its certificate's \(wanted.algorithm) fingerprint is \(seen), not \(wanted)",
                    hint: "find out why before you trust it: nothing was sent to it")
            }
        }
        switch result {
        case CURLE_PEER_FAILED_VERIFICATION, CURLE_SSL_CACERT_BADFILE:
            return MigrationError(
                .unauthenticated, "\(location.name): the server can't be trusted: \(text)", hint: location.trustHint)
        // OpenSSL's words for an answer that is no TLS.
        case CURLE_SSL_CONNECT_ERROR
        where ["wrong version number", "packet length too long", "http request"].contains(where: { text.contains($0) }):
            return MigrationError(
                .unauthenticated, "\(location.name): the server doesn't speak TLS on that port: \(text)",
                hint: "check the port: vCenter and ESXi listen on 443")
        case CURLE_COULDNT_RESOLVE_HOST, CURLE_COULDNT_RESOLVE_PROXY, CURLE_COULDNT_CONNECT, CURLE_PARTIAL_FILE,
            CURLE_OPERATION_TIMEDOUT, CURLE_RECV_ERROR, CURLE_SEND_ERROR, CURLE_GOT_NOTHING, CURLE_SSL_CONNECT_ERROR:
            return Interrupted(reason: text)
        default: return MigrationError(.unavailable, "\(location.name): \(text)")
        }
    }

    private func requireSuccess() throws {
        switch response.status {
        case 200, 206:
            guard !response.isEncoded else {
                throw MigrationError(.unimplemented, "\(location.name): the server sends it compressed, unasked")
            }
            // A login page or a proxy's excuse, whatever its status says.
            guard response.mediaType != "text/html" else {
                throw Interrupted(lasting: "the server answered with a web page (text/html), not with a disk")
            }
        case 401 where location.headers != nil:
            throw MigrationError(
                .unauthenticated, "\(location.name): the server doesn't take the session (401)",
                hint: "it ended, or the account may not read that file: run the same command again")
        case 401:
            throw MigrationError(
                .unauthenticated, "\(location.name): the server wants a name and a password (401)",
                hint: "put them into ~/.netrc: machine HOST login USER password PASSWORD")
        case 403: throw MigrationError(.permissionDenied, "\(location.name): the server forbids it (403)")
        case 404, 410: throw MigrationError(.notFound, "\(location.name): not on the server (\(response.status))")
        case 408, 429, 500...599: throw Interrupted(reason: "the server answered \(response.status)")
        // To where, a session's cookie doesn't follow.
        case 300...399 where location.headers != nil:
            throw Interrupted(lasting: "the server sends us elsewhere (\(response.status))").error(location.name)
        default: throw MigrationError(.unavailable, "\(location.name): the server answered \(response.status)")
        }
    }
}

/// Waits between attempts at a server that fails: 0.2 s, then twice as long each time.
struct Retries {
    private let location: HTTPLocation
    private let stop: StopFlag
    private var failures = 0

    init(_ location: HTTPLocation, _ stop: StopFlag) {
        self.location = location
        self.stop = stop
    }

    /// Counts afresh: there was progress.
    mutating func succeeded() { failures = 0 }

    /// Waits, or throws when it was the last time.
    mutating func failed(_ interruption: HTTPTransfer.Interrupted) throws {
        guard failures < location.retries else {
            throw interruption.error(location.name)
        }
        defer { failures += 1 }
        try stop.wait(for: .milliseconds(200 << failures))
    }
}
