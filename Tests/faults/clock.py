"""Clocks that are set while the fleet works."""

import json
import pathlib
import subprocess
import time

from fleet import LEASE, Violation, wait

SOURCE = pathlib.Path(__file__).with_name("clock.c")


def compile_clock(fleet):
    library = fleet.dir / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True)
    return library


def clock_jumps(fleet):
    """the wall clock of a worker, then of the coordinator, set half a lease and an hour forward and back, and right again"""
    library = compile_clock(fleet)
    for name in ("kvm1", "coordinator"):
        clock = fleet.dir / f"{name}.clock"
        clock.write_text("0")
        fleet.kill(name)
        fleet.begin(name, FLEET_PRELOAD=str(library), FLOTILLA_CLOCK=str(clock))
        listener = fleet.dir / "log" / ("coordinator.log" if name == "kvm1" else "kvm1.log")
        heard = len(listener.read_text())
        fleet.wait_api()
        for jump in (LEASE // 2, -LEASE // 2, 3600, -3600):
            fleet.submit(["kvm1", "kvm2"])
            clock.write_text(f"{jump}")
            fleet.submit(["kvm1"])
            if abs(jump) == 3600:
                wait(30, f"what {name}'s clock shows", lambda: is_seen(fleet, jump if name == "kvm1" else -jump))
            time.sleep(LEASE * 2)  # how long the clock is wrong
            clock.write_text("0")
            fleet.submit(["kvm1"])
            fleet.wait_ended()
            print(f"  {name} {jump:+} s: {fleet.judge()}", flush=True)
        if "in the future" not in listener.read_text()[heard:]:
            raise Violation(f"nobody noticed that the clock of {name} was an hour ahead")
        fleet.kill(name)
        fleet.begin(name)
    fleet.submit()
    fleet.wait_ended()


def is_seen(fleet, ahead):
    """Whether the coordinator knows that kvm1's clock differs from its own by about so many seconds, and doctor fails."""
    hosts = json.loads(fleet.api("host", "list", "--json").stdout)["hosts"]
    shown = next(int(host.get("clockAheadMs", 0)) for host in hosts if host["profile"]["name"] == "kvm1")
    doctor = subprocess.run([fleet.flotilla, "doctor", "--coordinator", fleet.dir / "coordinator.yaml", "--json"],
                            stdout=subprocess.PIPE, text=True)
    verdicts = {finding["subject"]: finding["verdict"] for finding in json.loads(doctor.stdout)["findings"]}
    return abs(shown / 1000 - ahead) < 5 and verdicts.get("clock of kvm1") == "fail" and doctor.returncode == 1
