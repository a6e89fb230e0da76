import COpenSSL
import CSHA256

extension Digest {
    private static let hasPairs = sha256_pair_is_supported()

    /// SHA-256 of two messages of one length, a multiple of 64 bytes, into 32 bytes each. Takes little more than half
    /// the time of one after the other where the CPU has SHA instructions.
    ///
    /// - Parameter usesInstructions: false for what other CPUs do.
    package static func sha256(
        _ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer,
        into outputs: (UnsafeMutableRawBufferPointer, UnsafeMutableRawBufferPointer), usesInstructions: Bool = true
    ) {
        precondition(first.count == second.count && first.count % 64 == 0)
        guard usesInstructions, hasPairs, let a = first.baseAddress, let b = second.baseAddress,
            let one = outputs.0.baseAddress, let other = outputs.1.baseAddress
        else {
            sha256(first, into: outputs.0)
            sha256(second, into: outputs.1)
            return
        }
        precondition(outputs.0.count == 32 && outputs.1.count == 32)
        sha256_pair(a, b, first.count, one, other)
    }

    /// SHA-256 of one message into 32 bytes.
    package static func sha256(_ message: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) {
        precondition(output.count == 32)
        let done = EVP_Digest(message.baseAddress, message.count, output.baseAddress, nil, EVP_sha256(), nil)
        precondition(done == 1, "OpenSSL has no SHA-256")
    }
}
