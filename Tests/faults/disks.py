"""Disks that are full for a while."""

import contextlib
import os
import sqlite3
import subprocess

from fleet import Violation, wait

# What members say of a disk that is full.
COMPLAINTS = ("No space left", "can't grow")


class SmallDisk:
    """A folder of a member that is a file system of its own for a while, which can be filled. The member is started again
    when that begins and when it ends."""

    def __init__(self, fleet, name, folder, room=1 << 30):
        self.fleet, self.name, self.folder, self.room = fleet, name, folder, room
        self.saved = folder.with_name(f"{folder.name}.saved")

    def __enter__(self):
        self.fleet.kill(self.name)
        self.folder.rename(self.saved)
        self.folder.mkdir(mode=0o700)
        # A log that has room left would put off the day.
        for store in self.saved.glob("*.sqlite"):
            with contextlib.closing(sqlite3.connect(store)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = sum(file.stat().st_size for file in self.saved.rglob("*") if file.is_file()) + self.room
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", self.folder], check=True)
        self.size = size
        subprocess.run(["cp", "-a", f"{self.saved}/.", self.folder], check=True)
        self.fleet.begin(self.name)
        return self

    def __exit__(self, *_):
        self.fleet.kill(self.name)
        self.free()
        subprocess.run(["find", self.saved, "-mindepth", "1", "-delete"], check=True)
        subprocess.run(["cp", "-a", "--sparse=always", f"{self.folder}/.", self.saved], check=True)
        subprocess.run(["umount", "-l", self.folder], check=True)
        self.folder.rmdir()
        self.saved.rename(self.folder)
        self.fleet.begin(self.name)

    def fill(self):
        """Nothing more fits: the file system becomes as small as what is in it."""
        while True:
            stat = os.statvfs(self.folder)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            if self.resize(max(used, stat.f_frsize)):
                return

    def free(self):
        self.resize(self.size)

    def resize(self, size):
        # What has grown meanwhile does not fit.
        return subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], stderr=subprocess.DEVNULL).returncode == 0


def full_disks(fleet):
    """no space left for a worker's journal, then for the coordinator's store, then in a worker's pool"""
    for name, folder in (("kvm1", "state/kvm1"), ("coordinator", "state/coordinator"), ("kvm1", "pool/kvm1")):
        with SmallDisk(fleet, name, fleet.dir / folder) as disk:
            log = fleet.dir / f"log/{name}.log"
            heard = len(log.read_text())
            fleet.submit(["kvm1", "kvm2"])
            disk.fill()
            wanted = (f"full-{folder.replace('/', '-')}", "kvm1")
            fleet.ask(*wanted)
            if folder.startswith("pool"):
                wait(60, "a migration to fail for the full pool", lambda: any(map(is_of_full_disk, failed(fleet))))
            else:
                wait(60, f"{name} to find its disk full", lambda: any(
                    words in log.read_text()[heard:] for words in COMPLAINTS))
            disk.free()
            fleet.begin(name)  # if it ended for that
            fleet.wait_api()
            # "No space left" is an honest end of a migration; with space it goes on.
            fleet.ask(*wanted)
            fleet.names.append(wanted)
            wait(180, "all migrations to end well", lambda: retried(fleet))
            print(f"  {folder}: {fleet.judge()}", flush=True)
    fleet.submit()
    fleet.wait_ended()


def failed(fleet):
    """This round's migrations that ended in another way than done."""
    found = fleet.migrations() or {}
    return [found[name] for name, _ in fleet.names if found.get(name, {}).get("state") in ("FAILED", "PREFLIGHT_BLOCKED")]


def is_of_full_disk(migration):
    said = [migration.get("errorMessage", "")]
    said += [each["message"] for each in migration.get("findings", []) if each["severity"] == "BLOCKED"]
    return any(words in text for text in said for words in (*COMPLAINTS, " free; the disks need about"))


def retried(fleet):
    """Whether all have ended well. What ended for a full disk is asked for again, as a person would; any other end is none."""
    if not fleet.ended():
        return False
    ends = failed(fleet)
    for migration in ends:
        if not is_of_full_disk(migration):
            raise Violation(f"{migration['id']} ended {migration['state']}: {migration.get('errorMessage')}")
        fleet.api("migration", "retry", migration["id"], check=False)
    return not ends
