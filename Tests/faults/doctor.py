"""What `flotilla doctor` says of a fleet in which one thing after the other is wrong."""

import contextlib
import datetime
import json
import os
import re
import subprocess

import pika
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench import permissions_of, set_permissions
from clock import compile_clock
from fleet import Violation, wait
from poison import connect


class Doctor:
    def __init__(self, fleet):
        self.fleet = fleet
        self.wrong = []
        self.count = 0

    def examine(self, role, path):
        done = subprocess.run([self.fleet.flotilla, "doctor", f"--{role}", path, "--json"], stdout=subprocess.PIPE, text=True,
                              timeout=60)
        return done.returncode, {each["subject"]: each for each in json.loads(done.stdout)["findings"]}

    def expect(self, subject, verdict, found, remedy, *, role="worker", edit=lambda text: text):
        """One line of it, of a configuration that was edited; every line that is not well has a remedy."""
        self.count += 1
        member = "kvm1" if role == "worker" else role
        path = self.fleet.dir / "doctor.yaml"
        path.write_text(edit((self.fleet.dir / f"{member}.yaml").read_text()))
        code, lines = self.examine(role, path)
        line = lines.get(subject)
        if (not line or line["verdict"] != verdict or not re.search(found, line["found"])
                or not re.search(remedy, line.get("remedy", "")) or code != (1 if verdict == "fail" else 0)):
            self.wrong.append(f"of {subject} it says, and exits {code}: {line or sorted(lines)}; not {verdict}, '{found}',"
                              f" '{remedy}'")
        self.wrong += [f"{each['subject']} has no remedy: {each}" for each in lines.values()
                       if each["verdict"] != "pass" and not each.get("remedy")]

    def well(self, role, path):
        code, lines = self.examine(role, path)
        bad = [line for line in lines.values() if line["verdict"] == "fail"]
        if code or bad:
            self.wrong.append(f"of a {role} that is well it exits {code} and says {bad}")


def doctor(fleet):
    """everything that doctor looks at, broken: what its line says and what to do"""
    said = Doctor(fleet)
    for role, path in (("worker", "kvm1.yaml"), ("coordinator", "coordinator.yaml")):
        said.well(role, fleet.dir / path)
    files(fleet, said)
    broker(fleet, said)
    hosts(fleet, said)
    for role, path in (("worker", "kvm1.yaml"), ("coordinator", "coordinator.yaml")):
        said.well(role, fleet.dir / path)
    if said.wrong:
        raise Violation("\n    ".join(["doctor:", *said.wrong]))
    print(f"  {said.count} things that were wrong, each with its verdict and remedy", flush=True)
    fleet.submit()
    fleet.wait_ended()


def replaced(old, new):
    def edit(text):
        if old not in text:
            raise Violation(f"the configuration has no '{old}'")
        return text.replace(old, str(new))
    return edit


def files(fleet, said):
    """Configuration, keys, certificate, pool, libvirt: of a worker's own host."""
    folder, members = fleet.dir / "doctor", fleet.members / "kvm1"
    (folder / "trusted").mkdir(parents=True)
    (folder / "signing.key").write_bytes((members / "signing.key").read_bytes())
    (folder / "signing.key").chmod(0o644)
    said.expect("configuration", "fail", "heartbaet is not a setting", "settings here are .*heartbeat", edit=replaced("heartbeat:", "heartbaet:"))
    said.expect("keys", "fail", "signing.key", "chmod|600", edit=replaced(f"{members}/signing.key", folder / "signing.key"))
    said.expect("keys", "fail", "no key of the coordinator", "enroll",
                edit=replaced(f"trusted: {members}/trusted", f"trusted: {folder}/trusted"))
    for days, verdict, found in ((-1, "fail", "ended .* ago"), (20, "warn", "good for (19|20) days")):
        path = certificate(fleet, folder / f"{days}", days)
        said.expect("certificate", verdict, found, "enroll again", edit=lambda text: replaced(
            f"{members}/tls.pem", f"{path}.pem")(replaced(f"{members}/tls.key", f"{path}.key")(text)))
    said.expect("configuration", "fail", "/nowhere", ".", edit=replaced(f"path: {fleet.dir}/pool/kvm1", "path: /nowhere"))
    with read_only(folder / "pool"):
        said.expect("pool default", "fail", "Read-only file system", "owner, mode and mount", edit=replaced(
            f"path: {fleet.dir}/pool/kvm1", f"path: {folder}/pool"))
    said.expect("libvirt", "fail", "/nowhere|socket", "libvirt", edit=lambda text: re.sub(
        "libvirt: .*", "libvirt: qemu:///system?socket=/nowhere", text))


