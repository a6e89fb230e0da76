package import DiskImage
import FoundationEssentials
import Glibc
package import HostKit
import MigrationModel

/// Images in formats that this program leaves to qemu-img.
package struct QEMUImage: Sendable {
    package enum Format: String, Sendable, CaseIterable {
        case qcow2, qed, vdi, vhdx, vpc
    }

    package let path: String
    package let format: Format
    /// Whether `path` has no links, and is not to be followed through any that appear.
    private let isResolved: Bool

    /// Where qemu-img lies; nil when `PATH` leads to none.
    package static var program: String? {
        let path = getenv("PATH").map { String(cString: $0) } ?? "/bin:/usr/bin"
        return Program.find("qemu-img", in: path.split(separator: ":").map(String.init))
    }

    package init(path: String, format: Format, isResolved: Bool = false) {
        self.path = path
        self.format = format
        self.isResolved = isResolved
    }

    package func open() throws -> File { try FileRegion(path: path, isResolved: isResolved).open().0 }

    /// What qemu-img is given: the open file under a number of its own, described so that nothing in it leads
    /// elsewhere.
    private struct Input {
        let name: String
        let file: File
    }

    private static let inputName = "/proc/self/fd/3"
    private static let inputNumber: Int32 = 3

    private func input() throws -> Input {
        let file = try isResolved ? open() : File(path, O_RDONLY)
        return Input(name: try description(of: node(of: file)), file: file)
    }

    /// The file with its first bytes as they are now, whatever becomes of them meanwhile. They decide whether the data
    /// lies in another file, which no option of qemu-img forbids. Only for qcow2.
    ///
    /// - Parameter start: a path at which nothing is, for a file that holds them until the end.
    private func input(startingAs start: String, stop: StopFlag) throws -> Input {
        let file = try isResolved ? open() : File(path, O_RDONLY)
        let size = lseek(file.descriptor, 0, SEEK_END)
        guard size >= 0 else { throw systemError("seek", path) }
        var bytes = [UInt8](repeating: 0, count: Self.startSize)
        _ = try bytes.withUnsafeMutableBytes { try file.read(at: 0, into: $0) }
        guard bytes[4..<8].elementsEqual([0, 0, 0, 2]) || bytes[79] & 4 == 0 else { throw dependence("data-file") }
        let raw = "\(start).raw"
        defer { try? Files.remove(raw) }
        try Files.writeAtomically(bytes, to: raw)
        try Self.run(["convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, start], nil, stop: stop)
        try Self.run(
            ["resize", "-q", "-f", "qcow2", start, "\(max(Self.startSize, (Int(size) + 511) / 512 * 512))"], nil,
            stop: stop)
        let named = String(decoding: try JSONEncoder().encode(start), as: UTF8.self)
        let whole = """
            {"driver":"qcow2","file":{"driver":"file","filename":\(named)},\
            "backing":{"driver":"raw","file":\(try node(of: file))}}
            """
        return Input(name: description(of: whole), file: file)
    }

    /// The least cluster of an image that `qemu-img convert` makes.
    private static let startSize = 64 << 10

    private func node(of file: File) throws -> String {
        let driver = try file.status().st_mode & S_IFMT == S_IFBLK ? "host_device" : "file"
        return #"{"driver":"\#(driver)","filename":"\#(Self.inputName)"}"#
    }

    private func description(of file: String) -> String {
        let backing = format == .qcow2 || format == .qed ? #","backing":null"# : ""
        return #"json:{"driver":"\#(format.rawValue)","file":\#(file)\#(backing)}"#
    }

    private func dependence(_ key: String) -> MigrationError {
        MigrationError(
            .failedPrecondition, "\(path): depends on another file (\(key))",
            hint: "merge them with qemu-img convert where that file is known and trusted")
    }

    /// By its magic number; nil for anything else.
    package static func detect(_ path: String) throws -> QEMUImage? {
        let start = try FileSource.beginning(of: path, count: 512)
        func has(_ magic: [UInt8], at offset: Int = 0) -> Bool { start.dropFirst(offset).starts(with: magic) }
        let format: Format? =
            if has([0x51, 0x46, 0x49, 0xFB]) {
                .qcow2
            } else if has(Array("QED\0".utf8)) {
                .qed
            } else if has([0x7F, 0x10, 0xDA, 0xBE], at: 64) {
                .vdi
            } else if has(Array("vhdxfile".utf8)) {
                .vhdx
            } else if has(Array("conectix".utf8)) {
                .vpc
            } else {
                nil
            }
        return format.map { QEMUImage(path: path, format: $0) }
    }

    /// `qemu-img info` as JSON. Throws `failedPrecondition` for an image that leads to other files: one from elsewhere
    /// must not pull a file of this host into a disk.
    package func info(stop: StopFlag = StopFlag()) throws -> String { try info(input(), stop) }

    private func info(_ input: Input, _ stop: StopFlag) throws -> String {
        let text = try Self.run(["info", "--output=json", input.name], input, stop: stop)
        for key in ["backing-filename", "data-file"] where text.contains("\"\(key)\":") { throw dependence(key) }
        let named = String(decoding: try JSONEncoder().encode(path), as: UTF8.self)
        return text.replacing("\"\(Self.inputName)\"", with: named)
    }

    /// Writes the content to `target`, a path that doesn't exist, and syncs it.
    ///
    /// - Parameter progress: a share, 0 to 1.
    package func convert(
        to target: String, _ format: TargetFormat, options: DiskConversion.Options, bytesPerSecond: UInt64?,
        stop: StopFlag, progress: (Double) -> Void
    ) throws {
        let start = "\(target).start"
        try Files.remove(start)
        defer { try? Files.remove(start) }
        let input = try self.format == .qcow2 ? input(startingAs: start, stop: stop) : input()
        _ = try info(input, stop)
        var arguments = ["convert", "-p", "-O", format.rawValue]
        if let threads = options.threads { arguments += ["-m", "\(min(max(threads, 1), 16))", "-W"] }
        if let bytesPerSecond { arguments += ["-r", "\(bytesPerSecond)"] }
        if options.geometry != .standard { arguments += ["-o", "cluster_size=\(options.geometry.clusterSize)"] }
        switch options.compression {
        case .zlib: arguments += ["-c"]
        case .zstd: arguments += ["-c", "-o", "compression_type=zstd"]
        case nil: break
        }
        try Self.run(arguments + [input.name, target], input, stop: stop) {
            // "    (12.34/100%)\r"
            guard let open = $0.lastIndex(of: "("), let slash = $0[open...].firstIndex(of: "/") else { return }
            if let percent = Double($0[$0.index(after: open)..<slash]) { progress(percent / 100) }
        }
        try File(target, O_RDWR).synchronize()
    }

    /// Whether two images hold the same for the guest, in whatever formats qemu-img knows; if not, what it says.
    package static func compare(
        _ first: (path: String, format: String), _ second: (path: String, format: String), stop: StopFlag
    ) throws -> String? {
        let (status, text) = try launch(
            ["compare", "-f", first.format, "-F", second.format, first.path, second.path], stop: stop
        ) { _ in }
        switch status {
        case 0: return nil
        case 1: return text.trimmed
        default: throw failure("compare", text)
        }
    }

    @discardableResult
    private static func run(
        _ arguments: [String], _ input: Input?, stop: StopFlag, output: (String) -> Void = { _ in }
    ) throws -> String {
        let (status, text) = try launch(arguments, input?.file, stop: stop, output)
        guard status == 0 else {
            let said =
                input.map {
                    text.replacing($0.name, with: $0.file.path).replacing(inputName, with: $0.file.path)
                } ?? text
            throw failure(arguments[0], said)
        }
        return text
    }

    private static func failure(_ verb: String, _ text: String) -> MigrationError {
        MigrationError(.internal, "qemu-img \(verb) failed: \(text.trimmed.suffix(2000))")
    }

    /// Runs qemu-img with no shell in between; its output and errors go to `output` as they come and, up to 1 MiB, into
    /// the result. Killed when the flag is set.
    ///
    /// - Parameter input: what it gets as its file `inputNumber`.
    private static func launch(
        _ arguments: [String], _ input: File? = nil, stop: StopFlag, _ output: (String) -> Void
    ) throws -> (status: Int32, text: String) {
        var ends: [Int32] = [0, 0]
        guard pipe(&ends) == 0 else { throw systemError("pipe to", "qemu-img") }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        defer { close(ends[0]) }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO)
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO)
        if let input { posix_spawn_file_actions_adddup2(&actions, input.descriptor, inputNumber) }
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        // The child must hear signals that this process blocks.
        var none = sigset_t()
        sigemptyset(&none)
        posix_spawnattr_setsigmask(&attributes, &none)
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
        var pointers: [UnsafeMutablePointer<CChar>?] = (["qemu-img"] + arguments).map { strdup($0) } + [nil]
        defer { for pointer in pointers { free(pointer) } }
        var pid: pid_t = 0
        let status = posix_spawnp(&pid, "qemu-img", &actions, &attributes, &pointers, environ)
        close(ends[1])
        guard status == 0 else {
            throw MigrationError(
                .notFound, "qemu-img can't be started: \(String(cString: strerror(status)))",
                hint: "install qemu-utils: it reads the formats that this program doesn't")
        }
        var text = ""
        let result = Result { text = try collect(ends[0], pid, stop, output) }
        var ended: Int32 = 0
        while waitpid(pid, &ended, 0) < 0 && errno == EINTR {}
        try result.get()
        return (ended & 0x7F == 0 ? ended >> 8 & 0xFF : -1, text)
    }

    private static func collect(
        _ descriptor: Int32, _ pid: pid_t, _ stop: StopFlag, _ output: (String) -> Void
    ) throws -> String {
        let source = DescriptorSource(descriptor, name: "qemu-img", stop: stop)
        var text = ""
        var buffer = [UInt8](repeating: 0, count: 4096)
        do {
            while true {
                let count = try buffer.withUnsafeMutableBytes { try source.read(into: $0) }
                if count == 0 { return text }
                let piece = String(decoding: buffer[..<count], as: UTF8.self)
                output(piece)
                if text.utf8.count < 1 << 20 { text += piece }
            }
        } catch {
            kill(pid, SIGKILL)
            throw error
        }
    }
}

extension String {
    fileprivate var trimmed: String {
        var text = self[...]
        while let first = text.first, first.isWhitespace { text.removeFirst() }
        while let last = text.last, last.isWhitespace { text.removeLast() }
        return String(text)
    }
}
