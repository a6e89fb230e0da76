"""A simulated vCenter, a private libvirt, and one run of a fault between them."""
import filecmp
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
LEASE = 4  # seconds
OFF, ON, WIDE = "Prüf & Stand 1", "läuft & schreibt 2", "zwei Platten 試験"
# Whose files change, and one that is taken away.
OTHER, GONE, BRANCHED = "wird & anders 4", "ist & weg 5", "zweigt & ab 6"
MACHINES = [
    (OFF, [96], False), (ON, [64], True), (WIDE, [48, 200], False), (OTHER, [128], False), (GONE, [64], False), (BRANCHED, [64], True)]


class Failure(Exception):
    pass


class Server:
    def __init__(self, folder, *options):
        self.folder = folder
        machines = f"{folder}.machines"
        for number, (name, disks, on) in enumerate(MACHINES):
            os.makedirs(f"{machines}/{number}")
            with open(f"{machines}/{number}/machine.json", "w") as file:
                json.dump({
                    "name": name, "guestId": "debian11_64Guest", "cpus": 1, "coresPerSocket": 1, "memoryMB": 256, "controller": "pvscsi",
                    "poweredOn": on, "disks": [{"capacityMB": size, "thin": True} for size in disks],
                    "nics": [{"network": "VM Network", "model": "vmxnet3"}]}, file)
        self.run("start", "--vms", "3", "--guest", machines, "--lease-timeout", str(LEASE), *options)

    def run(self, action, *options):
        subprocess.run([f"{HERE}/run", action, "--dir", self.folder, *options], check=True, stdout=subprocess.DEVNULL)

    def text(self, name):
        with open(f"{self.folder}/{name}") as file:
            return file.read().strip()

    def get(self, path):
        with urllib.request.urlopen(self.text("control") + path) as answer:
            return json.load(answer)

    def post(self, action, **query):
        address = f"{self.text('control')}{action}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(urllib.request.Request(address, method="POST")) as answer:
            return json.load(answer)

    def disks(self, vm):
        return self.get("/disks?" + urllib.parse.urlencode({"vm": vm}))


