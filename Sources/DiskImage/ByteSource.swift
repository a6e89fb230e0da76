import CLinux
import Glibc
package import HostKit
import MigrationModel

/// Bytes that come once, in order: a file, a pipe, the body of a download. One thread at a time.
package protocol ByteSource: AnyObject {
    /// For messages: a path, "standard input".
    var name: String { get }
    /// Blocks until there are bytes; reads at most `buffer.count` of them. Returns 0 at the end, and only there.
    func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int
    /// Of all bytes, where that is known; not before the first read.
    var length: UInt64? { get }
}

extension ByteSource {
    package var length: UInt64? { nil }
}

/// A region of a file, front to back, read ahead by the kernel. What wasn't in the page cache before is dropped from
/// it again: a disk of 2 TiB must not evict the host's cache, and one that is hot must not become cold.
package final class FileSource: ByteSource {
    private static let windowSize: UInt64 = 8 << 20

    package let name: String
    private let file: File
    private var position: UInt64
    private let end: UInt64
    private let residency: Residency?
    /// Where the window being read began, and whether it was resident by then.
    private var window: (start: UInt64, wasResident: Bool)?

    package init(_ source: SourceFile) throws {
        name = source.path
        file = try source.open()
        position = source.offset
        end = source.offset + source.length
        residency = Residency(file, length: end)
        _ = flotilla_fadvise_sequential(file.descriptor)
    }

    /// The first bytes of a regular file; fewer when it is shorter.
    package static func beginning(of path: String, count: Int) throws -> [UInt8] {
        let (file, source) = try FileRegion(path: path).open()
        return try file.readExactly(at: 0, count: Int(min(UInt64(count), source.length)))
    }

    package func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        let count = Int(min(UInt64(buffer.count), end - position))
        guard count > 0 else { return 0 }
        enterWindow()
        let got = try file.read(at: position, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]))
        guard got == count else {
            throw MigrationError.truncated(
                name, "it ended at byte \(position + UInt64(got)) while being read", missing: UInt64(count - got))
        }
        position += UInt64(got)
        if position == end { leaveWindow() }
        return got
    }

    private func enterWindow() {
        if let window, position < window.start + Self.windowSize { return }
        leaveWindow()
        let resident = residency?.isResident(position, Self.windowSize) ?? true
        window = (position, resident)
        if !resident {
            _ = flotilla_fadvise_willneed(file.descriptor, Int64(position), Int64(Self.windowSize))
        }
    }

    private func leaveWindow() {
        guard let window, !window.wasResident else { return }
        _ = flotilla_fadvise_dontneed(file.descriptor, Int64(window.start), Int64(position - window.start))
    }
}

/// Which pages of a file are in the page cache, asked through a mapping that is never touched.
private final class Residency {
    private static let pageSize: UInt64 = 4096
    private let base: UnsafeMutableRawPointer
    private let length: UInt64

    init?(_ file: File, length: UInt64) {
        guard length > 0, let base = mmap(nil, Int(length), PROT_READ, MAP_SHARED, file.descriptor, 0),
            base != MAP_FAILED
        else { return nil }
        self.base = base
        self.length = length
    }

    deinit { munmap(base, Int(length)) }

    /// Whether at least a quarter of the range is there.
    func isResident(_ offset: UInt64, _ count: UInt64) -> Bool {
        let start = offset / Self.pageSize * Self.pageSize
        guard start < length else { return true }
        let bytes = min(count, length - start)
        var pages = [UInt8](repeating: 0, count: Int((bytes + Self.pageSize - 1) / Self.pageSize))
        guard mincore(base + Int(start), Int(bytes), &pages) == 0 else { return true }
        return pages.reduce(0) { $0 + Int($1 & 1) } * 4 >= pages.count
    }
}

/// An open descriptor that is read to its end, such as a pipe on standard input. The caller keeps it open.
package final class DescriptorSource: ByteSource {
    package let name: String
    private let descriptor: Int32
    private let stop: StopFlag

    /// - Parameter stop: ends a read that waits for a writer within a quarter of a second.
    package init(_ descriptor: Int32, name: String, stop: StopFlag) {
        self.descriptor = descriptor
        self.name = name
        self.stop = stop
    }

    package func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        while true {
            try stop.check()
            var waiting = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            let ready = poll(&waiting, 1, 250)
            if ready == 0 || ready < 0 && errno == EINTR { continue }
            guard ready > 0 else { throw systemError("wait for", name) }
            let count = Glibc.read(descriptor, buffer.baseAddress, buffer.count)
            if count >= 0 { return count }
            if errno != EINTR && errno != EAGAIN { throw systemError("read", name) }
        }
    }
}
