"""A Redis Cluster of three masters under load: slots moved while they work, and masters failed over.

A moved slot costs nothing, a failover by order neither. A killed master may take with it what it acknowledged in its
last moment, since replication is asynchronous.
"""

import random
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from chaos import SECONDS, Load, seconds_left
from conftest import wait_until
from history import Loss, check

from task_streams import keys
from tutorial.topologies import Cluster, Node

pytestmark = pytest.mark.chaos

LAG_SECONDS = 1.0  # what a master acknowledged this long before its end has reached the replica
LEASE_SECONDS = 2.0
PAUSE_SECONDS = 0.001  # after each key of a moving slot, so that others come in between
MOST_STREAMS = 10  # whose slots are moved in one round


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "nodes", random.randrange(10_000, 20_000)) as cluster:
        yield cluster


@pytest.fixture
def load(cluster: Cluster, tmp_path: Path) -> Iterator[Load]:
    directory = tmp_path / "load"
    directory.mkdir()
    with Load(cluster.url, directory, lease_seconds=LEASE_SECONDS) as load:
        wait_for_work(load)
        yield load


def wait_for_work(load: Load) -> None:
    """Wait until some tasks more have begun."""
    begun = load.begun()
    wait_until(lambda: load.begun() >= begun + 40, "work goes on")


def move(cluster: Cluster, key: str) -> int:
    """Move a key's slot to another master; return how many keys that were."""
    masters = [cluster.master_of(of) for of in ("a", "b", "c")]  # which are in the slots of three masters
    target = next(node for node in masters if node is not cluster.master_of(key))
    return cluster.move_slot(key, target, lambda: time.sleep(PAUSE_SECONDS))


def test_moving_the_queues_slot_breaks_no_promise(cluster: Cluster, load: Load) -> None:
    """The slot of {task_queue}, with list, ledger, leases and records, goes from master to master, key by key."""
    deadline, moved = time.monotonic() + SECONDS, list[int]()
    while seconds_left(deadline) or not moved:
        moved.append(move(cluster, keys.QUEUE))
        wait_for_work(load)
    history = load.finish()

    print(f"{len(moved)} times moved, {max(moved)} keys at most; {load.refused} of {len(history.puts)} puts refused")
    assert max(moved) > 20, "the slot was empty"
    assert check(history) == []


def test_moving_the_slots_of_streams_breaks_no_promise(cluster: Cluster, load: Load) -> None:
    """While their tasks wait, run or are watched, the slots of their streams go to another master."""
    deadline, moved = time.monotonic() + SECONDS, list[int]()
    while seconds_left(deadline) or not moved:
        moved += [move(cluster, keys.stream(put.id)) for put in load.history.puts[-MOST_STREAMS:]]
        wait_for_work(load)
    history = load.finish()

    print(f"{len(moved)} slots moved, {sum(moved)} keys")
    assert check(history) == []


def test_failover_by_order_breaks_no_promise(cluster: Cluster, load: Load) -> None:
    """CLUSTER FAILOVER: the queue's master hands over to its replica, which has all its data first."""
    deadline = time.monotonic() + SECONDS
    for number in count():
        if number and not seconds_left(deadline):
            break
        replica = cluster.replica_of(cluster.master_of(keys.QUEUE))
        replica.client().execute_command("CLUSTER FAILOVER")
        wait_for_master(cluster, replica)
        wait_for_work(load)
        cluster.wait_until_healthy()
    history = load.finish()

    assert check(history) == []


@pytest.mark.smoke
def test_killed_master_costs_at_most_its_last_second(cluster: Cluster, load: Load) -> None:
    """kill -9 of the queue's master: its replica takes over, and what was acknowledged a second before is there."""
    deadline, losses = time.monotonic() + SECONDS, list[Loss]()
    while seconds_left(deadline) or not losses:
        old, killed = cluster.master_of(keys.QUEUE), time.monotonic()
        replica = cluster.replica_of(old)
        old.stop(signal.SIGKILL)
        wait_for_master(cluster, replica)
        losses.append(Loss(killed - LAG_SECONDS, killed, time.monotonic() + LEASE_SECONDS))
        wait_for_work(load)
        old.start()
        cluster.wait_until_healthy()
    history = load.finish()

    known = {task_id: record.get("data", "") for task_id, record in history.records.items()}
    lost = [put for put in history.puts if f'"mark": "{put.mark}"' not in known.get(put.id, "")]
    there = {fields.get("mark") for entries in history.streams.values() for _, fields in entries}
    added = [step.mark for step in history.steps if step.what == "added"]
    print(f"killed {len(losses)} time(s): lost {len(lost)} of {len(history.puts)} puts, ", end="")
    print(f"{len(set(added) - there)} of {len(added)} events")
    assert check(history, losses) == []


def wait_for_master(cluster: Cluster, node: Node) -> None:
    wait_until(lambda: node.client().info("replication")["role"] == "master", "the replica is the master")
    cluster.wait_until_healthy()
