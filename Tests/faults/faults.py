"""The ways to break a fleet. `Tests/faults/run --help` says what is checked after each."""

import argparse
import random
import signal
import subprocess
import sys
import threading
import time

from bench import permissions_of, set_permissions
from bus import Tap
from clock import clock_jumps
from cluster import leader_partitioned
from disks import full_disks
from doctor import doctor
from fleet import COORDINATOR_FAILPOINTS, HOSTS, LEASE, WORKER_FAILPOINTS, Fleet, Violation, wait
from full import full_queues
from libvirt import libvirt_restarted
from operating import operator
from permissions import permissions
from poison import poison
from proxy import ChaosProxy
from schedule import random_cluster, random_schedule
from workers import cancelled, consumer_lost, crash_loop, drained, drained_in_deploy, task_stuck

def worker_failpoints(fleet, points=WORKER_FAILPOINTS):
    """kill -9 of a worker at every failpoint"""
    for point in points:
        fleet.kill("kvm1")
        fleet.begin("kvm1", point)
        fleet.submit(["kvm1"])
        wait(60, f"kvm1 to die at {point}", lambda: fleet.pid("kvm1") is None)
        fleet.begin("kvm1")
    fleet.wait_ended()


def worker_restarted(fleet):
    """kill -9 of a worker and a start at once: its tasks go on without waiting for their leases"""
    fleet.kill("kvm1")
    fleet.begin("kvm1", "convert.checkpoint=stop")
    fleet.submit(["kvm1"])
    wait(60, "the worker to stand in the middle of a conversion", lambda: fleet.is_stopped("kvm1"))
    held = fleet.log("SELECT id, fence FROM task WHERE stage = 'convert' AND has_worker")
    if len(held) != 1:
        raise Violation(f"the worker holds {held}")
    fleet.kill("kvm1")
    fleet.begin("kvm1")
    fleet.wait_ended()
    for task, fence in held:
        said = {(kind, at) for at, kind in fleet.log(
            f"SELECT at, kind FROM event WHERE task_id = '{task}' AND (fence = {fence} AND kind = 'released'"
            f" OR fence = {fence + 1} AND kind = 'accepted')")}
        times = {kind: at for kind, at in said}
        if times.keys() != {"released", "accepted"} or times["accepted"] - times["released"] > LEASE * 500:
            raise Violation(f"{task} did not go on at once: {said}")


def coordinator_failpoints(fleet, points=COORDINATOR_FAILPOINTS):
    """kill -9 of the coordinator at every failpoint"""
    for point in points:
        fleet.kill("coordinator")
        fleet.begin("coordinator", point)
        fleet.number += 1
        name = f"fault-{fleet.number}"
        fleet.names.append((name, "kvm2"))
        # Some die before they answer, some after.
        wait(60, f"the coordinator to die at {point}",
             lambda: fleet.pid("coordinator") is None or not fleet.ask(name, "kvm2") and fleet.pid("coordinator") is None)
        fleet.begin("coordinator")
        wait(60, f"the coordinator to take {name}", lambda: fleet.ask(name, "kvm2"))
    fleet.wait_ended()


def broker_killed(fleet):
    """kill -9 of the broker while tasks run, and a restart"""
    fleet.submit(HOSTS * 2)
    wait(60, "a conversion", lambda: fleet.in_stage("convert"))
    fleet.kill("broker")
    fleet.begin("broker")
    fleet.wait_ended()


def broker_at_failpoints(fleet, points=tuple(WORKER_FAILPOINTS + COORDINATOR_FAILPOINTS)):
    """kill -9 of the broker while a worker or the coordinator stands at a failpoint"""
    for point in points:
        name = "coordinator" if point.startswith("coordinator.") else "kvm1"
        fleet.kill(name)
        fleet.begin(name, f"{point}=stop")
        fleet.number += 1
        wanted = (f"fault-{fleet.number}", "kvm1")
        fleet.names.append(wanted)
        enough = threading.Event()

        def ask():  # it may not answer yet, or stand still before it does
            while not fleet.ask(*wanted) and not enough.wait(0.1):
                pass

        asking = threading.Thread(target=ask)
        asking.start()
        wait(60, f"{name} to stand at {point}", lambda: fleet.is_stopped(name))
        fleet.kill("broker")
        fleet.signal(name, signal.SIGCONT)
        fleet.begin("broker")
        enough.set()
        asking.join()
        for member in ("coordinator", "kvm1"):  # whichever ended for want of a broker, as a service manager would
            fleet.begin(member)
        wait(60, f"the coordinator to take {wanted[0]}", lambda: fleet.ask(*wanted))
    fleet.wait_ended()


