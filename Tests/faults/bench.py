"""A fleet of which every part can be broken while it runs: proxies before its broker, small disks, clocks to set."""

import contextlib
import os
import signal
import time

from bus import Tap
from clock import compile_clock
from cluster import bring_back, kill_node
from disks import SmallDisk
from fleet import HOSTS
from libvirt import pid
from proxy import ChaosProxy

MEMBERS = ["coordinator", *HOSTS]


def permissions_of(fleet, name):
    """Virtual host, and what it may configure, write, read."""
    return fleet.rabbitmqctl("list_user_permissions", name, "--no-table-headers").splitlines()[0].split("\t")


def set_permissions(fleet, name, virtual_host, *rights):
    fleet.rabbitmqctl("set_permissions", "-p", virtual_host, name, *rights)


class Bench:
    def __init__(self, fleet):
        self.fleet = fleet
        # Members that are not to be started now, and when they were looked at.
        self.away = set()
        self.looked = 0.0
        self.tapped = None
        self.seen = []
        self.stopped = []

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.proxied())
            stack.enter_context(self.clocked())
            self.disks = {(name, folder): stack.enter_context(SmallDisk(self.fleet, name, self.fleet.dir / folder / name))
                          for folder, names in (("state", MEMBERS), ("pool", HOSTS)) for name in names}
            self.fleet.wait_api()
            self.permissions = {name: permissions_of(self.fleet, name) for name in HOSTS}
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    @contextlib.contextmanager
    def proxied(self):
        """Each member reaches the broker through a proxy of its own."""
        settings = {name: self.fleet.dir / f"{name}.yaml" for name in MEMBERS}
        texts = {name: path.read_text() for name, path in settings.items()}
        with contextlib.ExitStack() as stack:
            self.proxies = {name: stack.enter_context(ChaosProxy(self.fleet.port())) for name in MEMBERS}
            for name, text in texts.items():
                settings[name].write_text(self.with_proxy(text, name).replace("broker:\n", "broker:\n  heartbeat: 2s\n"))
            try:
                yield
            finally:
                for name, text in texts.items():
                    settings[name].write_text(text)
                    self.fleet.kill(name)
                    self.fleet.begin(name)

    def with_proxy(self, text, name):
        return text.replace(f"localhost:{self.fleet.port()}", f"localhost:{self.proxies[name].port}")

    @contextlib.contextmanager
    def clocked(self):
        library = compile_clock(self.fleet)
        for name in MEMBERS:
            self.set_clock(name, 0)
            self.fleet.with_member[name] = {"FLEET_PRELOAD": str(library), "FLOTILLA_CLOCK": str(self.clock(name))}
        try:
            yield
        finally:
            self.fleet.with_member.clear()

    def clock(self, name):
        return self.fleet.dir / f"{name}.clock"

    def set_clock(self, name, seconds):
        self.clock(name).write_text(f"{seconds}")

    # Members

    def keep_alive(self):
        """Those that ended themselves are started, as a service manager would."""
        if time.monotonic() < self.looked + 1:
            return
        self.looked = time.monotonic()
        for name in MEMBERS:
            if name not in self.away and self.fleet.pid(name) is None:
                self.fleet.begin(name)

    def down(self, name, how, failpoint=None):
        self.away.add(name)
        self.fleet.bed(how, name)
        if failpoint:
            self.fleet.begin(name, failpoint)

    def up(self, name):
        # One that stands at a failpoint goes on; one that has not come to it is ended all the same.
        if self.fleet.is_stopped(name):
            self.fleet.signal(name, signal.SIGCONT)
        else:
            self.fleet.kill(name)
            self.fleet.begin(name)
        self.away.discard(name)

    def pause(self, name):
        if self.fleet.pid(name):
            self.fleet.signal(name, signal.SIGSTOP)

    def resume(self, name):
        if self.fleet.pid(name):
            self.fleet.signal(name, signal.SIGCONT)

    def pause_libvirt(self, number):
        os.kill(pid(self.fleet), number)

    # The broker, and what it is told

    def break_broker(self, how):
        if how != "pause":
            return self.fleet.bed(how, "broker")
        self.stopped = self.fleet.broker_pids()
        for number in self.stopped:
            os.kill(number, signal.SIGSTOP)

    def mend_broker(self, how):
        if how != "pause":
            return self.fleet.begin("broker")
        for number in self.stopped:
            os.kill(number, signal.SIGCONT)

    def tap(self):
        self.tapped = Tap(self.fleet).__enter__()

    def replay(self, chance):
        tap, self.tapped = self.tapped, None
        try:
            # Those of earlier times as well, whose tasks may be over.
            self.seen += tap.messages()
            copies = chance.sample(self.seen, min(len(self.seen), 200)) * 2
            chance.shuffle(copies)
            tap.replay(copies)
        finally:
            tap.__exit__()

    def rotate_certificate(self, name):
        (self.fleet.members / name / "tls.key").unlink()
        self.fleet.bed("enroll", name)
        self.fleet.rabbitmqctl("close_all_connections", "certificates change")

    def rotate_key(self, name):
        (self.fleet.members / name / "signing.key").unlink()
        self.fleet.bed("enroll", name)
        self.fleet.bed("stop", name)
        self.fleet.begin(name)

    def revoke(self, name):
        self.fleet.rabbitmqctl("clear_permissions", "-p", self.permissions[name][0], name)

    def give_back(self, name):
        set_permissions(self.fleet, name, *self.permissions[name])


class ClusterBench(Bench):
    """Its brokers are broken themselves, not the ways to them."""

    def __init__(self, fleet, network):
        super().__init__(fleet)
        self.network = network

    def with_proxy(self, text, name):
        return text

    def break_node(self, number, how):
        if how == "kill":
            kill_node(self.fleet, number)
        else:
            self.network.cut(number, how == "from its peers")

    def mend_node(self, number, how):
        if how != "kill":
            self.network.heal(number)
        bring_back(self.fleet, number, starts=how == "kill")
