"""What libvirt says of its domains while it happens."""

import collections
import re
import subprocess
import threading
import time

WORDS = ("Defined Added", "Defined Updated", "Undefined")
SAID = re.compile(rf"for domain '?([^':]+)'?: ({'|'.join(WORDS)})")
PROBE = "<domain type='qemu'><name>witness-probe</name><memory>1024</memory><os><type>hvm</type></os></domain>"


class Watcher(threading.Thread):
    """Listens from the moment it is made, and again when libvirt was away."""

    def __init__(self, uri, log):
        super().__init__(daemon=True)
        self.uri, self.log, self.ends, self.process = uri, log, False, None
        log.write_text("")
        self.start()
        self.wait()

    def run(self):
        with self.log.open("a") as log:
            while not self.ends:
                # Without a line's end in its buffer nobody would hear of it.
                self.process = subprocess.Popen(
                    ["stdbuf", "-oL", "virsh", "-c", self.uri, "event", "--event", "lifecycle", "--loop"],
                    stdout=log, stderr=subprocess.STDOUT)
                self.process.wait()
                time.sleep(0.1)

    def stop(self):
        self.ends = True
        while self.is_alive():
            if self.process:
                self.process.terminate()
            self.join(0.1)

    def wait(self):
        """Returns once what libvirt does is heard of: a domain of nobody's is defined until it is."""
        heard, end = self.log.stat().st_size, time.monotonic() + 30
        while "witness-probe" not in self.log.read_text()[heard:]:
            if time.monotonic() > end:
                raise RuntimeError(f"nothing is heard of libvirt at {self.uri}; see {self.log}")
            self.virsh("define", "/dev/stdin", input=PROBE)
            self.virsh("undefine", "witness-probe")
            time.sleep(0.1)

    def virsh(self, *words, **options):
        subprocess.run(["virsh", "-q", "-c", self.uri, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
                       check=False, **options)

    def seen(self):
        """How often each domain was added, updated, removed."""
        counts = collections.defaultdict(lambda: [0, 0, 0])
        for name, what in SAID.findall(self.log.read_text()):
            counts[name][WORDS.index(what)] += 1
        return counts
