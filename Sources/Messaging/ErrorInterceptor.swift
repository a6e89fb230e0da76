package import GRPCCore
package import MigrationModel

/// Turns a handler's `MigrationError` into a gRPC status that keeps its code, its words and its hint. Without it a
/// plain Swift error reaches the caller as UNKNOWN with no text.
package struct ErrorInterceptor: ServerInterceptor {
    package static let hintKey = "flotilla-hint"

    package init() {}

    package func intercept<Input: Sendable, Output: Sendable>(
        request: StreamingServerRequest<Input>, context: ServerContext,
        next:
            @concurrent @Sendable (StreamingServerRequest<Input>, ServerContext) async throws ->
            StreamingServerResponse<Output>
    ) async throws -> StreamingServerResponse<Output> {
        do {
            var response = try await next(request, context)
            if case .success(var contents) = response.accepted {
                let producer = contents.producer
                contents.producer = { writer in
                    do {
                        return try await producer(writer)
                    } catch {
                        throw RPCError(wrapping: error)
                    }
                }
                response.accepted = .success(contents)
            }
            return response
        } catch {
            throw RPCError(wrapping: error)
        }
    }
}

extension RPCError {
    package init(wrapping error: any Error) {
        switch error {
        case let error as RPCError: self = error
        case let error as MigrationError:
            var message = error.message
            if let cause = error.cause { message += ": \(cause)" }
            let code = Status.Code(rawValue: error.code.rawValue).flatMap(RPCError.Code.init) ?? .unknown
            self.init(
                code: code, message: message, metadata: error.hint.map { [ErrorInterceptor.hintKey: "\($0)"] } ?? [:])
        case is CancellationError: self.init(code: .cancelled, message: "cancelled")
        default: self.init(code: .unknown, message: "\(error)")
        }
    }
}

extension MigrationError {
    /// The error a gRPC caller got, back in our own words.
    package init(_ error: RPCError) {
        self.init(
            Code(rawValue: error.code.rawValue) ?? .unknown, error.message,
            hint: error.metadata[stringValues: ErrorInterceptor.hintKey].first { _ in true })
    }
}
