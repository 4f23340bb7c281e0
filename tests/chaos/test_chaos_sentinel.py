"""A failover by Sentinel under load: the master killed, frozen, and awake again beside its successor.

Replication is asynchronous: what the master acknowledged in its last moment, its replica may not have. What that costs
is counted here. All else must hold: nothing twice, nothing out of order, every task that is left reaches its end.
"""

import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import Writer
from chaos import SECONDS, Load, seconds_left
from conftest import wait_until
from history import History, Loss, Put, check

from task_streams import Event, TaskQueue
from tutorial.topologies import HOST, Node, Sentinels

pytestmark = pytest.mark.chaos

LAG_SECONDS = 1.0  # what a master acknowledged this long before its end has reached the replica
LEASE_SECONDS = 2.0


def start(directory: Path, *options: str) -> Sentinels:
    (directory / "load").mkdir()
    first = random.randrange(10_000, 20_000)
    return Sentinels(directory / "servers", first, first + 10, *options)


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    with start(tmp_path) as servers:
        yield servers


def wait_for_failover(sentinels: Sentinels, old: Node) -> None:
    wait_until(lambda: sentinels.master() is not old, "the replica is the master")


def wait_for_work(load: Load, tasks: int) -> None:
    """Wait until so many tasks more have begun."""
    begun = load.begun()
    wait_until(lambda: load.begun() >= begun + tasks, "work goes on")


def demote(sentinels: Sentinels, old: Node) -> None:
    """Do at once what the sentinels do some ten seconds after a former master is back: make it a replica."""
    client = old.client()
    client.replicaof(HOST, sentinels.master().port)  # type: ignore[no-untyped-call]
    client.client_kill_filter(_type="normal")

    def is_replica() -> bool:
        replication = old.client().info("replication")
        if replication["role"] == "master":  # one that the sentinels have made master again, in between
            old.client().replicaof(HOST, sentinels.master().port)  # type: ignore[no-untyped-call]
        return replication.get("master_link_status") == "up"

    wait_until(is_replica, "it is a replica")


def lost_puts(history: History) -> list[Put]:
    """Return the puts that were acknowledged and whose task is no more, or another one has its id by now."""
    datas = {task_id: record.get("data", "") for task_id, record in history.records.items()}
    return [put for put in history.puts if f'"mark": "{put.mark}"' not in datas.get(put.id, "")]


def lost_events(history: History) -> int:
    """Return how many events were acknowledged and are not there."""
    there = {fields.get("mark") for entries in history.streams.values() for _, fields in entries}
    return sum(step.what == "added" and step.mark not in there for step in history.steps)


@pytest.mark.smoke
def test_killed_master_costs_at_most_its_last_second(sentinels: Sentinels, tmp_path: Path) -> None:
    """kill -9 of the master under load: work goes on at the new one; what was acknowledged a second before is there."""
    with Load(sentinels.url, tmp_path / "load", lease_seconds=LEASE_SECONDS) as load:
        wait_for_work(load, 40)
        losses, deadline = list[Loss](), time.monotonic() + SECONDS
        while seconds_left(deadline) or not losses:
            old, killed = sentinels.master(), time.monotonic()
            old.stop(signal.SIGKILL)
            wait_for_failover(sentinels, old)
            losses.append(Loss(killed - LAG_SECONDS, killed, time.monotonic() + LEASE_SECONDS))
            wait_for_work(load, 40)
            old.start()
            demote(sentinels, old)
        history = load.finish()

    report(f"killed {len(losses)} time(s)", history)
    assert check(history, losses) == []


