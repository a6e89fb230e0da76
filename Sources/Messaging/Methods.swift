package import FlotillaProtocol
import GRPCCore

extension ExportService.Method.Export: BusMethod {}
extension ConvertService.Method.Convert: BusMethod {}
extension DeployService.Method.Deploy: BusMethod {}
