"""The loop around a handler: what a worker does with every kind of task, signal and trouble."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import programs
import pytest
from attempts import attempts, end_lease, popped, run
from conftest import Proxy, Server, wait_until
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

import consumer
from task_streams import (
    BlockingLog,
    Event,
    LogReader,
    NoSuchTask,
    StreamEnded,
    Task,
    TaskLog,
    TaskQueue,
    keys,
    run_worker,
)
from task_streams import worker as worker_module
from task_streams.claims import Claims
from task_streams.queue import MAX_DEPTH
from task_streams.worker import work

Start = Callable[..., "subprocess.Popen[str]"]
Work = Callable[..., "tuple[int, str]"]
WORKER = "tests/programs.py"


@pytest.fixture
def queue(valkey: Server) -> TaskQueue:
    return TaskQueue(valkey.client())


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def worker(valkey: Server, script: Start, journal: Path) -> Start:
    """Start a worker in the background: worker("--lease", "1")."""
    return lambda *options: script(valkey.url, WORKER, str(journal), *options)


@pytest.fixture
def drain(valkey: Server, journal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Work:
    """Run a worker in this process until nothing is owed; return its exit code and what it logged."""

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setenv("REDIS_URL", valkey.url)
        monkeypatch.setattr(
            sys, "argv", [WORKER, str(journal), "--burst", "--lease", "5", "--backoff", "0.2", *options]
        )
        return programs.main(), caplog.text

    return run


def events_of(queue: TaskQueue, task_id: str) -> list[Event]:
    return LogReader(task_id, queue.redis).read()


def names(queue: TaskQueue, task_id: str) -> list[str]:
    return [event.name for event in events_of(queue, task_id)]


def blocked(queue: TaskQueue) -> int:
    """Return how many clients wait in a blocking command."""
    return int(queue.redis.info("clients")["blocked_clients"])


def is_busy(queue: TaskQueue) -> bool:
    try:
        return not queue.redis.ping()
    except ResponseError as error:
        return str(error).startswith("BUSY ")


def begun(journal: Path) -> list[dict[str, Any]]:
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []  # the last may be half written
    return [entry for entry in map(json.loads, lines) if entry["what"] == "begin"]


# -- outcomes ---------------------------------------------------------------------------------------------------


def test_task_is_completed_with_the_handlers_result(queue: TaskQueue, drain: Work) -> None:
    """The stream says started, the handler's events, completed with result and duration; the record agrees."""
    task = queue.put({})

    code, errors = drain()

    events = events_of(queue, task.id)
    assert [event.name for event in events] == ["started", "progress", "completed"]
    assert set(events[-1].fields) == {"timestamp", "result", "duration_ms"}
    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["result"]) == ("completed", {"attempt": 1})
    assert code == 0
    assert "Traceback" not in errors


def test_failing_task_is_retried_with_backoff_then_given_up(queue: TaskQueue, drain: Work) -> None:
    """Three attempts, each with its error; the pauses double; then failed, and the task is in `dead`."""
    task = queue.put({"then": "raise"})

    drain()

    events = events_of(queue, task.id)
    assert [e.name for e in events] == ["started", "progress", "error"] * 3 + ["failed"]
    errors = [e.fields for e in events if e.name == "error"]
    assert [(e["error"], e["error_type"], e["will_retry"]) for e in errors] == [
        ("as told", "RuntimeError", True),
        ("as told", "RuntimeError", True),
        ("as told", "RuntimeError", False),
    ]
    assert events[-1].fields["attempts"] == 3
    at = [int(e.id.split("-")[0]) for e in events if e.name in ("started", "error")]
    assert at[2] - at[1] >= 200
    assert at[4] - at[3] >= 400
    letter = json.loads(queue.redis.lrange(keys.DEAD, 0, -1)[0])
    assert letter == {"id": task.id, "data": {"then": "raise"}, "reason": "as told", "attempts": 3}


class Busy(Exception):
    def __init__(self, retry_after_seconds: Any) -> None:
        super().__init__("busy")
        self.retry_after_seconds = retry_after_seconds


@pytest.mark.parametrize(
    ("asked", "rest"),
    [(900, 900), (10**9, 3600), (float("inf"), 3600), (1, 60), (-5, 60), (float("nan"), 60), (None, 60)],
)
def test_exception_may_ask_for_a_longer_rest(valkey: Server, queue: TaskQueue, asked: Any, rest: int) -> None:
    """The next attempt is not before its retry_after_seconds, nor before the backoff (60 s), but within an hour."""
    task = queue.put({})

    async def handle(task: Task, log: TaskLog) -> None:
        raise Busy(asked)

    async def work_until_it_rests() -> None:
        working = asyncio.create_task(work(handle, url=valkey.url, backoff_seconds=60))
        while queue.redis.hget(keys.record(task.id), "status") != "retrying":
            await asyncio.sleep(0.01)
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working

    asyncio.run(asyncio.wait_for(work_until_it_rests(), 60))

    due = queue.redis.zscore(keys.LEASES, task.id)
    assert due is not None
    begun_ms, now_seconds = int(events_of(queue, task.id)[0].id.split("-")[0]), queue.redis.time()[0]
    assert begun_ms / 1000 + rest <= due / 1000 <= now_seconds + 1 + rest


