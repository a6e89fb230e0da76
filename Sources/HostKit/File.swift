package import Glibc
package import MigrationModel

/// An open file descriptor that closes itself. Positioned reads and writes only, so one value serves many threads.
/// Errors name the file and say what the operating system said.
package final class File: Sendable {
    package let descriptor: Int32
    /// The path it was opened with, for messages.
    package let path: String

    /// - Parameters:
    ///   - flags: as open(2) takes them; `O_CLOEXEC` is added.
    ///   - mode: permission bits for `O_CREAT`, before umask.
    package init(_ path: String, _ flags: Int32, mode: mode_t = 0o600) throws {
        let descriptor = open(path, flags | O_CLOEXEC, mode)
        guard descriptor >= 0 else { throw systemError("open", path) }
        self.descriptor = descriptor
        self.path = path
    }

    /// Opens a file for reading by a path that was resolved. A link that was put anywhere in it since is not followed.
    package init(resolved path: String, _ flags: Int32 = O_RDONLY) throws {
        let descriptor = Files.openResolved(path, flags | O_CLOEXEC)
        guard descriptor >= 0 || errno != ELOOP else {
            throw MigrationError(
                .failedPrecondition, "open \(path): a link was put there since the path was checked",
                hint: "make sure that nothing writes to the source's folder and run the same command again")
        }
        guard descriptor >= 0 else { throw systemError("open", path) }
        self.descriptor = descriptor
        self.path = path
    }

    deinit { close(descriptor) }

    /// Bytes in the file, for regular files.
    package var size: UInt64 {
        get throws { UInt64(try status().st_size) }
    }

    package func status() throws -> stat {
        var info = stat()
        guard fstat(descriptor, &info) == 0 else { throw systemError("stat", path) }
        return info
    }

    /// Reads up to `buffer.count` bytes at `offset`; fewer only at the end of the file. Returns the count read.
    package func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        guard let base = buffer.baseAddress else { return 0 }
        guard let start = Int(exactly: offset) else {
            throw MigrationError(.outOfRange, "\(path): offset \(offset) is not addressable")
        }
        var done = 0
        while done < buffer.count {
            let count = pread(descriptor, base + done, buffer.count - done, start + done)
            if count == 0 { break }
            if count < 0 {
                if errno == EINTR { continue }
                throw systemError("read at byte \(start + done)", path)
            }
            done += count
        }
        return done
    }

    /// Reads exactly `count` bytes at `offset`, or throws `dataLoss` naming where the file ends.
    package func readExactly(at offset: UInt64, count: Int) throws -> [UInt8] {
        try [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            let got = try read(
                at: offset, into: UnsafeMutableRawBufferPointer(start: buffer.baseAddress, count: count))
            guard got == count else {
                throw MigrationError(
                    .dataLoss, "\(path): truncated: \(count) bytes wanted at byte \(offset), \(got) there")
            }
            initialized = count
        }
    }

    /// Writes all of `bytes` at `offset`.
    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws {
        guard let base = bytes.baseAddress else { return }
        var done = 0
        while done < bytes.count {
            let count = pwrite(descriptor, base + done, bytes.count - done, Int(offset) + done)
            if count < 0 {
                if errno == EINTR { continue }
                throw systemError("write at byte \(Int(offset) + done)", path)
            }
            done += count
        }
    }

    package func write(_ bytes: [UInt8], at offset: UInt64) throws {
        try bytes.withUnsafeBytes { try write($0, at: offset) }
    }

    /// Data and the metadata needed to read it back are on stable storage when this returns.
    package func synchronizeData() throws {
        guard fdatasync(descriptor) == 0 else { throw systemError("fdatasync", path) }
    }

    package func synchronize() throws {
        guard fsync(descriptor) == 0 else { throw systemError("fsync", path) }
    }

    package func truncate(to size: UInt64) throws {
        guard ftruncate(descriptor, Int(size)) == 0 else { throw systemError("truncate to \(size) bytes", path) }
    }
}

/// The error of the last failed system call, as a `MigrationError` whose code tells what kind of failure it was.
package func systemError(_ operation: String, _ path: String, errno number: Int32 = errno) -> MigrationError {
    let (code, hint): (MigrationError.Code, String?) =
        switch number {
        case ENOENT, ENOTDIR: (.notFound, nil)
        case EACCES, EPERM, EROFS: (.permissionDenied, "check the owner and mode, and that the file system is writable")
        case EEXIST: (.alreadyExists, nil)
        case ENOSPC, EDQUOT: (.resourceExhausted, "free some space and run the same command again: it continues")
        case EMFILE, ENFILE, ENOMEM: (.resourceExhausted, nil)
        case EIO: (.dataLoss, "look for disk errors in the kernel log")
        default: (.internal, nil)
        }
    return MigrationError(code, "\(operation) \(path): \(String(cString: strerror(number)))", hint: hint)
}

/// Whether a descriptor of a process is open for writing: by the last digit of open(2)'s flags, which proc(5) gives in octal.
///
/// - Parameter info: its file in `/proc/<process>/fdinfo`. What ended meanwhile is not.
package func isOpenForWriting(_ info: String) -> Bool {
    let text = (try? Files.read(info)).map { String(decoding: $0, as: UTF8.self) } ?? ""
    let line = text.split(separator: "\n").first { $0.hasPrefix("flags:") }
    return line?.last.flatMap { Int(String($0), radix: 8) }.map { Int32($0) & O_ACCMODE != O_RDONLY } ?? false
}
