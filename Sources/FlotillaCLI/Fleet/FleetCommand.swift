import ArgumentParser
import Enrollment
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel

struct FleetCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "fleet", abstract: "Sets a fleet up: keys, certificates, the broker's users and queues.",
        discussion: """
            1. on the coordinator's machine   flotilla fleet init
            2. on each host                   flotilla worker enroll --host kvm1 > kvm1.request
            3. on the coordinator's machine   flotilla host enroll kvm1.request > kvm1.answer
            4. on the host                    flotilla worker enroll --answer kvm1.answer
            5. for the broker                 flotilla fleet broker-certificate rabbit1.example.org
                                              flotilla fleet definitions > fleet.json
                                              rabbitmqctl import_definitions fleet.json
            """,
        subcommands: [Initialize.self, BrokerCertificate.self, Definitions.self])

    struct Folder: ParsableArguments {
        @Option(
            name: .customLong("dir"), help: ArgumentHelp("Folder of keys and certificates.", valueName: "dir"),
            completion: .directory)
        var path = "/etc/flotilla"

        var folder: FleetFolder { get throws { FleetFolder(try absolute(path)) } }
    }

    /// The folder of a command that changes it.
    struct ChangedFolder: ParsableArguments {
        @OptionGroup var place: Folder
        @Flag(help: "Change nothing; say which files would be written and removed.") var dryRun = false

        /// Nil of a dry run, which prints what `body` would do.
        func change<Value>(_ body: (FleetFolder) throws -> Value) throws -> Value? {
            guard dryRun else { return try body(try place.folder) }
            let plan = FleetFolder.Plan()
            _ = try body(FleetFolder(try absolute(place.path), plan: plan))
            Console.line("nothing was changed; it would" + (plan.steps.isEmpty ? " change nothing" : ""))
            for step in plan.steps { Console.line("  \(step)") }
            return nil
        }
    }

    struct Initialize: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "init",
            abstract: "Makes the coordinator's keys and the fleet's certificate authority; what is there stays.")

        @OptionGroup var folder: ChangedFolder

        func run() async throws {
            if let key = try folder.change(Enrollment.makeFleet) {
                Console.line(
                    "\(try absolute(folder.place.path)): coordinator's key \(key), certificate authority in ca.pem")
            }
        }
    }

    struct BrokerCertificate: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Makes a certificate and key for a broker node, NAME.pem and NAME.key in the present folder.")

        @OptionGroup var folder: ChangedFolder
        @Argument(help: "The node's DNS name, as coordinator and workers call it.") var name: String

        func run() async throws {
            let target = try absolute(name)
            let made = try folder.change { try Enrollment.brokerCertificate(name, in: $0, to: target) }
            guard let made else { return }
            Console.line("\(made.certificate) and \(made.key): give the key to the broker's user alone")
        }
    }

    struct Definitions: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Prints what the broker imports: users, permissions, exchanges, queues and policies.",
            discussion: """
                Import it again after hosts have joined. Exchanges and queues that are there stay as they are; policies of \
                these names are set anew.
                """)

        @OptionGroup var place: Folder
        @Option(help: "The broker's virtual host.") var virtualHost = "/"
        @Option(help: "What the names of exchanges and queues begin with.") var namespace = "flotilla"
        @Option(
            name: .customLong("requester"),
            help: "Broker user of another program that may ask for migrations. Repeatable.")
        var requesters: [String] = []
        @Option(name: .customLong("host"), help: "A host besides those enrolled. Repeatable.") var others: [String] = []

        func validate() throws { for host in others { try requireHostName(host) } }

        func run() async throws {
            let folder = try place.folder
            let hosts = Set(try folder.hosts() + others).sorted()
            let definitions: BrokerDefinitions
            do {
                definitions = try BrokerDefinitions(
                    Names(namespace: namespace), hosts: hosts, requesters: requesters, virtualHost: virtualHost)
            } catch let error as MigrationError where error.code == .invalidArgument {
                throw ValidationError(error.description)
            }
            guard Files.isDirectory(folder.trusted) else {
                throw MigrationError(
                    .notFound, "\(folder.path) holds no fleet: it has no folder \(folder.trusted)",
                    hint: "make it with flotilla fleet init, or name the coordinator's folder with --dir")
            }
            Console.line(try definitions.json())
        }
    }
}

/// A name that can't be a host's is a mistake on the command line.
func requireHostName(_ name: String) throws {
    guard FleetMember.isHostName(name) else {
        throw ValidationError("'\(name)' can't name a host: \(FleetMember.hostNameRule)")
    }
}