def test_task_that_fails_once_is_completed(queue: TaskQueue, drain: Work) -> None:
    """The second attempt succeeds, and burst waits for it."""
    task = queue.put({"then": "raise once"})

    drain()

    assert names(queue, task.id) == ["started", "progress", "error", "started", "progress", "completed"]


def test_permanent_failure_is_not_retried(queue: TaskQueue, drain: Work) -> None:
    """PermanentFailure fails the task at once, without a traceback in the worker's log."""
    task = queue.put({"then": "give up"})

    _, errors = drain()

    assert names(queue, task.id) == ["started", "progress", "error", "failed"]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("then", "kind"), [("exit", "SystemExit"), ("return nonsense", "TypeError"), ("be cancelled", "CancelledError")]
)
def test_handler_cannot_stop_the_worker(queue: TaskQueue, drain: Work, then: str, kind: str) -> None:
    """sys.exit(), asyncio's CancelledError and a result that is not JSON are failures of that task only."""
    bad, good = queue.put_many([{"then": then}, {}])

    drain("--max-attempts", "1")

    assert events_of(queue, bad.id)[-2].fields["error_type"] == kind
    assert names(queue, bad.id)[-1] == "failed"
    assert names(queue, good.id)[-1] == "completed"


def test_malformed_elements_do_not_stop_the_worker(queue: TaskQueue, drain: Work) -> None:
    """What is no task goes to `dead` with the reason, and the task after it is done."""
    queue.redis.lpush(keys.QUEUE, b"\xff\xfe", "nonsense", "[1]", '{"id": 1}', '{"id": 2.5, "data": 1}', "[" * 100_000)
    task = queue.put({}, id="good")

    drain()

    reasons = [json.loads(letter)["reason"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)]
    assert len(reasons) == 6
    assert all(reasons)
    assert names(queue, task.id)[-1] == "completed"


def test_task_pushed_by_hand_is_done(queue: TaskQueue, drain: Work) -> None:
    """An element that any client pushed becomes a task like any other."""
    queue.redis.lpush(keys.QUEUE, '{"id":"by-hand","data":{}}')

    drain()

    assert names(queue, "by-hand") == ["started", "progress", "completed"]


def test_tasks_run_at_the_same_time(queue: TaskQueue, drain: Work, journal: Path) -> None:
    """With --concurrency 10, ten tasks are under way at once."""
    queue.put_many({"seconds": 0.5} for _ in range(10))

    drain("--concurrency", "10")

    begins = [entry["at"] for entry in begun(journal)]
    ends = [json.loads(line)["at"] for line in journal.read_text().splitlines() if '"end"' in line]
    assert max(begins) < min(ends)


def test_task_that_is_nested_as_deep_as_put_allows_is_completed(queue: TaskQueue, drain: Work) -> None:
    """What put takes, a worker can read."""
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    task = queue.put(deep)

    drain()

    assert names(queue, task.id)[-1] == "completed"


def test_worker_that_dies_on_a_task_again_and_again_gives_it_up(
    queue: TaskQueue, worker: Start, drain: Work, journal: Path
) -> None:
    """A task that kills its worker five times fails, instead of killing workers for ever."""
    task = queue.put({"seconds": 30})
    for attempt in range(1, 6):
        victim = worker("--lease", "1")
        wait_until(lambda attempt=attempt: len(begun(journal)) == attempt, f"attempt {attempt}")  # type: ignore[misc]
        victim.kill()
        victim.wait()

    drain()

    assert names(queue, task.id)[-3:] == ["worker_lost", "started", "failed"]
    assert queue.redis.llen(keys.DEAD) == 1


