"""What a fleet did, told by two witnesses: the order in which its store was written, and what libvirt saw."""

import collections
import sqlite3

# Written by the store itself, in the transaction of what it tells, so that rows stand in the order of commits and no
# clock tells it. `state` and `owner` are the task's own state and fence at that moment.
WITNESS = """
    CREATE TABLE IF NOT EXISTS witness (
        number INTEGER PRIMARY KEY, task TEXT NOT NULL, what TEXT NOT NULL, fence INTEGER NOT NULL, state TEXT NOT NULL,
        owner INTEGER NOT NULL);
    CREATE TRIGGER IF NOT EXISTS witness_event AFTER INSERT ON event BEGIN
        INSERT INTO witness (task, what, fence, state, owner)
            SELECT id, new.kind, new.fence, state, fence FROM task WHERE id = new.task_id;
    END;
    CREATE TRIGGER IF NOT EXISTS witness_new AFTER INSERT ON task BEGIN
        INSERT INTO witness (task, what, fence, state, owner) VALUES (new.id, 'task', new.fence, new.state, new.fence);
    END;
    CREATE TRIGGER IF NOT EXISTS witness_task AFTER UPDATE ON task
            WHEN old.state <> new.state OR old.fence <> new.fence BEGIN
        INSERT INTO witness (task, what, fence, state, owner) VALUES (new.id, 'task', new.fence, new.state, new.fence);
    END;
    """
FINAL = ("succeeded", "failed", "cancelled")


def install(path):
    """Into a store that nobody has open."""
    store = sqlite3.connect(path)
    try:
        store.executescript(WITNESS)
    finally:
        store.close()


def read(path):
    """Rows of the witness in a store."""
    store = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return store.execute("SELECT task, what, fence, state, owner FROM witness ORDER BY number").fetchall()
    finally:
        store.close()


class Findings(list):
    """Violations, each with its kind before the colon; and what was counted on the way."""

    def __init__(self):
        super().__init__()
        # Fences of each task that ended, and of each step that was permitted.
        self.ended = collections.defaultdict(set)
        self.permitted = collections.defaultdict(set)

    def lost(self, text):
        self.append(f"lost: {text}")

    def duplicate(self, text):
        self.append(f"duplicate effect: {text}")

    def stale(self, text):
        self.append(f"stale-fence write: {text}")

    def several(self):
        """Tasks whose ends, and steps whose permits, came from more than one fence: where an attempt took over."""
        return sum(len(fences) > 1 for counted in (self.ended, self.permitted) for fences in counted.values())


class Life:
    """One task, as far as the rows tell."""

    def __init__(self):
        self.state, self.fence = "", 0
        # The success that nobody has asked to repeat.
        self.success = None


def judge(rows):
    """Goes through a witness's rows in their order."""
    findings = Findings()
    lives = collections.defaultdict(Life)
    # Migrations whose domain is defined, by the fence that was permitted to.
    defined = {}
    for task, what, fence, state, owner in rows:
        life = lives[task]
        migration, _, stage = task.rpartition("-")
        if what == "task":
            change(findings, life, task, state, owner)
            if state == "succeeded" and stage == "deploy" and (task, "permit:define-domain") in findings.permitted:
                defined.setdefault(migration, fence)
            if state == "succeeded" and stage == "undeploy":
                defined.pop(migration, None)
        elif what == "ended":
            findings.ended[task].add(fence)
        elif what == "accepted" and fence > life.fence:
            findings.stale(f"{task}: fence {fence} was accepted, and {life.fence} is the last that was given out")
        elif what.startswith("permit:"):
            if fence < life.fence or fence != owner or state != "running":
                findings.stale(f"{task}: {what} for fence {fence} when it was {state or 'nowhere'} under {life.fence}")
            elif life.success is not None:
                findings.duplicate(f"{task}: {what} for fence {fence} after {life.success} had succeeded")
            elif what == "permit:define-domain" and migration in defined:
                findings.duplicate(f"{task}: {what} for fence {fence}, and {defined[migration]} has defined it")
            findings.permitted[task, what].add(fence)
    for task, life in lives.items():
        if life.state not in FINAL:
            findings.lost(f"{task}: {life.state} under fence {life.fence}, without an end")
    return findings


def change(findings, life, task, state, owner):
    if owner < life.fence:
        findings.stale(f"{task}: {state} under fence {owner}, and {life.fence} was given out")
    if state == "sent" and owner == life.fence:
        findings.stale(f"{task}: given out again under fence {owner}")
    if state == "succeeded":
        if life.success is not None:
            findings.duplicate(f"{task}: succeeded under fence {owner} after {life.success} had")
        if owner not in findings.ended[task]:
            findings.lost(f"{task}: counts as done under fence {owner}, which told of no end")
        life.success = owner
    elif state == "waiting" and life.state in FINAL:
        life.success = None  # somebody asked for it again
    life.state, life.fence = state, owner


def judge_domains(findings, wanted, domains, defines):
    """What libvirt has and saw, beside what the fleet says of it.

    wanted   by name: (migration, UUID, digest of its manifest), as the coordinator tells
    domains  by name: the same, as libvirt has them
    defines  by name: [how often it was added, updated, removed], as libvirt saw it
    """
    for name in sorted(wanted.keys() - domains.keys()):
        findings.lost(f"domain {name} is not there")
    for name in sorted(domains.keys() - wanted.keys()):
        findings.duplicate(f"domain {name} is of no migration")
    for name in sorted(domains.keys() & wanted.keys()):
        for what, told, found in zip(("migration", "UUID", "manifest"), wanted[name], domains[name]):
            if told != found:
                findings.duplicate(f"domain {name} has {what} {found}, not {told}")
        added, updated, removed = defines.get(name, (0, 0, 0))
        permits = len(findings.permitted[f"{wanted[name][0]}-deploy", "permit:define-domain"])
        if added + updated > permits:
            findings.duplicate(f"domain {name} was defined {added + updated} times with {permits} permits")
        if added - removed != 1:
            findings.duplicate(f"domain {name} was added {added} times and removed {removed} times")
