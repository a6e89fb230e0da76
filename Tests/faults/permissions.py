"""What the broker keeps a worker from, with the users and permissions that `flotilla fleet definitions` makes."""

import ssl

import pika

from fleet import Violation


def permissions(fleet):
    """a worker's broker user tries what only others may do"""
    def publish(exchange, key, user="kvm1"):
        return lambda channel: channel.basic_publish(
            exchange, key, b"", pika.BasicProperties(user_id=user), mandatory=True)

    def bind(channel):
        channel.queue_bind("flotilla.tasks.kvm1", "flotilla.tasks", "kvm2")

    forbidden = {
        "take another host's tasks": lambda channel: channel.basic_get("flotilla.tasks.kvm2"),
        "consume another host's tasks": lambda channel: channel.basic_consume("flotilla.tasks.kvm2", print),
        "take another host's control messages": lambda channel: channel.basic_get("flotilla.control.kvm2"),
        "take events": lambda channel: channel.basic_get("flotilla.events.coordinator"),
        "take dead letters": lambda channel: channel.basic_get("flotilla.dead"),
        "send a task to itself": publish("flotilla.tasks", "kvm1"),
        "send a task to another": publish("flotilla.tasks", "kvm2"),
        "send a control message": publish("flotilla.control", "kvm2"),
        "ask for a migration": publish("flotilla.requests", "flotilla.requests"),
        "invent a notification": publish("flotilla.notifications", "migration.done"),
        "use the default exchange": publish("", "flotilla.tasks.kvm2"),
        "use the default exchange for its own queue": publish("", "flotilla.tasks.kvm1"),
        "use another exchange of the broker": publish("amq.topic", "evt.kvm1.task"),
        "speak for another worker": publish("flotilla.events", "evt.kvm2.task"),
        "speak for a host whose name goes on after a dot": publish("flotilla.events", "evt.kvm1.lab.task"),
        "speak for a host whose name goes on": publish("flotilla.events", "evt.kvm10.task"),
        "sign as another user": publish("flotilla.events", "evt.kvm1.task", user="kvm2"),
        "listen to events": bind,
        "make a queue": lambda channel: channel.queue_declare("flotilla.tasks.kvm9"),
        "make a queue without a name": lambda channel: channel.queue_declare("", exclusive=True),
        "delete its queue": lambda channel: channel.queue_delete("flotilla.tasks.kvm1"),
    }
    for what, attempt in forbidden.items():
        refusal = try_out(fleet, attempt)
        if refusal not in (403, 406):
            raise Violation(f"a worker can {what}")
    allowed = {
        "speak for itself": publish("flotilla.events", "evt.kvm1.task"),
        "look at its queue": lambda channel: channel.queue_declare("flotilla.tasks.kvm1", passive=True),
    }
    for what, attempt in allowed.items():
        refusal = try_out(fleet, attempt)
        if refusal is not None:
            raise Violation(f"a worker can't {what}: {refusal}")
    print(f"  {len(forbidden)} attempts refused, {len(allowed)} allowed", flush=True)
    fleet.submit()
    fleet.wait_ended()


def try_out(fleet, attempt, user="kvm1"):
    """The broker's reply code if it refuses."""
    folder = fleet.members / user
    tls = ssl.create_default_context(cafile=folder / "ca.pem")
    tls.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    connection = pika.BlockingConnection(pika.ConnectionParameters(
        "localhost", fleet.port(), credentials=pika.credentials.ExternalCredentials(),
        ssl_options=pika.SSLOptions(tls, "localhost"), heartbeat=0))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        attempt(channel)
        return None
    except pika.exceptions.ChannelClosedByBroker as error:
        return error.reply_code
    finally:
        connection.close()