def test_handler_does_not_start_if_the_claims_reply_came_too_late(
    valkey: Server, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reply comes when its lease is over: only a later attempt reaches the handler."""
    task = queue.put({})
    claim, attempts = Claims.claim, list[int]()

    async def claim_late(self: Claims, elements: Any) -> list[Task]:
        claimed = await claim(self, elements)
        if any(one.attempt == 1 for one in claimed):
            await asyncio.sleep(self.lease_seconds)
        return claimed

    monkeypatch.setattr(Claims, "claim", claim_late)

    run_worker(lambda task, log: attempts.append(task.attempt), url=valkey.url, burst=True, lease_seconds=1)

    assert attempts
    assert 1 not in attempts
    assert names(queue, task.id)[-1] == "completed"


def test_thread_that_a_handler_left_behind_cannot_write_after_completed(valkey: Server, queue: TaskQueue) -> None:
    """It adds when the task has ended: it gets StreamEnded."""
    task = queue.put({})
    left = list[Future[Any]]()

    with ThreadPoolExecutor() as threads:

        def add_late(log: BlockingLog) -> None:
            wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task has ended")
            log.add("progress", percent=1)

        async def handler(_task: Task, log: TaskLog) -> None:
            left.append(threads.submit(add_late, BlockingLog(log, asyncio.get_running_loop())))

        async def both() -> None:
            await work(handler, url=valkey.url, burst=True)
            await asyncio.wait([asyncio.wrap_future(left[0])], timeout=60)

        asyncio.run(both())

    assert [type(one.exception()) for one in left] == [StreamEnded]
    assert names(queue, task.id) == ["started", "completed"]


def test_plain_function_runs_in_a_thread_with_the_same_log(queue: TaskQueue, drain: Work) -> None:
    task = queue.put({"steps": 3})

    drain("--blocking")

    assert names(queue, task.id) == ["started", *["progress"] * 3, "completed"]


def test_worker_is_known_by_the_name_of_its_connection(queue: TaskQueue, worker: Start) -> None:
    """CLIENT LIST tells who is alive: worker:<host>:<pid>."""
    process = worker()
    wait_until(lambda: blocked(queue) == 1, "it waits in BRPOP")

    names_of_clients = [one["name"] for one in queue.redis.client_list()]
    process.terminate()

    assert any(re.fullmatch(f"worker:[^ ]+:{process.pid}", name) for name in names_of_clients)


# -- stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_tasks_finish(
    queue: TaskQueue, worker: Start, journal: Path, number: signal.Signals
) -> None:
    """After SIGTERM or Ctrl-C the running task is completed, no other is taken, and the exit code is 0."""
    running, waiting = queue.put_many([{"seconds": 0.7}, {}])
    process = worker()
    wait_until(lambda: begun(journal), "the task runs")

    process.send_signal(number)
    _, errors = process.communicate(timeout=60)

    assert names(queue, running.id)[-1] == "completed"
    assert names(queue, waiting.id) == []
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_tasks_that_outlast_the_grace_are_handed_back(
    queue: TaskQueue, worker: Start, drain: Work, journal: Path
) -> None:
    """What is not done within --grace runs again at once, before its lease would have ended, and no failure counts."""
    task = queue.put({"seconds": 3})
    process = worker("--grace", "0.3", "--lease", "60")
    wait_until(lambda: begun(journal), "the task runs")

    process.terminate()
    process.communicate(timeout=60)
    assert queue.redis.zcard(keys.LEASES) == 0
    drain()

    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["attempts"], record["failures"]) == ("completed", 2, 0)
    assert names(queue, task.id) == ["started", "progress", "started", "progress", "completed"]


def test_second_ctrl_c_leaves_at_once(queue: TaskQueue, worker: Start, journal: Path) -> None:
    """The second Ctrl-C does not wait for the grace; the task is handed back, the exit code is 130."""
    queue.put({"seconds": 600})
    process = worker("--grace", "600")
    wait_until(lambda: begun(journal), "the task runs")

    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "stopping" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)

    assert process.returncode == 130
    assert queue.redis.llen(keys.QUEUE) == 1


def test_task_that_comes_while_a_worker_stops_is_left_in_the_queue(queue: TaskQueue, worker: Start) -> None:
    """What BRPOP still brings after SIGTERM is put back, even where it was pushed by hand and has no record yet."""
    process = worker("--grace", "0")
    assert process.stderr is not None
    assert "waits for tasks" in process.stderr.readline()
    wait_until(lambda: blocked(queue) == 1, "it waits in BRPOP")

    process.terminate()
    queue.redis.lpush(keys.QUEUE, '{"id": "by-hand", "data": {}}')
    process.communicate(timeout=60)

    assert process.returncode == 0
    assert queue.redis.lrange(keys.QUEUE, 0, -1) == ['{"id": "by-hand", "data": {}}']
    assert "completed" not in names(queue, "by-hand")  # the two may arrive at once: then it began, and was handed back


def test_task_whose_claim_was_not_answered_is_handed_back(
    valkey: Server, queue: TaskQueue, script: Start, drain: Work, journal: Path
) -> None:
    """The server claims it, no answer arrives, SIGTERM comes: it is in the list at once, and no worker was lost."""
    task = queue.put({})
    with Proxy(valkey.port, cut_before=b"claimed", most_cuts=1_000) as proxy:
        process = script(proxy.url, WORKER, str(journal), "--lease", "60")
        wait_until(lambda: proxy.cuts >= 2, "the claim was repeated")
        process.terminate()
        process.communicate(timeout=60)

    found = (queue.get(task.id) or {})["status"], queue.redis.llen(keys.QUEUE), queue.redis.zcard(keys.LEASES)
    drain()

    assert found == ("waiting", 1, 0)
    assert names(queue, task.id) == ["started", "started", "progress", "completed"]


def test_second_ctrl_c_does_not_wait_for_a_frozen_server(
    valkey: Server, queue: TaskQueue, worker: Start, journal: Path
) -> None:
    """Twelve tasks run and the server is silent: it is asked once to take all back, not once for each."""
    queue.put_many({"seconds": 600} for _ in range(12))
    process = worker("--concurrency", "12", "--lease", "600")
    wait_until(lambda: len(begun(journal)) == 12, "the tasks run")

    valkey.send(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    valkey.send(signal.SIGCONT)

    assert process.returncode == 130
    assert "12 task(s) not handed back" in errors


def test_burst_waits_for_what_a_dead_worker_left(queue: TaskQueue, worker: Start, drain: Work, journal: Path) -> None:
    """Burst ends when nothing is owed: it takes over the task of a worker that was killed."""
    task = queue.put({"seconds": 0.5})
    victim = worker("--lease", "1")
    wait_until(lambda: begun(journal), "the task runs")
    victim.kill()

    code, _ = drain()

    assert code == 0
    assert names(queue, task.id)[-1] == "completed"


# -- Redis away, full, read-only --------------------------------------------------------------------------------


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """Where a worker's stderr goes, to be read while it runs: script(…, stderr=said.open("w"))."""
    return tmp_path / "said"


def says_once(said: Path, went: str) -> None:
    """Check that trouble and its end were each said in one line, and nothing was a traceback."""
    wait_until(lambda: "Redis serves again" in said.read_text(), "it says that Redis is back")
    lines = said.read_text().splitlines()
    assert sum("Redis does not serve" in line and went in line for line in lines) == 1, lines
    assert sum("Redis serves again" in line for line in lines) == 1, lines
    assert not any("Traceback" in line for line in lines)


def test_idle_worker_survives_a_restart_and_says_so_once(
    valkey: Server, queue: TaskQueue, script: Start, journal: Path, said: Path
) -> None:
    """The server is away for two seconds: one line when it goes, one when it is back, then tasks are done."""
    with said.open("w") as stderr:
        script(valkey.url, WORKER, str(journal), stderr=stderr)
    wait_until(lambda: any(c["cmd"] == "brpop" for c in queue.redis.client_list()), "the worker waits")

    valkey.stop()
    time.sleep(2)  # away for so long that it fails more than once
    valkey.start()
    task = queue.put({})

    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task is done")
    says_once(said, "onnection")


def spoil_memory(client: "Redis") -> None:
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1")


def restore_memory(client: "Redis") -> None:
    client.config_set("maxmemory", "0")


def spoil_role(client: "Redis") -> None:
    client.config_set("replica-serve-stale-data", "yes")
    client.replicaof("127.0.0.1", "1")


def restore_role(client: "Redis") -> None:
    client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("spoil", "restore", "word"), [(spoil_memory, restore_memory, "memory"), (spoil_role, restore_role, "read only")]
)
@pytest.mark.parametrize("running", [False, True])
def test_worker_waits_for_a_server_that_cannot_write(
    server: Server,
    script: Start,
    journal: Path,
    said: Path,
    running: bool,
    spoil: Callable[["Redis"], None],
    restore: Callable[["Redis"], None],
    word: str,
) -> None:
    """Memory full or a replica, with a task waiting or under way: the worker says so once, waits, and goes on."""
    queue = TaskQueue(server.client())
    command = [WORKER, str(journal), "--lease", "20"]
    task = queue.put({"seconds": 0.1, "steps": 10})
    with said.open("w") as stderr:
        if running:
            script(server.url, *command, stderr=stderr)
            wait_until(lambda: begun(journal), "the task runs")
        spoil(queue.redis)
        if not running:
            script(server.url, *command, stderr=stderr)
    wait_until(lambda: "Redis does not serve" in said.read_text(), "the worker has noticed")
    time.sleep(2)  # spoilt for so long that many tries fail

    restore(queue.redis)
    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task is done")

    says_once(said, word)
    assert names(queue, task.id).count("started") == 1


