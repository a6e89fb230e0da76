"""Faults in an order and of a length that chance decides and a seed repeats, sometimes two at once."""

import random
import signal
import subprocess
import threading
import time

from bench import Bench, ClusterBench
from cluster import PEERS, clustered
from disks import retried
from fleet import COORDINATOR_FAILPOINTS, HOSTS, LEASE, WORKER_FAILPOINTS, Violation, verdict, wait

MEMBERS = ["coordinator", *HOSTS]
# Everybody's leases run out; nobody notices; something between.
LENGTHS = [0.5, 3.0, LEASE * 2.0]


class Fault:
    """What is broken and how it is mended, both given the bench. `holds` names what it needs for itself: members, "broker"."""

    def __init__(self, text, holds, seconds, begin, end=lambda bench: None):
        self.text, self.holds, self.seconds, self.begin, self.end = text, set(holds), seconds, begin, end


def killed(chance):
    name, how = chance.choice(MEMBERS), chance.choice(["kill", "kill", "stop"])
    return Fault(f"{name}: {how}", [name], chance.choice([0, *LENGTHS]), lambda bench: bench.down(name, how),
                 lambda bench: bench.up(name))


def paused(chance):
    name = chance.choice(MEMBERS)
    return Fault(f"{name}: stands still", [name], chance.choice(LENGTHS), lambda bench: bench.pause(name),
                 lambda bench: bench.resume(name))


def failpoint(chance):
    name = chance.choice(MEMBERS)
    point = chance.choice(COORDINATOR_FAILPOINTS if name == "coordinator" else WORKER_FAILPOINTS)
    action = chance.choice(["", "", "=stop"])
    return Fault(f"{name}: {'stands still' if action else 'dies'} at {point}", [name], chance.uniform(4, LEASE * 2),
                 lambda bench: bench.down(name, "kill", point + action), lambda bench: bench.up(name))


def network(chance):
    name, mode = chance.choice(MEMBERS), chance.choice(["delay", "reset", "silence", "half-open", "unheard"])
    return Fault(f"{name}: its network: {mode}", [name], chance.choice(LENGTHS),
                 lambda bench: bench.proxies[name].behave(mode), lambda bench: bench.proxies[name].behave("pass"))


def full_disk(chance):
    name = chance.choice(MEMBERS)
    folder = "state" if name == "coordinator" else chance.choice(["state", "pool"])
    return Fault(f"{name}: its {folder}'s disk is full", [name], chance.choice(LENGTHS),
                 lambda bench: bench.disks[name, folder].fill(), lambda bench: bench.disks[name, folder].free())


