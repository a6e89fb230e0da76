import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import HostKit
import MigrationModel
import SwiftProtobuf
import Synchronization

extension BusServerTransport {
    /// Runs the handler to its end. Returns what to report, or nil when nothing may be said: the task belongs to
    /// someone else now, or to this worker's next process.
    func execute(
        _ call: TaskCall, _ method: MethodDescriptor, _ running: RunningCall, _ handler: @escaping StreamHandler
    ) async -> TaskEnded? {
        guard running.stopReason == nil else { return report(nil, running.stopReason, last: nil) }
        let writer = UpdateWriter(call: running, events: events)
        running.noteProgress()
        defer { running.noteProgress(isOver: true) }
        let peer = "bus:\(member.name)"
        let work = Task {
            await withServerContextRPCCancellationHandle { handle in
                let context = ServerContext(
                    descriptor: method, remotePeer: peer, localPeer: peer, cancellation: handle)
                let (parts, continuation) = AsyncThrowingStream<RPCRequestPart<[UInt8]>, any Error>.makeStream()
                continuation.yield(.metadata(call.identity.metadata))
                continuation.yield(.message(call.body))
                continuation.finish()
                await handler(
                    RPCStream(
                        descriptor: method, inbound: RPCAsyncSequence(wrapping: parts),
                        outbound: RPCWriter.Closable(wrapping: writer)), context)
            }
        }
        // Handlers listen to task cancellation: gRPC's own handle would only flip a flag.
        running.onStop { work.cancel() }
        await work.value
        let (status, metadata, last) = writer.outcome
        return report(status.map { ($0, metadata) }, running.stopReason, last: last)
    }

    func deadlineTimer(_ deadline: Moment?, _ running: RunningCall) -> Task<Void, Never>? {
        guard let deadline else { return nil }
        let wait = Duration.milliseconds(deadline.milliseconds - Moment.now.milliseconds)
        return Task {
            guard (try? await Task.sleep(for: max(wait, .zero))) != nil else { return }
            running.stop(.deadline)
        }
    }

    /// A call that ended well counts as such even when it was being stopped; otherwise the reason for stopping says
    /// more than the handler's own CANCELLED.
    private func report(
        _ status: (Status, Metadata)?, _ reason: RunningCall.StopReason?, last: [UInt8]?
    ) -> TaskEnded? {
        switch reason {
        case .lostOwnership, .shutdown: return nil
        case .deadline where status?.0.code != .ok:
            return TaskEnded.with {
                $0.code = Int32(MigrationError.Code.deadlineExceeded.rawValue)
                $0.message = "the task's deadline passed"
                $0.hint = TaskEnded.laterDeadline
            }
        case .cancelled(let why) where status?.0.code != .ok:
            return TaskEnded.with {
                $0.code = Int32(MigrationError.Code.cancelled.rawValue)
                $0.message = why
            }
        default: break
        }
        return TaskEnded.with {
            guard let (status, metadata) = status else {
                $0.code = Int32(MigrationError.Code.internal.rawValue)
                $0.message = "the handler ended without a status"
                return
            }
            $0.code = Int32(status.code.rawValue)
            $0.message = status.message
            $0.hint = metadata[stringValues: ErrorInterceptor.hintKey].first { _ in true } ?? ""
            if status.code == .ok { $0.result = Data(last ?? []) }
        }
    }
}

/// Takes a handler's response: messages become update events, the status is kept. Awaiting the publish is the
/// handler's backpressure.
private final class UpdateWriter: ClosableRPCWriterProtocol {
    typealias Element = RPCResponsePart<[UInt8]>

    private struct State {
        var last: [UInt8]?
        var status: Status?
        var metadata: Metadata = [:]
    }

    private let call: RunningCall
    private let events: EventPublisher
    private let state = Mutex(State())

    init(call: RunningCall, events: EventPublisher) {
        self.call = call
        self.events = events
    }

    var outcome: (Status?, Metadata, [UInt8]?) { state.withLock { ($0.status, $0.metadata, $0.last) } }

    func write(_ element: Element) async throws {
        switch element {
        case .metadata: break
        case .message(let bytes):
            state.withLock { $0.last = bytes }
            call.noteProgress()
            // An update that can't be published now is only progress; the end is what must not be lost.
            try? await events.publish(
                TaskEvent(call.identity, sequence: call.nextSequence(), .update(Data(bytes))))
        case .status(let status, let metadata):
            state.withLock {
                $0.status = status
                $0.metadata = metadata
            }
        }
    }

    func write(contentsOf elements: some Sequence<Element>) async throws {
        for element in elements { try await write(element) }
    }

    func finish() async {}
    func finish(throwing error: any Error) async {}
}

extension TaskEnded {
    /// A hint.
    package static let laterDeadline = "ask for it again with a later deadline: it goes on where it stopped"

    /// Itself, or why it can't be sent: a result that no message holds would be waited for for ever.
    var thatFits: TaskEnded {
        let room = Message.maximumBody - 4096
        let size = (try? serializedBytes() as [UInt8])?.count ?? 0
        guard size > room else { return self }
        return TaskEnded.with {
            $0.code = Int32(MigrationError.Code.resourceExhausted.rawValue)
            $0.message = "the task's result has \(size) bytes, a message holds \(room)"
            $0.hint = "shorten the VM's annotation and other long texts on the source"
        }
    }
}
