import MigrationModel
import Testing

/// One event and what it must lead to, in order. The machine has no clock: times are milliseconds of the table.
private struct Step {
    var at: Int64
    var event: TaskMachine.Event
    var actions: [TaskMachine.Action]
    var state: TaskMachine.State
}

private let policy = TaskMachine.Policy(leaseDuration: .seconds(60), maximumFailures: 3, backoff: .seconds(1))

private func moment(_ milliseconds: Int64) -> Moment { Moment(milliseconds: milliseconds) }

private func run(_ steps: [Step], sourceLocation: SourceLocation = #_sourceLocation) {
    var machine = TaskMachine(now: moment(0))
    for (number, step) in steps.enumerated() {
        let actions = machine.handle(step.event, now: moment(step.at), policy: policy)
        #expect(actions == step.actions, "step \(number): \(step.event)", sourceLocation: sourceLocation)
        #expect(machine.state == step.state, "step \(number): \(step.event)", sourceLocation: sourceLocation)
    }
}

private let unavailable = MigrationError.Code.unavailable.rawValue
private let dataLoss = MigrationError.Code.dataLoss.rawValue

@Suite struct TaskMachineTests {
    @Test func successfulTask() {
        run([
            Step(at: 0, event: .dispatch, actions: [.send(attempt: 1, fence: 1)], state: .sent),
            Step(
                at: 10, event: .accepted(fence: 1), actions: [.renewLease(fence: 1)],
                state: .running(leaseUntil: moment(60_010))),
            Step(
                at: 20_000, event: .heartbeat(fence: 1), actions: [.renewLease(fence: 1)],
                state: .running(leaseUntil: moment(80_000))),
            Step(
                at: 30_000, event: .ended(fence: 1, outcome: .success), actions: [.finish(.success)], state: .succeeded),
        ])
    }

    @Test func leaseExpiryIssuesLargerFenceAndStaleEventsChangeNothing() {
        run([
            Step(at: 0, event: .dispatch, actions: [.send(attempt: 1, fence: 1)], state: .sent),
            Step(
                at: 0, event: .accepted(fence: 1), actions: [.renewLease(fence: 1)],
                state: .running(leaseUntil: moment(60_000))),
            Step(at: 59_999, event: .tick, actions: [], state: .running(leaseUntil: moment(60_000))),
            Step(at: 60_000, event: .tick, actions: [.revoke(fence: 1)], state: .waiting(notBefore: moment(60_000))),
            Step(at: 60_000, event: .dispatch, actions: [.send(attempt: 2, fence: 2)], state: .sent),
            // The first worker wakes up again.
            Step(at: 60_001, event: .heartbeat(fence: 1), actions: [.revoke(fence: 1)], state: .sent),
            Step(at: 60_002, event: .ended(fence: 1, outcome: .success), actions: [], state: .sent),
            Step(
                at: 60_003, event: .accepted(fence: 2), actions: [.renewLease(fence: 2)],
                state: .running(leaseUntil: moment(120_003))),
            Step(
                at: 60_004, event: .ended(fence: 1, outcome: .failure(code: dataLoss)), actions: [],
                state: .running(leaseUntil: moment(120_003))),
            Step(
                at: 60_005, event: .ended(fence: 2, outcome: .success), actions: [.finish(.success)], state: .succeeded),
        ])
    }

    @Test func retryableFailuresBackOffAndThenFail() {
        let failed = TaskMachine.Outcome.failure(code: unavailable)
        run([
            Step(at: 0, event: .dispatch, actions: [.send(attempt: 1, fence: 1)], state: .sent),
            Step(
                at: 0, event: .ended(fence: 1, outcome: failed), actions: [], state: .waiting(notBefore: moment(1000))),
            Step(at: 999, event: .dispatch, actions: [], state: .waiting(notBefore: moment(1000))),
            Step(at: 1000, event: .dispatch, actions: [.send(attempt: 2, fence: 2)], state: .sent),
            Step(
                at: 1000, event: .ended(fence: 2, outcome: failed), actions: [],
                state: .waiting(notBefore: moment(3000))),
            Step(at: 3000, event: .dispatch, actions: [.send(attempt: 3, fence: 3)], state: .sent),
            Step(
                at: 3000, event: .ended(fence: 3, outcome: failed), actions: [.finish(failed)],
                state: .failed(code: unavailable)),
            Step(at: 3001, event: .restart, actions: [], state: .waiting(notBefore: moment(3001))),
            Step(at: 3001, event: .dispatch, actions: [.send(attempt: 4, fence: 4)], state: .sent),
        ])
    }

    @Test func finalFailureIsNotRetried() {
        let failed = TaskMachine.Outcome.failure(code: dataLoss)
        run([
            Step(at: 0, event: .dispatch, actions: [.send(attempt: 1, fence: 1)], state: .sent),
            Step(
                at: 1, event: .ended(fence: 1, outcome: failed), actions: [.finish(failed)],
                state: .failed(code: dataLoss)),
            Step(at: 2, event: .tick, actions: [], state: .failed(code: dataLoss)),
            Step(at: 2, event: .dispatch, actions: [], state: .failed(code: dataLoss)),
            Step(at: 3, event: .accepted(fence: 1), actions: [.revoke(fence: 1)], state: .failed(code: dataLoss)),
        ])
    }

