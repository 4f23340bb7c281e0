"""What is promised, tested by breaking things: kill -9, SIGSTOP, cut connections, restarts, a frozen server."""

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from attempts import Hand, Writer, end_lease
from conftest import BOTH_ENGINES, Proxy, Server, wait_until

from task_streams import Event, LogReader, TaskQueue, keys
from task_streams.claims import LEASE_SECONDS
from task_streams.leases import RECOVER_SECONDS

Start = Callable[..., "subprocess.Popen[str]"]
WORKER = "tests/programs.py"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def entries(journal: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal that workers write meanwhile; one that is killed may leave half a line."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [json.loads(line[line.rindex('{"what"') :]) for line in lines]


def all_ended(queue: TaskQueue) -> bool:
    return queue.owed() == 0


def check_streams(queue: TaskQueue, ids: list[str]) -> list[list[Event]]:
    """Check what every history must show, whatever happened; return the events of each task."""
    histories = []
    for task_id in ids:
        events = LogReader(task_id, queue.redis).read()
        names = [event.name for event in events]
        seqs = [int(event.id.split("-")[1]) for event in events]
        assert seqs == list(range(1, len(events) + 1)), f"task {task_id}: {names}"
        assert [event.is_terminal for event in events].count(True) == 1, f"task {task_id}: {names}"
        assert events[-1].is_terminal, f"task {task_id}: {names}"
        attempts = [event.fields["attempt"] for event in events if event.name == "started"]
        assert attempts == sorted(set(attempts)), f"task {task_id}: attempts {attempts}"
        epochs = [event.id.split("-")[0] for event in events]
        assert len(set(epochs)) == len(attempts), f"task {task_id}: attempts interleave: {epochs}"
        histories.append(events)
    assert queue.redis.zcard(keys.UNFINISHED) == 0
    assert queue.redis.zcard(keys.LEASES) == 0
    assert queue.redis.llen(keys.QUEUE) == 0
    return histories


def completed(history: list[Event]) -> bool:
    return history[-1].name == "completed"


@pytest.mark.parametrize(("tasks", "kills"), [(60, 5), pytest.param(600, 60, marks=pytest.mark.chaos)])
def test_kill_9_of_random_workers_loses_no_task(
    valkey: Server, script: Start, journal: Path, tasks: int, kills: int
) -> None:
    """3 workers at concurrency 5, one killed whenever some more is done: each task is completed, and ends once."""
    queue = TaskQueue(valkey.client())
    ids = [task.id for task in queue.put_many({"steps": 4, "seconds": 0.06} for _ in range(tasks))]
    command = [WORKER, str(journal), "--concurrency", "5", "--lease", "2", "--max-attempts", "1000"]
    workers = [script(valkey.url, *command, stderr=subprocess.DEVNULL) for _ in range(3)]
    chance = random.Random(1)

    for _ in range(kills):
        seen = len(entries(journal))
        wait_until(lambda seen=seen: len(entries(journal)) > seen + 5, "work is under way")  # type: ignore[misc]
        victim = chance.randrange(3)
        workers[victim].kill()
        workers[victim] = script(valkey.url, *command, stderr=subprocess.DEVNULL)
    wait_until(lambda: all_ended(queue), "all tasks ended", 120)

    histories = check_streams(queue, ids)
    assert all(completed(history) for history in histories)
    assert any(event.name == "worker_lost" for history in histories for event in history), "no kill hit a task"


@pytest.mark.parametrize("server", BOTH_ENGINES, indirect=True)
def test_worker_that_is_killed_loses_no_task_on_either_engine(server: Server, script: Start, journal: Path) -> None:
    """What a killed worker held, the next one does. (`make test` runs only this on redis-server, `make chaos` all.)"""
    queue = TaskQueue(server.client())
    task = queue.put({})
    script(server.url, WORKER, str(journal), "--lease", "1", env={"TASK_STREAMS_FAULT": "started"}).wait(timeout=60)

    script(server.url, WORKER, str(journal), "--burst").communicate(timeout=60)

    assert completed(check_streams(queue, [task.id])[0])


@pytest.mark.parametrize("point", ["popped", "claimed", "started", "handled", "completed"])
def test_kill_at_a_fault_point_loses_nothing(valkey: Server, script: Start, journal: Path, point: str) -> None:
    """A worker dies at this very line; the next one completes the task, and the stream ends once."""
    queue = TaskQueue(valkey.client())
    ids = [task.id for task in queue.put_many([{}, {}])]
    victim = script(valkey.url, WORKER, str(journal), "--lease", "1", env={"TASK_STREAMS_FAULT": point})
    victim.wait(timeout=60)

    script(valkey.url, WORKER, str(journal), "--burst").communicate(timeout=60)

    assert victim.returncode == -signal.SIGKILL
    assert all(completed(history) for history in check_streams(queue, ids))
    again = [entry for entry in entries(journal) if entry["id"] == ids[0] and entry["what"] == "begin"]
    assert len(again) == (2 if point == "handled" else 1), "run again only if its end was not yet written"


@pytest.mark.parametrize(("point", "begins"), [("error", 2), ("failed", 1)])
def test_kill_while_a_failure_is_written_ends_the_task_once(
    valkey: Server, script: Start, journal: Path, point: str, begins: int
) -> None:
    """Between `error` and `failed`, or behind `failed`: the task fails, and there is one dead letter."""
    queue = TaskQueue(valkey.client())
    task = queue.put({"then": "raise"})
    command = [WORKER, str(journal), "--max-attempts", "1"]
    victim = script(valkey.url, *command, "--lease", "1", env={"TASK_STREAMS_FAULT": point})
    victim.wait(timeout=60)

    script(valkey.url, *command, "--burst").communicate(timeout=60)

    assert victim.returncode == -signal.SIGKILL
    assert check_streams(queue, [task.id])[0][-1].name == "failed"
    assert [entry["what"] for entry in entries(journal)].count("begin") == begins
    assert queue.redis.llen(keys.DEAD) == 1


def test_kill_behind_cancelled_ends_the_task_once(valkey: Server, script: Start, journal: Path) -> None:
    """The worker of a task that is cancelled dies when it has written that."""
    queue = TaskQueue(valkey.client())
    task = queue.put({"seconds": 0.1, "steps": 10_000})
    victim = script(valkey.url, WORKER, str(journal), env={"TASK_STREAMS_FAULT": "cancelled"})
    wait_until(lambda: entries(journal), "the task runs")
    queue.cancel(task.id, "not wanted")
    victim.wait(timeout=60)

    script(valkey.url, WORKER, str(journal), "--burst").communicate(timeout=60)

    assert victim.returncode == -signal.SIGKILL
    assert check_streams(queue, [task.id])[0][-1].name == "cancelled"


def test_connection_cut_while_brpop_is_answered_loses_nothing(valkey: Server, script: Start, journal: Path) -> None:
    """The server pops the element, its answer never arrives: the audit finds the task, and it is completed once."""
    queue = TaskQueue(valkey.client())
    with Proxy(valkey.port, cut_before=b"task_queue") as proxy:
        script(proxy.url, WORKER, str(journal), stderr=subprocess.DEVNULL)
        wait_until(lambda: b"BRPOP" in proxy.seen, "the worker waits for a task")
        task = queue.put({})
        wait_until(lambda: proxy.cuts == 1, "the answer was cut")

        wait_until(lambda: all_ended(queue), "the task ended")

    assert [event.name for event in check_streams(queue, [task.id])[0]] == ["started", "progress", "completed"]


def test_killed_workers_task_runs_again(valkey: Server, script: Start, journal: Path) -> None:
    """After kill -9 another worker, which is there already, begins the task again when the lease is over."""
    queue = TaskQueue(valkey.client())
    task = queue.put({"seconds": 0.5, "steps": 200})
    command = [WORKER, str(journal), "--lease", "5"]
    victim = script(valkey.url, *command, stderr=subprocess.DEVNULL)
    wait_until(lambda: entries(journal), "the first attempt has begun")
    script(valkey.url, *command, stderr=subprocess.DEVNULL)
    victim.kill()
    victim.wait(timeout=60)
    lease_end = queue.redis.zscore(keys.LEASES, task.id)

    wait_until(lambda: len(entries(journal)) > 1, "the second attempt has begun")

    events = LogReader(task.id, queue.redis).read()
    lost = next(event for event in events if event.name == "worker_lost")
    assert entries(journal)[-1]["attempt"] == 2
    assert int(lost.id.split("-")[0]) >= lease_end


def test_default_lease_keeps_what_the_readme_says() -> None:
    """A killed worker's task runs again within 15 s: when its lease has ended, and somebody has looked."""
    assert LEASE_SECONDS + RECOVER_SECONDS < 15


@pytest.mark.parametrize("tasks", [250, pytest.param(1_000, marks=pytest.mark.chaos)])
def test_two_workers_never_hold_one_task(valkey: Server, script: Start, journal: Path, tasks: int) -> None:
    """Many tasks under load, workers killed and stopped meanwhile: no two runs of one task overlap in time."""
    queue = TaskQueue(valkey.client())
    ids = [task.id for task in queue.put_many({"steps": 2, "seconds": 0.02} for _ in range(tasks))]
    command = [WORKER, str(journal), "--concurrency", "5", "--lease", "1", "--max-attempts", "1000"]
    workers = [script(valkey.url, *command, stderr=subprocess.DEVNULL) for _ in range(3)]
    wait_until(lambda: len(entries(journal)) > 50, "work is under way")
    workers[0].kill()
    workers[1].send_signal(signal.SIGSTOP)
    workers.append(script(valkey.url, *command, stderr=subprocess.DEVNULL))

    wait_until(lambda: all_ended(queue), "all tasks ended", 120)
    workers[1].send_signal(signal.SIGCONT)

    histories = check_streams(queue, ids)
    assert all(completed(history) for history in histories)
    stopped = {workers[0].pid, workers[1].pid}  # their handlers were cut off, and say no `end` in time
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in entries(journal):
        runs.setdefault(entry["id"], []).append(entry)
    for run in runs.values():
        steps = [entry for entry in run if not (entry["what"] == "end" and entry["pid"] in stopped)]
        for entry, following in pairwise(steps):
            if entry["what"] == "begin" and entry["pid"] not in stopped:
                assert following["what"] == "end", f"two at a time: {run}"
                assert following["pid"] == entry["pid"], f"two at a time: {run}"


def test_stopped_worker_writes_nothing_after_its_lease(valkey: Server, script: Start, journal: Path) -> None:
    """SIGSTOP past the lease, another worker takes over; woken up, the first gets LeaseLost and is silent."""
    queue = TaskQueue(valkey.client())
    task = queue.put({"seconds": 0.2, "steps": 15})
    command = [WORKER, str(journal), "--lease", "3"]
    stopped = script(valkey.url, *command)
    wait_until(lambda: len(queue.redis.xrange(keys.stream(task.id))) > 3, "the first is at work")
    stopped.send_signal(signal.SIGSTOP)
    script(valkey.url, *command, "--burst").communicate(timeout=60)
    before = LogReader(task.id, queue.redis).read()

    stopped.send_signal(signal.SIGCONT)
    wait_until(lambda: {"end"} <= {e["what"] for e in entries(journal) if e["pid"] == stopped.pid}, "it gave up")
    stopped.terminate()
    _, errors = stopped.communicate(timeout=60)

    assert before[-1].name == "completed"
    assert LogReader(task.id, queue.redis).read() == before
    assert [event.name for event in before].count("worker_lost") == 1
    assert "the lease of task 1 is over" in errors or "task 1 is written by somebody else" in errors


def test_stopped_worker_alone_starts_a_new_attempt(valkey: Server, script: Start, journal: Path) -> None:
    """With no other worker around, a worker that was stopped past its lease writes nothing more for that attempt."""
    queue = TaskQueue(valkey.client())
    task = queue.put({"seconds": 0.2, "steps": 10})
    worker = script(valkey.url, WORKER, str(journal), "--lease", "3", stderr=subprocess.DEVNULL)
    wait_until(lambda: len(queue.redis.xrange(keys.stream(task.id))) > 3, "it is at work")
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: queue.redis.zscore(keys.LEASES, task.id) < time.time() * 1000 - 200, "the lease is over")
    before = LogReader(task.id, queue.redis).read()

    worker.send_signal(signal.SIGCONT)
    wait_until(lambda: all_ended(queue), "the task ended")

    history = check_streams(queue, [task.id])[0]
    assert completed(history)
    assert history[: len(before)] == before
    assert history[len(before)].name == "worker_lost"
    assert history[len(before)].id.split("-")[0] != before[-1].id.split("-")[0]