def test_leases_are_renewed_while_memory_is_full(server: Server, script: Start, journal: Path) -> None:
    """In full memory a running task keeps its lease, and is completed by its first attempt."""
    queue = TaskQueue(server.client())
    task = queue.put({"seconds": 8, "steps": 1})
    process = script(server.url, WORKER, str(journal), "--lease", "3")
    wait_until(lambda: begun(journal), "the task runs")

    spoil_memory(queue.redis)
    ends = {queue.redis.zscore(keys.LEASES, task.id)}
    wait_until(lambda: ends.add(queue.redis.zscore(keys.LEASES, task.id)) or len(ends) > 4, "it is renewed four times")
    restore_memory(queue.redis)
    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task is done")
    process.terminate()

    assert names(queue, task.id) == ["started", "progress", "completed"]


def test_spoilt_record_of_one_task_does_not_disturb_the_others(queue: TaskQueue, worker: Start, journal: Path) -> None:
    """A running task's record gets a wrong type: the one beside it keeps its lease, and the next one is done."""
    spoilt, other = queue.put_many([{"seconds": 60}, {"seconds": 0.1, "steps": 30}])
    process = worker("--concurrency", "2", "--lease", "3")
    wait_until(lambda: len(begun(journal)) == 2, "both run")

    queue.redis.delete(keys.record(spoilt.id))
    queue.redis.set(keys.record(spoilt.id), "spoilt")
    wait_until(lambda: names(queue, other.id)[-1:] == ["completed"], "the other one is done")
    after = queue.put({})
    wait_until(lambda: names(queue, after.id)[-1:] == ["completed"], "the next one is done")

    assert process.poll() is None
    assert names(queue, other.id).count("started") == 1


