"""What every program on Flotilla's bus needs: signatures, the protocol's messages, and a connection by TLS.

The contract is ../../amqp.md; ../../vectors holds signed messages to test a port of this file with.
"""

import hashlib
import importlib
import pathlib
import ssl
import subprocess
import sys
import tempfile
import time

import pika
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

COORDINATOR = "coordinator"
MAXIMUM_BODY = 1 << 20
SIGNATURE = "flotilla-signature-bin"
PATH = "flotilla-signature-path-bin"
CLOCK_TOLERANCE_MS = 60_000
NEEDED_HEADERS = {
    "flotilla-issuer": str, "flotilla-key-id": str, "flotilla-issued-unix-ms": int, "flotilla-expires-unix-ms": int,
    SIGNATURE: bytes,
}

# gRPC status codes: https://grpc.io/docs/guides/status-codes/
CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED = 1, 3, 4, 5, 6, 7
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, UNIMPLEMENTED, INTERNAL = 8, 9, 10, 12, 13
UNAVAILABLE, UNAUTHENTICATED = 14, 16


class StatusError(Exception):
    """A gRPC status that is not OK; the hint is the next step for a person."""

    def __init__(self, code, message, hint=""):
        super().__init__(message)
        self.code, self.hint = code, hint


def now_ms():
    return time.time_ns() // 1_000_000


def load_protocol():
    """Makes Python code of ../../flotilla/v1/*.proto in a temporary folder and returns its modules by name."""
    protos = pathlib.Path(__file__).resolve().parents[2]
    names = sorted(path.stem for path in (protos / "flotilla/v1").glob("*.proto"))
    with tempfile.TemporaryDirectory(prefix="flotilla-protos.") as folder:
        files = [f"flotilla/v1/{name}.proto" for name in names]
        subprocess.run(["protoc", f"--proto_path={protos}", f"--python_out={folder}", *files], check=True)
        sys.path.insert(0, folder)
        try:
            return {name: importlib.import_module(f"flotilla.v1.{name}_pb2") for name in names}
        finally:
            sys.path.remove(folder)


# Signatures


def key_id(public_key):
    raw = public_key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def signed_bytes(properties, body):
    """The bytes a signature is made over."""
    fields = [b"flotilla-signature-v1"]
    for text in (properties.type, properties.content_type, properties.correlation_id, properties.message_id):
        fields.append((text or "").encode())
    headers = {name.encode(): value for name, value in (properties.headers or {}).items()}
    for name in sorted(headers):
        if name in (SIGNATURE.encode(), PATH.encode()) or name.startswith(b"x-"):
            continue
        value = headers[name]
        fields.append(name)
        if isinstance(value, str):
            fields.append(b"s" + value.encode())
        elif isinstance(value, bytes):
            fields.append(b"b" + value)
        elif isinstance(value, int) and not isinstance(value, bool):
            fields.append(b"i%d" % value)
        else:
            raise StatusError(UNAUTHENTICATED, f"header {name.decode()} is neither text, nor a whole number, nor bytes")
    fields.append(body)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def leaf(message):
    return hashlib.sha256(b"\0" + message).digest()


def node(left, right):
    return hashlib.sha256(b"\1" + left + right).digest()


def signed_root(root):
    """The bytes a signature of several messages is made over."""
    return b"flotilla-signature-tree-v1" + root


def root_of(message, path):
    """The root that a message's path leads to, from its signed bytes."""
    if not isinstance(path, bytes) or len(path) % 33 or len(path) > 16 * 33:
        raise InvalidSignature
    found = leaf(message)
    for start in range(0, len(path), 33):
        side, other = path[start], path[start + 1:start + 33]
        if side > 1:
            raise InvalidSignature
        found = node(found, other) if side else node(other, found)
    return found


