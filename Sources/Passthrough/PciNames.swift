import Glibc
import HostKit

/// Names of vendors, devices and classes from a pci.ids file (https://pci-ids.ucw.cz: "vendor  name", a tab before a
/// device, two before a subsystem; "C class", a tab before a subclass). Only what was asked for is kept: the file has
/// 37,000 lines and reading it is most of what a listing takes.
package struct PciNames: Sendable {
    package static let files = ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"]

    /// The file that was read; nil when there is none.
    package private(set) var file: String?
    private var vendors: [UInt32: String] = [:]
    private var devices: [UInt64: String] = [:]
    private var subsystems: [Subsystem: String] = [:]
    private var classes: [UInt32: String] = [:]

    private struct Subsystem: Hashable {
        var device: UInt64
        var subsystem: UInt64
    }

    package struct Wanted: Sendable {
        var vendor: UInt32
        var device: UInt32
        var subsystemVendor: UInt32
        var subsystemDevice: UInt32

        package init(vendor: UInt32, device: UInt32, subsystemVendor: UInt32 = 0, subsystemDevice: UInt32 = 0) {
            self.vendor = vendor
            self.device = device
            self.subsystemVendor = subsystemVendor
            self.subsystemDevice = subsystemDevice
        }
    }

    /// - Parameter files: the first that can be read is used.
    package init(for wanted: [Wanted], files: [String] = PciNames.files) {
        for path in files {
            guard let bytes = try? Files.read(path, limit: 64 << 20) else { continue }
            file = path
            read(bytes, wanted)
            return
        }
    }

    package func vendor(_ id: UInt32) -> String? { vendors[id] }
    package func device(_ vendor: UInt32, _ device: UInt32) -> String? { devices[Self.pair(vendor, device)] }
    /// - Parameter code: class and subclass, 0x0302. "3D controller"; the class alone for an unknown subclass.
    package func className(_ code: UInt32) -> String? { classes[code] ?? classes[code >> 8 | 0x1_0000] }

    package func subsystem(_ wanted: Wanted) -> String? {
        subsystems[
            Subsystem(
                device: Self.pair(wanted.vendor, wanted.device),
                subsystem: Self.pair(wanted.subsystemVendor, wanted.subsystemDevice))]
    }

    private static func pair(_ high: UInt32, _ low: UInt32) -> UInt64 { UInt64(high) << 32 | UInt64(low) }

    private mutating func read(_ bytes: [UInt8], _ wanted: [Wanted]) {
        let pairs = Set(wanted.map { Self.pair($0.vendor, $0.device) })
        let makers = Set(wanted.map(\.vendor) + wanted.map(\.subsystemVendor))
        var vendor: UInt32?
        var device: UInt64?
        var base: UInt32?
        bytes.withUnsafeBytes { text in
            guard let start = text.baseAddress else { return }
            var position = 0
            while position < text.count {
                let rest = text.count - position
                let end = memchr(start + position, 0x0a, rest).map { $0 - UnsafeMutableRawPointer(mutating: start) }
                let line = UnsafeRawBufferPointer(rebasing: text[position..<(end ?? text.count)])
                position = (end ?? text.count) + 1
                guard let first = line.first, first != UInt8(ascii: "#") else { continue }
                if first != 0x09 {
                    (vendor, device, base) = (nil, nil, nil)
                    if first == UInt8(ascii: "C"), line.count > 4, line[1] == 0x20 {
                        base = Self.hex(line, 2, 2)
                        if let base { classes[base | 0x1_0000] = Self.name(line, 4) }
                    } else if let id = Self.hex(line, 0, 4), makers.contains(id) {
                        vendor = id
                        vendors[id] = Self.name(line, 4)
                    }
                } else if line.count > 2, line[1] == 0x09 {
                    guard let known = device, let maker = Self.hex(line, 2, 4), let id = Self.hex(line, 7, 4) else {
                        continue
                    }
                    subsystems[Subsystem(device: known, subsystem: Self.pair(maker, id))] = Self.name(line, 11)
                } else if let base, let sub = Self.hex(line, 1, 2) {
                    classes[base << 8 | sub] = Self.name(line, 3)
                } else if let vendor, let id = Self.hex(line, 1, 4) {
                    let pair = Self.pair(vendor, id)
                    device = pairs.contains(pair) ? pair : nil
                    if let device { devices[device] = Self.name(line, 5) }
                }
            }
        }
    }

    private static func hex(_ line: UnsafeRawBufferPointer, _ start: Int, _ count: Int) -> UInt32? {
        guard line.count >= start + count else { return nil }
        var value: UInt32 = 0
        for index in start..<start + count {
            let byte = line[index]
            switch byte {
            case 0x30...0x39: value = value << 4 | UInt32(byte - 0x30)
            case 0x61...0x66: value = value << 4 | UInt32(byte - 0x57)
            default: return nil
            }
        }
        return value
    }

    private static func name(_ line: UnsafeRawBufferPointer, _ start: Int) -> String {
        String(decoding: line.dropFirst(start).drop { $0 == 0x20 }.prefix(256), as: UTF8.self)
    }
}
