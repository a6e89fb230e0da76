import FlotillaProtocol

/// Devices of the source that must come from one slot of the target: usually one, two when the source handed over
/// a GPU and its audio function separately.
struct DeviceRequest {
    /// Indices into the wanted devices.
    var members: [Int]
    var devices: [AssignedDevice]

    static func group(_ wanted: [AssignedDevice]) -> [DeviceRequest] {
        var requests: [DeviceRequest] = []
        var slots: [String: Int] = [:]
        for (index, device) in wanted.enumerated() {
            if case .vgpu = device.backing { continue }
            if let slot = device.slot {
                if let request = slots[slot] {
                    requests[request].members.append(index)
                    requests[request].devices.append(device)
                    continue
                }
                slots[slot] = requests.count
            }
            requests.append(DeviceRequest(members: [index], devices: [device]))
        }
        return requests
    }

    /// Whether the functions hold a different one for each device.
    func isServed(by functions: [PciFunction]) -> Bool {
        var free = functions
        for device in devices {
            guard let match = free.firstIndex(where: device.mayBe) else { return false }
            free.remove(at: match)
        }
        return true
    }

    /// A GPU among these functions when nothing that was asked for is one: it would come along unasked.
    func unaskedGPU(in functions: [PciFunction]) -> PciFunction? {
        let asked = functions.contains { function in
            function.isDisplay && devices.contains { $0.mayBe(function) }
        }
        return asked ? nil : functions.first(where: \.isDisplay)
    }

    /// The same board, not only the same chip.
    func prefers(_ functions: [PciFunction]) -> Bool {
        devices.allSatisfy { device in
            device.allowedIDs.contains { id in
                functions.contains {
                    $0.id.vendor == id.vendor && $0.id.device == id.device && id.subsystemVendor != 0
                        && $0.id.subsystemVendor == id.subsystemVendor && $0.id.subsystemDevice == id.subsystemDevice
                }
            }
        }
    }

    /// What no host can serve, whatever it has.
    var unsupported: [Finding] { devices.compactMap(unsupportedBacking) }
}

extension AssignedDevice {
    fileprivate func mayBe(_ function: PciFunction) -> Bool {
        allowedIDs.contains { $0.vendor == function.id.vendor && $0.device == function.id.device }
    }
}

/// A finding for a backing that isn't a whole PCI device.
func unsupportedBacking(_ device: AssignedDevice) -> Finding? {
    let drop = "leave it out with `--gpu drop`, or give the VM a whole passthrough GPU on the source first"
    switch device.backing {
    case .vgpu(let vgpu):
        guard vgpu.profile.isEmpty else { return nil }
        return .blocked(
            device.id, "\(device.id): the source has an NVIDIA vGPU without a profile",
            remedy: "choose its profile on the source, or leave it out with `--gpu drop`")
    case .passthrough, .dynamic:
        guard device.allowedIDs.isEmpty else { return nil }
        return .blocked(
            device.id, "\(device.id): the source does not say which vendor and device id it is",
            remedy: "assign the device on the source again, or leave it out with `--gpu drop`")
    case .dvx(let dvx):
        return .blocked(
            device.id,
            "\(device.id): the source has a Device Virtualization Extensions device (\(dvx.deviceClass)), which exists "
                + "only on ESXi",
            remedy: drop)
    case .sriov(let function):
        return .blocked(
            device.id,
            "\(device.id): the source has an SR-IOV virtual function (\(function.id.text)); this version can't create "
                + "virtual functions",
            remedy: drop)
    case nil:
        return .blocked(
            device.id, "\(device.id): the manifest says nothing of what backs it",
            remedy: "export the VM again, or leave the device out with `--gpu drop`")
    }
}