def clock(chance):
    name, jump = chance.choice(MEMBERS), chance.choice([LEASE // 2, -LEASE // 2, 3600, -3600])
    return Fault(f"{name}: its clock {jump:+} s", [name], chance.choice(LENGTHS),
                 lambda bench: bench.set_clock(name, jump), lambda bench: bench.set_clock(name, 0))


def broker(chance):
    how = chance.choice(["kill", "kill", "stop", "pause"])
    return Fault(f"broker: {how}", ["broker"], chance.choice([0, *LENGTHS]), lambda bench: bench.break_broker(how),
                 lambda bench: bench.mend_broker(how))


def node(chance):
    number, how = chance.choice(PEERS), chance.choice(["kill", "from its peers", "from everybody"])
    return Fault(f"broker {number}: {'kill' if how == 'kill' else 'cut off ' + how}", ["broker"],
                 chance.uniform(LEASE, LEASE * 3), lambda bench: bench.break_node(number, how),
                 lambda bench: bench.mend_node(number, how))


def copies(chance):
    order = chance.random()
    return Fault("bus: messages of now and before again, twice, in another order", ["broker"], chance.choice(LENGTHS),
                 lambda bench: bench.tap(), lambda bench: bench.replay(random.Random(order)))


def certificate(chance):
    name = chance.choice(HOSTS)
    return Fault(f"{name}: another certificate, connections closed", [name, "broker"], 0,
                 lambda bench: bench.rotate_certificate(name))


def key(chance):
    name = chance.choice(HOSTS)
    return Fault(f"{name}: another signing key", [name], 0, lambda bench: bench.rotate_key(name))


def libvirt(chance):
    return Fault("libvirt: stands still", ["libvirt"], chance.choice(LENGTHS),
                 lambda bench: bench.pause_libvirt(signal.SIGSTOP), lambda bench: bench.pause_libvirt(signal.SIGCONT))


def permission(chance):
    name = chance.choice(HOSTS)
    return Fault(f"{name}: no permissions", [name, "broker"], chance.choice(LENGTHS),
                 lambda bench: bench.revoke(name), lambda bench: bench.give_back(name))


COMMON = [killed, killed, paused, failpoint, failpoint, full_disk, clock, certificate, key, libvirt, permission]
SINGLE = [*COMMON, network, network, broker, copies]
CLUSTER = [*COMMON, node, node]


def plan(seed, seconds, kinds):
    """Steps in the order of their times: ("begin" or "end", fault), ("submit", hosts) or ("cancel", how many ago)."""
    chance = random.Random(seed)
    steps, active, now = [], [], 0.0
    while now < seconds:
        fault = chance.choice(kinds)(chance)
        active = [(end, other) for end, other in active if end > now]
        if len(active) < chance.choice([1, 1, 2]) and not any(fault.holds & other.holds for _, other in active):
            steps += [(now, "begin", fault), (now + fault.seconds, "end", fault)]
            active.append((now + fault.seconds, fault))
        now += chance.uniform(0.2, 2)
    now = 0.0
    while now < seconds:
        steps.append((now, "submit", [chance.choice(HOSTS) for _ in range(chance.randint(1, 3))]))
        if chance.random() < 0.25:
            steps.append((now + chance.uniform(0, 6), "cancel", chance.randint(1, 3)))
        now += chance.uniform(3, 7)
    return sorted(steps, key=lambda step: step[0])


class Client(threading.Thread):
    """Asks for migrations, and for the end of some, until the coordinator has heard it, as whoever gets no answer does."""

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.fleet, self.wanted, self.ends = fleet, [], threading.Event()
        self.cancelled = []

    def submit(self, hosts):
        for host in hosts:
            self.fleet.number += 1
            name = (f"fault-{self.fleet.number}", host)
            self.fleet.names.append(name)
            self.wanted.append(lambda name=name: self.fleet.ask(*name))

    def cancel(self, ago):
        if ago <= len(self.fleet.names):
            name = self.fleet.names[-ago]
            self.cancelled.append(name)
            self.wanted.append(lambda: self.is_cancelled(name[0]))

    def is_cancelled(self, name):
        found = self.fleet.migrations()
        return found and self.fleet.api("migration", "cancel", found[name]["id"], check=False).returncode == 0

    def run(self):
        while not self.ends.wait(0.1):
            try:
                if self.wanted and self.wanted[0]():
                    self.wanted.pop(0)
            except subprocess.TimeoutExpired:
                pass


def run(bench, steps):
    """Does what was planned. Whatever is late delays what follows, and changes no order."""
    fleet, active, start = bench.fleet, [], time.monotonic()
    client = Client(fleet)
    client.start()
    try:
        for at, what, subject in steps:
            while time.monotonic() < start + at:
                bench.keep_alive()
                time.sleep(0.2)
            if what in ("submit", "cancel"):
                (client.submit if what == "submit" else client.cancel)(subject)
                continue
            print(f"  {time.monotonic() - start:6.1f} s (planned {at:5.1f}) {what:5} {subject.text}", flush=True)
            if what == "begin":
                active.append(subject)
                subject.begin(bench)
            else:
                active.remove(subject)
                subject.end(bench)
        all_end(bench, client)
        cancelled = [name for name in client.cancelled if fleet.migrations()[name[0]]["state"] == "CANCELLED"]
        left = lambda: [name for name, _ in cancelled if name in fleet.domains()] + [*fleet.dir.glob("pool/*/.flotilla/*")]
        wait(60, f"nothing to be left of what was cancelled: {left()}", lambda: not left())
        print(f"  {len(cancelled)} cancelled, and nothing left of them; they are asked for again", flush=True)
        for name in cancelled:
            wait(60, f"the coordinator to take {name} again", lambda: fleet.ask(*name))
        all_end(bench, client)
        fleet.api("queue", "replay", "--all")
    finally:
        client.ends.set()
        client.join()
        for fault in active:
            fault.end(bench)


def all_end(bench, client):
    deadline = time.monotonic() + 240
    while client.wanted or not retried(bench.fleet):
        if time.monotonic() > deadline:
            raise Violation(f"waited 240 s in vain for all migrations to end: {unfinished(bench.fleet)}")
        bench.keep_alive()
        time.sleep(0.5)


def unfinished(fleet):
    found = fleet.migrations() or {}
    left = [(name, host, found.get(name)) for name, host in fleet.names]
    return [(name, host, each and [each["id"], each["state"], [(step["name"], step["state"], step["attempt"])
                                                               for step in each["stages"]]])
            for name, host, each in left if not each or each["state"] != "DONE"]


def random_schedule(fleet, seed, seconds):
    """all of these in a random order, now and then two at once"""
    with Bench(fleet) as bench:
        run(bench, plan(seed, seconds, SINGLE))


def random_cluster(outer, seed, seconds):
    """the same with three brokers, which are killed or cut off one at a time"""
    with clustered(outer) as (fleet, network):
        with ClusterBench(fleet, network) as bench:
            run(bench, plan(seed, seconds, CLUSTER))
        fleet.judge()
        return verdict(*fleet.total)
