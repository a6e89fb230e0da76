"""Queues that take no more for a while."""

import contextlib
import json

from fleet import HOSTS, LEASE, Violation, wait
from workers import Log

REFUSED = "refuses the message: it is full"


@contextlib.contextmanager
def no_room(fleet, queues):
    """Queues of these names hold one message: an operator's policy, before which the fleet's own give way."""
    fleet.rabbitmqctl("set_policy", "--priority", "1000", "--apply-to", "queues", "no-room", f"^({'|'.join(queues)})$",
                      json.dumps({"max-length-bytes": 1}))
    try:
        yield
    finally:
        fleet.rabbitmqctl("clear_policy", "no-room")


def full_queues(fleet):
    """a host's queue, then the events', that take no more: others are served, and all goes on when there is room"""
    policies(fleet)
    fleet.kill("kvm1")
    log = Log(fleet, "coordinator")
    with no_room(fleet, ["flotilla.tasks.kvm1"]):
        fleet.submit(["kvm1"] * 4)
        fleet.submit(["kvm2"])
        served, _ = fleet.names[-1]
        wait(60, "the coordinator to be refused", lambda: log.lines(REFUSED))
        wait(60, f"{served} to be done", lambda: fleet.migrations()[served]["state"] == "DONE")
        fleet.begin("kvm1")  # makes room, one by one
        fleet.wait_ended()
    print(f"  tasks: {fleet.judge()}", flush=True)
    fleet.submit(HOSTS)
    wait(60, "a conversion", lambda: fleet.in_stage("convert"))
    fleet.kill("coordinator")
    log = Log(fleet, "kvm1")
    with no_room(fleet, ["flotilla.events.coordinator"]):
        wait(LEASE * 5, "kvm1 to be refused", lambda: log.lines(REFUSED))
        fleet.begin("coordinator")
        fleet.wait_ended()
    print(f"  events: {fleet.judge()}", flush=True)
    fleet.submit()
    fleet.wait_ended()


def policies(fleet):
    """The broker has taken those that flotilla made, and each of the fleet's queues has its room from one."""
    rooms = {line.split("\t")[1]: line for line in fleet.rabbitmqctl("list_policies", "--no-table-headers").splitlines()}
    for name, room in (("flotilla", 1 << 30), ("flotilla.dead", 256 << 20)):
        if f'{{"max-length-bytes":{room}}}\t100' not in rooms.get(name, ""):
            raise Violation(f"the broker has the policies {rooms}")
    listed = fleet.rabbitmqctl("list_queues", "name", "policy", "--no-table-headers").splitlines()
    queues = dict(line.split("\t") for line in listed if line.startswith("flotilla."))
    wrong = {name: policy for name, policy in queues.items() if policy != ("flotilla.dead" if "dead" in name else "flotilla")}
    if wrong or len(queues) != 3 + 2 * len(HOSTS):
        raise Violation(f"queues have policies {queues}")