class Member:
    """The coordinator or a host's worker: its name, the key it signs with, and the keys it believes."""

    def __init__(self, name, key, believes):
        """`believes`: public keys by the name of their owner, any number each."""
        self.name, self.key = name, key
        self.keys = {owner: {key_id(key): key for key in keys} for owner, keys in believes.items()}

    @classmethod
    def load(cls, name, key_file, trusted):
        """`trusted` is a folder that holds one folder with PEM files for each owner."""
        def read(path, load, **options):
            key = load(pathlib.Path(path).read_bytes(), **options)
            if not isinstance(key, (Ed25519PrivateKey, Ed25519PublicKey)):
                raise ValueError(f"{path} holds no Ed25519 key")
            return key

        if pathlib.Path(key_file).stat().st_mode & 0o077:
            raise PermissionError(f"{key_file} can be read by others: chmod 600 {key_file}")
        believes = {
            owner.name: [read(file, serialization.load_pem_public_key) for file in sorted(owner.glob("*.pem"))]
            for owner in pathlib.Path(trusted).iterdir() if owner.is_dir()
        }
        return cls(name, read(key_file, serialization.load_pem_private_key, password=None), believes)

    def sign(self, properties, body, audience, validity_ms, now=None):
        """Completes the headers; nothing of the message may change any more."""
        now = now_ms() if now is None else now
        properties.headers = dict(properties.headers or {}) | {
            "flotilla-issuer": self.name,
            "flotilla-audience": audience,
            "flotilla-key-id": key_id(self.key.public_key()),
            "flotilla-issued-unix-ms": now,
            "flotilla-expires-unix-ms": now + validity_ms,
        }
        properties.headers[SIGNATURE] = self.key.sign(signed_bytes(properties, body))

    def verify(self, properties, body, now=None):
        """Returns who signed the message, or raises. DEADLINE_EXCEEDED is only raised of a message that is otherwise
        good."""
        now = now_ms() if now is None else now
        headers = properties.headers or {}
        if len(body) > MAXIMUM_BODY:
            raise StatusError(INVALID_ARGUMENT, f"its body has {len(body)} bytes, {MAXIMUM_BODY} are allowed")
        # Not `type(…) is`: pika reads 64-bit numbers as a subclass of int.
        if not all(isinstance(headers.get(name), kind) for name, kind in NEEDED_HEADERS.items()):
            raise StatusError(UNAUTHENTICATED, "it is not signed")
        issuer, identity = headers["flotilla-issuer"], headers["flotilla-key-id"]
        key = self.keys.get(issuer, {}).get(identity)
        if key is None:
            raise StatusError(
                UNAUTHENTICATED, f"it is signed by {issuer} with key {identity}, which {self.name} does not believe")
        try:
            signed = signed_bytes(properties, body)
            if PATH in headers:
                signed = signed_root(root_of(signed, headers[PATH]))
            key.verify(headers[SIGNATURE], signed)
        except InvalidSignature:
            raise StatusError(UNAUTHENTICATED, f"its signature by {issuer}'s key {identity} is wrong") from None
        if headers.get("flotilla-audience") != self.name:
            raise StatusError(PERMISSION_DENIED, f"it is addressed to {headers.get('flotilla-audience')}")
        if headers["flotilla-issued-unix-ms"] > now + CLOCK_TOLERANCE_MS:
            raise StatusError(UNAUTHENTICATED, "it was signed in the future; are the clocks set by NTP?")
        if headers["flotilla-expires-unix-ms"] < now:
            raise StatusError(DEADLINE_EXCEEDED, "its validity has ended")
        return issuer


# Connection


def connection_arguments(parser):
    group = parser.add_argument_group("broker")
    group.add_argument("--broker", required=True, metavar="HOST:PORT", help="its TLS port; HOST as in its certificate")
    group.add_argument("--ca", required=True, metavar="FILE", help="who signed the broker's certificate")
    group.add_argument("--certificate", required=True, metavar="FILE", help="our own; its common name is the broker user")
    group.add_argument("--key", required=True, metavar="FILE", help="of our certificate")


def connect(arguments, name):
    """A connection that logs in with its certificate (SASL EXTERNAL), and a channel with publisher confirms."""
    host, _, port = arguments.broker.rpartition(":")
    tls = ssl.create_default_context(cafile=arguments.ca)
    tls.load_cert_chain(arguments.certificate, arguments.key)
    connection = pika.BlockingConnection(
        pika.ConnectionParameters(
            host, int(port), credentials=pika.credentials.ExternalCredentials(), heartbeat=10,
            blocked_connection_timeout=30, socket_timeout=10, client_properties={"connection_name": name},
            ssl_options=pika.SSLOptions(tls, host)))
    channel = connection.channel()
    channel.confirm_delivery()
    return connection, channel


def publish(channel, exchange, routing_key, properties, body):
    """Returns once the broker has taken the message for a queue. Raises pika's UnroutableError when no queue takes it,
    and NackError when one is full."""
    if len(body) > MAXIMUM_BODY:
        raise StatusError(INVALID_ARGUMENT, f"a message of {len(body)} bytes is over the limit of {MAXIMUM_BODY}")
    properties.delivery_mode = 2
    channel.basic_publish(exchange, routing_key, body, properties, mandatory=True)