# -- cancelling -------------------------------------------------------------------------------------------------


def test_waiting_task_is_cancelled_at_once(queue: TaskQueue, drain: Work, journal: Path) -> None:
    """It ends without a worker; its element is dropped when it is popped."""
    task = queue.put({})

    outcome = queue.cancel(task.id, "not wanted")
    drain()

    assert outcome == "cancelled"
    assert names(queue, task.id) == ["cancelled"]
    assert begun(journal) == []


def test_running_task_stops_at_its_next_step(queue: TaskQueue, worker: Start, journal: Path) -> None:
    """Where nobody hears the message, the next heartbeat tells its worker; the stream ends in cancelled."""
    task = queue.put({"seconds": 0.1, "steps": 1000})
    process = worker("--lease", "3")
    wait_until(lambda: begun(journal), "the task runs")

    queue.redis.hset(keys.record(task.id), "cancel", "not wanted")  # what cancel() does, without the message
    wait_until(lambda: names(queue, task.id)[-1:] == ["cancelled"], "it is cancelled")
    wait_until(lambda: queue.owed() == 0, "nothing is owed")
    process.terminate()

    assert events_of(queue, task.id)[-1].fields["reason"] == "not wanted"


def test_running_task_is_told_by_a_message(queue: TaskQueue, worker: Start, journal: Path) -> None:
    """With a heartbeat every 200 s, the message alone lets its worker look at the record at once."""
    task = queue.put({"seconds": 0.1, "steps": 1000})
    process = worker("--lease", "600")
    wait_until(lambda: begun(journal), "the task runs")

    outcome = queue.cancel(task.id, "not wanted")
    wait_until(lambda: names(queue, task.id)[-1:] == ["cancelled"], "it is cancelled")
    process.terminate()

    assert outcome == "requested"
    assert events_of(queue, task.id)[-1].fields["reason"] == "not wanted"


def test_message_about_a_task_that_is_not_to_be_cancelled_does_nothing(
    queue: TaskQueue, worker: Start, journal: Path
) -> None:
    """Anybody may publish; it is the record that counts."""
    task = queue.put({"seconds": 0.1, "steps": 10})
    process = worker()
    wait_until(lambda: begun(journal), "the task runs")

    for message in (task.id, "nonsense", "[1, 2]", b"\xff"):
        queue.redis.publish(keys.CANCEL_CHANNEL, message)
    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "it is completed")
    process.terminate()


def test_cancelled_task_leaves_no_element(queue: TaskQueue) -> None:
    """Its element would outlive its record, and then run as a task pushed by hand."""
    task = queue.put({})

    queue.cancel(task.id, "not wanted")

    assert queue.redis.llen(keys.QUEUE) == 0


def test_task_whose_worker_died_before_finish_is_closed_by_cancelling(valkey: Server, queue: TaskQueue) -> None:
    """Its stream has ended: that counts, and the error says so."""
    task = queue.put({})

    async def die_before_finish() -> None:
        async with attempts(valkey.url) as dying:
            _, log = await dying.claim(popped(queue.redis))
            queue.redis.xadd(keys.stream(task.id), {"event": "completed", "result": "7"}, id=f"{log.epoch}-2")

    run(die_before_finish)
    end_lease(queue, task.id)
    assert queue.recover() == 1

    with pytest.raises(ValueError, match="has ended already: completed"):
        queue.cancel(task.id, "too late")

    record = queue.get(task.id) or {}
    assert (record["status"], record["result"]) == ("completed", 7)


