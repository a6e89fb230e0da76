"""What ends a worker, or only seems to leave it alive: tasks that kill it, a drain, a consumer that is gone."""

import re
import signal
import subprocess
import time

from fleet import HOSTS, Violation, wait

LOST_ATTEMPTS = 4
ATTEMPT = re.compile(r"\battempt=\d+ .*\bfence=\d+ .*\btask=[0-9a-f-]+-(export|convert|deploy)\b.*"
                     r"\btraceparent=00-[0-9a-f]{32}-[0-9a-f]{16}-01\b")


class Settings:
    """Settings of a member's configuration that others replace for a while; the member is started with either."""

    def __init__(self, fleet, name, *lines):
        self.fleet, self.name, self.lines = fleet, name, lines
        self.path = fleet.dir / f"{name}.yaml"

    def __enter__(self):
        self.text = self.path.read_text()
        replaced = tuple(line.split(":")[0] + ":" for line in self.lines)
        kept = [line for line in self.text.splitlines() if not line.startswith(replaced)]
        self.path.write_text("\n".join([*kept, *self.lines, ""]))
        self.again()

    def __exit__(self, *_):
        self.path.write_text(self.text)
        self.again()

    def again(self):
        self.fleet.kill(self.name)
        self.fleet.begin(self.name)


class Log:
    """What a member says from now on."""

    def __init__(self, fleet, name):
        self.path = fleet.dir / f"log/{name}.log"
        self.start = len(self.path.read_text())

    def text(self):
        return self.path.read_text()[self.start:]

    def lines(self, about):
        return [line for line in self.text().splitlines() if about in line]


def crash_loop(fleet):
    """a task that kills its worker each time: attempts count and end in a failure, others are served, a retry is done"""
    with Settings(fleet, "coordinator", f"lost-attempts: {LOST_ATTEMPTS}"):
        fleet.kill("kvm1")
        log = Log(fleet, "coordinator")
        fleet.submit(["kvm1", "kvm2"])
        poisoned, _ = fleet.names[0]
        began = time.monotonic()

        def failed():
            fleet.begin("kvm1", "convert.chunk-written:2")  # as a service manager does, again and again
            return (fleet.migrations() or {}).get(poisoned, {}).get("state") == "FAILED"

        wait(120, f"{poisoned} to fail", failed)
        migration = fleet.migrations()[poisoned]
        attempts = next(step["attempt"] for step in migration["stages"] if step["name"] == "convert")
        if attempts != LOST_ATTEMPTS or f"{LOST_ATTEMPTS} attempts at the convert" not in migration["errorMessage"]:
            raise Violation(f"it ended after {attempts} attempts with '{migration['errorMessage']}'")
        lost = log.lines("attempt lost")
        if len(lost) != LOST_ATTEMPTS or not all(map(ATTEMPT.search, lost)):
            raise Violation(f"the coordinator logged {lost}")
        print(f"  failed after {attempts} attempts and {time.monotonic() - began:.0f} s: {migration['errorMessage']}",
              flush=True)
        fleet.kill("kvm1")
        fleet.begin("kvm1")
        fleet.api("migration", "retry", migration["id"])
        fleet.wait_ended()


def drained(fleet):
    """SIGTERM of a busy worker: short tasks are finished; long ones stop by the deadline and go on from their checkpoint"""
    with Settings(fleet, "kvm1", "rate: 8M"):
        log = Log(fleet, "kvm1")
        fleet.submit(["kvm1"])
        wait(60, "a conversion", lambda: fleet.in_stage("convert"))
        took = stop(fleet, "kvm1")
        if log.lines("task stopped") or not log.lines("worker ended") or took < 0.5:
            raise Violation(f"a task was not finished in {took:.1f} s: {log.text()[-2000:]}")
        print(f"  a short task was finished {took:.1f} s after SIGTERM", flush=True)
        fleet.begin("kvm1")
        fleet.wait_ended()
        if any(step["attempt"] != 1 for step in fleet.migrations()[fleet.names[0][0]]["stages"]):
            raise Violation("what was finished was done again")
        for line in log.lines("task taken on") + log.lines("task ended"):
            if not ATTEMPT.search(line):
                raise Violation(f"a line does not tell task, attempt, fence and trace: {line}")
    with Settings(fleet, "kvm1", "drain: 2s", "rate: 1M"):
        log = Log(fleet, "kvm1")
        fleet.submit(["kvm1"])
        name, _ = fleet.names[-1]
        wait(60, "a checkpoint", lambda: [*fleet.dir.glob("pool/kvm1/.flotilla/*-convert/**/*.checkpoint")])
        took = stop(fleet, "kvm1")
        stopped = log.lines("task stopped")
        if not 2 <= took < 10 or len(stopped) != 1 or not ATTEMPT.search(stopped[0]) or not log.lines("worker ended"):
            raise Violation(f"the drain took {took:.1f} s, and the worker said: {log.text()[-2000:]}")
        print(f"  a long task stopped {took:.1f} s after SIGTERM", flush=True)
    # The worker is back, at full speed.
    watched = fleet.api("migration", "watch", fleet.migrations()[name]["id"], check=False).stdout
    fleet.wait_ended()
    if fleet.migrations()[name]["stages"][1]["attempt"] != 2:
        raise Violation(f"the stopped conversion took no second attempt: {watched}")