class Case:
    """One run of a fault."""

    def __init__(self, bed, name):
        self.bed, self.name = bed, name
        self.dir = f"{bed.dir}/{name}"
        os.makedirs(f"{self.dir}/pool")
        self.server = bed.server
        self.before = self.server.post("/clear")
        self.vm = OFF

    def command(self, vm=OFF, url="url", trust=None, password="password", options=(), **parameters):
        self.vm = vm
        host = urllib.parse.urlsplit(self.server.text(url)).netloc
        query = urllib.parse.urlencode({"vm": vm, **parameters}, quote_via=urllib.parse.quote)
        if trust is None:
            trust = ["--ca", f"{self.server.folder}/ca.pem"]
        return [
            self.bed.flotilla, "migrate", f"vsphere://{self.server.text('user')}@{host}?{query}", "--password-file",
            f"{self.server.folder}/{password}", *trust, "--host", self.bed.libvirt, "--pool", f"{self.dir}/pool", "--state",
            f"{self.dir}/state", "--network", "VM Network=network:flotilla-a", "--name", f"{self.name}-{os.getpid()}", "--new-uuid", *options]

    def migrate(self, expect=None, timeout=180, within=(), **options):
        """Runs it to its end. expect: pattern of the error; none: it succeeds. within: a command that runs it."""
        done = subprocess.run(
            [*within, *self.command(**options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, errors="replace")
        with open(f"{self.dir}/log", "a") as file:
            file.write(done.stdout)
        if expect is None and done.returncode:
            raise Failure(f"failed with {done.returncode}: {done.stdout[-1500:]}")
        if expect is not None:
            if not done.returncode:
                raise Failure(f"succeeded: {done.stdout[-800:]}")
            if not re.search(expect, done.stdout, re.IGNORECASE):
                raise Failure(f"the message doesn't say {expect!r}: {done.stdout[-1500:]}")
            self.no_images()
        else:
            self.same()
        return done

    def start(self, **options):
        with open(f"{self.dir}/log", "a") as log:
            return subprocess.Popen(self.command(**options), stdout=log, stderr=subprocess.STDOUT)

    def images(self):
        return sorted(
            f"{folder}/{name}" for folder, _, names in os.walk(f"{self.dir}/pool") for name in names if name.endswith(".qcow2"))

    def no_images(self):
        kept = [name for name in os.listdir(f"{self.dir}/pool") if name.endswith(".vmdk")]
        if self.images() or kept:
            raise Failure(f"images under their final name: {self.images()} {kept}")

    def kept(self):
        """The VMDKs beside the images are what the server sent."""
        for index, disk in enumerate(self.server.disks(self.vm)):
            path = f"{self.dir}/pool/{self.name}-{os.getpid()}-disk{index}.vmdk"
            if not filecmp.cmp(path, disk["stream"], shallow=False):
                raise Failure(f"{path} is not what was sent")

    def same(self):
        images, disks = self.images(), self.server.disks(self.vm)
        if len(images) != len(disks):
            raise Failure(f"{len(images)} images, {len(disks)} disks")
        for image, disk in zip(images, disks):
            done = subprocess.run(
                ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, disk["raw"]], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise Failure(f"WRONG CONTENT in {image}: {done.stdout}")

    def state(self):
        return self.server.get("/state")

    def rising(self, values, least):
        """Progress never goes back, and there is some."""
        if sorted(values) != values or len(set(values)) < least:
            raise Failure(f"progress: {values}")

    def fault(self, kind, **options):
        if "vm" not in options:
            options["vm"] = OFF
        if not options["vm"]:
            del options["vm"]
        self.server.post("/fault", kind=kind, **options)

    def happened(self, *kinds):
        hits = self.server.get("/state")["hits"]
        for kind in kinds:
            if not hits.get(kind):
                raise Failure(f"the fault {kind} did not happen: {hits}")

    def until(self, ready, what):
        deadline = time.monotonic() + 60
        while not ready(self.server.get("/state")):
            if time.monotonic() > deadline:
                raise Failure(f"waited for {what} in vain")
            time.sleep(0.05)

    def forget(self):
        """Ends all faults; what was there when the case began is still known."""
        known = self.before
        self.server.post("/clear")
        self.before = known

    def killed(self, ready, what, **options):
        """A migration is killed once the server's state is that."""
        process = self.start(**options)
        self.until(ready, what)
        process.kill()
        process.wait()
        self.forget()

    def clean(self, wait=False):
        """Nothing of ours is left; what a killed process left may need its next run."""
        state = self.server.get("/state")
        known = {snapshot["id"] for snapshot in self.before["snapshots"]}
        left = [snapshot for snapshot in state["snapshots"] if snapshot["id"] not in known]
        if left or state["leases"]:
            raise Failure(f"left behind: leases {state['leases']}, snapshots {left}")

    def count(self, what):
        return self.server.get("/state")["leaseCounts"].get(what, 0) - self.before["leaseCounts"].get(what, 0)

    def size(self, vm=OFF, disk=0):
        return os.path.getsize(self.server.disks(vm)[disk]["stream"])


class Bed:
    """A simulated vCenter, a private libvirt, and a folder that goes away."""

    def __init__(self, flotilla, seed, esx):
        self.flotilla, self.random = flotilla, random.Random(seed)
        self.dir = tempfile.mkdtemp(prefix="flotilla-vsphere-")
        self.server, self.libvirt = None, ""
        try:
            self.server = Server(f"{self.dir}/server", *(["--esx"] if esx else []))
            self.libvirt = subprocess.run(
                [f"{HERE}/../libvirt/run", "start", "--dir", f"{self.dir}/libvirt"], check=True, stdout=subprocess.PIPE, text=True
            ).stdout.strip().splitlines()[-1]
        except BaseException:
            self.close()
            raise

    def close(self):
        subprocess.run([f"{HERE}/../libvirt/run", "stop", "--dir", f"{self.dir}/libvirt"])
        subprocess.run([f"{HERE}/run", "stop", "--dir", f"{self.dir}/server"])
        shutil.rmtree(self.dir, ignore_errors=True)
