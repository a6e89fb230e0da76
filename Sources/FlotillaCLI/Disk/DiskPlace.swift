import Convert
import DiskImage
import HostKit
import MigrationModel
import Volumes

/// Where a converted disk goes, as the command line names it.
enum DiskPlace {
    case file(String)
    case device(String)
    case nbd(String)

    init(_ text: String) throws {
        if NBDExport.isOne(text) {
            self = .nbd(text)
            return
        }
        let path = try absolute(text)
        if BlockDevice.isDevice(path) {
            self = .device(path)
        } else if path.hasPrefix("/dev/"), !path.hasPrefix("/dev/shm/") {
            throw MigrationError(
                .notFound, "\(path): no such block device",
                hint: "lsblk lists devices; a file in /dev would fill memory")
        } else {
            self = .file(path)
        }
    }

    static func isVolume(_ text: String) -> Bool { NBDExport.isOne(text) || BlockDevice.isDevice(text) }

    var name: String {
        switch self {
        case .file(let name), .device(let name), .nbd(let name): name
        }
    }

    /// Beside a file; a volume's in the state folder, under its name in letters that suit a file.
    func workFolder(state: String?) throws -> String {
        if case .file(let path) = self { return "\(path).flotilla" }
        let plain = name.map { $0.isASCII && ($0.isLetter || $0.isNumber) ? $0 : "-" }.drop { $0 == "-" }
        let mark = hex(Digest.hash(.sha256, Array(name.utf8)).prefix(4))
        return "\(try stateFolder(state))/disk/\(String(plain.prefix(100)))-\(mark)"
    }

    /// Claims a volume; a file isn't touched.
    ///
    /// - Parameter stop: ends what waits for a server.
    func open(_ format: DiskImageFormat?, _ stop: StopFlag) throws -> DiskConversion.Target {
        if case .file(let path) = self { return .file(format == .raw ? .raw : .qcow2, path: path) }
        guard format != .qcow2 else {
            throw MigrationError(
                .invalidArgument, "\(name): a volume holds a raw disk, not a qcow2 image", hint: "leave out -O qcow2")
        }
        switch self {
        case .file, .device: return .volume(try BlockDevice(name))
        case .nbd(let uri): return .volume(try NBDExport(uri, stop: stop))
        }
    }
}
