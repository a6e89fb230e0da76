"""Faults of exports whose disks come as streams, under a lease."""
import hashlib
import json
import os
import re
import signal
import subprocess

from bed import LEASE, OFF, ON, OTHER, WIDE, Failure


def plain(case):
    done = case.migrate(options=["--json"])
    manifest = json.loads(done.stdout.splitlines()[-1])["state"]["manifest"]
    with open(case.server.disks(OFF)[0]["stream"], "rb") as file:
        if manifest["disks"][0]["source"].get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
            raise Failure(f"the manifest's digest is not that of what was sent: {manifest['disks']}")
    if case.count("completed") != 1 or case.count("opened") != 1:
        raise Failure("the lease was not completed")


def two_disks(case):
    case.migrate(vm=WIDE)


def cut(case):
    for _ in range(4):
        case.fault("cut", after=case.bed.random.randrange(case.size()))
    case.migrate()
    case.happened("cut")


def cut_one_disk(case):
    case.fault("cut", vm=WIDE, disk=1, after=case.size(WIDE, 1) // 2)
    case.migrate(vm=WIDE)
    case.happened("cut")
    sent, sizes = case.state()["sent"], [case.size(WIDE, disk) for disk in range(2)]
    if sent["nfc/0"] != sizes[0] or sent["nfc/1"] < sizes[1] * 1.4:
        raise Failure(f"not the failing disk alone came again: {sent} of {sizes}")


def cut_always(case):
    case.fault("cut", after=100_000, times=0)
    case.migrate(expect="connection|ended|cut|bytes|closed", timeout=400)
    case.happened("cut")


def session_expires(case):
    case.fault("expire-at", after=case.size() // 3)
    case.fault("slow", rate=4 << 20)
    case.migrate()
    case.happened("expire-at")


def lease_times_out(case):
    case.fault("timeout-at", after=case.size() // 2)
    case.migrate()
    case.happened("timeout-at")
    if case.count("opened") < 2:
        raise Failure("no second lease")


def slow_link(case):
    case.fault("slow", rate=max(case.size() // (3 * LEASE), 1))
    case.migrate()
    case.happened("slow")
    if case.count("timedOut") or case.count("progress") < 3:
        raise Failure(f"the lease was not kept alive: {case.server.get('/state')['leaseCounts']}")
    case.rising(case.state()["percents"], 4)
    if not any(30 <= percent < 100 for percent in case.state()["percents"]):
        raise Failure(f"the lease was told {case.state()['percents']} percent")


def stall(case):
    case.fault("stall", after=case.size() // 2)
    case.migrate(timeout=400)
    case.happened("stall")


def wrong_thumbprint(case):
    case.fault("thumbprint", times=0)
    case.migrate(expect="certificate")
    case.happened("thumbprint")


def other_host(case):
    case.fault("nfc-host", times=0)
    case.migrate()
    case.happened("nfc-host")


def wrong_certificate(case):
    case.migrate(expect="certificate", url="other-url")
    case.migrate(expect="fingerprint|certificate", trust=["--fingerprint", "AB:" * 31 + "AB"])


def fingerprint(case):
    case.migrate(trust=["--fingerprint", case.server.text("fingerprint")])


def wrong_password(case):
    with open(f"{case.server.folder}/wrong", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write("geheim")
    case.migrate(expect="login|password|refuse", password="wrong")


def html_once(case):
    case.fault("html", path="nfc")
    case.migrate()
    case.happened("html")


def html_always(case):
    case.fault("html", path="nfc", times=0)
    case.migrate(expect="html|no VMDK|not a VMDK|text/", timeout=400)
    case.happened("html")


def html_sdk(case):
    case.fault("html", path="sdk", vm="", times=0)
    case.migrate(expect="html|no vCenter|not.*SOAP|XML|answer", timeout=400)
    case.happened("html")


def busy(case):
    case.fault("status", path="nfc", code=503, times=2)
    case.migrate()
    case.happened("status")


def truncated(case):
    case.fault("truncate", after=case.size() * 2 // 3)
    case.migrate()
    case.happened("truncate")


def truncated_always(case):
    case.fault("truncate", after=case.size() - 700, times=0)
    case.migrate(expect="end|truncated|short|cut", timeout=400)
    case.happened("truncate")


def corrupted(case):
    case.fault("corrupt", after=case.size() // 2)
    try:
        case.migrate()
    except Failure as failure:
        if "WRONG" in str(failure) or not re.search("grain|corrupt|checksum|inflate|damaged", str(failure)):
            raise
        case.no_images()
    case.happened("corrupt")


def corrupted_always(case):
    case.fault("corrupt", after=case.size() // 2, times=0)
    case.migrate(expect="grain|corrupt|checksum|inflate|damaged", timeout=400)
    case.happened("corrupt")


def deleted(case):
    case.fault("delete-vm", vm=WIDE, disk=1, after=case.size(WIDE, 1) // 2)
    case.migrate(vm=WIDE, expect="deleted|not there|no VM|not found|gone|lease", timeout=400)
    case.happened("delete-vm")


def running(case):
    case.migrate(vm=ON, expect="running")


def snapshot(case):
    case.fault("cut", vm=ON, after=case.size(ON) // 2)
    case.migrate(vm=ON, snapshot=1)
    case.happened("cut")


def snapshot_fails(case):
    case.fault("cut", vm=ON, after=50_000, times=0)
    case.migrate(vm=ON, snapshot=1, expect=".", timeout=400)


def merged(case):
    """Somebody removes our snapshot."""
    case.fault("merge-at", vm=ON, after=case.size(ON) // 2)
    case.migrate(vm=ON, snapshot=1, expect="somebody removed snapshot")
    case.happened("merge-at")


def transfers(state):
    return state["leases"] and state["hits"].get("slow")


def interrupted(case):
    case.fault("slow", vm=ON, rate=1 << 20, times=0)
    process = case.start(vm=ON, snapshot=1)
    case.until(transfers, "a transfer")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    if not process.returncode:
        raise Failure("it says that it is done")
    case.no_images()


def killed(case):
    case.fault("slow", vm=ON, rate=1 << 20, times=0)
    case.killed(transfers, "a transfer", vm=ON, snapshot=1)
    case.migrate(vm=ON, snapshot=1)


def killed_making(case):
    """A snapshot that appears when the next process has looked for it already."""
    case.fault("slow-snapshot", vm=ON, after=9000)
    case.killed(lambda state: state["hits"].get("slow-snapshot"), "the snapshot's task", vm=ON, snapshot=1)
    late = subprocess.run(
        case.command(vm=ON, snapshot=1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180)
    case.until(lambda state: state["tasks"] == 0, "the late snapshot")
    # Whether that one waited for it or not.
    if late.returncode and "still being made" not in late.stdout:
        raise Failure(f"failed for another reason: {late.stdout[-1500:]}")
    case.migrate(vm=ON, snapshot=1)


def removal_lasts(case):
    """Whoever is impatient goes; the merge goes on, and the next process knows of it."""
    case.fault("slow", vm=ON, rate=1 << 20, times=0)
    case.fault("slow-removal", vm=ON, after=75_000)
    process = case.start(vm=ON, snapshot=1)
    case.until(transfers, "a transfer")
    process.send_signal(signal.SIGTERM)
    # A minute, not as long as it takes.
    if process.wait(70) == 0:
        raise Failure("it says that it is done")
    case.happened("slow-removal")
    case.no_images()
    case.until(lambda state: state["tasks"] == 0, "the removal's end")
    case.forget()
    case.migrate(vm=ON, snapshot=1)


def snapshot_of_changed(case):
    """A VM that is off was written to between its capture and the snapshot."""
    case.fault("slow", vm=OTHER, rate=1 << 20, times=0)
    case.killed(transfers, "a transfer", vm=OTHER, snapshot=1)
    case.server.post("/rewrite", vm=OTHER, id=1)
    case.migrate(vm=OTHER, snapshot=1, expect="changed since it was captured")


def staged(case):
    case.migrate(vm=WIDE, staged=1)
    case.kept()


def staged_progress(case):
    """The user and the lease hear of a disk that is only kept for now. Its length is not known beforehand."""
    progress = staged_downloading(case)
    if any("bytesTotal" in each for each in progress):
        raise Failure(f"a total is told that nobody knows: {progress[-1]}")


def staged_length(case):
    """A server that says how long the stream is."""
    case.fault("length", times=0)
    progress = staged_downloading(case)
    if {int(each.get("bytesTotal", 0)) for each in progress} != {case.size()}:
        raise Failure(f"the total of {case.size()} bytes was told as {progress[-1]}")
    if not any(50 <= percent < 100 for percent in case.state()["percents"]):
        raise Failure(f"the lease was told {case.state()['percents']} percent")


def staged_downloading(case):
    case.fault("slow", rate=max(case.size() // (3 * LEASE), 1))
    done = case.migrate(staged=1, options=["--json"])
    case.kept()
    case.happened("slow")
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    progress = [event["progress"]["progress"] for event in events if "progress" in event]
    progress = [each for each in progress if each.get("phase") == "downloading"]
    case.rising([each.get("bytesDone", 0) for each in progress], 4)
    if max(each.get("bytesDone", 0) for each in progress) < case.size() * 0.6:
        raise Failure(f"the download of {case.size()} bytes was told until {progress[-1]}")
    case.rising(case.state()["percents"], 3)
    return progress


def staged_cut(case):
    case.fault("cut", after=case.size() // 2)
    case.fault("truncate", after=case.size() * 2 // 3)
    case.migrate(staged=1)
    case.kept()
    case.happened("cut", "truncate")


def staged_corrupted_always(case):
    case.fault("corrupt", after=case.size() // 2, times=0)
    case.migrate(staged=1, expect="grain|corrupt|checksum|inflate|damaged", timeout=400)
    case.happened("corrupt")


def system_roots(case):
    """Without --ca the system's authorities count: the simulator's is one of them in a mount namespace of its own."""
    case.migrate(trust=[], expect="can't be trusted")
    roots = "/etc/ssl/certs/ca-certificates.crt"
    bundle = f"{case.dir}/roots.pem"
    with open(bundle, "wb") as to:
        for path in [roots, f"{case.server.folder}/ca.pem"]:
            with open(path, "rb") as file:
                to.write(file.read() + b"\n")
    case.migrate(trust=[], within=[
        "unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', bundle, roots])


def started_meanwhile(case):
    """A lease is lost while disks are read, and somebody starts the VM."""
    for options, path in [({"via": "datastore"}, {"path": "folder"}), ({}, {})]:
        case.fault("slow", rate=8 << 20, times=0, **path)
        process = case.start(**options)
        case.until(lambda state: state["hits"].get("slow"), "a transfer")
        case.server.post("/fault", kind="lease-timeout")
        case.server.post("/power", vm=OFF, on=1)
        try:
            status = process.wait(timeout=240)
        finally:
            case.server.post("/power", vm=OFF, on=0)
            case.server.post("/clear")
        if not status:
            raise Failure("disks of a VM that ran meanwhile are called done")
        case.no_images()
    with open(f"{case.dir}/log") as log:
        if not re.search("is running", log.read()):
            raise Failure("the message doesn't say that it is running")


# Deleted comes last: it takes a VM away.
CASES = [
    plain, two_disks, fingerprint, cut, cut_one_disk, cut_always, session_expires, lease_times_out, slow_link, stall, wrong_thumbprint,
    other_host, wrong_certificate, system_roots, wrong_password, html_once, html_always, html_sdk, busy, truncated, truncated_always, corrupted,
    corrupted_always, running, snapshot, snapshot_fails, merged, interrupted, killed, killed_making, removal_lasts, snapshot_of_changed, staged, staged_progress,
    staged_length, staged_cut, staged_corrupted_always,
    started_meanwhile, deleted,
]