@contextlib.contextmanager
def read_only(folder):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def certificate(fleet, path, days):
    """kvm1's, by the fleet's own authority, of another time. Returns the path without its extension."""
    authority = x509.load_pem_x509_certificate((fleet.members / "coordinator/ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((fleet.members / "coordinator/ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    end = datetime.datetime.utcnow() + datetime.timedelta(days=days)
    made = (x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvm1")])).issuer_name(authority.subject)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(end - datetime.timedelta(days=30)).not_valid_after(end)
            .sign(signer, hashes.SHA256()))
    path.with_suffix(".pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    with open(path.with_suffix(".key"), "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                     serialization.NoEncryption()))
    return path


def broker(fleet, said):
    """The way to it, who is there, and what one may do there."""
    members, address = fleet.members / "kvm1", f"localhost:{fleet.port()}"
    other = fleet.dir / "doctor/other-ca"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=other", "-keyout", f"{other}.key", "-out", f"{other}.pem"], check=True, stderr=subprocess.DEVNULL)
    said.expect("broker", "fail", "cert verification failed", "configured authorities", edit=replaced(f"{members}/ca.pem", f"{other}.pem"))
    said.expect("broker", "fail", "certificate of broker 127.0.0.1:.* is not for '127.0.0.1'", "DNS name", edit=replaced(address, f"127.0.0.1:{fleet.port()}"))
    said.expect("broker", "fail", "localhost:1 can't be reached", "broker.addresses", edit=replaced(address, "localhost:1"))
    tasks, events = "queue flotilla.tasks.kvm1", "exchange flotilla.events"
    virtual_host, *rights = permissions_of(fleet, "kvm1")
    for given, subject, found, remedy in (
            (None, "broker", "virtual host|access", "permission|definitions"),
            (["^$", "^$", rights[2]], events, "refused|ACCESS_REFUSED", "permission|definitions"),
            (["^$", rights[1], "^$"], tasks, "refused|ACCESS_REFUSED", "permission|definitions")):
        try:
            if given:
                set_permissions(fleet, "kvm1", virtual_host, *given)
            else:
                fleet.rabbitmqctl("clear_permissions", "-p", virtual_host, "kvm1")
            said.expect(subject, "fail", found, remedy)
        finally:
            set_permissions(fleet, "kvm1", virtual_host, *rights)
    unreadable(fleet, said)
    fleet.kill("kvm1")
    said.expect(tasks, "warn", "nothing consumes it", "systemctl status flotilla-worker")
    fleet.rabbitmqctl("delete_queue", "flotilla.tasks.kvm1")
    said.expect(tasks, "fail", "does not exist", "start the coordinator|definitions")
    for name in ("coordinator", "kvm1"):
        fleet.kill(name)
        fleet.begin(name)
    fleet.wait_api()


def unreadable(fleet, said):
    """Dead letters that the coordinator may not read, where there are none and where there is one."""
    virtual_host, *rights = permissions_of(fleet, "coordinator")
    fleet.api("queue", "discard", "--all")
    connection, channel = connect(fleet, "coordinator")
    for found in ("empty", "1 waiting"):
        said.expect("queue flotilla.dead", "pass", f"may be read, {found}", "", role="coordinator")
        try:
            set_permissions(fleet, "coordinator", virtual_host, *rights[:2], "^flotilla\\.events\\.")
            said.expect("queue flotilla.dead", "fail", "ACCESS_REFUSED", "definitions", role="coordinator")
        finally:
            set_permissions(fleet, "coordinator", virtual_host, *rights)
        channel.basic_publish("flotilla.dead", "", b"", pika.BasicProperties(message_id="doctor"), mandatory=True)
    connection.close()
    fleet.api("queue", "discard", "--all")


def hosts(fleet, said):
    """What the coordinator knows of them."""
    clock = fleet.dir / "doctor/clock"
    clock.write_text("3600")
    fleet.kill("kvm1")
    fleet.begin("kvm1", FLEET_PRELOAD=str(compile_clock(fleet)), FLOTILLA_CLOCK=str(clock))
    wait(30, "the coordinator to hear of a wrong clock", lambda: b"in the future" in (
        fleet.dir / "log/coordinator.log").read_bytes())
    said.expect("clock of kvm1", "fail", "3(59|60)\\d s ahead", "NTP", role="coordinator")
    fleet.kill("kvm1")
    fleet.begin("kvm1")
    fleet.kill("coordinator")
    said.expect("hosts", "unknown", "does not answer", "start it", role="coordinator")
    fleet.begin("coordinator")
    fleet.wait_api()
    wait(30, "kvm1 to be heard of", lambda: said.examine("coordinator", fleet.dir / "coordinator.yaml")[0] == 0)
