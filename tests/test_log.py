"""A task's stream: what add(), read() and follow() promise."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from attempts import Writer, attempts, end_lease, names, popped, run, seqs
from conftest import Server, wait_until
from redis import Redis

from task_streams import Event, LeaseLost, LogReader, StreamEnded, TaskCancelled, TaskQueue, keys
from task_streams import claims as claims_module
from task_streams import log as log_module
from task_streams.log import MAX_EVENT_BYTES, TTL_SECONDS
from task_streams.reader import check_cursor, seq_of

Write = Callable[[Server], Writer]


@pytest.fixture
def queue(redis: Redis) -> TaskQueue:
    """A queue with one task, 1."""
    queue = TaskQueue(redis)
    queue.put({})
    return queue


@pytest.fixture
def write() -> Iterator[Write]:
    """Make a log that a test can write without asyncio: write(server).add("progress", percent=1)."""
    writers: list[Writer] = []

    def make(server: Server) -> Writer:
        writers.append(Writer(server.url))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


class Follower(threading.Thread):
    """Follow a stream in the background, and keep what comes."""

    def __init__(self, events: Iterator[Event]) -> None:
        super().__init__(daemon=True)
        self.source, self.events, self.error = events, [], None  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        try:
            for event in self.source:
                self.events.append(event)
        except Exception as error:
            self.error = error

    def names(self) -> list[str]:
        return [event.name for event in self.events]


# -- appending --------------------------------------------------------------------------------------------------


def test_add_writes_flat_fields_that_a_person_can_read(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Text stands in the entry as it is, everything else as JSON; event and timestamp come first."""

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            await log.add("chain_of_thought", step="analyzing", prompt="Process this...", n=1, like_json="7")

    before = datetime.now(UTC)
    run(test)

    _, (_, entry) = redis.xrange("task_logs:1")
    assert list(entry) == ["event", "timestamp", "step", "prompt", "n", "like_json"]
    assert (entry["event"], entry["prompt"]) == ("chain_of_thought", "Process this...")
    assert (entry["n"], entry["like_json"]) == ("1", '"7"')
    at = datetime.strptime(entry["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert before.replace(microsecond=before.microsecond // 1000 * 1000) <= at <= datetime.now(UTC)


def test_entry_ids_hold_the_attempts_epoch_and_count_over_all_attempts(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """<epoch>-<seq>: the second attempt has a greater epoch, and goes on counting."""

    async def test() -> list[str]:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            ids = [await log.add("progress", percent=n) for n in range(2)]
            end_lease(queue, "1")
            _, log = await worker.claim(element)
            return [*ids, await log.add("progress", percent=2)]

    one, two, three = run(test)

    assert [seq_of(entry_id) for entry_id in (one, two, three)] == [2, 3, 6]
    assert names(redis) == ["started", "progress", "progress", "worker_lost", "started", "progress"]
    assert seqs(redis) == [1, 2, 3, 4, 5, 6]
    epochs = [int(entry_id.split("-")[0]) for entry_id in (one, two, three)]
    assert epochs[0] == epochs[1] < epochs[2]


@pytest.mark.parametrize("terminal", sorted(keys.TERMINAL))
def test_nothing_follows_a_terminal_event(terminal: str, url: str, queue: TaskQueue, redis: Redis) -> None:
    """After the terminal event its own attempt gets StreamEnded, which names it, and no other one can be claimed."""

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            await log.end(terminal, None)
            for add in (log.add, log.add_always):
                with pytest.raises(StreamEnded, match=terminal):
                    await add("progress", percent=1)
            assert await worker.claims.claim([(element, "another token")]) == []

    run(test)
    assert names(redis) == ["started", terminal]


def test_stream_expires_only_after_its_end(url: str, queue: TaskQueue, redis: Redis) -> None:
    """It has no TTL while the task is under way, and one from the terminal event on."""

    async def test() -> int:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            await log.add("progress", percent=1)
            before = redis.ttl(keys.stream("1"))
            await log.end("completed", 1, result=1)
            return int(before)

    assert run(test) == -1
    assert 0 < redis.ttl(keys.stream("1")) <= TTL_SECONDS


def test_lease_that_is_over_by_ones_own_clock_is_not_believed(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Past the lease's deadline add() raises LeaseLost without asking the server."""

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            log.deadline = time.monotonic() - 1
            with pytest.raises(LeaseLost, match="is over"):
                await log.add("progress", percent=1)
            with pytest.raises(LeaseLost, match="is over"):
                await log.end("completed", None)

    run(test)
    assert names(redis) == ["started"]


def test_cancellation_stops_the_next_add(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Once a cancellation was asked for, add() raises TaskCancelled with the reason; the worker may still write."""

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            log.stop(TaskCancelled("not wanted"))
            with pytest.raises(TaskCancelled, match="not wanted"):
                await log.add("progress", percent=1)
            with pytest.raises(TaskCancelled, match="not wanted"):
                log.check()
            await log.add_always("error", error="as told", error_type="E", will_retry=False)
            await log.end("cancelled", "not wanted", reason="not wanted")

    run(test)
    assert names(redis) == ["started", "error", "cancelled"]


@pytest.mark.parametrize(
    ("event", "fields", "message"),
    [
        ("gap", {}, "not an event name"),
        ("two words", {}, "not an event name"),
        ("progress", {"timestamp": 1}, "'timestamp' is written by the log itself"),
        ("progress", {"percent": float("nan")}, "JSON"),
        ("progress", {"\ud800": 1}, "surrogates not allowed"),
        ("llm_response", {"response": "x" * (MAX_EVENT_BYTES + 1)}, "the limit is 1,000,000"),
    ],
)
def test_what_cannot_be_an_event_is_refused(
    event: str, fields: dict[str, object], message: str, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """A reserved name or field, a value that cannot be stored, or a huge one is a ValueError; nobody else suffers."""

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            with pytest.raises(ValueError, match=message):
                await log.add(event, **fields)
            await log.add("progress", percent=1)

    run(test)
    assert names(redis) == ["started", "progress"]


def test_clock_that_steps_back_keeps_the_order(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The last attempt's epoch is an hour ahead of the server's clock: the next one still comes after it."""
    ahead = str(int(time.time() * 1000) + 3_600_000)

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            redis.hset(keys.record("1"), mapping={"epoch": ahead, "epochs": ahead})
            redis.xadd(keys.stream("1"), {"event": "progress"}, id=f"{ahead}-2")
            end_lease(queue, "1")
            _, log = await worker.claim(element)
            await log.end("completed", None, result=None)

    run(test)
    assert seqs(redis) == [1, 2, 3, 4, 5]


def test_long_stream_is_trimmed(url: str, queue: TaskQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream keeps about MAXLEN entries, whatever is added."""
    monkeypatch.setattr(log_module, "MAXLEN", 200)
    monkeypatch.setattr(claims_module, "MAXLEN", 200)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            for n in range(1000):
                await log.add("progress", percent=n)

    run(test)
    assert 200 <= redis.xlen(keys.stream("1")) < 400


# -- following --------------------------------------------------------------------------------------------------


def test_follow_replays_from_any_entry_then_waits_and_ends(server: Server, write: Write) -> None:
    """Followers from the start and from any entry get exactly what comes after it, live, up to the terminal event."""
    log = write(server)
    ids = [log.add("progress", percent=n) for n in range(5)]
    followers = [Follower(LogReader("t", server.client()).follow(since)) for since in ["0", *ids]]
    wait_until(lambda: followers[0].names() == ["progress"] * 5, "the first has caught up")

    ids += [log.add("llm_delta", text="hello "), log.add("completed", result=1)]
    for follower in followers:
        follower.join(timeout=60)

    for place, follower in enumerate(followers):
        assert [event.id for event in follower.events] == ids[place:]
        assert not follower.is_alive()


def test_follow_from_the_end_ends_at_once(valkey: Server, write: Write) -> None:
    """With the terminal event's id, or $ on a stream that has ended, there is nothing to wait for."""
    log = write(valkey)
    last = log.add("completed", result=1)

    assert list(log.reader.follow(last, timeout_seconds=60)) == []
    assert list(log.reader.follow("$", timeout_seconds=60)) == []


def test_dollar_is_resolved_once(valkey: Server, write: Write) -> None:
    """Following from $ misses nothing between two reads, however long the follower takes with each event."""
    log = write(valkey)
    log.add("progress", percent=0)
    events = log.reader.follow("$", timeout_seconds=60)
    got: list[object] = []

    def read_slowly() -> None:
        for event in events:
            got.append(event.fields.get("percent"))
            log.reader.read()

    reader = threading.Thread(target=read_slowly, daemon=True)
    reader.start()
    commands = valkey.client()
    wait_until(lambda: any(c["cmd"] == "xread" for c in commands.client_list()), "it waits")
    for n in range(1, 50):
        log.add("progress", percent=n)
    log.add("completed", result=1)
    reader.join(timeout=60)

    assert got == [*range(1, 50), None]


@pytest.mark.parametrize("while_following", [False, True])
def test_gap_tells_exactly_how_many_events_were_missed(server: Server, while_following: bool, write: Write) -> None:
    """The stream is trimmed past a follower's cursor: it is told the exact number missed, then goes on."""
    client = server.client()
    log = write(server)
    ids = [log.add("progress", percent=n) for n in range(10)]
    events = log.reader.follow(ids[1], timeout_seconds=60)
    got = [next(events)] if while_following else []
    if while_following:
        got += [next(events) for _ in range(7)]  # the page that is read already: up to number 10
        ids += [log.add("progress", percent=n) for n in range(10, 30)]
        client.xtrim(keys.stream("t"), maxlen=3, approximate=False)
    else:
        client.xtrim(keys.stream("t"), maxlen=3, approximate=False)
    log.add("completed", result=1)

    got += list(events)

    gap = next(event for event in got if event.name == "gap")
    seen = sum(event.name != "gap" for event in got)
    assert gap.fields["missed"] == (17 if while_following else 5)
    assert gap.fields["missed"] + seen == len(ids) + 1 - 2
    assert got[-1].name == "completed"


def test_replay_of_a_trimmed_stream_begins_with_the_gap(valkey: Server, write: Write) -> None:
    """From the start, too, a reader is told what was trimmed away."""
    client = valkey.client()
    log = write(valkey)
    for n in range(9):
        log.add("progress", percent=n)
    log.add("completed", result=1)
    client.xtrim(keys.stream("t"), maxlen=1, approximate=False)

    names = [(event.name, event.fields.get("missed")) for event in log.reader.follow()]

    assert names == [("gap", 9), ("completed", None)]


def test_cursor_ahead_of_the_stream_gets_reset(valkey: Server, write: Write) -> None:
    """After a failover lost the stream's tail, a follower is told, and reads the stream anew."""
    log = write(valkey)
    log.add("progress", percent=1)
    log.add("completed", result=1)
    ahead = f"{int(time.time() * 1000) + 60_000}-99"

    names = [event.name for event in log.reader.follow(ahead, timeout_seconds=60)]

    assert names == ["reset", "progress", "completed"]


def test_expired_stream_ends_the_follow(valkey: Server) -> None:
    """A task that has ended, and whose stream is gone, is not waited for."""
    client = valkey.client()
    client.hset(keys.record("t"), mapping={"status": "completed"})

    assert list(LogReader("t", client).follow(timeout_seconds=60)) == []
    assert list(LogReader("t", client).follow("1700000000000-5", timeout_seconds=60)) == []


def test_follow_gives_up_after_its_timeout(valkey: Server, write: Write) -> None:
    """Where nothing comes, and where events come but no end, TimeoutError is raised."""
    log = write(valkey)
    log.add("progress", percent=1)

    got = []
    with pytest.raises(TimeoutError, match=r"0\.3 s"):
        got.extend(log.reader.follow(timeout_seconds=0.3))

    with pytest.raises(TimeoutError):
        list(LogReader("other", valkey.client()).follow(timeout_seconds=0.3))


def test_killed_connections_lose_and_repeat_nothing(server: Server, write: Write) -> None:
    """CLIENT KILL of every connection, again and again: the follower and the writer go on, each event comes once."""
    log = write(server)
    follower = Follower(LogReader("t", server.client()).follow(timeout_seconds=60))
    admin = server.client()

    for n in range(200):
        log.add("progress", percent=n)
        if n % 10 == 0:
            admin.client_kill_filter(_type="normal", skipme=True)
    log.add("completed", result=1)
    follower.join(timeout=60)

    assert follower.error is None
    assert [seq_of(event.id) for event in follower.events] == list(range(1, 202))


def test_server_restart_is_survived_by_writer_and_follower(server: Server, write: Write) -> None:
    """The server restarts while both are at work: nothing acknowledged is lost, nothing comes twice."""
    server.client().config_set("appendfsync", "always")
    log = write(server)
    follower = Follower(LogReader("t", server.client()).follow(timeout_seconds=60))
    for n in range(50):
        log.add("progress", percent=n)

    server.stop()
    writer = threading.Thread(target=lambda: log.add("progress", percent=50), daemon=True)
    writer.start()
    server.start()
    writer.join(timeout=60)
    log.add("completed", result=1)
    follower.join(timeout=60)

    assert [seq_of(event.id) for event in follower.events] == list(range(1, 53))


def test_cursors_are_checked() -> None:
    """An entry id is two numbers, or one; everything else is a ValueError that shows the form."""
    for good in ("0", "1700000000000", "1700000000000-7", "$"):
        assert check_cursor(good) == good
    for bad in ("", "-", "x", "1-", "-1", "1-2-3", "1 ", "\u0661", f"{2**64}"):
        with pytest.raises(ValueError, match="expected <milliseconds>-<number>"):
            check_cursor(bad)


def test_import_does_nothing() -> None:
    """Importing the helper connects nowhere and prints nothing."""
    code = "import task_streams, ailf.messaging.redis"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (result.stdout, result.stderr) == ("", "")
