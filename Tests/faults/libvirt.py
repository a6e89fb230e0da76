"""libvirt's daemon, which others restart and which may hang."""

import signal
import subprocess

from fleet import ROOT, wait


def restart(fleet):
    for words in ("stop", "start"):
        subprocess.run([ROOT / "Tests/testbeds/libvirt/run", words, "--dir", fleet.libvirt], check=True, stdout=subprocess.DEVNULL)
    fleet.watcher.wait()


def libvirt_restarted(fleet):
    """libvirt's daemon restarted under a worker in the middle of its deploy, and while it is looked for: tried again"""
    for point in ("deploy.permitted", "deploy.defined"):
        fleet.kill("kvm1")
        fleet.begin("kvm1", f"{point}=stop")
        fleet.submit(["kvm1"])
        wait(60, f"kvm1 to stand at {point}", lambda: fleet.is_stopped("kvm1"))
        restart(fleet)
        fleet.signal("kvm1", signal.SIGCONT)
        fleet.wait_ended()
        print(f"  {point}: {fleet.judge()}", flush=True)
    fleet.submit()
    wait(60, "a conversion", lambda: fleet.in_stage("convert"))
    restart(fleet)
    fleet.wait_ended()


def pid(fleet):
    return int((fleet.libvirt / "run/libvirtd.pid").read_text())
