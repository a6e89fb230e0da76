import Assessment
import MigrationModel

/// An assessment for people: a table, the reasons, a summary.
struct AssessmentView {
    private let assessment: Assessment

    init(_ assessment: Assessment) { self.assessment = assessment }

    var lines: [String] {
        let judged = !assessment.hosts.isEmpty
        // Names repeat between data centres.
        let several = assessment.isOfSeveralDatacenters
        var head = ["status", "VM", "CPUs", "memory", "disks", "GPUs"]
        if several { head.insert("data centre", at: 2) }
        if judged { head.append("hosts") }
        var lines = table(
            head,
            assessment.vms.map { vm in
                let gpus = vm.devices.filter(\.isGPU).map(\.kindText)
                var row = [
                    vm.verdict == .blocked ? "BLOCKED" : vm.verdict.rawValue, vm.name, vm.cpus > 0 ? "\(vm.cpus)" : "",
                    vm.memoryBytes > 0 ? byteText(vm.memoryBytes) : "",
                    vm.diskBytes.isEmpty ? "" : byteText(vm.diskBytes.reduce(0, &+)), listed(gpus),
                ]
                if several { row.insert(vm.datacenter, at: 2) }
                if judged {
                    row.append(vm.hosts.prefix(6).joined(separator: ", ") + (vm.hosts.count > 6 ? ", …" : ""))
                }
                return row
            })
        for vm in assessment.vms where !vm.reasons.isEmpty || vm.devices.contains(where: { !$0.fits.isEmpty }) {
            lines += ["", vm.name + (several && !vm.datacenter.isEmpty ? " (\(vm.datacenter))" : "")]
            for device in vm.devices {
                for fit in device.fits.prefix(8) {
                    lines.append(
                        "  fits     \(device.id) (\(device.kindText)): \(fit.host) \(fit.functions.joined(separator: " "))"
                    )
                }
            }
            for reason in vm.reasons {
                let word =
                    switch reason.severity {
                    case .blocked: "BLOCKED"
                    case .warning: "warning"
                    case .ready: "note   "
                    }
                lines.append("  \(word)  \(reason.message)")
                if !reason.remedy.isEmpty { lines.append("           \(reason.remedy)") }
            }
        }
        lines.append("")
        if judged {
            for demand in assessment.demand {
                lines.append("\(demand.kind): VMs want \(demand.wanted), the hosts have \(demand.free) free")
            }
        }
        let summary = assessment.summary
        lines.append(
            "\(counted(assessment.vms.count, "VM")): \(summary.ready) ready, \(summary.warning) with warnings, \(summary.blocked) blocked; "
                + "\(byteText(summary.diskBytes)) of disks, \(counted(summary.gpus, "GPU"))")
        return lines.map(\.withoutControls)
    }
}
