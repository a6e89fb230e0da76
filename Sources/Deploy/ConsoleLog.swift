import Glibc
import HostKit
import MigrationModel

/// A console log as virtlogd writes it, read from its beginning and followed. virtlogd rotates at 2 MiB by renaming
/// the file to `.0` and starting a new one: the rest of the old one is read first.
///
/// One thread at a time.
final class ConsoleLog {
    private let path: String
    private var file: File?
    private var offset: UInt64 = 0
    private let watch: Int32

    /// - Parameter path: absolute; the file may not exist yet, its folder must.
    init(_ path: String) throws {
        self.path = path
        watch = inotify_init1(Int32(IN_CLOEXEC | IN_NONBLOCK))
        guard watch >= 0 else { throw systemError("inotify for", path) }
        let events = UInt32(IN_MODIFY) | UInt32(IN_CREATE) | UInt32(IN_MOVED_TO)
        guard inotify_add_watch(watch, Files.parent(of: path), events) >= 0 else {
            let number = errno
            close(watch)
            throw systemError("watch", Files.parent(of: path), errno: number)
        }
    }

    deinit { close(watch) }

    /// The next bytes, at most 64 KiB; empty when there are none now.
    func read() throws -> [UInt8] {
        while true {
            if file == nil {
                file = try openIfThere()
                offset = 0
            }
            guard let current = file else { return [] }
            if try current.size < offset { offset = 0 }  // Truncated: the domain was started again.
            let bytes = try [UInt8](unsafeUninitializedCapacity: 64 << 10) { buffer, count in
                count = try current.read(at: offset, into: UnsafeMutableRawBufferPointer(buffer))
            }
            offset += UInt64(bytes.count)
            guard bytes.isEmpty, try isReplaced(current) else { return bytes }
            file = nil
        }
    }

    private func openIfThere() throws -> File? {
        do {
            return try File(path, O_RDONLY)
        } catch let error as MigrationError where error.code == .notFound {
            return nil
        }
    }

    /// Another file has the path. A path without a file is one in the middle of a rotation: not yet replaced.
    private func isReplaced(_ current: File) throws -> Bool {
        var info = stat()
        guard stat(path, &info) == 0 else { return false }
        let own = try current.status()
        return info.st_ino != own.st_ino || info.st_dev != own.st_dev
    }

    /// Returns true once something in the folder changed, false after `milliseconds` without.
    func wait(milliseconds: Int32) -> Bool {
        var poller = pollfd(fd: watch, events: Int16(POLLIN), revents: 0)
        guard poll(&poller, 1, milliseconds) > 0 else { return false }
        withUnsafeTemporaryAllocation(byteCount: 64 << 10, alignment: 8) { buffer in
            _ = Glibc.read(watch, buffer.baseAddress, buffer.count)
        }
        return true
    }
}
