"""A hand on the wire: copies of all tasks, control messages and events, and the means to send them again."""

import ssl
from types import SimpleNamespace

import pika


class Tap:
    def __init__(self, fleet):
        tls = ssl.create_default_context(cafile=fleet.members / "coordinator/ca.pem")
        tls.load_cert_chain(fleet.members / "coordinator/tls.pem", fleet.members / "coordinator/tls.key")
        self.parameters = pika.ConnectionParameters(
            "localhost", fleet.port(), credentials=pika.credentials.ExternalCredentials(),
            ssl_options=pika.SSLOptions(tls, "localhost"), heartbeat=0)
        self.hosts = ["kvm1", "kvm2", "kvm3"]

    def __enter__(self):
        self.connection = pika.BlockingConnection(self.parameters)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.queue = self.channel.queue_declare("flotilla.tap", exclusive=True).method.queue
        for host in self.hosts:
            for exchange in ("flotilla.tasks", "flotilla.control"):
                self.channel.queue_bind(self.queue, exchange, host)
        self.channel.queue_bind(self.queue, "flotilla.events", "evt.#")
        return self

    def __exit__(self, *_):
        self.connection.close()

    def messages(self):
        found = []
        while True:
            method, properties, body = self.channel.basic_get(self.queue, auto_ack=True)
            if method is None:
                return found
            if "x-copy" in properties.headers:
                continue
            found.append(SimpleNamespace(exchange=method.exchange, key=method.routing_key, properties=properties,
                                         body=body))

    def replay(self, messages):
        for message in messages:
            # The broker verifies who publishes; a thief of messages has another account than their author.
            message.properties.user_id = None
            # Headers of this kind are not signed. It keeps copies of copies away.
            message.properties.headers["x-copy"] = 1
            self.channel.basic_publish(message.exchange, message.key, message.body, message.properties, mandatory=True)
