import Download
import Glibc
import HostKit

// Reads what the address $1 gives to its end, with the authorities in $2, as an export does, and throws it away.
let arguments = CommandLine.arguments
guard arguments.count == 3 else {
    print("usage: Drain URL CA-FILE")
    exit(2)
}
do {
    let source = try HTTPSource(HTTPLocation(arguments[1], authorities: arguments[2]), stop: StopFlag())
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    var total = 0
    while case let count = try source.read(into: buffer), count > 0 { total += count }
    print(total)
} catch {
    print("Drain: \(error)")
    exit(1)
}
