"""Faults of exports whose disks are read from the datastore, in ranges."""
import re
import subprocess

from bed import BRANCHED, GONE, ON, OTHER, Failure


def datastore(case):
    case.migrate(via="datastore")


def datastore_cut(case):
    for _ in range(3):
        case.fault("cut", path="folder", after=1 + case.bed.random.randrange(1 << 20))
    case.migrate(via="datastore")
    case.happened("cut")


def datastore_range_once(case):
    for _ in range(3):
        case.fault("range200", path="folder")
    case.migrate(via="datastore")
    case.happened("range200")


def datastore_no_range(case):
    case.fault("range200", path="folder", times=0)
    done = subprocess.run(case.command(via="datastore"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    if done.returncode:
        if not re.search("range", done.stdout, re.IGNORECASE):
            raise Failure(f"unclear: {done.stdout[-800:]}")
        case.no_images()
    else:
        case.same()
    case.happened("range200")


def datastore_encoded(case):
    """What stands between compresses the first answer."""
    case.fault("encoded", path="folder")
    case.migrate(via="datastore")
    case.happened("encoded")


def datastore_html(case):
    case.fault("html", path="folder", times=3)
    case.migrate(via="datastore")
    case.happened("html")


def datastore_html_always(case):
    case.fault("html", path="folder", times=0)
    case.migrate(via="datastore", expect="web page", timeout=400)
    case.happened("html")


def datastore_expires(case):
    case.fault("expire-at", path="folder", after=1 << 20)
    case.migrate(via="datastore")
    case.happened("expire-at")
    # Of the capture, of the export, and again.
    if case.state()["calls"]["Login"] < 3:
        raise Failure("it did not log in again")


def datastore_busy(case):
    case.fault("status", path="folder", code=503, times=3)
    case.migrate(via="datastore")
    case.happened("status")


def datastore_file_gone(case):
    case.fault("status", path="folder", code=404, times=0)
    case.migrate(via="datastore", expect="not on the server")
    case.happened("status")


def datastore_forbidden(case):
    case.fault("status", path="folder", code=403, times=0)
    case.migrate(via="datastore", expect="forbids")


def datastore_snapshot(case):
    case.fault("cut", path="folder", vm=ON, after=1 << 20)
    case.migrate(vm=ON, snapshot=1, via="datastore")
    case.happened("cut")


def datastore_merged(case):
    """Somebody removes our snapshot: what the VM wrote since goes to the file that is read. Nothing else would tell."""
    case.fault("no-tag", vm=ON, times=0)
    case.fault("merge-at", path="folder", vm=ON, after=1 << 20)
    case.migrate(vm=ON, snapshot=1, via="datastore", expect="somebody removed snapshot")
    case.happened("merge-at")


def datastore_branched(case):
    """The VM writes to a file that no snapshot lists, since its capture."""
    case.fault("branch", vm=BRANCHED)
    case.migrate(vm=BRANCHED, snapshot=1, via="datastore", expect="does not write disk0 to .* any more")
    case.happened("branch")


def datastore_deleted(case):
    case.fault("delete-vm", path="folder", vm=GONE, after=1 << 20)
    case.migrate(vm=GONE, via="datastore", expect="deleted|not there|not on the server|removed", timeout=400)
    case.happened("delete-vm")


def killed_in_ranges(case):
    """Kills an export by ranges when two thirds have come, several checkpoints after its beginning."""
    size = case.server.disks(OTHER)[0]["capacity"]
    case.killed(
        lambda state: state["sent"].get("folder", 0) > size * 2 // 3, "two thirds of the disk", vm=OTHER,
        via="datastore", options=["--rate", "12M"])
    return size


def datastore_continues(case):
    size = killed_in_ranges(case)
    done = case.migrate(vm=OTHER, via="datastore")
    sent = case.state()["sent"]["folder"]
    if "continued from its checkpoint" not in done.stdout or sent > size * 0.8:
        raise Failure(f"it did not go on: {sent} of {size} bytes again: {done.stdout[-1500:]}")


def datastore_starts_over(case):
    size = killed_in_ranges(case)
    case.server.post("/rewrite", vm=OTHER)
    done = case.migrate(vm=OTHER, via="datastore")
    if "started over" not in done.stdout or case.state()["sent"]["folder"] < size:
        raise Failure(f"it did not start over: {case.state()['sent']}: {done.stdout[-1500:]}")


def datastore_unproven(case):
    """Nothing tells whether the file is the same."""
    case.fault("no-tag", vm=OTHER, times=0)
    size = killed_in_ranges(case)
    case.fault("no-tag", vm=OTHER, times=0)
    case.migrate(vm=OTHER, via="datastore")
    case.happened("no-tag")
    if case.state()["sent"]["folder"] < size:
        raise Failure(f"it went on: {case.state()['sent']}")


def datastore_written(case):
    """The server says that a disk was written to since the VM was captured."""
    killed_in_ranges(case)
    case.server.post("/rewrite", vm=OTHER, id=1)
    case.migrate(vm=OTHER, via="datastore", expect="changed since it was captured")


# Deleted comes last: it takes a VM away. One that was branched is of no use any more, either.
CASES = [
    datastore, datastore_cut, datastore_range_once, datastore_no_range, datastore_encoded, datastore_html,
    datastore_html_always, datastore_expires,
    datastore_busy, datastore_file_gone, datastore_forbidden, datastore_snapshot, datastore_continues, datastore_starts_over,
    datastore_unproven, datastore_written, datastore_merged, datastore_branched, datastore_deleted,
]
