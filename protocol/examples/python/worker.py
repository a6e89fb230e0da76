"""A worker for a host that Flotilla's own can't serve, speaking the protocol of ../../amqp.md.

This file is the protocol; what the host does is in raw_images.py. One thread, the main one, owns the connection and the
journal; every task has a thread that works, and hands what it has to say to the main one.
"""

import argparse
import logging
import os
import pathlib
import queue
import re
import threading
import time

import pika

import flotilla_bus as bus
from flotilla_bus import COORDINATOR, StatusError
from journal import Journal
from raw_images import RawImages

log = logging.getLogger("worker")
TASK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
EVENT_VALIDITY_MS = 7 * 24 * 3600 * 1000
DISCARD_SEQ = 1 << 40  # far above what an attempt counts to


def clock():
    """Seconds, for leases: a clock that nobody sets, and that goes on while the computer sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Stopped(Exception):
    """The task must not go on. Without a code nothing may be said of it either: it is somebody else's now."""

    def __init__(self, reason, code=None):
        super().__init__(reason)
        self.code = code


class Attempt:
    """One attempt of one task. What works calls `check` between its steps and `permit` before what can't be undone."""

    def __init__(self, worker, task, number, fence, deadline):
        self.worker, self.task, self.number, self.fence, self.deadline = worker, task, number, fence, deadline
        self.lock = threading.Lock()
        self.seq = 0
        self.sent = {}  # by seq, when the events were sent that a lease may answer
        self.lease_until = clock() + worker.lease
        self.stopped = None
        self.permits = {}
        self.thread = None

    def __str__(self):
        return f"{self.task} attempt {self.number} fence {self.fence}"

    def event(self, asks_for_lease=False, **kind):
        """The next event, numbered. Publish it at once if it asks for a lease: that runs from now."""
        with self.lock:
            self.seq += 1
            if asks_for_lease:
                self.sent[self.seq] = clock()
            return self.worker.pb.TaskEvent(
                task_id=self.task, attempt=self.number, fence=self.fence, seq=self.seq, **kind)

    def renew(self, answers_seq, ttl_ms):
        with self.lock:
            sent = self.sent.pop(answers_seq, None)
            if sent is not None:
                self.sent = {seq: at for seq, at in self.sent.items() if seq > answers_seq}
                self.lease_until = max(self.lease_until, sent + ttl_ms / 1000)

    def stop(self, reason, code=None):
        """The first reason stays."""
        with self.lock:
            self.stopped = self.stopped or Stopped(reason, code)

    def check(self):
        """Needs nothing but the clock: it also holds while the broker can't be reached. A quarter of the lease is kept
        for the step that is under way."""
        if clock() > self.lease_until - self.worker.lease / 4:
            self.stop("its lease was not renewed")
        if self.deadline is not None and bus.now_ms() > self.deadline:
            self.stop("the task's deadline passed", bus.DEADLINE_EXCEEDED)
        if self.stopped:
            raise self.stopped

    def permit(self, step):
        """Returns when the coordinator says that this attempt may do it."""
        answer = queue.Queue()
        with self.lock:
            self.permits[step] = answer
        self.ask(step)
        while True:
            try:
                reply = answer.get(timeout=0.2)
                break
            except queue.Empty:
                self.check()
        if not reply.granted:
            raise StatusError(bus.ABORTED, f"the coordinator refused the step {step}: {reply.reason}")
        self.check()

    def ask(self, step):
        self.worker.say(self.event(permit=self.worker.pb.PermitRequest(step=step)))

    def answer(self, reply):
        with self.lock:
            waiting = self.permits.pop(reply.step, None)
        if waiting:
            waiting.put(reply)


