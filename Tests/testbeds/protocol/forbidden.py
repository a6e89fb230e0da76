"""Checks that the broker keeps a requester to its requests. Connection arguments as client.py."""

import argparse

import pika

import flotilla_bus as bus

parser = argparse.ArgumentParser()
bus.connection_arguments(parser)
arguments = parser.parse_args()


def publish(exchange, key, user="client"):
    return lambda channel: bus.publish(channel, exchange, key, pika.BasicProperties(user_id=user), b"")


def bind(channel):
    channel.queue_declare("client.test", exclusive=True)
    channel.queue_bind("client.test", "flotilla.events", "#")


refused = {
    "send a task": (403, publish("flotilla.tasks", "kvm1")),
    "send a control message": (403, publish("flotilla.control", "kvm1")),
    "speak for a host": (403, publish("flotilla.events", "evt.kvm1.task")),
    "invent a notification": (403, publish("flotilla.notifications", "migration.done")),
    "pass through the default exchange": (403, publish("", "flotilla.tasks.kvm1")),
    "ask under another's name": (406, publish("flotilla.requests", "flotilla.requests", user="coordinator")),
    "listen to events": (403, bind),
    "take requests": (403, lambda channel: channel.basic_get("flotilla.requests")),
    "make a queue of another name": (403, lambda channel: channel.queue_declare("flotilla.tasks.kvm9")),
    "delete a task queue": (403, lambda channel: channel.queue_delete("flotilla.tasks.kvm1")),
}
for what, (code, attempt) in refused.items():
    connection, channel = bus.connect(arguments, "forbidden")
    try:
        attempt(channel)
        raise SystemExit(f"forbidden.py: a requester can {what}")
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != code:
            raise SystemExit(f"forbidden.py: {what}: {error.reply_code}, not {code}: {error.reply_text}") from None
        print(f"can't {what}: {code}")
    connection.close()