def drained_in_deploy(fleet):
    """SIGTERM of a worker, and its host drained, in the middle of a deploy: it is finished, once, and no other begins"""
    for point in ("deploy.permitted", "deploy.defined"):
        fleet.kill("kvm1")
        fleet.begin("kvm1", f"{point}=stop")
        fleet.submit(["kvm1"])
        name, _ = fleet.names[-1]
        wait(60, f"kvm1 to stand at {point}", lambda: fleet.is_stopped("kvm1"))
        answer = fleet.api("host", "drain", "kvm1").stdout
        if answer.strip() != "kvm1 is drained; 1 of its tasks go on":
            raise Violation(f"host drain says {answer}")
        log = Log(fleet, "kvm1")
        fleet.signal("kvm1", signal.SIGTERM)
        fleet.submit(["kvm1"])
        fleet.signal("kvm1", signal.SIGCONT)
        wait(30, "kvm1 to end", lambda: fleet.pid("kvm1") is None)
        if not log.lines("worker ended") or log.lines("task stopped"):
            raise Violation(f"the worker did not finish its deploy: {log.text()[-2000:]}")
        wait(30, f"{name} to be done", lambda: fleet.migrations()[name]["state"] == "DONE")
        deploy = next(step for step in fleet.migrations()[name]["stages"] if step["name"] == "deploy")
        if deploy["attempt"] != 1:
            raise Violation(f"the deploy took {deploy['attempt']} attempts")
        fleet.begin("kvm1")
        wait(30, "kvm1 to be back", lambda: log.lines("connected"))
        kept, _ = fleet.names[-1]
        if [step["state"] for step in fleet.migrations()[kept]["stages"]] != ["waiting"]:
            raise Violation(f"a drained host got {kept}")
        fleet.api("host", "undrain", "kvm1")
        fleet.wait_ended()
        print(f"  {point}: {fleet.judge()}", flush=True)
    fleet.submit()
    fleet.wait_ended()


