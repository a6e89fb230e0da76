"""Compares flotilla assess of a simulated vCenter with what pyvmomi's reading of it says against each machine."""
import html.parser
import json
import os
import subprocess

# By a word of flotilla's message.
WORDS = {
    "running": "is running", "suspended": "is suspended", "encrypted": "is encrypted", "raw": "raw device mapping in physical mode",
    "shared": "may be shared with other VMs", "dvx": "Device Virtualization Extensions", "network": "is mapped to nothing",
}


def against(machine, unmapped):
    """What blocks a machine, of what a random inventory holds."""
    found = {
        "running": machine["vm"]["powerState"] == "POWERED_ON", "suspended": machine["vm"]["powerState"] == "SUSPENDED",
        "encrypted": machine["vm"]["encrypted"], "raw": any(disk["rawDeviceMapping"] == "physicalMode" for disk in machine["disks"]),
        "shared": any(disk["shared"] for disk in machine["disks"]), "dvx": any("dvx" in facts for _, facts, _ in machine["devices"]),
        "network": any(nic["network"] == unmapped for nic in machine["nics"]),
    }
    return {name for name, is_so in found.items() if is_so}


def ordered(text):
    """The server's order is another each time."""
    report = json.loads(text)
    report["vms"].sort(key=lambda vm: vm["name"])
    report["demand"].sort(key=lambda each: each["kind"])
    return report


class Page(html.parser.HTMLParser):
    """The data of the page's script, its text, and whatever it would load."""

    def __init__(self, text):
        super().__init__()
        self.data, self.text, self.loads, self.inside = "", "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside = attributes.get("id", tag)
        self.loads += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data
        elif self.inside not in ("style", "script"):
            self.text += data + "\n"


def assess(flotilla, source, access, networks, folder):
    """The report, its page, and what unmapped network it was asked with. All but one network go somewhere."""
    unmapped, *mapped = networks
    page = os.path.join(folder, "report.html")
    command = [flotilla, "assess", source, *access, "--json", "--html", page]
    for name in mapped:
        command += ["--network", f"{name}=network:default"]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    strict = subprocess.run([*command, "--strict"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wrong = subprocess.run([*command[:2], source.replace("localhost", "localhost.invalid"), *command[3:]], capture_output=True, text=True)
    with open(page, encoding="utf-8") as file:
        return {
            "report": json.loads(told), "page": Page(file.read()), "unmapped": unmapped, "strict": strict.returncode,
            "same": ordered(strict.stdout) == ordered(told), "wrong": (wrong.returncode, wrong.stderr)}


def compare(comparison, machines, found):
    report, page = found["report"], found["page"]
    theirs = {machine["vm"]["name"]: machine for machine in machines}
    comparison.compare("assess (names)", sorted(theirs), sorted(vm["name"] for vm in report["vms"]))
    counts = {"ready": 0, "warning": 0, "blocked": 0}
    for vm in report["vms"]:
        where = f"assess {vm['name']}"
        counts[vm["verdict"]] += 1
        machine = theirs.get(vm["name"])
        if not machine:
            continue
        blocks = against(machine, found["unmapped"])
        messages = [reason["message"] for reason in vm["reasons"] if reason["severity"] == "blocked"]
        comparison.compare(f"{where} blocked", bool(blocks), vm["verdict"] == "blocked")
        comparison.compare(f"{where} why", sorted(blocks), sorted(name for name, word in WORDS.items() if any(word in each for each in messages)))
        comparison.compare(f"{where} remedies", True, all(reason["remedy"] for reason in vm["reasons"] if reason["severity"] != "ready"))
        comparison.compare(f"{where} disks", [disk["capacityBytes"] for disk in machine["disks"]], vm["diskBytes"])
        comparison.compare(f"{where} cpus", machine["vm"]["cpu"]["count"], vm["cpus"])
        comparison.compare(f"{where} devices", len(machine["devices"]), len(vm["devices"]))
    comparison.compare("assess summary", counts, report["summary"])
    comparison.compare("assess --strict", 3 if counts["blocked"] else 0, found["strict"])
    comparison.compare("assess --strict prints the same", True, found["same"])
    # A server that isn't there makes no report, and no page in place of the one that was read.
    comparison.compare("assess of no server", (1, True), (found["wrong"][0], "localhost.invalid" in found["wrong"][1]))
    data = json.loads(page.data)
    comparison.compare("page loads", [], page.loads)
    comparison.compare("page names", sorted(theirs), sorted(row["n"] for row in data["rows"]))
    verdicts = ["ready", "warning", "blocked"]
    comparison.compare(
        "page verdicts", sorted((vm["name"], vm["verdict"]) for vm in report["vms"]),
        sorted((row["n"], verdicts[row["v"]]) for row in data["rows"]))
    for number in [counts["ready"], counts["blocked"], len(theirs)]:
        comparison.compare(f"page shows {number}", True, f"\n{number}\n" in page.text)