def broker_restarted(fleet):
    """an orderly restart of the broker while tasks are being published"""
    fleet.submit()
    fleet.bed("stop", "broker")
    fleet.begin("broker")
    fleet.submit()
    fleet.wait_ended()


def paused_worker(fleet):
    """SIGSTOP of a worker for longer than its lease, then SIGCONT"""
    fleet.kill("kvm1")
    fleet.begin("kvm1", "convert.chunk-written:3=stop")
    fleet.submit(["kvm1", "kvm1", "kvm2"])
    wait(60, "the worker to stand in the middle of a conversion", lambda: fleet.is_stopped("kvm1"))
    try:
        # Its tasks are given out again as soon as their leases have run out.
        wait(60, "another attempt", lambda: fleet.in_stage("convert", "sent", attempt=2))
    finally:
        fleet.signal("kvm1", signal.SIGCONT)
    fleet.wait_ended()


def coordinator_away(fleet):
    """the coordinator down for longer than the lease"""
    fleet.submit()
    wait(60, "a conversion", lambda: fleet.in_stage("convert"))
    fleet.kill("coordinator")
    time.sleep(LEASE * 2)  # the outage itself
    fleet.begin("coordinator")
    fleet.wait_ended()


def all_killed(fleet):
    """kill -9 of everything at once"""
    fleet.submit()
    wait(60, "a conversion", lambda: fleet.in_stage("convert"))
    fleet.bed("kill", *HOSTS, "coordinator", "broker")
    for name in ["broker", "coordinator", *HOSTS]:
        fleet.begin(name)
    fleet.wait_ended()


def replayed(fleet):
    """every task, control message and event sent again, twice, in another order"""
    with Tap(fleet) as tap:
        fleet.submit()
        fleet.wait_ended()
        copies = tap.messages() * 2
        random.Random(1).shuffle(copies)
        tap.replay(copies)
        tasks = sum(1 for message in copies if message.exchange.endswith(".tasks"))
        letters = lambda: fleet.api("queue", "dead", "--limit", "1000").stdout.count("replay:")
        wait(60, f"{tasks} replays among the dead letters", lambda: letters() >= tasks)
        fleet.api("queue", "replay", "--all")
    fleet.submit()
    fleet.wait_ended()


def duplicated(fleet):
    """every task, control message and event sent again and again, in another order, while the tasks run"""
    chance = random.Random(2)
    copies = 0
    with Tap(fleet) as tap:
        fleet.submit(HOSTS * 2)
        seen = []
        while not fleet.ended():
            seen += tap.messages()
            chosen = chance.sample(seen, min(len(seen), 40))
            tap.replay(chosen)
            copies += len(chosen)
    if copies < 40:
        raise Violation(f"only {copies} copies were sent")


def bad_network(fleet, seconds=20):
    """a worker behind a network that delays, resets, goes silent and half-closes"""
    with ChaosProxy(fleet.port()) as proxy:
        settings = fleet.dir / "kvm1.yaml"
        text = settings.read_text()
        fleet.kill("kvm1")
        settings.write_text(text.replace(f"localhost:{fleet.port()}", f"localhost:{proxy.port}")
                            .replace("broker:\n", "broker:\n  heartbeat: 2s\n"))
        fleet.begin("kvm1")
        try:
            for mode in ("delay", "reset", "silence", "half-open", "reset"):
                fleet.submit(["kvm1", "kvm2"])
                proxy.behave(mode)
                time.sleep(seconds / 5)  # how long the network is like this
                proxy.behave("pass")
            fleet.wait_ended()
        finally:
            fleet.kill("kvm1")
            settings.write_text(text)
            fleet.begin("kvm1")