    @Test func cancelOfAFailedTaskSweepsItAndFinishesNothing() {
        let failed = TaskMachine.Outcome.failure(code: dataLoss)
        run([
            Step(at: 0, event: .dispatch, actions: [.send(attempt: 1, fence: 1)], state: .sent),
            Step(
                at: 1, event: .ended(fence: 1, outcome: failed), actions: [.finish(failed)],
                state: .failed(code: dataLoss)),
            Step(at: 2, event: .alive, actions: [], state: .failed(code: dataLoss)),
            Step(at: 3, event: .cancel, actions: [.cancel(fence: 1)], state: .cancelled),
            Step(at: 4, event: .cancel, actions: [], state: .cancelled),
            // Its end was said again, not yet confirmed.
            Step(at: 5, event: .ended(fence: 1, outcome: failed), actions: [], state: .cancelled),
            Step(at: 6, event: .alive, actions: [.cancel(fence: 1)], state: .cancelled),
            Step(at: 7, event: .ended(fence: 1, outcome: .failure(code: 1)), actions: [], state: .cancelled),
            Step(at: 8, event: .alive, actions: [], state: .cancelled),
            Step(at: 9, event: .restart, actions: [], state: .waiting(notBefore: moment(9))),
        ])
        // One that no host ever had left nothing.
        var unsent = TaskMachine(now: moment(0))
        _ = unsent.handle(.expire, now: moment(1), policy: policy)
        #expect(unsent.handle(.cancel, now: moment(2), policy: policy).isEmpty)
    }

