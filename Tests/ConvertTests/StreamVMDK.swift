import Glibc
import HostKit

/// Rewrites a streamOptimized VMDK that QEMU made, with its grain directory in front, as ESXi writes them: grains,
/// then tables and directory behind their markers, a footer, and the end-of-stream marker.
func rewriteAsStream(_ source: String, _ target: String) throws {
    let bytes = try Files.read(source)
    func number(_ offset: Int, _ width: Int) -> Int {
        (0..<width).reduce(0) { $0 | Int(bytes[offset + $1]) << ($1 * 8) }
    }
    func little(_ value: Int, _ width: Int) -> [UInt8] {
        (0..<width).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
    }
    func padded(_ bytes: [UInt8]) -> [UInt8] { bytes + [UInt8](repeating: 0, count: (512 - bytes.count % 512) % 512) }
    func marker(_ sectors: Int, _ type: Int) -> [UInt8] { padded(little(sectors, 8) + little(0, 4) + little(type, 4)) }

    let (capacity, grainSectors, directory) = (number(12, 8), number(20, 8), number(56, 8))
    let tables = (capacity + grainSectors * 512 - 1) / (grainSectors * 512)
    var header = Array(bytes[..<512])
    header.replaceSubrange(48..<64, with: little(0, 8) + little(-1, 8))
    var out = header + bytes[512..<(number(28, 8) + number(36, 8)) * 512]
    // Grains begin behind the metadata that the header promises, as QEMU insists.
    out += [UInt8](repeating: 0, count: number(64, 8) * 512 - out.count)
    var newDirectory: [UInt8] = []
    for table in 0..<tables {
        let place = number(directory * 512 + table * 4, 4)
        var entries: [UInt8] = []
        for index in 0..<512 {
            let sector = number(place * 512 + index * 4, 4)
            guard sector > 1 else {
                entries += little(sector, 4)
                continue
            }
            entries += little(out.count / 512, 4)
            out += padded(Array(bytes[sector * 512..<sector * 512 + 12 + number(sector * 512 + 8, 4)]))
        }
        guard entries.contains(where: { $0 != 0 }) else {
            newDirectory += little(0, 4)
            continue
        }
        out += marker(4, 1)
        newDirectory += little(out.count / 512, 4)
        out += entries
    }
    newDirectory = padded(newDirectory)
    out += marker(newDirectory.count / 512, 2)
    header.replaceSubrange(56..<64, with: little(out.count / 512, 8))
    out += newDirectory + marker(1, 3) + header + [UInt8](repeating: 0, count: 512)
    try File(target, O_RDWR | O_CREAT).write(out, at: 0)
}