def cancelled(fleet):
    """cancelled when no worker has the task and its folder waits for the next, with kills just then: nothing stays"""
    for what in ("worker", "worker, killed again as it begins", "worker, after another attempt was sent", "coordinator",
                 "coordinator, while the broker is away", "worker, when an image had its name"):
        fleet.kill("kvm1")
        fleet.begin("kvm1", "convert.disk-published" if "image" in what else "convert.checkpoint")
        fleet.submit(["kvm1"])
        name, host = fleet.names.pop()
        wait(60, "kvm1 to die in a conversion", lambda: fleet.pid("kvm1") is None)
        migration = fleet.migrations()[name]["id"]
        if not folders(fleet):
            raise Violation("the conversion left no folder: there is nothing to look at")
        if what.endswith("sent"):
            wait(60, "another attempt", lambda: fleet.migrations()[name]["stages"][1]["attempt"] == 2)
        if what.endswith("away"):
            fleet.kill("broker")
        # It may wait for the broker before it answers.
        cancel = subprocess.Popen([fleet.flotilla, "migration", "cancel", migration, "--socket", fleet.dir / "coordinator.sock"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait(30, f"{name} to be cancelled", lambda: fleet.log(
            f"SELECT 1 FROM task WHERE id = '{migration}-convert' AND state = 'cancelled'"))
        if what.startswith("coordinator"):
            fleet.kill("coordinator")
        cancel.wait(60)
        log = Log(fleet, "kvm1")
        for member in ("broker", "coordinator", "kvm1"):
            fleet.begin(member)
        if "again" in what:
            wait(30, "kvm1 to give its task back", lambda: log.lines("task released"))
            fleet.kill("kvm1")
            fleet.begin("kvm1")
        wait(60, f"{folders(fleet)} to go ({what})", lambda: not folders(fleet))
        fleet.wait_api()
        if fleet.migrations()[name]["state"] != "CANCELLED":
            raise Violation(f"{name} is {fleet.migrations()[name]['state']}")
        if images := [*fleet.dir.glob(f"pool/kvm1/{name}-*")]:
            raise Violation(f"{images} stayed ({what})")
        fleet.ask(name, host)
        fleet.names.append((name, host))
    fleet.submit()
    fleet.wait_ended()


def folders(fleet):
    return [*fleet.dir.glob("pool/kvm1/.flotilla/*")]


def stop(fleet, name):
    """SIGTERM, and how many seconds the process took to end."""
    began = time.monotonic()
    fleet.bed("stop", name)
    return time.monotonic() - began


def task_stuck(fleet):
    """a thread that never comes back with a task it was to take on: the process ends by itself, and names the task"""
    with Settings(fleet, "coordinator", "lost-attempts: 100"):  # it gives the task out again and again meanwhile
        fleet.kill("kvm1")
        log = Log(fleet, "kvm1")
        fleet.begin("kvm1", "worker.accepted=hang")
        fleet.submit(["kvm1", "kvm2"])
        wait(30, "a task at the failpoint", lambda: log.lines("task taken on"))
        began = time.monotonic()
        wait(300, "kvm1 to end by itself", lambda: fleet.pid("kvm1") is None)
        task = re.search(r"\btask=(\S+)", log.lines("task taken on")[0])[1]
        if not log.lines(f"task {task} of flotilla.tasks.kvm1 has been neither accepted nor rejected"):
            raise Violation(f"kvm1 ended for another reason: {log.text()[-2000:]}")
        print(f"  kvm1 ended {time.monotonic() - began:.0f} s after it got {task}", flush=True)
        fleet.begin("kvm1")
        fleet.wait_ended()


# What a queue of the broker may do to a consumer: forget it, and say nothing to its channel.
FORGET = """{ok, Queue} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"QUEUE">>)),
[ra:process_command(amqqueue:get_pid(Queue), rabbit_fifo:make_checkout({element(2, C), element(1, C)}, cancel, #{}))
 || C <- rabbit_amqqueue:consumers(Queue)]."""


def consumer_lost(fleet):
    """a queue that forgets its consumer while the connection is fine: the process ends by itself, the next one serves"""
    for name, queue in (("kvm1", "flotilla.tasks.kvm1"), ("coordinator", "flotilla.events.coordinator")):
        settings = fleet.dir / f"{name}.yaml"
        text = settings.read_text()
        settings.write_text(text.replace("broker:\n", "broker:\n  heartbeat: 1s\n"))  # looks every 30 s
        fleet.kill(name)
        fleet.begin(name)
        log = Log(fleet, name)
        fleet.wait_api()
        wait(60, f"a consumer of {queue}", lambda: consumers(fleet, queue) == 1)
        began = time.monotonic()
        fleet.rabbitmqctl("eval", FORGET.replace("QUEUE", queue))
        # What the consumer has in its hands it may still settle.
        wait(10, f"{queue} to forget its consumer", lambda: consumers(fleet, queue) == 0)
        wait(90, f"{name} to end by itself", lambda: fleet.pid(name) is None)
        if not log.lines(f"nothing consumes {queue}"):
            raise Violation(f"{name} ended for another reason: {log.text()[-2000:]}")
        print(f"  {name} ended {time.monotonic() - began:.0f} s after {queue} forgot it", flush=True)
        settings.write_text(text)
        fleet.begin(name)
        fleet.submit(HOSTS)
        fleet.wait_ended()


def consumers(fleet, queue):
    for line in fleet.rabbitmqctl("list_queues", "name", "consumers", "--no-table-headers").splitlines():
        name, _, count = line.partition("\t")
        if name == queue:
            return int(count)
    raise Violation(f"there is no queue {queue}")