def test_frozen_server_doubles_no_task_and_no_event(valkey: Server) -> None:
    """The server stops for 6.5 s in the middle of puts and appends: each task and each event is there once."""
    writers = 4
    queues = [TaskQueue(valkey.client()) for _ in range(writers)]
    log = Writer(valkey.url)
    put: list[list[str]] = [[] for _ in range(writers)]
    added: list[str] = []
    woken = threading.Event()

    def go_on(count: int) -> bool:
        return count < 200 or not woken.is_set()

    def put_tasks(place: int) -> None:
        while go_on(len(put[place])):
            data = {"writer": place, "number": len(put[place])}
            tasks = [queues[place].put(data)] if place < 2 else queues[place].put_many([data] * 20)
            put[place] += [task.id for task in tasks]

    def add_events() -> None:
        while go_on(len(added)):
            added.append(log.add("progress", percent=len(added)))

    threads = [threading.Thread(target=put_tasks, args=(place,)) for place in range(writers)]
    threads.append(threading.Thread(target=add_events))
    for thread in threads:
        thread.start()
    wait_until(lambda: all(put) and added, "all are at work")

    valkey.send(signal.SIGSTOP)
    time.sleep(6.5)  # longer than the socket's time-out of 5 s: what was sent is sent again
    valkey.send(signal.SIGCONT)
    woken.set()
    for thread in threads:
        thread.join(timeout=60)

    ids = [task_id for part in put for task_id in part]
    listed = [str(json.loads(element)["id"]) for element in queues[0].redis.lrange(keys.QUEUE, 0, -1)]
    events = log.reader.read()
    log.close()
    assert sorted(listed) == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert [event.id for event in events] == added
    assert [event.fields["percent"] for event in events] == list(range(len(added)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_restart_loses_no_task(valkey: Server, script: Start, journal: Path, number: signal.Signals) -> None:
    """The server goes down in the middle of 100 tasks and comes back with its append-only file: none is lost."""
    client = valkey.client()
    client.config_set("appendfsync", "always")
    queue = TaskQueue(client)
    ids = [task.id for task in queue.put_many({"steps": 2, "seconds": 0.05} for _ in range(100))]
    command = [WORKER, str(journal), "--concurrency", "5", "--lease", "3", "--max-attempts", "100"]
    workers = [script(valkey.url, *command) for _ in range(2)]
    wait_until(lambda: len(entries(journal)) > 50, "a part is done")

    valkey.stop(number)
    time.sleep(1.5)  # down for so long that the workers cannot but notice
    valkey.start()
    wait_until(lambda: all_ended(queue), "all tasks ended")
    for worker in workers:
        worker.terminate()
    errors = [worker.communicate(timeout=60)[1] for worker in workers]

    assert all(completed(history) for history in check_streams(queue, ids))
    for text in errors:
        assert text.count("Redis does not serve") == 1, text
        assert text.count("Redis serves again") == 1, text
        assert "Traceback" not in text


def test_nothing_is_left_without_a_ttl(valkey: Server, script: Start, journal: Path) -> None:
    """After all is finished, every key left has a TTL or is one of the fixed ones."""
    queue = TaskQueue(valkey.client())
    kinds = [{}, {"then": "raise once"}, {"then": "raise"}, {"then": "give up"}, {"then": "return nonsense"}]
    queue.put_many(kinds)
    queue.put({}, id="own")
    cancelled = queue.put({})
    queue.cancel(cancelled.id, "not wanted")
    queue.redis.lpush(keys.QUEUE, '{"id": "by-hand", "data": {}}', "nonsense")
    script(valkey.url, WORKER, str(journal), "--burst", "--lease", "5", "--backoff", "0.1").communicate(timeout=60)

    left = {key: queue.redis.ttl(key) for key in queue.redis.scan_iter()}

    assert queue.owed() == 0
    assert [key for key, ttl in left.items() if ttl < 0 and key not in keys.FIXED] == []
    assert len(left) > 3 * len(kinds)


def test_waiting_tasks_are_not_pushed_again_and_again(empty_valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that were pushed again wait behind busy workers, in no order: audit after audit adds no copies."""
    monkeypatch.setattr("task_streams.queue.AUDIT_GRACE_MS", 0)
    queue, worker = TaskQueue(empty_valkey.client()), Hand(empty_valkey.url)
    queue.put_many({"n": n} for n in range(50))
    for _ in range(30):
        end_lease(queue, worker.take().id)
    worker.close()
    assert queue.recover() == 30
    waiting = queue.redis.llen(keys.QUEUE)

    pushed = [queue.recover() for _ in range(50)]

    assert waiting == 50
    assert queue.redis.llen(keys.QUEUE) == 50
    assert not any(pushed)
