import CDeflate

/// A libdeflate decompressor. One thread at a time.
final class Inflater {
    private let handle: OpaquePointer

    init() {
        guard let handle = libdeflate_alloc_decompressor() else { preconditionFailure("out of memory") }
        self.handle = handle
    }

    deinit { libdeflate_free_decompressor(handle) }

    /// Inflates one zlib stream (RFC 1950) and checks its Adler-32. Returns the bytes produced, or nil when the
    /// stream is damaged or holds more than `output` takes.
    func inflate(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        var produced = 0
        var consumed = 0
        let result = libdeflate_zlib_decompress_ex(
            handle, input.baseAddress, input.count, output.baseAddress, output.count, &consumed, &produced)
        return result == LIBDEFLATE_SUCCESS ? produced : nil
    }
}
