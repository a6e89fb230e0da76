import ArgumentParser
import Convert
import DiskImage
import HostKit
import MigrationModel

struct DiskVerifyCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "verify", abstract: "Checks that two images hold the same disk, whatever their formats.",
        discussion: "Exits with 1 and says where they first differ if they don't.")

    @Argument(help: ArgumentHelp("One image.", valueName: "a"), completion: .file())
    var first: String

    @Argument(help: ArgumentHelp("The other.", valueName: "b"), completion: .file())
    var second: String

    @Option(name: .customShort("f"), help: ArgumentHelp("A's format (default: by content).", valueName: "format"))
    var firstFormat: DiskFormatArgument?

    @Option(name: .customShort("F"), help: ArgumentHelp("B's format (default: by content).", valueName: "format"))
    var secondFormat: DiskFormatArgument?

    func run() async throws {
        let sides = [
            try DiskArgument(first, format: firstFormat), try DiskArgument(second, format: secondFormat),
        ]
        let difference = try await interruptible("verify") { try Self.difference(sides[0], sides[1], $0) }
        guard let difference else { return Console.line("\(first) and \(second) hold the same disk") }
        throw MigrationError(.dataLoss, "\(first) and \(second) differ: \(difference)")
    }

    private static func difference(_ a: DiskArgument, _ b: DiskArgument, _ stop: StopFlag) throws -> String? {
        if let first = try a.open(stop), let second = try b.open(stop) {
            return try firstDifference(first, second, stop: stop).map { "first at guest byte \($0)" }
        }
        return try QEMUImage.compare(try named(a, stop), try named(b, stop), stop: stop)
    }

    private static func named(_ side: DiskArgument, _ stop: StopFlag) throws -> (path: String, format: String) {
        switch side {
        case .own(let region, let format): return (region.path, format.rawValue)
        case .foreign(let image):
            _ = try image.info(stop: stop)
            return (image.path, image.format.rawValue)
        case .web, .input:
            throw MigrationError(
                .unimplemented, "a stream can't be compared", hint: "download it and compare the file")
        }
    }
}