# -- time limits, and handlers that don't stop --------------------------------------------------------------------


async def never(_task: Task, log: TaskLog) -> None:
    await log.add("progress", percent=1)
    await asyncio.sleep(10**6)


async def deaf(_task: Task, log: TaskLog) -> None:
    """Swallow every cancellation, until the test is over."""
    await log.add("progress", percent=1)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10**6)


def test_handler_that_never_returns_ends_by_its_time_limit(valkey: Server, queue: TaskQueue) -> None:
    task = queue.put({})

    run_worker(never, url=valkey.url, burst=True, time_limit_seconds=0.2, max_attempts=2, backoff_seconds=0.1)

    assert names(queue, task.id) == ["started", "progress", "error", "started", "progress", "error", "failed"]
    assert events_of(queue, task.id)[-1].fields["error"] == "did not finish within 0.2 s"


def test_handler_that_never_returns_is_cancelled(valkey: Server, queue: TaskQueue) -> None:
    """With a heartbeat every 200 s: the message alone interrupts it."""
    task = queue.put({})

    async def cancel_it() -> None:
        working = asyncio.create_task(work(never, url=valkey.url, burst=True, lease_seconds=600))
        while names(queue, task.id)[-1:] != ["progress"]:
            await asyncio.sleep(0.02)
        assert queue.cancel(task.id, "not wanted") == "requested"
        await asyncio.wait_for(working, 60)

    asyncio.run(cancel_it())
    assert names(queue, task.id) == ["started", "progress", "cancelled"]


def test_work_that_is_cancelled_hands_back_its_tasks(valkey: Server, queue: TaskQueue) -> None:
    """Its handlers are cancelled, and no element is swallowed."""
    tasks = queue.put_many([{}] * 3)

    async def cancel_it() -> None:
        working = asyncio.create_task(work(never, url=valkey.url, concurrency=4, lease_seconds=600))
        while any(names(queue, task.id)[-1:] != ["progress"] for task in tasks):
            await asyncio.sleep(0.02)
        queue.redis.lpush(keys.QUEUE, '{"id": "by-hand", "data": {}}')
        working.cancel()
        await asyncio.wait_for(asyncio.wait([working]), 60)
        assert working.cancelled()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(cancel_it())
    waiting = {json.loads(element)["id"] for element in queue.redis.lrange(keys.QUEUE, 0, -1)}
    assert waiting == {"by-hand", *(int(task.id) for task in tasks)}
    assert all((queue.get(task.id) or {})["failures"] == 0 for task in tasks)


def test_event_loop_that_shuts_down_hands_back_its_tasks(valkey: Server, queue: TaskQueue) -> None:
    """main() ends while work() runs beside it: asyncio.run() cancels everything, and no lease is waited out."""
    task = queue.put({})

    async def main() -> None:
        working.append(asyncio.create_task(work(never, url=valkey.url, lease_seconds=600)))
        while names(queue, task.id)[-1:] != ["progress"]:
            await asyncio.sleep(0.02)

    working: list[asyncio.Task[int]] = []
    asyncio.run(main())

    record = queue.get(task.id) or {}
    assert (record["status"], record["losses"]) == ("waiting", 0)


def test_work_that_is_cancelled_while_redis_is_away_leaves_nothing_running(valkey: Server, queue: TaskQueue) -> None:
    task = queue.put({})

    async def cancel_it() -> None:
        working = asyncio.create_task(work(never, url=valkey.url, lease_seconds=600))
        while names(queue, task.id)[-1:] != ["progress"]:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(valkey.stop)
        working.cancel()
        await asyncio.wait_for(asyncio.wait([working]), 60)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(cancel_it())


