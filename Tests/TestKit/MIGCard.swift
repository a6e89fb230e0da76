import Glibc
import HostKit
import Passthrough

/// An A100 with 40 GB that can be partitioned: its functions in sysfs, and a stand-in for nvidia-smi that keeps its GPU
/// instances, in the words of NVIDIA's MIG user guide.
extension VgpuMachine {
    /// - Parameters:
    ///   - types: what its driver calls the vGPUs, "NVIDIA A100-1-5C 470".
    ///   - old: an nvidia-smi that knows nothing of places.
    ///   - vgpus: what `nvidia-smi vgpu -s -v` tells of its types, "470 19 7 1": number, kind of instance, how many it holds,
    ///     how many of these on an instance ("-" where it has no line for that). With these it is a Blackwell card of 96 GB.
    package func migGPU(
        _ bus: String, types: [String] = a100Types, virtualFunctions: Int = 8, isOn: Bool = true, old: Bool = false,
        vgpus: String = ""
    ) throws {
        let gpu = "0000:\(bus):00.0"
        try function(gpu, ["sriov_totalvfs": "\(virtualFunctions)\n", "sriov_numvfs": "\(virtualFunctions)\n"])
        for number in 0..<virtualFunctions {
            let function = "0000:\(bus):\(number < 7 ? "00.\(number + 1)" : "01.\(number - 7)")"
            try self.function(
                function,
                ["nvidia/current_vgpu_type": "0\n", "nvidia/vgpu_params": "", "nvidia/creatable_vgpu_types": ""])
            symlink("../\(gpu)", sysfs.path("bus/pci/devices/\(function)/physfn"))
            symlink("../\(function)", sysfs.path("bus/pci/devices/\(gpu)/virtfn\(number)"))
        }
        for (file, text) in [
            "mode": isOn ? "Enabled" : "Disabled", "instances": "", "types": types.joined(separator: "\n"),
            "vgpus": vgpus,
        ] {
            try write(text, to: "mig/\(gpu)/\(file)")
        }
        if old { try write("", to: "mig/old") }
        try write(migProgram, to: "bin/mig.py")
        try program("nvidia-smi", "exec python3 -SE $D/bin/mig.py $D \"$@\"")
    }

    /// As somebody else makes them: profile ids with places, "19:0,9:4".
    package func partition(_ bus: String, _ instances: String) throws {
        _ = try Program.run(
            "\(folder.path)/bin/nvidia-smi", ["mig", "-i", "0000:\(bus):00.0", "-cgi", instances, "-C"])
    }

    /// "1g.5gb:0", in the order of their places.
    package func instances(_ bus: String) -> [String] {
        let text = (try? Files.read("\(folder.path)/mig/0000:\(bus):00.0/instances")) ?? []
        return String(decoding: text, as: UTF8.self).split(separator: "\n").map { line in
            let words = line.split(separator: " ")
            return "\(words[0]):\(words[3])"
        }.sorted { ($0.last ?? "0") < ($1.last ?? "0") }
    }

    /// A file of the stand-in's.
    package func write(_ text: String, to path: String) throws {
        try Files.createDirectories(Files.parent(of: "\(folder.path)/\(path)"))
        try Files.writeAtomically(Array(text.utf8), to: "\(folder.path)/\(path)")
    }

    /// Instances don't outlive a boot; the mode does.
    package func rebootMIG(_ bus: String) throws {
        try write("", to: "mig/0000:\(bus):00.0/instances")
        for function in sysfs.list("bus/pci/devices") where sysfs.linkName("bus/pci/devices/\(function)/physfn") != nil
        {
            try put("bus/pci/devices/\(function)/nvidia/current_vgpu_type", "0\n")
        }
        try kernel.fill()
    }
}

/// RTX PRO 6000 Blackwell with instances for graphics, several vGPUs on each.
package let blackwellTypes = [
    "NVIDIA RTX Pro 6000 Blackwell DC-1-24Q 1562", "NVIDIA RTX Pro 6000 Blackwell DC-1-12Q 1560",
    "NVIDIA RTX Pro 6000 Blackwell DC-2-48Q 1570", "NVIDIA RTX Pro 6000 Blackwell DC-2-24Q 1568",
    "NVIDIA RTX Pro 6000 Blackwell DC-4-24Q 1575",
]
package let blackwellVgpus = "1562 47 4 1\n1560 47 8 2\n1570 35 2 1\n1568 35 4 2\n1575 32 4 4\n"

package let a100Types = [
    "NVIDIA A100-1-5C 470", "NVIDIA A100-1-5CME 471", "NVIDIA A100-1-10C 472", "NVIDIA A100-2-10C 473",
    "NVIDIA A100-3-20C 474", "NVIDIA A100-4-20C 475", "NVIDIA A100-7-40C 476",
]

