import ArgumentParser
import Deploy
import FlotillaProtocol
import SwiftProtobuf

enum DiskImageFormat: String, ExpressibleByArgument, CaseIterable {
    case qcow2, raw
}

enum GPUPolicyArgument: String, ExpressibleByArgument, CaseIterable {
    case require, drop

    var policy: GpuPolicy {
        switch self {
        case .require: .gpuRequire
        case .drop: .gpuDrop
        }
    }
}

enum DiskBusArgument: String, ExpressibleByArgument, CaseIterable {
    case virtio, scsi, sata

    var bus: DiskBus {
        switch self {
        case .virtio: .virtio
        case .scsi: .scsi
        case .sata: .sataBus
        }
    }
}

/// "VM Network=bridge:br0". The source's name may hold '=' itself.
struct NetworkArgument: ExpressibleByArgument {
    let mapping: NetworkMapping

    init?(argument: String) {
        guard let equals = argument.lastIndex(of: "="), equals != argument.startIndex else { return nil }
        let target = argument[argument.index(after: equals)...].split(separator: ":", maxSplits: 1)
        guard target.count == 2, !target[1].isEmpty else { return nil }
        var mapping = NetworkMapping()
        mapping.source = String(argument[..<equals])
        switch target[0] {
        case "bridge": mapping.bridge = String(target[1])
        case "network": mapping.network = String(target[1])
        default: return nil
        }
        self.mapping = mapping
    }
}

enum VerifyArgument: ExpressibleByArgument, Equatable {
    case none
    case agent
    case console(String)

    init?(argument: String) {
        switch argument {
        case "none": self = .none
        case "agent": self = .agent
        case _ where argument.hasPrefix("console="):
            let pattern = String(argument.dropFirst("console=".count))
            guard (try? validateConsolePattern(pattern)) != nil else { return nil }
            self = .console(pattern)
        default: return nil
        }
    }

    var defaultValueDescription: String { "none" }

    var verification: Verification {
        var verification = Verification()
        switch self {
        case .none: break
        case .agent: verification.agent = true
        case .console(let pattern): verification.console = pattern
        }
        return verification
    }
}