def test_frozen_master_is_left_by_all(sentinels: Sentinels, tmp_path: Path) -> None:
    """SIGSTOP of the master under load: within their time-outs all clients go to the new one."""
    with Load(sentinels.url, tmp_path / "load", lease_seconds=LEASE_SECONDS) as load:
        wait_for_work(load, 40)
        old, frozen = sentinels.master(), time.monotonic()
        old.send(signal.SIGSTOP)
        wait_for_failover(sentinels, old)
        loss = Loss(frozen - LAG_SECONDS, frozen, time.monotonic() + LEASE_SECONDS)
        wait_for_work(load, 40)
        history = load.finish()

    report("frozen", history)
    assert check(history, [loss]) == []


@pytest.mark.parametrize("remedy", ["none", "min-replicas-to-write", "wait_replicas"])
def test_master_awake_beside_its_successor_takes_what_is_lost(tmp_path: Path, remedy: str) -> None:
    """A master frozen for a moment goes on beside the new one, with the clients that did not notice, until a sentinel
    makes it a replica: what it takes meanwhile is lost. With min-replicas-to-write that is what was on its way; with
    TaskQueue(wait_replicas=1) a put does not return before the replica has it."""
    refuses = ["--min-replicas-to-write", "1", "--min-replicas-max-lag", "2"]
    options = refuses if remedy == "min-replicas-to-write" else []
    with (
        start(tmp_path, *options) as sentinels,
        Load(sentinels.url, tmp_path / "load", lease_seconds=LEASE_SECONDS) as load,
    ):
        if remedy == "wait_replicas":
            load.queue = TaskQueue(load.client, wait_replicas=1)
        wait_for_work(load, 40)
        old, frozen = sentinels.master(), time.monotonic()
        old.send(signal.SIGSTOP)
        wait_for_failover(sentinels, old)
        old.send(signal.SIGCONT)
        if remedy != "min-replicas-to-write":
            wait_for_work(load, 40 if remedy == "none" else 1)  # at the old master
        else:
            wait_until(lambda: "NOREPLICAS" in load.said(), "the old master refuses")
        demote(sentinels, old)
        two_masters = Loss(frozen - LAG_SECONDS, time.monotonic(), time.monotonic() + 2 * LEASE_SECONDS)
        wait_for_work(load, 40)
        history = load.finish()

    report(f"two masters, {remedy}", history)
    lost, on_their_way = len(lost_puts(history)), 1  # one producer, which puts one at a time
    if remedy == "none":
        assert lost > on_their_way
    else:
        assert lost <= (on_their_way if remedy == "min-replicas-to-write" else 0)
    assert check(history, [two_masters]) == []


def report(what: str, history: History) -> None:
    """Print what was lost (pytest -rP shows it)."""
    added = sum(step.what == "added" for step in history.steps)
    print(
        f"{what}: lost {len(lost_puts(history))} of {len(history.puts)} puts, {lost_events(history)} of {added} events"
    )


def test_watcher_of_a_stream_that_lost_its_end_gets_reset(sentinels: Sentinels) -> None:
    """What it saw on the master whose data are discarded is taken back by `reset`; then comes what there is."""
    log, old, seen = Writer(sentinels.url), sentinels.master(), list[Event]()
    for step in ("a", "b"):
        log.add("processing", step=step)
    replica = sentinels.replica().client()
    wait_until(lambda: replica.xlen("task_logs:t") == 2, "the replica has them")
    watcher = threading.Thread(target=lambda: deque(map(seen.append, log.reader.follow())), daemon=True)
    watcher.start()
    wait_until(lambda: len(seen) == 2, "the watcher saw two")

    old.send(signal.SIGSTOP)
    wait_for_failover(sentinels, old)
    old.send(signal.SIGCONT)
    log.add("processing", step="lost")
    wait_until(lambda: len(seen) == 3, "the watcher saw the third")
    demote(sentinels, old)
    wait_until(lambda: len(seen) >= 6, "it sees all anew")
    log.add("completed", result="done")
    watcher.join(timeout=60)

    names = [event.fields.get("step", event.name) for event in seen]
    assert names == ["a", "b", "lost", "reset", "a", "b", "gap", "completed"]
    log.close()
