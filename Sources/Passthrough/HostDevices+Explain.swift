import FlotillaProtocol

extension HostDevices {
    /// Why `device` got nothing: the first of what the source is, what the host lacks, what is wrong with each
    /// candidate, and finally that other wanted devices took them all.
    func explain(
        _ device: AssignedDevice, _ request: DeviceRequest, _ candidates: [HostDevice], taken: Set<String>,
        wantedAlike requests: [DeviceRequest]
    ) -> [Finding] {
        if let finding = unsupportedBacking(device) { return [finding] }
        if let sibling = request.unsupported.first {
            return [
                .blocked(
                    device.id, "\(device.text) goes with another device: \(sibling.message)", remedy: sibling.remedy)
            ]
        }
        guard !candidates.isEmpty else { return [notPresent(device, request)] }
        if let problem = hostProblem {
            return [.blocked(device.id, "\(device.text): \(problem.message)", remedy: problem.remedy)]
        }

        var findings: [Finding] = []
        var usedHere: [HostDevice] = []
        for unit in candidates {
            if let gpu = request.unaskedGPU(in: unit.functions) {
                findings.append(
                    .blocked(
                        device.id,
                        "\(device.text): on host \(host.name) it is a part of \(gpu.text), which would come along unasked",
                        remedy: "give the VM the GPU as well on the source, or leave the device out with `--gpu drop`"))
                continue
            }
            if unit.addresses.contains(where: taken.contains) {
                usedHere.append(unit)
                continue
            }
            for problem in problems(unit) {
                findings.append(.blocked(device.id, "\(device.text): \(problem.message)", remedy: problem.remedy))
            }
            let others = unrelated(unit, besides: taken)
            if !others.isEmpty {
                findings.append(
                    .blocked(
                        device.id,
                        "\(device.text): \(unit.functions[0].address) shares IOMMU group \(unit.functions[0].iommuGroup) with "
                            + others.map(\.text).joined(separator: ", "),
                        remedy:
                            "move the card to a slot with a group of its own, or unbind those devices from their drivers"
                    ))
            }
        }
        if !usedHere.isEmpty || findings.isEmpty {
            let alike = requests.filter { other in candidates.contains { other.isServed(by: $0.functions) } }.count
            findings.append(
                .blocked(
                    device.id,
                    "\(device.text): the VM needs \(alike) such devices, host \(host.name) has \(usedHere.count) that "
                        + "can be handed over"
                        + (usedHere.isEmpty ? "" : " (\(usedHere.map(\.key).joined(separator: ", ")))"),
                    remedy: "choose a host with \(alike) of them, or leave GPUs out with `--gpu drop`"))
        }
        return findings
    }

    private func notPresent(_ device: AssignedDevice, _ request: DeviceRequest) -> Finding {
        let has = host.pciFunctions.filter {
            !$0.bridge && (device.mayBeDisplay ? $0.isDisplay : $0.classCode == device.classCode)
        }
        let kind = device.mayBeDisplay ? "GPU" : "device of its class"
        let list = has.isEmpty ? "it has no \(kind)" : "it has \(has.prefix(16).map(\.text).joined(separator: ", "))"
        let apart =
            request.devices.count > 1
            && request.devices.allSatisfy { one in
                host.pciFunctions.contains { DeviceRequest(members: [], devices: [one]).isServed(by: [$0]) }
            }
        return .blocked(
            device.id,
            "\(device.text): host \(host.name) has no such device"
                + (apart
                    ? " with the functions \(request.devices.map(\.id).joined(separator: " and ")) in one slot" : "")
                + "; \(list)",
            remedy: "choose a host with this device, or leave GPUs out with `--gpu drop`")
    }
}
