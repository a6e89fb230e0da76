import HostKit

/// A Merkle tree over messages (RFC 9162, 2.1), whose root stands for all of them: a signature of the root is one of each
/// message, and costs as much as a signature of one. Each message carries its way to the root.
struct MessageTree {
    /// Bytes of a step of a path: on which side the other hash goes (0 left, 1 right), and that hash.
    private static let step = 33
    /// Steps of a path; the tree has at most 65,536 leaves.
    private static let maximumSteps = 16

    /// From the leaves up; the last of an odd number goes up as it is.
    private let levels: [[[UInt8]]]

    /// - Parameter messages: the signed bytes of each, at least one.
    init(_ messages: [[UInt8]]) {
        var levels = [messages.map(Self.leaf)]
        while let level = levels.last, level.count > 1 {
            levels.append(
                stride(from: 0, to: level.count, by: 2).map {
                    $0 + 1 < level.count ? Self.node(level[$0], level[$0 + 1]) : level[$0]
                })
        }
        self.levels = levels
    }

    /// 32 bytes.
    var root: [UInt8] { levels[levels.count - 1][0] }

    /// The way of a message to the root, as `root(of:along:)` reads it.
    func path(of message: Int) -> [UInt8] {
        var (path, index) = ([UInt8](), message)
        for level in levels.dropLast() {
            let isRight = index % 2 == 1
            let other = isRight ? index - 1 : index + 1
            if other < level.count { path += [isRight ? 0 : 1] + level[other] }
            index /= 2
        }
        return path
    }

    /// nil when the path is none.
    static func root(of message: [UInt8], along path: [UInt8]) -> [UInt8]? {
        guard path.count % step == 0, path.count / step <= maximumSteps else { return nil }
        var hash = leaf(message)
        for start in stride(from: 0, to: path.count, by: step) {
            let other = Array(path[start + 1..<start + step])
            switch path[start] {
            case 0: hash = node(other, hash)
            case 1: hash = node(hash, other)
            default: return nil
            }
        }
        return hash
    }

    // The first byte keeps a node from passing for a message.
    private static func leaf(_ message: [UInt8]) -> [UInt8] { Digest.hash(.sha256, [0] + message) }
    private static func node(_ left: [UInt8], _ right: [UInt8]) -> [UInt8] { Digest.hash(.sha256, [1] + left + right) }
}
