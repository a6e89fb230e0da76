"""Clocks that are set while the fleet works."""

import time

from fleet import LEASE, Violation

# Of the Debian package faketime. Multi-threaded programs need this one of its libraries.
LIBRARY = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"


def clock_jumps(fleet):
    """the wall clock of a worker, then of the coordinator, set half a lease and an hour forward and back, and right again"""
    for name in ("kvm1", "coordinator"):
        clock = fleet.dir / f"{name}.clock"
        clock.write_text("+0s")
        fleet.kill(name)
        # The clock that waits are measured by goes on as ever, as it does on a computer whose time is set.
        fleet.begin(name, FLEET_PRELOAD=LIBRARY, FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1",
                    FAKETIME_DONT_FAKE_MONOTONIC="1")
        listener = fleet.dir / "log" / ("coordinator.log" if name == "kvm1" else "kvm1.log")
        heard = len(listener.read_text())
        for jump in (LEASE // 2, -LEASE // 2, 3600, -3600):
            fleet.submit(["kvm1", "kvm2"])
            clock.write_text(f"{jump:+}s")
            time.sleep(LEASE * 2)  # how long the clock is wrong
            clock.write_text("+0s")
            fleet.submit(["kvm1"])
            fleet.wait_ended()
            print(f"  {name} {jump:+} s: {fleet.judge(in_order=name != 'coordinator')}", flush=True)
        if "in the future" not in listener.read_text()[heard:]:
            raise Violation(f"nobody noticed that the clock of {name} was an hour ahead")
        fleet.kill(name)
        fleet.begin(name)
    fleet.submit()
    fleet.wait_ended()
