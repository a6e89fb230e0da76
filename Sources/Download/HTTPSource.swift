import DiskImage
package import HostKit
import MigrationModel

/// A resource front to back. A connection that breaks is taken up again at the byte where it broke, if the server can
/// tell that the content is still the same.
package final class HTTPSource: ByteSource {
    package var name: String { location.name }
    package var length: UInt64? { total ?? nil }
    private let location: HTTPLocation
    private let transfer: HTTPTransfer
    private var retries: Retries
    /// nil before the first answer.
    private var total: UInt64??
    private var validator: String?
    private var position: UInt64 = 0
    private var isOpen = false
    /// The server says that there is no more.
    private var isAtEnd = false

    package init(_ location: HTTPLocation, stop: StopFlag) throws {
        self.location = location
        transfer = try HTTPTransfer(location, stop)
        retries = Retries(location, stop)
    }

    package func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        while true {
            do {
                if !isOpen { try open() }
                if isAtEnd { return 0 }
                let count = try transfer.read(into: buffer)
                if count > 0 { retries.succeeded() }
                position += UInt64(count)
                if count == 0, let total = total ?? nil, position < total {
                    throw HTTPTransfer.Interrupted(reason: "the connection ended at byte \(position) of \(total)")
                }
                return count
            } catch let interruption as HTTPTransfer.Interrupted {
                isOpen = false
                // What never answered is more likely misspelt than overloaded.
                guard total != nil || interruption.isLasting && location.headers != nil else {
                    throw MigrationError(.unavailable, "\(name): \(interruption.reason)")
                }
                guard validator != nil || position == 0 else { throw lost(interruption.reason) }
                try retries.failed(interruption)
            }
        }
    }

    private func open() throws {
        guard position > 0 else {
            let response = try transfer.start(nil, validator: nil)
            guard response.status == 200 else { throw lost("the server answered with a part, unasked") }
            total = .some(response.total)
            validator = response.validator
            return isOpen = true
        }
        let response = try transfer.start((position, nil), validator: validator)
        let known = total ?? nil
        // The connection broke when everything had come. Of other content the server would have sent all.
        if response.status == 416, response.total == position, known == nil || known == position,
            response.validator == nil || response.validator == validator
        {
            (isOpen, isAtEnd) = (true, true)
            return
        }
        guard response.status == 206, response.range?.lowerBound == position, response.validator == validator,
            known == nil || response.total == known
        else { throw lost("the server can't go on at byte \(position), or has other content by now") }
        isOpen = true
    }

    private func lost(_ reason: String) -> MigrationError {
        MigrationError(.unavailable, "\(name): \(reason)", hint: "start again: a stream can't be continued")
    }
}