    @Test func orphanIsSentAgainAtOnceAndCostsNoFailure() {
        var machine = TaskMachine(now: moment(0))
        for round in 1...10 {
            #expect(
                machine.handle(.dispatch, now: moment(0), policy: policy)
                    == [.send(attempt: UInt32(round), fence: UInt64(round))])
            _ = machine.handle(.accepted(fence: UInt64(round)), now: moment(0), policy: policy)
            _ = machine.handle(.orphaned, now: moment(0), policy: policy)
        }
        #expect(machine.failures == 0)
    }

    /// A task that ends its worker whenever it runs must not do so for ever.
    @Test func attemptsThatAreLostBackOffAndThenFail() {
        var few = policy
        few.maximumLosses = 4
        var machine = TaskMachine(now: moment(0))
        let internalError = MigrationError.Code.internal.rawValue
        func attempt(_ fence: UInt64, at time: Int64) {
            #expect(
                machine.handle(.dispatch, now: moment(time), policy: few)
                    == [.send(attempt: UInt32(fence), fence: fence)])
            _ = machine.handle(.accepted(fence: fence), now: moment(time), policy: few)
        }
        attempt(1, at: 0)
        #expect(machine.handle(.released(fence: 1), now: moment(0), policy: few).isEmpty)
        #expect(machine.state == .waiting(notBefore: moment(0)))
        attempt(2, at: 0)
        #expect(machine.handle(.tick, now: moment(60_000), policy: few) == [.revoke(fence: 2)])
        #expect(machine.state == .waiting(notBefore: moment(61_000)))
        #expect(
            machine.handle(.dispatch, now: moment(61_000), policy: few) == [.send(attempt: 3, fence: 3)])
        #expect(machine.handle(.unclaimed, now: moment(70_000), policy: few).isEmpty)
        #expect(machine.state == .waiting(notBefore: moment(72_000)))
        attempt(4, at: 72_000)
        // What is taken on can't be unclaimed.
        #expect(machine.handle(.unclaimed, now: moment(72_000), policy: few).isEmpty)
        #expect(
            machine.handle(.released(fence: 4), now: moment(72_001), policy: few)
                == [.finish(.failure(code: internalError))])
        #expect(machine.state == .failed(code: internalError) && machine.failures == 0)
        _ = machine.handle(.restart, now: moment(80_000), policy: few)
        #expect(machine.losses == 0)
        attempt(5, at: 80_000)
    }

    @Test func releaseOfItsOwnFenceAloneEndsALease() {
        var machine = TaskMachine(now: moment(0))
        _ = machine.handle(.dispatch, now: moment(0), policy: policy)
        // Still in the queue, or on its way back to it: another attempt would be one too many.
        #expect(machine.handle(.released(fence: 1), now: moment(0), policy: policy).isEmpty && machine.state == .sent)
        _ = machine.handle(.accepted(fence: 1), now: moment(0), policy: policy)
        let running = machine
        for other in [0, 2] as [UInt64] { _ = machine.handle(.released(fence: other), now: moment(1), policy: policy) }
        #expect(machine == running)
        _ = machine.handle(.released(fence: 1), now: moment(1), policy: policy)
        #expect(machine.state == .waiting(notBefore: moment(1)) && machine.failures == 0)
        #expect(machine.handle(.dispatch, now: moment(1), policy: policy) == [.send(attempt: 2, fence: 2)])
        #expect(machine.losses == 1)
        // The released attempt's late words change nothing any more.
        #expect(machine.handle(.heartbeat(fence: 1), now: moment(1), policy: policy) == [.revoke(fence: 1)])
        _ = machine.handle(.ended(fence: 1, outcome: .success), now: moment(1), policy: policy)
        #expect(machine.state == .sent)
        // What can't have ended its process is not lost.
        _ = machine.handle(.accepted(fence: 2), now: moment(1), policy: policy)
        _ = machine.handle(.released(fence: 2, blameless: true), now: moment(2), policy: policy)
        #expect(machine.state == .waiting(notBefore: moment(2)) && machine.losses == 1)
    }

    /// A lease or a wait that was reckoned by a clock that has been set back since ends as soon as any other.
    @Test func clockSetBackKeepsNothingWaiting() {
        var machine = TaskMachine(now: moment(100_000))
        #expect(machine.handle(.dispatch, now: moment(0), policy: policy).isEmpty)
        _ = machine.handle(.tick, now: moment(0), policy: policy)
        #expect(machine.handle(.dispatch, now: moment(0), policy: policy) == [.send(attempt: 1, fence: 1)])
        _ = machine.handle(.accepted(fence: 1), now: moment(100_000), policy: policy)
        _ = machine.handle(.tick, now: moment(10), policy: policy)
        #expect(machine.state == .running(leaseUntil: moment(10) + policy.leaseDuration))
        #expect(
            machine.handle(.tick, now: moment(10) + policy.leaseDuration, policy: policy) == [.revoke(fence: 1)])
    }

    @Test func cancelTellsTheWorkerOnlyWhenThereIsOne() {
        var waiting = TaskMachine(now: moment(0))
        #expect(waiting.handle(.cancel, now: moment(0), policy: policy) == [.finish(.failure(code: 1))])
        var sent = TaskMachine(now: moment(0))
        _ = sent.handle(.dispatch, now: moment(0), policy: policy)
        #expect(
            sent.handle(.cancel, now: moment(0), policy: policy) == [.cancel(fence: 1), .finish(.failure(code: 1))])
        #expect(sent.handle(.cancel, now: moment(0), policy: policy).isEmpty)
        // Who takes it on all the same, or goes on, is told again.
        for event in [TaskMachine.Event.accepted(fence: 1), .heartbeat(fence: 1)] {
            #expect(sent.handle(event, now: moment(0), policy: policy) == [.cancel(fence: 1)])
        }
        #expect(sent.handle(.heartbeat(fence: 0), now: moment(0), policy: policy) == [.revoke(fence: 0)])
        #expect(sent.handle(.ended(fence: 1, outcome: .success), now: moment(0), policy: policy).isEmpty)
        #expect(sent.state == .cancelled)
    }

    @Test func cancelIsSaidAgainUntilNothingIsLeft() {
        let cancelled = MigrationError.Code.cancelled.rawValue
        for outcome in [TaskMachine.Outcome.success, .failure(code: cancelled)] {
            var machine = TaskMachine(now: moment(0))
            func handle(_ event: TaskMachine.Event) -> [TaskMachine.Action] {
                machine.handle(event, now: moment(0), policy: policy)
            }
            _ = handle(.dispatch)
            #expect(handle(.alive).isEmpty)
            _ = handle(.cancel)
            // A failure keeps its files for the next attempt; another fence's end says nothing of this one's.
            for event in [
                TaskMachine.Event.ended(fence: 1, outcome: .failure(code: unavailable)),
                .ended(fence: 0, outcome: .success),
            ] {
                #expect(handle(event).isEmpty)
                #expect(handle(.alive) == [.cancel(fence: 1)])
            }
            #expect(handle(.released(fence: 0)).isEmpty)
            #expect(handle(.released(fence: 1)) == [.cancel(fence: 1)])
            #expect(handle(.ended(fence: 1, outcome: outcome)).isEmpty)
            #expect(handle(.alive).isEmpty)
            _ = handle(.restart)
            #expect(handle(.dispatch) == [.send(attempt: 2, fence: 2)])
            _ = handle(.cancel)
            #expect(handle(.alive) == [.cancel(fence: 2)])
            _ = handle(.restart)
            #expect(!machine.isUnswept)
        }
        var waiting = TaskMachine(now: moment(0))
        _ = waiting.handle(.cancel, now: moment(0), policy: policy)
        #expect(waiting.handle(.alive, now: moment(0), policy: policy).isEmpty)
    }
}

@Suite struct NamingTests {
    @Test(
        arguments: [
            (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"),
            (UInt64.max, "16 EiB"),
        ] as [(UInt64, String)])
    func bytesAsText(_ bytes: UInt64, _ text: String) { #expect(byteText(bytes) == text) }
}
