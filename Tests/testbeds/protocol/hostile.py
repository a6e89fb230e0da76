"""Sends a worker messages that can't be right, as somebody who has the coordinator's place on the broker, and for some of
them its key. Prints, by message-id, what the worker's reason has to hold; whoever starts this compares the dead letters."""

import argparse
import json

import pika

import flotilla_bus as bus

HOUR = 3_600_000
parser = argparse.ArgumentParser()
parser.add_argument("--host", required=True)
parser.add_argument("--signing-key", required=True, help="the coordinator's")
parser.add_argument("--forger-key", required=True, help="one the worker does not believe")
parser.add_argument("--trusted", required=True)
bus.connection_arguments(parser)
arguments = parser.parse_args()
coordinator = bus.Member.load("coordinator", arguments.signing_key, arguments.trusted)
forger = bus.Member.load("coordinator", arguments.forger_key, arguments.trusted)
connection, channel = bus.connect(arguments, "hostile")
expected = {}


def send(name, reason, signer=coordinator, audience=arguments.host, method="/flotilla.v1.ExportService/Export", body=b"",
         task=None, headers=None, now=None, change=lambda properties: None, exchange="flotilla.tasks"):
    properties = pika.BasicProperties(
        type=method, content_type="application/grpc+proto", correlation_id=task or name, message_id=name,
        headers={"flotilla-attempt": 1, "flotilla-fence": 1} if headers is None else headers)
    if signer:
        signer.sign(properties, body, audience, HOUR, now=now)
    change(properties)
    bus.publish(channel, exchange, arguments.host, properties, body)
    if reason:
        expected[name] = reason


def next_fence(properties):
    properties.headers["flotilla-fence"] = 2


send("unsigned", "not signed", signer=None)
send("forged", "does not believe", signer=forger)
send("misaddressed", "addressed to", audience="kvm1")
send("changed", "signature", change=next_fence)
send("expired", "validity has ended", now=bus.now_ms() - 2 * HOUR)
send("early", "in the future", now=bus.now_ms() + HOUR)
send("unknown-method", "not served", method="/flotilla.v1.HostService/Inspect")
send("no-fence", "are needed", headers={"flotilla-attempt": 1})
send("path", "no task id", task="../../etc/passwd")
send("undecodable", "body is no ExportRequest", body=b"\xff")
send("wrong-queue", "no control message", exchange="flotilla.control")
send("forged-control", "does not believe", signer=forger, exchange="flotilla.control")
send("first", None, task="replayed")
send("replay", "replay", task="replayed")
connection.close()
print(json.dumps(expected))