class Worker:
    def __init__(self, arguments):
        self.arguments = arguments
        self.name, self.lease = arguments.host, arguments.lease
        self.protocol = bus.load_protocol()
        self.pb = self.protocol["events"]
        self.member = bus.Member.load(self.name, arguments.signing_key, arguments.trusted)
        os.makedirs(arguments.state, exist_ok=True)
        self.journal = Journal(f"{arguments.state}/journal")
        self.service = RawImages(self.name, arguments, self.protocol)
        self.slots = threading.Semaphore(arguments.tasks)
        self.attempts = {}
        self.outbox = queue.Queue()
        names = arguments.namespace
        self.events, self.tasks, self.control = (
            f"{names}.events", f"{names}.tasks.{self.name}", f"{names}.control.{self.name}")

    # Main thread: the connection

    def run(self):
        """For ever. Tasks go on without a connection for as long as their leases last."""
        while True:
            try:
                self.serve()
            except (pika.exceptions.AMQPError, OSError) as error:
                log.warning("no connection: %r; again in 2 s", error)
                time.sleep(2)

    def serve(self):
        self.connection, self.channel = bus.connect(self.arguments, self.name)
        try:
            self.channel.add_on_cancel_callback(self.cancelled)
            self.channel.basic_qos(prefetch_count=64)
            # Fails until the coordinator, which makes the queues, knows this host. Only then is the host announced: from
            # then on it is sent tasks.
            self.channel.basic_consume(self.control, self.on_control)
            self.channel.basic_consume(self.tasks, self.on_task)
            self.publish("inventory", self.pb.WorkerEvent(inventory=self.service.inventory()))
            self.repeat_ends()
            log.info("serving %s", self.tasks)
            next_beat = clock() + self.arguments.heartbeat
            while True:
                self.empty_outbox()
                if clock() >= next_beat:
                    self.beat()
                    next_beat = clock() + self.arguments.heartbeat
                self.connection.process_data_events(time_limit=max(0, next_beat - clock()))
        finally:
            if self.connection.is_open:
                self.connection.close()

    def cancelled(self, frame):
        raise pika.exceptions.ConsumerCancelled(frame)

    def publish(self, kind, *events):
        """Signs and publishes events; returns once the broker has them."""
        message = self.pb.WorkerEvents(host=self.name, events=events)
        for event in message.events:
            event.time.GetCurrentTime()
        body = message.SerializeToString()
        properties = pika.BasicProperties(type="flotilla.v1.WorkerEvents", user_id=self.name)
        self.member.sign(properties, body, COORDINATOR, EVENT_VALIDITY_MS)
        bus.publish(self.channel, self.events, f"evt.{self.name}.{kind}", properties, body)

    def publish_task(self, event):
        self.publish("task", self.pb.WorkerEvent(task=event))

    def say(self, event):
        """From any thread: has the main one publish the event. It may get lost with the connection."""
        self.hand_over(lambda: self.publish_task(event))

    def hand_over(self, action):
        self.outbox.put(action)
        connection = self.connection
        try:
            connection.add_callback_threadsafe(lambda: None)  # ends the wait in process_data_events
        except pika.exceptions.ConnectionWrongStateError:
            pass  # the next connection empties the outbox

    def empty_outbox(self):
        while True:
            try:
                action = self.outbox.get_nowait()
            except queue.Empty:
                return
            action()

    def beat(self):
        """Keeps the leases, asks again what was not answered, says again what ended."""
        for attempt in self.attempts.values():
            if attempt.stopped is None:
                self.publish_task(attempt.event(asks_for_lease=True, heartbeat=self.pb.TaskHeartbeat()))
                for step in list(attempt.permits):
                    attempt.ask(step)
        heartbeat = self.pb.HostHeartbeat(tasks=len(self.attempts))
        self.publish("heartbeat", self.pb.WorkerEvent(heartbeat=heartbeat))
        self.repeat_ends()

    def repeat_ends(self):
        for end in self.journal.unconfirmed():
            self.publish_task(self.pb.TaskEvent.FromString(end))

    # Main thread: tasks

    def on_task(self, channel, delivery, properties, body):
        attempt = None
        try:
            late = self.require_coordinator(properties, body)
            attempt = self.decode(properties)
            if late:
                raise StatusError(bus.UNAVAILABLE, f"the task came too late: {late}")
            method = self.service.methods.get(properties.type)
            if method is None:
                raise StatusError(bus.UNIMPLEMENTED, f"method {properties.type} is not served here")
            request_type, handler = method
            try:
                request = request_type.FromString(body)
            except Exception as error:
                raise StatusError(bus.INVALID_ARGUMENT, f"its body is no {request_type.__name__}: {error}") from error
        except StatusError as error:
            if attempt:  # a task of the coordinator's, to which it wants an answer
                self.refuse(attempt, error)
            return self.reject(self.tasks, delivery, properties, error)
        try:
            admission = self.journal.admit(attempt.task, attempt.fence)
        except OSError as error:
            self.refuse(attempt, StatusError(bus.INTERNAL, f"not journaled: {error}"))
            return channel.basic_ack(delivery.delivery_tag)
        running = self.attempts.get(attempt.task)
        if admission == "stale" or running and running.fence == attempt.fence:
            if delivery.redelivered:  # the broker's own repetition; anybody else's is a replay
                return channel.basic_ack(delivery.delivery_tag)
            return self.reject(
                self.tasks, delivery, properties,
                StatusError(bus.ALREADY_EXISTS, f"replay: {attempt}, or a later one, was taken on before"))
        self.publish_task(attempt.event(asks_for_lease=True, accepted=self.pb.TaskAccepted()))
        channel.basic_ack(delivery.delivery_tag)
        log.info("%s: taken on: %s", attempt, properties.type)
        if admission != "run":
            return self.publish_task(self.pb.TaskEvent.FromString(admission))
        self.attempts[attempt.task] = attempt
        attempt.thread = threading.Thread(
            target=self.work, args=(attempt, handler, request, running), name=attempt.task, daemon=True)
        attempt.thread.start()

    def require_coordinator(self, properties, body):
        """Raises unless the coordinator said this, to us. Returns the error of a message that is only too old."""
        try:
            issuer = self.member.verify(properties, body)
        except StatusError as error:
            if error.code == bus.DEADLINE_EXCEEDED and properties.headers["flotilla-issuer"] == COORDINATOR:
                return error
            raise
        if issuer != COORDINATOR:
            raise StatusError(bus.PERMISSION_DENIED, f"it comes from {issuer}, not from the coordinator")

    def decode(self, properties):
        number, fence = properties.headers.get("flotilla-attempt"), properties.headers.get("flotilla-fence")
        if not TASK_ID.fullmatch(properties.correlation_id or ""):
            raise StatusError(bus.INVALID_ARGUMENT, f"correlation-id {properties.correlation_id!r} is no task id")
        if not all(isinstance(value, int) and value > 0 for value in (number, fence)):
            raise StatusError(bus.INVALID_ARGUMENT, "headers flotilla-attempt and flotilla-fence are needed")
        return Attempt(self, properties.correlation_id, number, fence, properties.headers.get("deadline-unix-ms"))

    def refuse(self, attempt, error):
        ended = self.pb.TaskEnded(code=error.code, message=str(error), hint=error.hint)
        self.publish_task(attempt.event(ended=ended))

    def reject(self, from_queue, delivery, properties, error):
        """To the dead letters. The reason goes to the coordinator first: a rejection carries none."""
        log.warning("rejected from %s: %s: %s", from_queue, properties.message_id, error)
        rejected = self.pb.MessageRejected(
            queue=from_queue, message_id=properties.message_id or "", type=properties.type or "",
            task_id=properties.correlation_id or "", reason=str(error))
        self.publish("rejected", self.pb.WorkerEvent(rejected=rejected))
        self.channel.basic_reject(delivery.delivery_tag, requeue=False)

    def on_control(self, channel, delivery, properties, body):
        try:
            if late := self.require_coordinator(properties, body):
                raise late
            if properties.type != "flotilla.v1.ControlMessages":
                raise StatusError(bus.INVALID_ARGUMENT, f"{properties.type} is no control message")
            try:
                messages = self.pb.ControlMessages.FromString(body).messages
            except Exception as error:
                raise StatusError(bus.INVALID_ARGUMENT, f"its body can't be read: {error}") from error
        except StatusError as error:
            return self.reject(self.control, delivery, properties, error)
        channel.basic_ack(delivery.delivery_tag)
        for message in messages:
            self.obey(message)

    def obey(self, message):
        kind = message.WhichOneof("kind")
        if kind == "stored":
            if self.journal.holds_end(message.task_id, message.fence):
                self.service.sweep(message.task_id)
                self.journal.forget(message.task_id)
            return
        attempt = self.attempts.get(message.task_id)
        if attempt is None and kind == "cancel" and not message.cancel.revoked:
            return self.discard(message)
        if attempt is None or attempt.fence != message.fence:
            return
        if kind == "lease":
            attempt.renew(message.lease.answers_seq, message.lease.ttl_ms)
        elif kind == "permit":
            attempt.answer(message.permit)
        elif kind == "cancel":
            attempt.stop(message.cancel.reason, None if message.cancel.revoked else bus.CANCELLED)

    def discard(self, message):
        """Of a cancelled task that nobody works on here. Asked for again until `ended` arrives."""
        task, fence = message.task_id, message.fence
        if not TASK_ID.fullmatch(task) or not self.journal.may_discard(task, fence):
            return
        self.service.sweep(task)
        if task in self.journal.entries:
            self.journal.forget(task)
        ended = self.pb.TaskEnded(code=bus.CANCELLED, message=message.cancel.reason)
        self.publish_task(self.pb.TaskEvent(task_id=task, fence=fence, seq=DISCARD_SEQ, ended=ended))

    def finish(self, attempt, ended):
        """Journals the end before anybody hears of it."""
        if self.attempts.get(attempt.task) is attempt:
            del self.attempts[attempt.task]
        if ended is None:
            return log.info("%s: stopped: %s", attempt, attempt.stopped)
        event = attempt.event(ended=ended)
        log.info("%s: ended with status %d %s", attempt, ended.code, ended.message)
        if self.journal.end(attempt.task, attempt.fence, event.SerializeToString()):
            self.publish_task(event)
            # What the host holds has changed: say so before it is asked for the next task.
            self.publish("inventory", self.pb.WorkerEvent(inventory=self.service.inventory()))

    # A task's own thread

    def work(self, attempt, handler, request, older):
        if older:  # out of the way before this attempt touches its files
            older.stop("a later attempt was issued")
            older.thread.join()
        ended = self.pb.TaskEnded()
        try:
            while not self.slots.acquire(timeout=0.2):
                attempt.check()
            try:
                attempt.check()
                for update in handler(request, attempt):
                    ended.result = update.SerializeToString()
                    if len(ended.result) > bus.MAXIMUM_BODY - 4096:  # would be waited for for ever
                        raise StatusError(bus.RESOURCE_EXHAUSTED, f"{attempt}: no message holds its result")
                    self.say(attempt.event(update=ended.result))
            finally:
                self.slots.release()
            # A success counts even if the task was being cancelled, but only of who still owns it.
            if attempt.stopped and attempt.stopped.code is None:
                ended = None
        except Stopped as stop:
            ended = stop.code and self.pb.TaskEnded(code=stop.code, message=str(stop))
        except StatusError as error:
            ended = self.pb.TaskEnded(code=error.code, message=str(error), hint=error.hint)
        except Exception as error:
            log.exception("%s", attempt)
            ended = self.pb.TaskEnded(code=bus.INTERNAL, message=repr(error))
        self.hand_over(lambda: self.finish(attempt, ended))


