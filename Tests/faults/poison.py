"""Messages that can't be right, in every queue that a member of the fleet reads, by somebody who may put them there."""

import json
import ssl
import sys
from types import SimpleNamespace

import pika
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fleet import ROOT, Violation, wait

sys.path.insert(0, str(ROOT / "protocol/examples/python"))
import flotilla_bus as bus  # noqa: E402

# pika goes down into what it sends.
sys.setrecursionlimit(200_000)
HOUR = 3_600_000
EXPORT = "/flotilla.v1.ExportService/Export"
# Deeper than the stack of a reader's thread, unless that was made for it. A broker takes its time for more.
NESTED = []
for _ in range(13_000):
    NESTED = [NESTED]
CONTROL, EVENTS = "flotilla.v1.ControlMessages", "flotilla.v1.WorkerEvents"


class Sender:
    """One who has a member's place on the broker, and its key."""

    def __init__(self, fleet, name):
        folder = fleet.members / name
        self.member = bus.Member.load(name, folder / "signing.key", folder / "trusted")
        self.forger = bus.Member(name, Ed25519PrivateKey.generate(), {})
        self.connection, self.channel = connect(fleet, name)
        self.reasons = {}

    def send(self, case, reason, *, exchange, key, kind, audience, signer=None, body=b"", task=None, headers=None, now=None,
             change=lambda properties: None):
        """`reason` is what the one who rejects it has to say."""
        name = f"{exchange}:{case}"
        properties = pika.BasicProperties(
            type=kind, correlation_id=task, message_id=name, headers=dict(headers or {}), delivery_mode=2)
        if signer is not None:
            signer.sign(properties, body, audience, HOUR, now=now)
        change(properties)
        self.channel.basic_publish(exchange, key, body, properties, mandatory=True)
        if reason:
            self.reasons[name] = reason

    def everywhere(self, to, audience, body=b"", **how):
        """What no reader of any queue may take."""
        def send(case, reason, **special):
            self.send(case, reason, **{"audience": audience, "signer": self.member, "body": body, **to, **how, **special})

        send("unsigned", "not signed", signer=None)
        send("forged", "does not believe", signer=self.forger)
        send("changed", "signature", change=lambda properties: properties.headers.update({"flotilla-new": 1}))
        send("misaddressed", "addressed to", audience="kvm9")
        send("expired", "validity ended", now=bus.now_ms() - 2 * HOUR)
        send("early", "in the future", now=bus.now_ms() + HOUR)
        send("oversized", "3145728 bytes", body=bytes(3 << 20))
        send("undecodable", "its body is no", body=b"\xff")
        return send


def connect(fleet, name):
    folder = fleet.members / name
    return bus.connect(SimpleNamespace(
        broker=f"localhost:{fleet.port()}", ca=folder / "ca.pem", certificate=folder / "tls.pem", key=folder / "tls.key"),
        "poison")


def poison(fleet):
    """forged, expired, misaddressed, replayed, oversized, undecodable, deeply nested messages to worker and coordinator: all dead letters"""
    fleet.submit()
    coordinator, kvm1 = Sender(fleet, "coordinator"), Sender(fleet, "kvm1")
    attempt = {"flotilla-attempt": 1, "flotilla-fence": 1}
    tasks = {"exchange": "flotilla.tasks", "key": "kvm1", "kind": EXPORT}
    send = coordinator.everywhere(tasks, "kvm1", task="poison-export", headers=attempt)
    send("unknown-method", "not served", kind="/flotilla.v1.HostService/Inspect")
    send("no-fence", "are needed", headers={"flotilla-attempt": 1})
    send("nested", "not signed", signer=None, headers={"nested": NESTED})
    send("path", "no task id", task="../../etc/passwd")
    send("first", None, task="replayed-export")
    send("replay", "replay", task="replayed-export")
    control = {"exchange": "flotilla.control", "key": "kvm1", "kind": CONTROL}
    send = coordinator.everywhere(control, "kvm1")
    send("unknown-type", "no type of control message", kind=EXPORT)
    said = bus.load_protocol()["events"].WorkerEvents(host="kvm1").SerializeToString()
    events = {"exchange": "flotilla.events", "key": "evt.kvm1.task", "kind": EVENTS}
    send = kvm1.everywhere(events, "coordinator", body=said)
    send("unknown-type", "no type of event", kind=EXPORT)
    send("nested", "not signed", signer=None, headers={"nested": NESTED})
    send("for-another", "signed it, for host 'kvm2'", body=said.replace(b"kvm1", b"kvm2"))
    expected = coordinator.reasons | kvm1.reasons

    found = {}

    def all_judged():
        letters = json.loads(fleet.api("queue", "dead", "--json", "--limit", "1000").stdout).get("letters", [])
        found.clear()
        found.update((letter["messageId"], letter) for letter in letters if ":" in letter.get("messageId", ""))
        return found.keys() >= expected.keys()

    wait(60, f"{len(expected)} dead letters", all_judged)
    for name, reason in expected.items():
        letter = found[name]
        rejecter = "coordinator" if name.startswith("flotilla.events") else "kvm1"
        if reason not in letter.get("reason", "") or letter.get("rejectedBy") != rejecter:
            raise Violation(f"{name} should be rejected by {rejecter} for '{reason}': {letter}")
    if strange := found.keys() - expected.keys():
        raise Violation(f"among the dead letters are {strange}")
    print(f"  {len(expected)} messages among the dead letters with their reasons", flush=True)

    large = sorted(name for name in expected if name.endswith("oversized"))
    answer = fleet.api("queue", "replay", "--all", check=False)
    if answer.returncode != 1 or any(f"{name}: its body has 3145728 bytes" not in answer.stdout for name in large):
        raise Violation(f"oversized letters were not refused: {answer.stdout}")
    all_judged()
    if sorted(found) != large:
        raise Violation(f"after a replay of all letters {sorted(found)} are left, not {large}")
    if "no-such: it is not among" not in fleet.api("queue", "replay", "no-such", check=False).stdout:
        raise Violation("a letter that is not there was not missed")
    fleet.api("queue", "discard", *large)
    all_judged()
    if found:
        raise Violation(f"{sorted(found)} could not be discarded")
    for sender in (coordinator, kvm1):
        sender.connection.close()
    fleet.submit()
    fleet.wait_ended()
