import HostKit
import MigrationModel

extension VIMClient {
    /// Starts a method that returns a task and waits for its end.
    ///
    /// - Parameter cancels: whether the task is cancelled on the server when `stop` is set.
    /// - Returns: the task's result.
    func run(_ request: VIMRequest, _ subject: String, cancels: Bool = true, stop: StopFlag) throws -> VIMNode? {
        guard let task = try call(request, subject, stop: stop).reference("returnval") else {
            throw MigrationError(.unavailable, "\(server.authority): \(request.method) of \(subject) returned no task")
        }
        var pause = 50
        do {
            while true {
                let info = try properties(["info"], of: task, stop: stop)["info"]
                switch info?.text("state") {
                case "success": return info?["result"]
                case "error":
                    let fault = info?["error"].map(VIMFault.init(localized:))
                    throw (fault ?? VIMFault(type: "", message: "")).error(
                        "\(server.authority): \(request.method) of \(subject)")
                default: try stop.wait(for: .milliseconds(pause))
                }
                pause = min(pause * 2, 2000)
            }
        } catch let error as MigrationError {
            if stop.isSet, cancels { cancel(task) }
            throw error
        }
    }

    /// Waits, for a while, until the task has ended: one that can't be cancelled any more makes something, and whoever takes
    /// that away must find it.
    private func cancel(_ task: ObjectReference) {
        _ = try? answer(VIMRequest("CancelTask", on: task), StopFlag())
        let end = ContinuousClock.now + .seconds(30)
        while ContinuousClock.now < end,
            let state = try? properties(["info"], of: task, stop: StopFlag())["info"]?.text("state"),
            state != "success" && state != "error"
        { try? StopFlag().wait(for: .milliseconds(200)) }
    }

    /// A snapshot of the disks without the memory.
    ///
    /// - Returns: the snapshot.
    func createSnapshot(
        of vm: ObjectReference, named name: String, description: String, quiesce: Bool, stop: StopFlag
    ) throws -> ObjectReference {
        let request = VIMRequest(
            "CreateSnapshot_Task", on: vm,
            [
                XML.text("name", name), XML.text("description", description), XML.flag("memory", false),
                XML.flag("quiesce", quiesce),
            ], isRepeatable: false)
        guard let snapshot = try run(request, "VM \(vm.value)", stop: stop)?.reference else {
            throw MigrationError(.unavailable, "\(server.authority): the snapshot of VM \(vm.value) has no reference")
        }
        return snapshot
    }

    /// Whether the server makes a snapshot of the VM now, or is about to.
    func isMakingSnapshot(of vm: ObjectReference, stop: StopFlag) throws -> Bool {
        let tasks = try properties(["recentTask"], of: vm, stop: stop)["recentTask"]?.children.compactMap(\.reference)
        return try (tasks ?? []).contains { task in
            do {
                let info = try properties(["info"], of: task, stop: stop)["info"]
                // A vCenter's; an ESXi host puts "vim." before it.
                return info?.text("descriptionId")?.hasSuffix("VirtualMachine.createSnapshot") == true
                    && ["running", "queued"].contains(info?.text("state"))
            } catch let error as MigrationError where error.code == .notFound {
                // Long over.
                return false
            }
        }
    }

    /// Removes one snapshot, not those after it; its changes are merged. One that is gone is fine. When nobody waits any
    /// more the server goes on: a merge that is cut off would leave a chain of files.
    func removeSnapshot(_ snapshot: ObjectReference, stop: StopFlag) throws {
        let request = VIMRequest(
            "RemoveSnapshot_Task", on: snapshot, [XML.flag("removeChildren", false), XML.flag("consolidate", true)])
        do {
            _ = try run(request, "snapshot \(snapshot.value)", cancels: false, stop: stop)
        } catch let error as MigrationError where error.code == .notFound {
            return
        }
    }
}
