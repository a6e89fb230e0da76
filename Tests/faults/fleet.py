"""A fleet under test, and the judge of what it did."""

import json
import os
import pathlib
import sqlite3
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTS = ["kvm1", "kvm2", "kvm3"]
LEASE = 6


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

    def stop(self):
        if (self.dir / "hosts").exists():
            self.bed("stop")
        subprocess.run([ROOT / "Tests/testbeds/libvirt/run", "stop", "--dir", self.libvirt], check=False)

    def kill(self, name):
        self.bed("kill", name)

    def begin(self, name, failpoint="", **environment):
        self.bed("start", name, FLOTILLA_FAILPOINT=failpoint, **environment)

    def pid(self, name):
        for line in self.bed("status").splitlines():
            words = line.split()
            if words[0] == name and words[1] != "-":
                return int(words[1])
        return None

    def is_stopped(self, name):
        number = self.pid(name)
        return number is not None and f"\nState:\tT" in pathlib.Path(f"/proc/{number}/status").read_text()

    def signal(self, name, number):
        os.kill(self.pid(name), number)

    def rabbitmqctl(self, *arguments, node=1):
        return subprocess.run([ROOT / "Tests/testbeds/rabbitmq/run", "ctl", "--dir", self.dir / "rabbitmq", "--node",
                               str(node), "--", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

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

    def judge(self, in_order=True):
        """Checks this round's migrations, by what is there and by the event log, and clears the ground for the next.
        Where the log's own clock was set, its times don't tell the order of permits: `in_order` is false then."""
        lost = []
        self.wait_api()
        found = self.migrations()
        for name, _ in self.names:
            if found[name]["state"] != "DONE":
                lost.append(f"{name}: {found[name]['state']} {found[name].get('errorMessage', '')}")
        lost += [f"{task}: no end in the event log" for task, in self.log("""
            SELECT id FROM task WHERE NOT EXISTS
                (SELECT 1 FROM event WHERE event.task_id = task.id AND event.fence = task.fence
                 AND event.kind = 'ended')""")]
        if lost:
            raise Violation("lost: " + "; ".join(lost))
        domains = self.domains()
        if sorted(domains) != sorted(name for name, _ in self.names):
            raise Violation(f"duplicate or missing effects: domains {domains}, wanted {self.names}")
        for name, host in self.names:
            for number in (0, 1):
                image = self.dir / f"pool/{host}/{name}-disk{number}.qcow2"
                compared = subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image,
                                           self.guest / f"raw/demo-web-disk{number + 1}.raw"], capture_output=True)
                if compared.returncode != 0:
                    raise Violation(f"{image} differs from its source: {compared.stderr}")
        wait(60, "the work folders to be swept", lambda: not self.left_over())
        stale = in_order and self.stale_permits()
        if stale:
            raise Violation(f"stale-fence writes: {stale}")
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
        return [path for path in self.dir.glob("pool/*/**/*") if path.is_file() and path not in wanted]

    def stale_permits(self):
        """Permits that were given to a fence when a larger one had been accepted."""
        return self.log("""
            SELECT late.task_id, late.fence, late.kind FROM event late JOIN event newer
                ON newer.task_id = late.task_id AND newer.fence > late.fence AND newer.at < late.at
            WHERE late.kind LIKE 'permit:%' AND newer.kind = 'accepted'""")

    def log(self, query):
        """Rows of the coordinator's store, in which the event log is."""
        store = sqlite3.connect(f"file:{self.dir}/state/coordinator/coordinator.sqlite?mode=ro", uri=True)
        try:
            return store.execute(query).fetchall()
        finally:
            store.close()

    def domains(self):
        listed = subprocess.run(["virsh", "-q", "-c", self.uri, "list", "--all", "--name"], check=True,
                                stdout=subprocess.PIPE, text=True).stdout
        return listed.split()

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
