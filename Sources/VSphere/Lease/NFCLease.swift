import DiskImage
import Download
import Export
import FlotillaProtocol
import HostKit
import MigrationModel
import Synchronization

/// An export lease: while it is held the VM can't be started or changed and its disks can be fetched. A thread of its
/// own tells the server that it is still in use, however slow the disks are.
final class NFCLease: Sendable {
    struct DeviceURL: Sendable {
        /// "/vm-42/VirtualLsiLogicController0:0".
        let key: String
        let url: String
        let thumbprint: String
        let datastore: String
        let isDisk: Bool
    }

    let devices: [DeviceURL]
    private let client: VIMClient
    let reference: ObjectReference
    /// Set when the lease is over, by us or by the server.
    private let over = StopFlag()
    private let percent: @Sendable () -> Int

    /// Waits until the lease is ready.
    ///
    /// - Parameter percent: of the whole export, for the server's own display.
    init(
        _ client: VIMClient, _ reference: ObjectReference, stop: StopFlag, percent: @escaping @Sendable () -> Int
    ) throws {
        self.client = client
        self.reference = reference
        self.percent = percent
        var info: VIMNode?
        do {
            while info == nil {
                let content = try client.properties(["state", "info", "error"], of: reference, stop: stop)
                switch content.text("state") {
                case "ready": info = content["info"] ?? VIMNode(name: "info")
                case "error":
                    let fault = content["error"].map(VIMFault.init(localized:))
                    throw (fault ?? VIMFault(type: "", message: "it failed")).error(
                        "\(client.server.authority): export lease")
                case "done":
                    throw MigrationError(.unavailable, "\(client.server.authority): the export lease ended at once")
                default: try stop.wait(for: .milliseconds(200))
                }
            }
        } catch {
            _ = try? client.answer(VIMRequest("HttpNfcLeaseAbort", on: reference), StopFlag())
            throw error
        }
        devices = (info?.all("deviceUrl") ?? []).map { node in
            DeviceURL(
                key: node.text("key") ?? "", url: node.text("url") ?? "",
                thumbprint: node.text("sslThumbprint") ?? "", datastore: node.text("datastoreKey") ?? "",
                isDisk: node.flag("disk") ?? true)
        }
        // Well inside the timeout: two may be lost.
        let timeout = min(max(3, info?.number("leaseTimeout") ?? 300), 86_400)
        let interval = Duration.milliseconds(min(30_000, timeout * 250))
        spawnThread("nfc-lease") { [self] in keepAlive(every: interval) }
    }

    private func keepAlive(every interval: Duration) {
        while true {
            do {
                try over.wait(for: interval)
                let request = VIMRequest(
                    "HttpNfcLeaseProgress", on: reference, [XML.number("percent", min(99, max(0, percent())))])
                _ = try client.answer(request, over)
            } catch let fault as VIMFault {
                over.set(fault.error("\(client.server.authority): the export lease was lost"))
                return
            } catch {
                // Unreachable for now; the next time may be early enough.
                if over.isSet { return }
            }
        }
    }

    /// Asks the server, which may know more than the last keep-alive.
    func isAlive(_ stop: StopFlag) throws -> Bool {
        guard !over.isSet else { return false }
        do {
            return try client.properties(["state"], of: reference, stop: stop).text("state") == "ready"
        } catch let error as MigrationError where error.code == .notFound {
            return false
        }
    }

    /// - Parameter isDone: all was fetched. A server that disagrees is no reason to distrust what was.
    func end(isDone: Bool, _ stop: StopFlag = StopFlag()) {
        over.set(MigrationError(.cancelled, "the export is over"))
        let method = isDone ? "HttpNfcLeaseComplete" : "HttpNfcLeaseAbort"
        do {
            _ = try client.answer(VIMRequest(method, on: reference), stop)
        } catch {
            if isDone { _ = try? client.answer(VIMRequest("HttpNfcLeaseAbort", on: reference), stop) }
        }
    }

    /// Which of the lease's addresses is that of a disk.
    func device(of disk: Disk, among disks: [Disk]) throws -> DeviceURL {
        let urls = devices.filter(\.isDisk)
        let slots = urls.map { Self.slot(ofKey: $0.key) }
        let matches = zip(urls, slots).filter { $0.1 == disk.label }
        if matches.count == 1, let match = matches.first { return match.0 }
        // By order only where it can't be wrong unnoticed: the stream's size is compared with the disk's.
        let sizes = Set(disks.map(\.capacityBytes))
        if urls.count == disks.count, sizes.count == disks.count, slots.allSatisfy({ $0 == nil }),
            let index = disks.firstIndex(where: { $0.id == disk.id })
        {
            return urls[index]
        }
        throw MigrationError(
            .failedPrecondition,
            "\(client.server.authority): the export lease has no certain address for \(disk.id) (\(disk.label)): "
                + urls.prefix(16).map(\.key.printable).joined(separator: ", "),
            hint: "migrate with --via datastore, or export the VM to an OVA")
    }

    /// "scsi0:1" from "/vm-42/ParaVirtualSCSIController0:1".
    static func slot(ofKey key: String) -> String? {
        let last = key.split(separator: "/").last ?? ""
        guard let end = last.lastIndex(of: ":") else { return nil }
        let unit = last[last.index(after: end)...]
        let digits = last[..<end].reversed().prefix { $0.isASCII && $0.isNumber }.count
        let type = String(last[..<end].dropLast(digits))
        let bus = last[..<end].suffix(digits)
        guard digits > 0, let kind = ControllerKind(type: type), UInt32(unit) != nil, UInt32(bus) != nil else {
            return nil
        }
        return "\(kind.rawValue)\(bus):\(unit)"
    }
}