struct WorkerEnrollCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "enroll",
        abstract: "Makes this host's keys and a request to join, or takes the coordinator's answer.",
        discussion: """
            Private keys stay on this machine. Run it again to renew the certificate, or with --new-keys to change the \
            keys: the new ones lie beside those in use, as *.new, until the answer is taken. Then restart the worker. The \
            coordinator believes both keys until the old one is forgotten: flotilla host forget NAME --keep ID.
            """)

    @OptionGroup var folder: FleetCommand.ChangedFolder
    @Option(help: ArgumentHelp("This host's name in the fleet; prints the request.", valueName: "name"))
    var host: String?
    @Flag(help: "Ask with new keys, which take the place of those in use with the answer.") var newKeys = false
    @Option(help: ArgumentHelp("The coordinator's answer.", valueName: "file"), completion: .file())
    var answer: String?

    func validate() throws {
        if let host { try requireHostName(host) }
        if newKeys, host == nil { throw ValidationError("--new-keys goes with --host") }
        if (host == nil) == (answer == nil) { throw ValidationError("Give either --host or --answer") }
    }

    func run() async throws {
        if let host {
            guard
                let (json, key) = try folder.change({
                    try Enrollment.ask(host: host, in: $0, newKeys: newKeys)
                })
            else { return }
            Console.out(String(decoding: json, as: UTF8.self))
            Console.complain("request of \(host), key \(key): give it to flotilla host enroll on the coordinator")
        } else if let answer {
            let bytes = try Files.read(answer, limit: 1 << 20)
            guard let granted = try folder.change({ try Enrollment.accept(bytes, named: answer, in: $0) }) else {
                return
            }
            let path = try absolute(folder.place.path)
            Console.line("\(granted.host) is enrolled; \(path) holds what its worker's configuration names")
            if let key = granted.newKeyID {
                Console.line("next: systemctl restart flotilla-worker, so that it signs with its new key")
                Console.line("then on the coordinator: flotilla host forget \(granted.host) --keep \(key)")
            }
        }
    }
}

struct HostEnrollCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "enroll", abstract: "Lets a host join: takes its request, prints the answer.",
        discussion: """
            Compare the key it shows with the one the host showed, in a way you trust. The coordinator hears the host \
            from then on; the broker needs its user, see flotilla fleet definitions.
            """)

    @OptionGroup var folder: FleetCommand.ChangedFolder
    @Argument(help: ArgumentHelp("The host's request.", valueName: "file"), completion: .file())
    var request: String
    @Flag(help: "Believe the new key only, not those the host had before.") var replace = false

    func run() async throws {
        let bytes = try Files.read(request, limit: 1 << 20)
        let granted = try folder.change { try Enrollment.grant(bytes, named: request, in: $0, replaces: replace) }
        guard let (json, host, key) = granted else { return }
        Console.out(String(decoding: json, as: UTF8.self))
        Console.complain("\(host) joins with key \(key)")
        let others = try folder.place.folder.keys(of: host).filter { $0 != key }
        if !others.isEmpty {
            Console.complain(
                "it is believed with its earlier keys, too (\(others.joined(separator: ", "))); when its worker has taken the "
                    + "answer and was restarted: flotilla host forget \(host) --keep \(key)")
        }
    }
}

struct HostForgetCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "forget", abstract: "Believes a host's keys no more, all of them or all but one.",
        discussion: """
            Takes effect within a minute: the host gets no tasks any more, and its migrations wait until it has a key \
            again or they are cancelled. Its broker user and queues stay; the commands that delete them are printed. On \
            a host, 'coordinator' with --keep drops the coordinator's earlier keys.
            """)

    @OptionGroup var folder: FleetCommand.ChangedFolder
    @Argument(help: "The host's name.") var name: String
    @Option(help: "Id of the key to keep.") var keep: String?

    func validate() throws {
        if name != FleetMember.coordinator { try requireHostName(name) }
    }

    func run() async throws {
        guard let removed = try folder.change({ try $0.forget(name, except: keep) }) else { return }
        let none = "\(name) has no \(keep == nil ? "" : "other ")keys"
        Console.line(removed.isEmpty ? none : "\(name): forgot \(removed.joined(separator: ", "))")
        if keep == nil { for line in try rest { Console.line(line) } }
    }

    /// What is left to do, with the names that the coordinator's configuration beside the keys gives.
    private var rest: [String] {
        get throws {
            let file = "\(try folder.place.folder.path)/coordinator.yaml"
            let settings = try? CoordinatorConfiguration(path: file)
            let (names, place) = (settings?.names ?? Names(), settings?.broker.virtualHost ?? "/")
            return ["next:", "  on \(name): systemctl disable --now flotilla-worker"]
                + [
                    "delete_user \(name)", "delete_queue --vhost \(place) \(names.tasks(of: name))",
                    "delete_queue --vhost \(place) \(names.control(of: name))",
                ].map { "  at the broker: rabbitmqctl \($0)" }
                + ["  its migrations that are open: flotilla migration list, flotilla migration cancel ID"]
        }
    }
}
