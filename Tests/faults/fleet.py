"""A fleet under test, and the judge of what it did."""

import collections
import json
import os
import pathlib
import sqlite3
import subprocess
import time
import xml.etree.ElementTree as xml

import checker
from witness import Watcher

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTS = ["kvm1", "kvm2", "kvm3"]
LEASE = 6
WORKER_FAILPOINTS = [
    "worker.accepted", "worker.accepted-published", "worker.result-journaled", "worker.result-published",
    "worker.journal-written", "worker.journal-replaced",
    "export.manifest-written", "convert.image-created", "convert.chunk-written:3", "convert.checkpoint",
    "convert.image-finished", "convert.disk-published", "deploy.permitted", "deploy.defined",
]
COORDINATOR_FAILPOINTS = [
    "coordinator.migration-stored", "coordinator.task-stored", "coordinator.task-sent", "coordinator.result-stored",
]
METADATA = "{https://flotilla.dev/xmlns/domain/1}migration"


class Violation(Exception):
    pass


class Fleet:
    def __init__(self, directory, flotilla, guest, nodes=1, **environment):
        self.dir = pathlib.Path(directory).resolve()
        self.members = self.dir / "members"
        self.nodes = nodes
        self.environment = environment
        self.flotilla = flotilla
        self.guest = pathlib.Path(guest)
        self.libvirt = self.dir.parent / (self.dir.name + ".libvirt")
        self.number = 0
        self.names = []
        # Migrations that were judged, and their attempts.
        self.total = [0, 0]
        self.watcher = None
        # What each member is started with besides.
        self.with_member = collections.defaultdict(dict)

    # Processes

    def bed(self, *arguments, **environment):
        return subprocess.run([ROOT / "Tests/testbeds/fleet/run", *arguments, "--dir", self.dir], check=True,
                              env={**os.environ, **self.environment, **environment}, stdout=subprocess.PIPE, text=True).stdout

    def start(self):
        self.stop()
        subprocess.run(["rm", "-rf", self.dir], check=True)
        self.uri = subprocess.run([ROOT / "Tests/testbeds/libvirt/run", "start", "--dir", self.libvirt], check=True,
                                  stdout=subprocess.PIPE, text=True).stdout.strip()
        self.undefine()
        self.bed("start", "--flotilla", self.flotilla, "--hosts", str(len(HOSTS)), "--libvirt", self.uri,
                 "--sources", str(self.guest), "--nodes", str(self.nodes), FLEET_LEASE=f"{LEASE}s", FLEET_HEARTBEAT="2s",
                 FLEET_RATE="8M")  # a conversion takes long enough to be hit
        self.store = self.dir / "state/coordinator/coordinator.sqlite"
        self.kill("coordinator")
        checker.install(self.store)
        self.begin("coordinator")
        self.wait_api()
        self.watcher = Watcher(self.uri, self.dir / "log/libvirt.log")

    def stop(self):
        if self.watcher:
            self.watcher.stop()
            self.watcher = None
        if (self.dir / "hosts").exists():
            self.bed("stop")
        subprocess.run([ROOT / "Tests/testbeds/libvirt/run", "stop", "--dir", self.libvirt], check=False)

    def kill(self, name):
        self.bed("kill", name)

    def begin(self, name, failpoint="", **environment):
        self.bed("start", name, FLOTILLA_FAILPOINT=failpoint, **{**self.with_member[name], **environment})

    def pid(self, name):
        try:
            number = int((self.dir / f"run/{name}.pid").read_text())
            variables = pathlib.Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return number if f"FLOTILLA_FLEET={self.dir}/{name}".encode() in variables else None

    def broker_pids(self):
        lines = [line.split() for line in self.bed("status").splitlines()]
        # A process has its number and its command there, a node its number and ports.
        return [int(words[1]) for words in lines if words[0] == "broker" and words[1].isdigit() and "/" in words[2]]

    def is_stopped(self, name):
        number = self.pid(name)
        return number is not None and f"\nState:\tT" in pathlib.Path(f"/proc/{number}/status").read_text()

    def signal(self, name, number):
        os.kill(self.pid(name), number)

    def rabbitmqctl(self, *arguments, node=1, complaints=None):
        return subprocess.run([ROOT / "Tests/testbeds/rabbitmq/run", "ctl", "--dir", self.dir / "rabbitmq", "--node",
                               str(node), "--", *arguments], check=True, stdout=subprocess.PIPE, stderr=complaints,
                              text=True).stdout

    def port(self):
        text = (self.dir / "rabbitmq/n1/ports").read_text()
        return int(text.split("tls=")[1].split()[0])

    # Migrations

    def api(self, *arguments, check=True):
        return subprocess.run([self.flotilla, *arguments, "--socket", self.dir / "coordinator.sock"], check=check,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)

    def submit(self, hosts=HOSTS):
        """One migration for each host; returns when the coordinator has them."""
        for host in hosts:
            self.number += 1
            name = f"fault-{self.number}"
            self.names.append((name, host))
            wait(60, f"the coordinator to take {name}", lambda: self.ask(name, host))

    def ask(self, name, host):
        """Asks once for a migration; asking again for the same one changes nothing. False if nobody answered."""
        return self.api(
            "migration", "submit", f"ova:{self.guest}/demo-web.ova", "--host", host, "--pool", "default", "--name", name,
            "--new-uuid", "--detach", "--network", "VM Network=network:flotilla-a", "--network",
            "Storage Network=network:flotilla-b", check=False).returncode == 0

    def migrations(self):
        answer = self.api("migration", "list", "--limit", "0", "--json", check=False)
        if answer.returncode != 0:
            return None
        return {each["request"]["options"]["domainName"]: each
                for each in json.loads(answer.stdout).get("migrations", [])}

    def wait_api(self):
        wait(60, "the coordinator to answer", lambda: self.migrations() is not None)

    def ended(self):
        found = self.migrations()
        return found is not None and all(
            found.get(name, {}).get("state") in ("DONE", "FAILED", "PREFLIGHT_BLOCKED", "CANCELLED")
            for name, _ in self.names)

    def in_stage(self, stage, state="running", attempt=1):
        """Whether some migration of this round is there now, at this attempt or a later one."""
        found = self.migrations() or {}
        return any(step["name"] == stage and step["state"] == state and step["attempt"] >= attempt
                   for name, _ in self.names for step in found.get(name, {}).get("stages", []))

    def wait_ended(self, seconds=180):
        wait(seconds, "all migrations to end", self.ended)

    # Judgement

    def judge(self):
        """Checks this round's migrations, by what is there and by what the witnesses saw, and clears the ground for the
        next."""
        self.wait_api()
        found = self.migrations()
        findings = checker.judge(checker.read(self.store))
        for name in [name for name, _ in self.names if name not in found]:
            raise Violation(f"lost: the coordinator took {name}, and knows nothing of it")
        for name, _ in self.names:
            if found[name]["state"] != "DONE":
                findings.lost(f"{name}: {found[name]['state']} {found[name].get('errorMessage', '')}")
        wanted = {name: [found[name]["id"], *(found[name].get("result", {}).get(key) for key in ("domainUuid", "manifestSha256"))]
                  for name, _ in self.names}
        domains = {name: self.domain(name) for name in self.domains()}
        wait(10, "libvirt to tell of all its domains", lambda: self.watcher.seen().keys() >= domains.keys())
        checker.judge_domains(findings, wanted, domains, self.watcher.seen())
        if findings:
            raise Violation("; ".join(findings))
        for name, host in self.names:
            for number in (0, 1):
                image = self.dir / f"pool/{host}/{name}-disk{number}.qcow2"
                compared = subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image,
                                           self.guest / f"raw/demo-web-disk{number + 1}.raw"], capture_output=True)
                if compared.returncode != 0:
                    raise Violation(f"{image} differs from its source: {compared.stderr}")
        wait(60, "the work folders to be swept", lambda: not self.left_over())
        attempts = sum(step["attempt"] for name, _ in self.names for step in found[name]["stages"])
        count = len(self.names)
        self.undefine()
        for name, host in self.names:
            for number in (0, 1):
                (self.dir / f"pool/{host}/{name}-disk{number}.qcow2").unlink()
        self.names = []
        self.total = [self.total[0] + count, self.total[1] + attempts]
        return verdict(count, attempts)

    def left_over(self):
        wanted = {self.dir / f"pool/{host}/{name}-disk{number}.qcow2" for name, host in self.names for number in (0, 1)}
        # Folders may go while they are looked at, which walk() takes as it is.
        found = (pathlib.Path(folder) / name for folder, _, names in os.walk(self.dir / "pool") for name in names)
        return [path for path in found if path not in wanted]

    def log(self, query):
        """Rows of the coordinator's store, in which the event log is."""
        store = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        try:
            return store.execute(query).fetchall()
        finally:
            store.close()

    def domains(self):
        listed = subprocess.run(["virsh", "-q", "-c", self.uri, "list", "--all", "--name"], check=True,
                                stdout=subprocess.PIPE, text=True).stdout
        return listed.split()

    def domain(self, name):
        """Migration, UUID and digest of its manifest, as libvirt has them."""
        text = subprocess.run(["virsh", "-q", "-c", self.uri, "dumpxml", "--inactive", name], check=True,
                              stdout=subprocess.PIPE, text=True).stdout
        root = xml.fromstring(text)
        ours = root.find(f"metadata/{METADATA}")
        said = [None, None] if ours is None else [ours.get("id"), ours.get("manifest-sha256")]
        return [said[0], root.findtext("uuid"), said[1]]

    def undefine(self):
        for name in self.domains():
            subprocess.run(["virsh", "-q", "-c", self.uri, "undefine", "--nvram", name], check=True)


def verdict(migrations, attempts):
    """Of migrations that were judged: whatever is not 0 was thrown."""
    return f"{migrations} migrations in {attempts} attempts: lost=0 duplicate-effects=0 stale-fence-writes=0"


def wait(seconds, what, condition):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Violation(f"waited {seconds} s in vain for {what}")
        time.sleep(0.1)
