import ArgumentParser
import Deploy
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf

struct HostProfileCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "profile", abstract: "Prints what this host has, as JSON, for flotilla assess --hosts.",
        discussion: "Needs no fleet. Writes a probe file without a name into each pool, and nothing else.")

    @Option(help: ArgumentHelp("Name of the host (default: its host name).", valueName: "name")) var name: String?
    @Option(help: ArgumentHelp("libvirt's URI.", valueName: "uri")) var libvirt = "qemu:///system"
    @Option(
        name: .customLong("pool"),
        help: ArgumentHelp("A folder for disks. Repeatable.", valueName: "name=dir"), completion: .directory)
    var pools: [String] = []

    func run() async throws {
        let folders = try pools.map { text in
            guard let equals = text.firstIndex(of: "="), equals != text.startIndex else {
                throw MigrationError(
                    .invalidArgument, "--pool \(text): is not NAME=DIR", hint: "as in images=/var/lib/images")
            }
            return PoolFolder(
                name: String(text[..<equals]), path: try absolute(String(text[text.index(after: equals)...])))
        }
        let (uri, name) = (libvirt, name ?? Self.hostName())
        let profile = try await blocking("host") {
            try hostProfile(name: name, connection: try LibvirtConnection(uri: uri), pools: folders)
        }
        Console.line(try profile.jsonString())
    }

    private static func hostName() -> String {
        var names = utsname()
        guard uname(&names) == 0 else { return "host" }
        return withUnsafeBytes(of: names.nodename) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }
}
