"""Asks Flotilla's coordinator for migrations over the bus, and follows them to their end. Needs neither keys nor
protobuf: requests and notifications are JSON."""

import argparse
import json
import sys
import time
import uuid

import pika

import flotilla_bus as bus

# States a migration stays in, with the exit code each stands for; the worst one counts.
ENDS = {"done": 0, "ready": 0, "rolled-back": 0, "failed": 1, "blocked": 3, "cancelled": 4}
TEMPORARY_FAILURE = 75


class Client:
    def __init__(self, arguments, plan):
        self.arguments, self.plan = arguments, plan
        self.request = str(uuid.uuid4())
        self.queue = f"client.{arguments.user}.{self.request}"
        self.states = {}  # by migration, those of other requests too: they come before the answer names ours
        self.migrations = None
        self.end = time.monotonic() + arguments.timeout

    def run(self):
        """Returns the exit code."""
        while True:
            try:
                return self.follow()
            except (pika.exceptions.AMQPError, OSError) as error:
                if time.monotonic() > self.end:
                    print(f"client: {error!r}", file=sys.stderr)
                    return TEMPORARY_FAILURE
                print(f"client: {error!r}; connecting again", file=sys.stderr)
                time.sleep(1)

    def follow(self):
        names = self.arguments.namespace
        connection, channel = bus.connect(self.arguments, self.queue)
        # Ours for an hour after a lost connection; nothing that happens meanwhile is missed. Bound before the request
        # is made, so that no answer can come too early.
        channel.queue_declare(self.queue, durable=True, arguments={"x-expires": 3_600_000})
        for key in ("request.*", "migration.*"):
            channel.queue_bind(self.queue, f"{names}.notifications", key)
        if self.migrations is None:
            # Asking twice is safe: the same migrations are found again.
            properties = pika.BasicProperties(
                type="/flotilla.v1.CoordinatorService/SubmitMigrations", content_type="application/json",
                message_id=self.request, user_id=self.arguments.user)
            bus.publish(channel, f"{names}.requests", f"{names}.requests", properties, json.dumps(self.plan).encode())
        code = None
        for delivery, _, body in channel.consume(self.queue, inactivity_timeout=1):
            if delivery is not None:
                code = self.take(json.loads(body))
                channel.basic_ack(delivery.delivery_tag)
            if code is None and time.monotonic() > self.end:
                print("client: not all ended in time; they go on", file=sys.stderr)
                code = TEMPORARY_FAILURE
            if code is not None:
                break
        channel.cancel()
        channel.queue_delete(self.queue)
        connection.close()
        return code

    def take(self, event):
        """One CloudEvent. Returns the exit code once all is over. Events may come twice."""
        if self.arguments.events:
            with open(self.arguments.events, "a", encoding="utf-8") as file:
                print(json.dumps(event), file=file)
        kind, subject, data = event["type"], event["subject"], event["data"]
        if kind == "flotilla.request.rejected" and subject == self.request:
            print(f"request rejected: {data.get('message')}", file=sys.stderr)
            if data.get("hint"):
                print(f"  {data['hint']}", file=sys.stderr)
            return 2
        if kind == "flotilla.request.accepted" and subject == self.request:
            self.migrations = data.get("migrationIds", [])
            for migration in self.migrations:
                if migration in self.states:
                    self.show(migration)
        elif kind.startswith("flotilla.migration."):
            self.states[subject] = kind.removeprefix("flotilla.migration."), data
            if self.migrations and subject in self.migrations:
                self.show(subject)
        if self.migrations is None:
            return None
        codes = [ENDS.get(self.states.get(migration, (None,))[0]) for migration in self.migrations]
        return None if None in codes else max(codes, default=0)

    def show(self, migration):
        state, data = self.states[migration]
        why = data.get("errorMessage") or (data.get("result", {}).get("domainName", "") if state == "done" else "")
        print(f"{migration}  {data['request']['host']:<8} {state:<10} {why}".rstrip(), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit: 0 all done, 1 failed, 2 usage or request rejected, 3 blocked by preflight, "
                                    "4 cancelled, 75 not ended in time.")
    parser.add_argument("plan", help='file: {"migrations": [{"sourceUrl": …, "host": …, "pool": …, "format": …}]}')
    parser.add_argument("--user", default="client", help="our broker user, one of the coordinator's requesters (client)")
    parser.add_argument("--namespace", default="flotilla")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="to wait for the ends (3600)")
    parser.add_argument("--events", metavar="FILE", help="add every CloudEvent to this file, one a line")
    bus.connection_arguments(parser)
    arguments = parser.parse_args()
    with open(arguments.plan, encoding="utf-8") as file:
        plan = json.load(file)
    sys.exit(Client(arguments, plan).run())


if __name__ == "__main__":
    main()
