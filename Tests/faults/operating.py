"""What a person does with a running fleet, and is told."""

import json
import re
import subprocess

import pika

from fleet import HOSTS, Violation, wait
from poison import EXPORT, connect


def operator(fleet):
    """hosts listed, drained and opened, queues looked at, dead letters replayed and thrown away: by flotilla's commands"""
    hosts(fleet)
    letters(fleet)
    lost_task(fleet)
    forgotten(fleet)
    fleet.wait_ended()


def say(fleet, expected, *words, code=0):
    """Runs a command; what it says must match."""
    answer = fleet.api(*words, check=False)
    if answer.returncode != code or not re.search(expected, answer.stdout, re.MULTILINE):
        raise Violation(f"flotilla {' '.join(words)} exits {answer.returncode}, not {code}, and does not say"
                        f" '{expected}': {answer.stdout}")
    return answer.stdout


def stage(fleet, name):
    step = fleet.migrations()[name]["stages"][0]
    return step["name"], step["state"]


def hosts(fleet):
    wait(30, "all hosts to be heard of", lambda: fleet.api("host", "list").stdout.count(" right ") == len(HOSTS))
    for name in HOSTS:
        say(fleet, rf"^ *{name} +\d+ s ago +right +open +0 ", "host", "list")
    listed = {host["profile"]["name"]: host for host in json.loads(say(fleet, r"^\{", "host", "list", "--json"))["hosts"]}
    if sorted(listed) != HOSTS:
        raise Violation(f"host list --json has {sorted(listed)}")
    shown = json.loads(say(fleet, r"^\{", "host", "show", "kvm2"))
    if shown["profile"]["name"] != "kvm2" or [pool["name"] for pool in shown["profile"]["pools"]] != ["default"]:
        raise Violation(f"host show kvm2 shows {shown}")
    for verb in ("show", "drain", "undrain"):
        say(fleet, "kvm9.*\n?.*flotilla host list", "host", verb, "kvm9", code=1)

    say(fleet, "^kvm1 is drained; 0 of its tasks go on$", "host", "drain", "kvm1")
    say(fleet, r"^ *kvm1 .* drained +0 ", "host", "list")
    fleet.submit(["kvm1", "kvm2"])
    (kept, _), (other, _) = fleet.names
    wait(60, f"{other} to end", lambda: fleet.migrations()[other]["state"] == "DONE")
    if stage(fleet, kept) != ("export", "waiting"):
        raise Violation(f"a drained host got a task: {stage(fleet, kept)}")
    say(fleet, "^kvm1 is open$", "host", "undrain", "kvm1")
    wait(60, f"{kept} to end", lambda: fleet.migrations()[kept]["state"] == "DONE")
    say(fleet, r"^ *kvm1 .* open +0 ", "host", "list")
    print("  hosts: listed, shown, drained and opened", flush=True)


def letters(fleet):
    """Two messages that nobody could take: one replayed, which has no effect, and one thrown away."""
    say(fleet, r"^letters removed: \d+$", "queue", "discard", "--all")  # of the cases before this one
    for name in HOSTS:
        say(fleet, rf"^ *flotilla\.tasks\.{name} +0 +1$", "queue", "status")
    say(fleet, r"^ *flotilla\.dead +0 +0$", "queue", "status")
    say(fleet, "^no dead letters$", "queue", "dead")
    connection, channel = connect(fleet, "coordinator")
    for letter in ("letter-1", "letter-2", "letter-3"):
        channel.basic_publish("flotilla.tasks", "kvm1", b"", mandatory=True, properties=pika.BasicProperties(
            type=EXPORT, correlation_id=letter, message_id=letter, delivery_mode=2))
    connection.close()
    wait(30, "three dead letters", lambda: all(
        f"letter-{number}" in fleet.api("queue", "dead").stdout for number in (1, 2, 3)))
    say(fleet, r"^ *letter-1 +flotilla\.tasks\.kvm1 +\d+ s +kvm1 +.*not signed", "queue", "dead")
    say(fleet, r"^ *flotilla\.dead +3 +0$", "queue", "status")
    if len(json.loads(say(fleet, r"^\{", "queue", "dead", "--json", "--limit", "2"))["letters"]) != 2:
        raise Violation("queue dead --limit 2 has not two letters")
    say(fleet, "^letter-1: removed without effect: ", "queue", "replay", "letter-1")
    say(fleet, "^letter-2: would be thrown away$", "queue", "discard", "letter-2", "--dry-run")
    say(fleet, "^letter-2: thrown away$", "queue", "discard", "letter-2")
    say(fleet, "^not touched: letter-2: it is not among the dead letters$", "queue", "discard", "letter-2", code=1)
    for verb in ("replay", "discard"):
        say(fleet, "Name messages, or --all", "queue", verb, code=2)
        say(fleet, "Name messages, or --all", "queue", verb, "letter-3", "--all", code=2)
    say(fleet, "^letters removed: 1$", "queue", "discard", "--all")
    say(fleet, "^no dead letters$", "queue", "dead")
    print("  dead letters: listed with their reasons, replayed, thrown away", flush=True)


