import Glibc
import HostKit
import MigrationModel
import Synchronization

/// A TCP proxy on 127.0.0.1 that does to its connections what networks do. One thread.
final class ChaosProxy: Sendable {
    enum Mode: Sendable {
        case forward
        /// Accepts and keeps connections, but moves no byte in either direction.
        case stall
        /// The listener is there, new connections are reset.
        case refuse
    }

    private enum Command: Sendable {
        case mode(Mode)
        case reset
        case stop
    }

    private struct Pair {
        var client: Int32
        var server: Int32
        var toClient: [UInt8] = []
        var toServer: [UInt8] = []
    }

    let port: Int
    private let listener: Int32
    private let target: Int
    private let pipe: (read: Int32, write: Int32)
    private let commands = Mutex<[Command]>([])

    init(to target: Int) throws {
        self.target = target
        let listener = socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        var address = Self.loopback(0)
        let bound = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(listener, $0, 16) }
        }
        self.listener = listener
        var ends: [Int32] = [0, 0]
        guard bound == 0, listen(listener, 64) == 0, Glibc.pipe(&ends) == 0 else {
            throw systemError("listen on", "127.0.0.1")
        }
        for end in ends { _ = fcntl(end, F_SETFL, O_NONBLOCK) }
        pipe = (ends[0], ends[1])
        var length = socklen_t(16)
        _ = withUnsafeMutablePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(listener, $0, &length) }
        }
        port = Int(UInt16(bigEndian: address.sin_port))
        spawnThread("proxy") { [self] in run() }
    }

    func set(_ mode: Mode) { send(.mode(mode)) }
    /// Resets all connections there are.
    func reset() { send(.reset) }
    func stop() { send(.stop) }

    private func send(_ command: Command) {
        commands.withLock { $0.append(command) }
        _ = write(pipe.write, "x", 1)
    }

    private static func loopback(_ port: Int) -> sockaddr_in {
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = UInt16(port).bigEndian
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        return address
    }

    private func run() {
        var mode = Mode.forward
        var pairs: [Pair] = []
        while true {
            var polled = [
                pollfd(fd: pipe.read, events: Int16(POLLIN), revents: 0),
                pollfd(fd: listener, events: Int16(POLLIN), revents: 0),
            ]
            if case .forward = mode {
                for pair in pairs {
                    polled.append(Self.interest(pair.client, reads: pair.toServer, writes: pair.toClient))
                    polled.append(Self.interest(pair.server, reads: pair.toClient, writes: pair.toServer))
                }
            }
            _ = poll(&polled, nfds_t(polled.count), -1)
            if case .forward = mode {
                for index in pairs.indices.reversed() {
                    var pair = pairs[index]
                    let isAlive =
                        Self.move(polled[2 + 2 * index], &pair.toServer, &pair.toClient)
                        && Self.move(polled[3 + 2 * index], &pair.toClient, &pair.toServer)
                    pairs[index] = pair
                    if !isAlive { Self.close(pairs.remove(at: index), withReset: false) }
                }
            }
            if polled[1].revents != 0 { accept(mode, &pairs) }
            guard polled[0].revents != 0 else { continue }
            var byte: UInt8 = 0
            while read(pipe.read, &byte, 1) > 0 {}
            let asked = commands.withLock { commands in
                defer { commands = [] }
                return commands
            }
            for command in asked {
                switch command {
                case .mode(let new): mode = new
                case .reset:
                    for pair in pairs { Self.close(pair, withReset: true) }
                    pairs = []
                case .stop:
                    for pair in pairs { Self.close(pair, withReset: false) }
                    for descriptor in [listener, pipe.read, pipe.write] { Glibc.close(descriptor) }
                    return
                }
            }
        }
    }

    private func accept(_ mode: Mode, _ pairs: inout [Pair]) {
        let client = Glibc.accept(listener, nil, nil)
        guard client >= 0 else { return }
        let server = socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        var address = Self.loopback(target)
        let connected = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(server, $0, 16) }
        }
        if case .refuse = mode { return Self.close(Pair(client: client, server: server), withReset: true) }
        guard connected == 0 else { return Self.close(Pair(client: client, server: server), withReset: true) }
        for descriptor in [client, server] { _ = fcntl(descriptor, F_SETFL, O_NONBLOCK) }
        pairs.append(Pair(client: client, server: server))
    }

    private static func interest(_ descriptor: Int32, reads: [UInt8], writes: [UInt8]) -> pollfd {
        let events = (reads.isEmpty ? POLLIN : 0) | (writes.isEmpty ? 0 : POLLOUT)
        return pollfd(fd: descriptor, events: Int16(events), revents: 0)
    }

    /// Reads into `received` and writes from `waiting`. False when the peer is gone.
    private static func move(_ polled: pollfd, _ received: inout [UInt8], _ waiting: inout [UInt8]) -> Bool {
        if polled.revents & Int16(POLLERR) != 0 { return false }
        if polled.revents & Int16(POLLOUT) != 0, !waiting.isEmpty {
            let count = Glibc.send(polled.fd, waiting, waiting.count, Int32(MSG_NOSIGNAL))
            if count > 0 { waiting.removeFirst(count) } else if errno != EAGAIN { return false }
        }
        if polled.revents & Int16(POLLIN | POLLHUP) != 0, received.isEmpty {
            received = [UInt8](unsafeUninitializedCapacity: 1 << 16) { buffer, count in
                count = max(read(polled.fd, buffer.baseAddress, buffer.count), 0)
            }
            if received.isEmpty { return false }
        }
        return true
    }

    private static func close(_ pair: Pair, withReset: Bool) {
        for descriptor in [pair.client, pair.server] {
            var option = linger(l_onoff: withReset ? 1 : 0, l_linger: 0)
            setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &option, socklen_t(MemoryLayout<linger>.size))
            Glibc.close(descriptor)
        }
    }
}