def test_consumer_goes_on_after_a_task_whose_record_is_spoilt(
    valkey: Server, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """consumer.py, whose loop is its own: the end of the one task is refused; the other one is completed."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    spoilt, other = queue.put_many([{}, {}])

    async def handle(task: Task, _log: TaskLog) -> None:
        if task.id == spoilt.id:
            queue.redis.set(keys.record(spoilt.id), "not a hash")

    monkeypatch.setattr(consumer, "handle", handle)

    assert asyncio.run(consumer.consume(10, burst=True)) == 0
    assert names(queue, other.id)[-1] == "completed"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise AttributeError("as told")


def test_exception_that_cannot_be_written_down_fails_its_task(valkey: Server, queue: TaskQueue) -> None:
    """Its type is the message."""
    task = queue.put({})

    async def handler(_task: Task, _log: TaskLog) -> None:
        raise Unspeakable

    run_worker(handler, url=valkey.url, burst=True, max_attempts=1)

    assert events_of(queue, task.id)[-1].fields["error"] == "Unspeakable"


def test_record_that_is_not_utf_8_costs_no_other_task_its_lease(valkey: Server, queue: TaskQueue) -> None:
    spoilt, other = queue.put_many([{}, {}])

    async def handler(task: Task, log: TaskLog) -> None:
        await log.add("progress", percent=50)
        if task.id == spoilt.id:
            Redis(port=valkey.port).hset(keys.record(task.id), "cancel", b"\xff")
        first_ms = queue.redis.zscore(keys.LEASES, other.id)
        while queue.redis.zscore(keys.LEASES, other.id) < first_ms + 4_000:  # the other one outlives its first lease
            await asyncio.sleep(0.05)

    run_worker(handler, url=valkey.url, burst=True, concurrency=2, lease_seconds=3)

    assert names(queue, spoilt.id) == ["started", "progress", "cancelled"]
    assert names(queue, other.id) == ["started", "progress", "completed"]


def test_worker_without_the_right_to_claim_ends_and_leaves_the_queue_as_it_is(valkey: Server, queue: TaskQueue) -> None:
    queue.redis.execute_command("ACL SETUSER weak on nopass ~* &* +@all -eval -evalsha")
    queue.redis.lpush(keys.QUEUE, *['{"id": "by-hand", "data": {}}'] * 3)

    with pytest.raises(NoPermissionError):
        run_worker(never, url=valkey.url.replace("//", "//weak:any@"), concurrency=2)

    assert queue.redis.llen(keys.QUEUE) == 3


def test_task_of_a_handler_that_ignores_its_cancellation_ends_without_it(
    valkey: Server, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is written, its slot counts as taken, and a worker without any other slot says so and exits with 1."""
    monkeypatch.setattr(worker_module, "STUBBORN_SECONDS", 0.2)
    task = queue.put({})

    code = run_worker(deaf, url=valkey.url, time_limit_seconds=0.2, max_attempts=1)

    assert code == 1
    assert names(queue, task.id) == ["started", "progress", "error", "failed"]


def test_plain_function_that_never_returns_ends_by_its_time_limit(
    valkey: Server, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be stopped: its task ends without it, and its log tells it when it writes again."""
    monkeypatch.setattr(worker_module, "STUBBORN_SECONDS", 0.2)
    task, go_on, told = queue.put({}), threading.Event(), list[Exception]()

    def handler(_task: Task, log: BlockingLog) -> None:
        go_on.wait(60)
        try:
            log.add("progress", percent=1)
        except StreamEnded as error:
            told.append(error)

    async def both() -> int:
        working = asyncio.create_task(
            work(handler, url=valkey.url, burst=True, concurrency=2, time_limit_seconds=0.2, max_attempts=1)
        )
        while names(queue, task.id)[-1:] != ["failed"]:
            await asyncio.sleep(0.02)
        go_on.set()
        return await asyncio.wait_for(working, 60)

    assert asyncio.run(both()) == 0
    wait_until(lambda: told, "the thread is told")
    assert names(queue, task.id) == ["started", "error", "failed"]


def test_handler_that_ends_while_its_end_is_written_frees_its_slot_once(
    valkey: Server, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left behind. Freed twice, the slots would never add up again, and burst would not end."""
    monkeypatch.setattr(worker_module, "STUBBORN_SECONDS", 0.2)
    queue.put({})
    end, go_on = TaskLog.end, asyncio.Event()

    async def end_late(self: TaskLog, *args: Any, **fields: Any) -> None:
        go_on.set()
        while ended == []:
            await asyncio.sleep(0)
        await end(self, *args, **fields)

    async def handler(_task: Task, _log: TaskLog) -> None:
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()
        ended.append(True)

    ended: list[bool] = []
    monkeypatch.setattr(TaskLog, "end", end_late)

    assert run_worker(handler, url=valkey.url, burst=True, time_limit_seconds=0.2, max_attempts=1, concurrency=2) == 0


def test_blocked_event_loop_does_not_cost_the_others_their_leases(valkey: Server, queue: TaskQueue) -> None:
    """One handler blocks the loop for four leases; both tasks are done by their first attempt."""
    blocking, other = queue.put_many([{"blocks": True}, {}])

    async def handler(task: Task, log: TaskLog) -> None:
        await log.add("progress", percent=1)
        if task.data:
            time.sleep(4)

    run_worker(handler, url=valkey.url, burst=True, concurrency=2, lease_seconds=1)

    for task in (blocking, other):
        assert names(queue, task.id) == ["started", "progress", "completed"]


def test_worker_whose_event_loop_hangs_ends_and_hands_its_other_tasks_back(
    queue: TaskQueue, worker: Start, drain: Work, journal: Path
) -> None:
    """It logs where the handler hangs. The task that hangs counts as lost; the other one goes back uncounted."""
    hanging, other = queue.put_many([{"hang": 3600}, {"seconds": 60}])
    process = worker("--concurrency", "2", "--lease", "1", "--silent-loop", "1")

    _, errors = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "the event loop is blocked" in errors and "programs.py" in errors
    for task, losses in ((other, 0), (hanging, 1)):
        record = queue.get(task.id) or {}
        assert (record["status"], record["losses"]) == ("waiting", losses)


def test_task_of_a_handler_that_hangs_in_a_coroutine_of_its_own_counts_as_lost(queue: TaskQueue, worker: Start) -> None:
    """Else it could end one worker after the other."""
    hanging = queue.put({"hang": 3600, "in": "a coroutine of its own"})
    process = worker("--lease", "1", "--silent-loop", "1")

    process.communicate(timeout=60)

    assert process.returncode == 1
    assert (queue.get(hanging.id) or {})["losses"] == 1


# -- recovering -------------------------------------------------------------------------------------------------


def test_lost_task_is_recovered_after_a_worker_was_killed(queue: TaskQueue, worker: Start) -> None:
    """One worker's look for lost tasks is enough for all; if that worker is gone, another one looks."""
    killed = worker()
    wait_until(lambda: queue.redis.exists(keys.AUDITED), "it looks")
    others = [worker(), worker()]
    killed.kill()
    killed.wait(timeout=60)
    task = queue.put({})
    queue.redis.rpop(keys.QUEUE)

    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task is done")
    for process in others:
        process.terminate()


def test_worker_waits_for_a_busy_server(queue: TaskQueue, valkey: Server, worker: Start, journal: Path) -> None:
    """While a script of somebody else runs for long (BUSY), it waits, and then goes on."""
    process = worker()
    wait_until(lambda: blocked(queue) == 1, "it waits in BRPOP")
    slow = "local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 3 do end"
    valkey.client().config_set("busy-reply-threshold", 100)
    with pytest.raises(RedisTimeout):
        Redis(port=valkey.port, socket_timeout=1, retry=Retry(NoBackoff(), 0)).eval(slow, 0)
    wait_until(lambda: not is_busy(queue), "the script has ended")

    task = queue.put({})
    wait_until(lambda: names(queue, task.id)[-1:] == ["completed"], "the task is done")
    process.terminate()
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors


def test_resting_task_is_cancelled(queue: TaskQueue, worker: Start) -> None:
    """A task that waits for its retry, here ten minutes, ends all the same."""
    task = queue.put({"then": "raise"})
    process = worker("--backoff", "600")
    wait_until(lambda: (queue.get(task.id) or {}).get("status") == "retrying", "it rests")

    queue.cancel(task.id, "not wanted")
    wait_until(lambda: names(queue, task.id)[-1:] == ["cancelled"], "it is cancelled")
    wait_until(lambda: queue.owed() == 0, "nothing is owed")
    process.terminate()


def test_ended_or_unknown_task_cannot_be_cancelled(queue: TaskQueue, drain: Work) -> None:
    """The error says which."""
    task = queue.put({})
    drain()

    with pytest.raises(ValueError, match="has ended already: completed"):
        queue.cancel(task.id, "too late")
    with pytest.raises(NoSuchTask, match="no task 99"):
        queue.cancel("99", "nobody")


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [("--concurrency", "0"), ("--concurrency", "x"), ("--lease", "nan"), ("--lease", "0.1"), ("--grace", "-1")],
)
def test_bad_option_is_refused_in_one_line(
    drain: Work, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    """A number that makes no sense is a usage error, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        drain(*option)

    assert ended.value.code == 2
    assert option[0] in capsys.readouterr().err.splitlines()[-1]


def test_server_that_is_loading_is_waited_for(server: Server, script: Start, journal: Path, said: Path) -> None:
    """A server that is still reading its data: a worker and a producer that start meanwhile wait, say so, and go on."""
    client = server.client()
    with client.pipeline() as pipe:
        for n in range(3_000):
            pipe.set(f"ballast:{n}", "x" * 1_000)
        pipe.execute()
    client.bgrewriteaof()
    wait_until(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0, "the file is rewritten")
    server.stop()
    server.options = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    server.start(wait=False)
    wait_until(server.is_loading, "it is loading")

    with said.open("w") as stderr:
        script(server.url, WORKER, str(journal), stderr=stderr)
        producer = script(server.url, "producer.py", "--type", "t", stderr=stderr)
    output, _ = producer.communicate(timeout=60)
    queue = TaskQueue(client)
    wait_until(lambda: names(queue, "1")[-1:] == ["completed"], "the task is done")

    assert output == "1\n"
    assert "is still loading its data" in said.read_text()
    assert "Traceback" not in said.read_text()