def lost_task(fleet):
    """A task that a stranger takes out of its queue and rejects: a replay sends it again."""
    fleet.kill("kvm3")
    fleet.submit(["kvm3"])
    connection, channel = connect(fleet, "coordinator")
    taken = []

    def take():
        method, properties, _ = channel.basic_get("flotilla.tasks.kvm3")
        if method:
            taken.append(properties)
            channel.basic_reject(method.delivery_tag, requeue=False)
        return taken

    wait(30, "the task in its queue", take)
    message, task = taken[0].message_id, taken[0].correlation_id
    wait(30, f"{message} among the dead letters", lambda: message in fleet.api("queue", "dead").stdout)
    connection.close()
    say(fleet, rf"^ *{message} +flotilla\.tasks\.kvm3 +\d+ s +- +rejected$", "queue", "dead")
    say(fleet, f"^{message}: task {task} is sent again$", "queue", "replay", message)
    fleet.begin("kvm3")
    fleet.wait_ended()
    attempts = fleet.migrations()[fleet.names[-1][0]]["stages"][0]["attempt"]
    if attempts != 2:
        raise Violation(f"the replayed task took {attempts} attempts")
    print("  a task that was dead-lettered was sent again", flush=True)


def forgotten(fleet):
    """A host whose keys are taken away while it has a task: it is told of everywhere, and goes on once it has a key again."""
    folder = fleet.members / "coordinator"
    keys = {path: path.read_bytes() for path in (folder / "trusted/kvm3").glob("*.pem")}
    fleet.kill("kvm3")
    fleet.submit(["kvm3"])
    name = fleet.names[-1][0]
    done = subprocess.run([fleet.flotilla, "host", "forget", "kvm3", "--dir", folder], check=True, stdout=subprocess.PIPE, text=True)
    for line in ("rabbitmqctl delete_user kvm3", "rabbitmqctl delete_queue --vhost / flotilla.tasks.kvm3"):
        if line not in done.stdout:
            raise Violation(f"host forget does not say '{line}': {done.stdout}")
    try:
        wait(30, "kvm3 to be forgotten", lambda: re.search("^ *kvm3 .* forgotten ", fleet.api("host", "list").stdout, re.M))
        say(fleet, "kvm3: the coordinator has no key of it", "host", "list")
        say(fleet, "export sent, host has no key", "migration", "list")
        say(fleet, "warning +it waits: the coordinator has no key of host kvm3.*\n.*flotilla host enroll.*; or end it: "
            "flotilla migration cancel", "migration", "show", fleet.migrations()[name]["id"])
        say(fleet, "no key of host kvm3.*\n.*flotilla host enroll", "migration", "submit", "ova:/other.ova", "--host", "kvm3",
            "--pool", "default", "--detach", code=1)
        fleet.begin("kvm3")
        wait(30, "its letters to be dead", lambda: "kvm3 with key" in fleet.api("queue", "dead").stdout)
        say(fleet, "flotilla host enroll", "queue", "dead")
    finally:
        for path, content in keys.items():
            path.write_bytes(content)
    wait(60, f"{name} to end", lambda: fleet.migrations()[name]["state"] == "DONE")
    say(fleet, "^ *kvm3 .* open ", "host", "list")
    say(fleet, r"^letters removed: \d+$", "queue", "discard", "--all")
    print("  a host that was forgotten: refused, told of, and back", flush=True)
