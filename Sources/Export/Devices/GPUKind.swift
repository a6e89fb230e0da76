package import FlotillaProtocol

/// Whether a passthrough device is a GPU.
package enum GPUKind {
    case gpu
    case other
    /// Neither its class nor its vendor tells.
    case unknown

    static let nvidia: UInt32 = 0x10de
    static let amd: UInt32 = 0x1002
    static let intel: UInt32 = 0x8086

    /// VGA, 3D and other display controllers.
    static let displayClasses: Set<UInt32> = [0x0300, 0x0302, 0x0380]

    package init(classCode: UInt32, id: PciId) {
        if classCode != 0 {
            self = Self.displayClasses.contains(classCode) ? .gpu : .other
        } else if id.vendor == Self.nvidia || id.vendor == Self.amd {
            // Their audio and USB functions carry these vendor ids too; see `isCompanion`.
            self = .gpu
        } else if id.vendor == Self.intel, Self.intelDisplays.contains(where: { $0.contains(id.device) }) {
            self = .gpu
        } else {
            self = .unknown
        }
    }

    /// Intel's discrete GPUs by device id: Data Center GPU Max, Arc A and Flex, Arc B.
    private static let intelDisplays: [ClosedRange<UInt32>] = [
        0x0bd0...0x0bdf, 0x4905...0x4909, 0x5690...0x56c2, 0xe200...0xe216,
    ]
}
