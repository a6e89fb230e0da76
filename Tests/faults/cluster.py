"""A fleet whose three brokers have a network that can be cut."""

import contextlib
import functools
import subprocess
import time

from fleet import HOSTS, LEASE, ROOT, Fleet, Violation, verdict, wait

PEERS = (1, 2, 3)


def run(*words, node=None):
    inside = [] if node is None else ["nsenter", f"--net=/run/netns/rabbit{node}"]
    return subprocess.run([*inside, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout


class Network:
    """A bridge with a network namespace for each broker: rabbit1 is 10.77.0.1. `run` gave this process a network and
    mounts of its own, so that nothing of it is seen elsewhere, and all of it ends with the process."""

    def __init__(self, folder):
        run("mount", "-t", "tmpfs", "none", "/run/netns")
        hosts = folder.with_suffix(".hosts")
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{node} rabbit{node}\n" for node in PEERS))
        run("mount", "--bind", hosts, "/etc/hosts")
        run("ip", "link", "add", "brokers", "type", "bridge")
        run("ip", "address", "add", "10.77.0.254/24", "dev", "brokers")
        run("ip", "link", "set", "brokers", "up")
        for node in PEERS:
            run("ip", "netns", "add", f"rabbit{node}")
            run("ip", "link", "add", f"to{node}", "type", "veth", "peer", "name", "net", "netns", f"rabbit{node}")
            run("ip", "link", "set", f"to{node}", "master", "brokers", "up")
            run("ip", "address", "add", f"10.77.0.{node}/24", "dev", "net", node=node)
            for device in ("lo", "net"):
                run("ip", "link", "set", device, "up", node=node)

    def cut(self, node, peers_only):
        """From the other brokers alone, so that coordinator and workers still reach it, or from everybody. Packets in both
        directions go to an address that nobody has; neither side hears of it."""
        for ends in self.ends(node) if peers_only else [*self.ends(node), *self.ends(node, None)]:
            for (inside, device), address in ends:
                run("ip", "neigh", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", device, "nud", "permanent",
                    node=inside)

    def heal(self, node):
        for ends in [*self.ends(node), *self.ends(node, None)]:
            for (inside, device), address in ends:
                subprocess.run(["nsenter", *([f"--net=/run/netns/rabbit{inside}"] if inside else []), "ip", "neigh", "del",
                                address, "dev", device], check=False, stderr=subprocess.DEVNULL)

    def ends(self, node, *others):
        """Both ends of the ways from a node to its peers, or to this process."""
        for other in others or [peer for peer in PEERS if peer != node]:
            there = (other, "net") if other else (None, "brokers")
            yield (((node, "net"), f"10.77.0.{other or 254}"), (there, f"10.77.0.{node}"))


def leader(fleet, queue, asked):
    for line in fleet.rabbitmqctl("list_queues", "name", "leader", "--no-table-headers", node=asked).splitlines():
        name, _, node = line.partition("\t")
        if name == queue:
            return int(node.rpartition(".")[2])
    raise Violation(f"{queue} has no leader")


@contextlib.contextmanager
def clustered(outer):
    """A fleet of its own beside the outer one, with three brokers, and their network."""
    network = make_network(outer.dir)
    fleet = Fleet(outer.dir.with_name(outer.dir.name + "-cluster"), outer.flotilla, outer.guest, nodes=len(PEERS),
                  FLEET_NAMESPACES="yes")
    fleet.start()
    try:
        yield fleet, network
    except Violation as violation:
        raise Violation(f"{violation}\n  of the cluster in {fleet.dir}") from violation
    finally:
        fleet.stop()


# The process has one.
make_network = functools.cache(Network)


def leader_partitioned(outer):
    """3 brokers, of which the leader of a queue is cut off: from its peers, then from everybody"""
    with clustered(outer) as (fleet, network):
        for queue in ("flotilla.events.coordinator", "flotilla.tasks.kvm1"):
            for peers_only in (True, False):
                node = leader(fleet, queue, 1)
                witness = next(peer for peer in PEERS if peer != node)
                fleet.submit(HOSTS)
                wait(60, "a conversion", lambda: fleet.in_stage("convert"))
                network.cut(node, peers_only)
                try:
                    wait(60, f"another leader of {queue}", lambda: leader_or_none(fleet, queue, witness) not in (None, node))
                    time.sleep(LEASE)  # the outage, beyond the election
                finally:
                    network.heal(node)
                fleet.submit(["kvm1"])
                fleet.wait_ended(240)
                bring_back(fleet, node)
                print(f"  {queue} on node {node}, cut off from {'its peers' if peers_only else 'everybody'}: "
                      f"{fleet.judge()}", flush=True)
        return verdict(*fleet.total)


def leader_or_none(fleet, queue, asked):
    try:
        return leader(fleet, queue, asked)
    except (subprocess.CalledProcessError, ValueError, Violation):
        return None


def kill_node(fleet, node):
    run(ROOT / "Tests/testbeds/rabbitmq/run", "kill", "--dir", fleet.dir / "rabbitmq", "--node", node)


def start_node(fleet, node):
    run(ROOT / "Tests/testbeds/rabbitmq/run", "start", "--tls-from", fleet.dir / "broker-tls", "--nodes", len(PEERS),
        "--namespaces", "--dir", fleet.dir / "rabbitmq", "--node", node)


def bring_back(fleet, node, starts=False):
    """RabbitMQ's own affair: a node of the minority starts anew, and waits for its tables 30 s at a time. Erlang's `global` may
    hang in that (RabbitMQ's log: "Global hang workaround"); then somebody has to start the node again.

    - starts: it was killed"""
    try:
        if starts:
            start_node(fleet, node)
        wait(120, f"node {node} to be back", lambda: is_back(fleet, node))
    except (Violation, subprocess.CalledProcessError):
        kill_node(fleet, node)
        start_node(fleet, node)
        print(f"  RabbitMQ on node {node} hung in its start and was started again", flush=True)
        wait(240, f"node {node} to be back", lambda: is_back(fleet, node))


def is_back(fleet, node):
    try:
        fleet.rabbitmqctl("await_online_nodes", "3", "--timeout", "1", node=node, complaints=subprocess.DEVNULL)
        return True
    except subprocess.CalledProcessError:
        return False