def key_rotated(fleet):
    """the coordinator's and a worker's signing keys changed with an overlap, while tasks run"""
    fleet.submit()
    for name in ("coordinator", "kvm1"):
        earlier = set((fleet.members / f"coordinator/trusted/{name}").iterdir())
        (fleet.members / name / "signing.key").unlink()
        if name == "coordinator":
            subprocess.run([fleet.flotilla, "fleet", "init", "--dir", fleet.members / name], check=True,
                           stdout=subprocess.DEVNULL)
        # Each host's answer holds all keys of the coordinator.
        fleet.bed("enroll", *(HOSTS if name == "coordinator" else [name]))
        fleet.bed("stop", name)
        fleet.begin(name)
        fleet.submit()
        for holder in ["coordinator", *(HOSTS if name == "coordinator" else [])]:
            for key in earlier:
                (fleet.members / holder / "trusted" / name / key.name).unlink()
    fleet.wait_ended()


def certificate_rotated(fleet):
    """a worker's broker certificate and its key replaced, and its connections closed while tasks run"""
    fleet.submit(["kvm1", "kvm2"])
    (fleet.members / "kvm1/tls.key").unlink()
    fleet.bed("enroll", "kvm1")
    fleet.rabbitmqctl("close_all_connections", "certificates change")
    fleet.submit(["kvm1"])
    fleet.wait_ended()


def permission_revoked(fleet):
    """a worker's broker permissions taken away while it works, and given back"""
    virtual_host, *rights = permissions_of(fleet, "kvm1")
    fleet.submit(["kvm1", "kvm2"])
    fleet.rabbitmqctl("clear_permissions", "-p", virtual_host, "kvm1")
    time.sleep(LEASE)  # how long it may do nothing
    set_permissions(fleet, "kvm1", virtual_host, *rights)
    fleet.wait_ended()


CASES = {
    "worker-failpoints": worker_failpoints, "coordinator-failpoints": coordinator_failpoints,
    "broker-at-failpoints": broker_at_failpoints, "worker-restarted": worker_restarted, "permissions": permissions,
    "poison": poison, "crash-loop": crash_loop, "consumer-lost": consumer_lost, "task-stuck": task_stuck,
    "duplicated": duplicated, "leader-partitioned": leader_partitioned, "clock-jumps": clock_jumps,
    "broker-killed": broker_killed, "broker-restarted": broker_restarted, "paused-worker": paused_worker,
    "coordinator-away": coordinator_away, "all-killed": all_killed, "replayed": replayed, "bad-network": bad_network,
    "full-disks": full_disks, "full-queues": full_queues, "key-rotated": key_rotated,
    "certificate-rotated": certificate_rotated, "permission-revoked": permission_revoked, "drained": drained,
    "drained-in-deploy": drained_in_deploy, "cancelled": cancelled, "libvirt-restarted": libvirt_restarted,
    "doctor": doctor, "operator": operator, "random": random_schedule, "random-cluster": random_cluster,
}
SEEDED = (random_schedule, random_cluster)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dir")
    parser.add_argument("--flotilla")
    parser.add_argument("--guest")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    options = parser.parse_args()
    if options.list:
        for name, case in CASES.items():
            print(f"{name:24}{case.__doc__}")
        return 0
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        print(f"no case {unknown[0]}; see `run list`", file=sys.stderr)
        return 2
    fleet = Fleet(options.dir, options.flotilla, options.guest)
    fleet.start()
    try:
        for name in options.cases or CASES:
            began = time.monotonic()
            case = CASES[name]
            print(f"{name}: {case.__doc__}" + (f", seed {options.seed}" if case in SEEDED else ""), flush=True)
            try:
                # Of a fleet of its own a case tells the verdict.
                said = case(fleet, options.seed, options.seconds) if case in SEEDED else case(fleet)
                print(f"  {said or fleet.judge()}, {time.monotonic() - began:.0f} s", flush=True)
            except Violation as violation:
                print(f"  VIOLATED: {violation}\n  left in {fleet.dir}, logs in {fleet.dir}/log", flush=True)
                return 1
    finally:
        fleet.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