private let migProgram = #"""
    import os, re, sys

    home, args = sys.argv[1], sys.argv[2:]
    root = home + "/mig"
    pci = home + "/sys/bus/pci/devices"
    # Name, id, memory slices, where it may begin, how many a GPU holds.
    PROFILES = [
        ("1g.5gb", "19", 1, range(7), 7), ("1g.5gb+me", "20", 1, range(7), 1), ("1g.10gb", "15", 2, [0, 2, 4, 6], 4),
        ("2g.10gb", "14", 2, [0, 2, 4], 3), ("3g.20gb", "9", 4, [0, 4], 2), ("4g.20gb", "5", 4, [0], 1),
        ("7g.40gb", "0", 8, [0], 1),
    ]
    BLACKWELL = [
        ("1g.24gb", "14", 1, range(4), 4), ("1g.24gb+me", "21", 1, range(4), 1), ("1g.24gb+gfx", "47", 1, range(4), 4),
        ("1g.24gb-me", "67", 1, range(4), 4), ("2g.48gb", "5", 2, [0, 2], 2), ("2g.48gb+gfx", "35", 2, [0, 2], 2),
        ("4g.96gb", "0", 4, [0], 1), ("4g.96gb+gfx", "32", 4, [0], 1),
    ]


    def read(path, default=""):
        return open(path).read() if os.path.exists(path) else default


    def fail(text, code):
        print(text)
        sys.exit(code)


    class Card:
        def __init__(self, gpu):
            self.gpu, self.folder = gpu, f"{root}/{gpu}"
            self.there = [line.split() for line in read(f"{self.folder}/instances").splitlines()]
            self.vgpus = {l.split()[0]: l.split()[1:] for l in read(f"{self.folder}/vgpus").splitlines()}
            self.profiles = BLACKWELL if self.vgpus else PROFILES
            self.places = [v for v in sorted(os.listdir(pci)) if os.path.basename(os.path.realpath(f"{pci}/{v}/physfn")) == gpu]

        def kind(self, type):
            if self.vgpus:
                return next(p[0] for p in self.profiles if p[1] == self.vgpus[type.split()[-1]][0])
            slices, size, rest = re.search(r"-(\d)-(\d+)[CQ](\w*) ", type + " ").groups()
            return f"{slices}g.{size}gb" + ("+me" if rest == "ME" else "")

        def left(self, name):
            types = {line.split()[-1]: self.kind(line) for line in read(f"{self.folder}/types").splitlines()}
            used = [types.get(read(f"{pci}/{v}/nvidia/current_vgpu_type").strip()) for v in self.places]
            return sum(i[0] == name for i in self.there) - used.count(name)

        # One of this type, where those of one type are on as few instances as they can be.
        def offers(self, line):
            number = line.split()[-1]
            if not self.vgpus:
                return self.left(self.kind(line)) > 0
            now = [read(f"{pci}/{v}/nvidia/current_vgpu_type").strip() for v in self.places]
            used = 0
            for type, (id, most, share) in self.vgpus.items():
                share = int(share) if share != "-" else int(most) // self.most(id)
                if id == self.vgpus[number][0]:
                    used += -(-now.count(type) // share)
                    if type == number and now.count(type) % share:
                        return True
            return sum(i[1] == self.vgpus[number][0] for i in self.there) > used

        def most(self, id):
            return next(p[4] for p in self.profiles if p[1] == id)

        def free(self, start, size):
            return all(int(i[3]) + int(i[4]) <= start or start + size <= int(i[3]) for i in self.there)

        def room(self, profile):
            name, _, size, starts, total = profile
            spots, end = 0, -1
            for start in starts:
                if start >= end and self.free(start, size):
                    spots, end = spots + 1, start + size
            return min(spots, total - sum(i[0] == name for i in self.there))

        def store(self):
            with open(f"{self.folder}/instances", "w") as file:
                file.write("".join(" ".join(i) + "\n" for i in self.there))
            lines = read(f"{self.folder}/types").splitlines()
            offered = "".join(line + "\n" for line in lines if self.offers(line))
            for place in self.places:
                with open(f"{pci}/{place}/nvidia/creatable_vgpu_types", "w") as file:
                    file.write(offered)

        def create(self, wanted):
            for one in wanted.split(","):
                id, _, start = one.partition(":")
                if start and os.path.exists(root + "/old"):
                    fail(f"Invalid GPU instance profile: {one}", 2)
                profile = next(p for p in self.profiles if p[1] == id)
                starts = [int(start)] if start else profile[3]
                spot = next((s for s in starts if s in profile[3] and self.free(s, profile[2])), None)
                if spot is None or self.room(profile) == 0:
                    fail(f"Unable to create a GPU instance on GPU  0 using profile {id}: Insufficient Resources", 19)
                number = int(read(f"{self.folder}/count", "0")) + 1
                open(f"{self.folder}/count", "w").write(str(number))
                self.there.append([profile[0], id, str(number), str(spot), str(profile[2])])
                self.store()
                print(f"Successfully created GPU instance ID {number} on GPU  0 using profile MIG {profile[0]} (ID {id})")

        def destroy(self, id):
            one = next((i for i in self.there if i[2] == id), None)
            if one is None:
                fail("No GPU instances found: Not Found", 6)
            # Without a running VM the card with shared instances lets go of any: a vGPU would lose its own.
            if not self.vgpus and self.left(one[0]) <= 0 or one[3] in read(f"{self.folder}/busy").split():
                fail(f"Unable to destroy GPU instance ID {id} from GPU  0: In use by another client", 15)
            self.there.remove(one)
            self.store()


    if args == ["refresh"]:
        for gpu in os.listdir(root):
            if os.path.isdir(f"{root}/{gpu}"):
                Card(gpu).store()
        sys.exit(0)
    gpus = [gpu for gpu in sorted(os.listdir(root)) if os.path.isdir(f"{root}/{gpu}")]
    if args[0].startswith("--query-gpu"):
        for number, gpu in enumerate(gpus):
            line = f"0000{gpu.upper()}, {read(f'{root}/{gpu}/mode')}"
            print(f"{number}, {line}" if "=index" in args[0] else line)
        sys.exit(0)
    if args[0] == "vgpu" and "-s" in args:
        for gpu in [args[args.index("-i") + 1]] if "-i" in args else gpus:
            card = Card(gpu)
            print(f"GPU 0000{gpu.upper()}")
            for line in read(f"{card.folder}/types").splitlines():
                name, number = line.rsplit(" ", 1)
                if number not in card.vgpus:
                    continue
                id, most, share = card.vgpus[number]
                rows = [("Name", name), ("Class", "Quadro"), ("GPU Instance Profile ID", id), ("Max Instances", most)]
                rows += [("Max Instances Per VM", "1")] + ([("Max Instances Per GI", share)] if share != "-" else [])
                print(f"    {'vGPU Type ID':38}: {hex(int(number))}")
                for label, value in rows + [("FB Memory", "24576 MiB")]:
                    print(f"        {label:34}: {value}")
        sys.exit(0)
    if "-i" in args:
        cards = [Card(args[args.index("-i") + 1])]
    else:
        cards = [Card(gpu) for gpu in gpus if read(f"{root}/{gpu}/mode") == "Enabled"]
        if not cards:
            fail("No MIG-enabled devices found.", 6)
    card = cards[0]
    if "-mig" in args:
        wanted = "Enabled" if args[-1] == "1" else "Disabled"
        if os.path.exists(f"{card.folder}/held"):
            fail(f"Warning: MIG mode is in pending enable state for GPU {card.gpu}:In use by another client", 0)
        open(f"{card.folder}/mode", "w").write(wanted)
        fail(f"{wanted} MIG Mode for GPU 0000{card.gpu.upper()}\nAll done.", 0)
    if any(a.startswith("--query-compute-apps") for a in args):
        fail(read(f"{card.folder}/apps"), 0)
    if args[0] == "vgpu":
        sys.exit(0)
    if read(f"{card.folder}/mode") != "Enabled":
        fail("No MIG-enabled devices found.", 6)
    if "-lgip" in args:
        print("| GPU   Name             ID    Instances   Memory     P2P    SM    DEC   ENC  |")
        for each in cards:
            for p in each.profiles:
                counts, number = f"{each.room(p)}/{p[4]}", gpus.index(each.gpu)
                print(f"|{number:4}  MIG {p[0]:16} {p[1]:>3}     {counts}        4.75       No     14     0     0   |")
                print("|                                                             1     0     0   |")
    elif "-lgipp" in args:
        if os.path.exists(root + "/old"):
            fail('Option "-lgipp" is not recognized.', 2)
        for each in cards:
            for p in each.profiles:
                word = "Placements:" if len(p[3]) > 1 else "Placement :"
                starts = "{" + ",".join(map(str, p[3])) + "}"
                print(f"GPU {gpus.index(each.gpu):2} Profile ID {p[1]:>2} {word} {starts}:{p[2]}")
    elif "-lgi" in args:
        if not any(each.there for each in cards):
            fail("No GPU instances found: Not Found", 6)
        print("| GPU   Name          Profile  Instance   Placement  |")
        for each in cards:
            for i in each.there:
                print(f"|{gpus.index(each.gpu):4}  MIG {i[0]:12} {i[1]:>3}      {i[2]:>3}          {i[3]}:{i[4]}     |")
    elif "-lci" in args:
        if not card.there:
            fail("No compute instances found: Not Found", 6)
        for i in card.there:
            name = "1c." + i[0] if os.path.exists(card.folder + "/divided") else i[0]
            print(f"|   0    {i[2]:>3}       MIG {name:12}  0         0          0:1     |")
    elif "-cgi" in args:
        card.create(args[args.index("-cgi") + 1])
    elif "-dgi" in args:
        card.destroy(args[args.index("-gi") + 1])
    elif "-dci" not in args:
        fail("unknown", 2)
    """#
