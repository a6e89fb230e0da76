import HostKit
import MigrationModel

extension VMDK {
    /// A snapshot chain: a delta, its parent, and so on to a whole disk. Read as the guest that runs on the delta sees
    /// it.
    struct Chain: DiskSource {
        private static let maximumDepth = 64

        let capacity: UInt64
        let files: [SourceFile]
        /// The delta first.
        private let layers: [ExtentDisk]

        var formatName: String { "\(layers[0].formatName), snapshot chain of \(layers.count)" }

        /// - Parameters:
        ///   - descriptor: the delta's.
        ///   - file: holds it, alone: not a part of an archive.
        init(_ delta: ExtentDisk, _ descriptor: Descriptor, file: SourceFile) throws {
            var layers = [delta]
            var (child, childPath, isResolved) = (descriptor, file.path, file.isResolved)
            while child.isDelta {
                guard layers.count < Self.maximumDepth else {
                    throw MigrationError.malformed(
                        file.path, "a snapshot chain of more than \(Self.maximumDepth) disks")
                }
                guard let hint = child.parentHint else {
                    try child.requireWholeDisk(name: childPath)
                    break
                }
                // The path is that of the machine it came from; the parent lies beside its child.
                let name = hint.split(whereSeparator: { $0 == "/" || $0 == "\\" }).last.map(String.init) ?? hint
                let region = try VMDK.resolve(name, beside: childPath, isResolved: isResolved)
                let parentPath = region.path
                let (parent, parentDescriptor) = try VMDK.openLayer(region)
                guard parentDescriptor?.cid == child.parentCID else {
                    throw MigrationError(
                        .failedPrecondition,
                        "\(parentPath) (CID \(VMDK.printable(parentDescriptor?.cid ?? "none"))) changed after its snapshot"
                            + " \(childPath) was taken of CID \(VMDK.printable(child.parentCID))",
                        hint: "copy the whole chain again while nothing writes to it")
                }
                guard parent.capacity <= delta.capacity else {
                    throw MigrationError.malformed(parentPath, "larger than its snapshot \(childPath)")
                }
                layers.append(parent)
                guard let parentDescriptor else { break }
                (child, childPath, isResolved) = (parentDescriptor, parentPath, true)
            }
            self.layers = layers
            capacity = delta.capacity
            files = layers.flatMap(\.files)
        }

        func makeForwardReader(_ stream: any ByteSource) -> ForwardReader? { nil }

        func makeReader() -> sending any DiskReader { Reader(layers) }

        private final class Reader: DiskReader {
            private let layers: [ExtentDisk.Reader]

            init(_ layers: [ExtentDisk]) { self.layers = layers.map { $0.makeLayerReader() } }

            func nextData(from offset: UInt64) throws -> UInt64? {
                try layers.compactMap { try $0.nextData(from: offset) }.min()
            }

            func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> ChunkContent {
                guard let data = try nextData(from: offset), data < offset + UInt64(buffer.count) else { return .zero }
                zero(buffer)
                for layer in layers.reversed() { try layer.overlay(at: offset, into: buffer) }
                return .data
            }
        }
    }
}