def main():
    parser = argparse.ArgumentParser(
        description="Serves a host's tasks: copies raw disk images into a pool and describes the machine beside them.")
    parser.add_argument("--host", required=True, help="its name: of its queues, its broker user and its keys")
    parser.add_argument("--namespace", default="flotilla")
    parser.add_argument("--signing-key", required=True, metavar="FILE", help="Ed25519 private key, PEM, mode 0600")
    parser.add_argument("--trusted", required=True, metavar="DIR", help="public keys: DIR/coordinator/*.pem")
    parser.add_argument("--state", required=True, metavar="DIR", help="journal and descriptions of machines")
    parser.add_argument("--pool", required=True, action="append", metavar="NAME=DIR", help="where disks go")
    parser.add_argument("--sources", required=True, action="append", metavar="DIR", help="where images may lie")
    parser.add_argument("--tasks", type=int, default=2, help="that run at once (2)")
    parser.add_argument("--rate", type=int, default=0, metavar="MIB", help="copy at most so much a second")
    parser.add_argument("--lease", type=float, default=60, metavar="SECONDS", help="as the coordinator has it (60)")
    parser.add_argument("--heartbeat", type=float, default=10, metavar="SECONDS", help="at most a third of that (10)")
    bus.connection_arguments(parser)
    arguments = parser.parse_args()
    if arguments.heartbeat * 3 > arguments.lease:
        parser.error("--lease has to be at least three heartbeats")
    arguments.pool = dict(pool.split("=", 1) for pool in arguments.pool)
    arguments.sources = [str(pathlib.Path(folder).resolve()) for folder in arguments.sources]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("pika").setLevel(logging.ERROR)
    Worker(arguments).run()


if __name__ == "__main__":
    main()
