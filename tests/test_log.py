"""A task's stream: what add(), read() and follow() promise."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from conftest import Server, wait_until
from fakeredis import FakeRedis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from task_streams import Event, LeaseLost, StreamEnded, TaskCancelled, TaskLog, keys
from task_streams.log import MAX_EVENT_BYTES, Lease, check_cursor, seq_of


@pytest.fixture
def fake() -> "Redis":
    return FakeRedis(decode_responses=True)


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


def test_add_writes_flat_fields_that_a_person_can_read(fake: "Redis") -> None:
    """Text stands in the entry as it is, everything else as JSON; event, timestamp, attempt and seq come first."""
    log = TaskLog(7, fake)

    log.add("chain_of_thought", step="analyzing_task", prompt="Process this data...", n=1, like_json="7")

    [(_, entry)] = fake.xrange("task_logs:7")
    assert list(entry)[:4] == ["event", "timestamp", "attempt", "seq"]
    assert entry["prompt"] == "Process this data..."
    assert (entry["n"], entry["like_json"]) == ("1", '"7"')


def test_entry_ids_hold_the_time_and_the_seq(fake: "Redis") -> None:
    """The entry id is <ms>-<seq>, seq counts 1, 2, 3, and the timestamp is the id's time in ISO 8601."""
    log = TaskLog("t", fake)

    ids = [log.add("progress", percent=n) for n in range(3)]

    events = log.read()
    assert [event.id for event in events] == ids
    assert [seq_of(entry_id) for entry_id in ids] == [1, 2, 3] == [event.fields["seq"] for event in events]
    at = datetime.fromtimestamp(int(ids[0].split("-")[0]) / 1000, UTC)
    assert events[0].fields["timestamp"] == at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


@settings(deadline=None, max_examples=40)
@given(st.integers(min_value=0, max_value=4_102_444_800_000))
def test_timestamps_are_right_on_any_day(ms: int) -> None:
    """The script's own calendar agrees with Python's for every millisecond from 1970 to 2100."""
    fake = FakeRedis(decode_responses=True)
    log = TaskLog("t", fake)
    fake.hset(keys.writer("t"), mapping={"attempt": -1, "token": "", "number": 0, "seq": 0, "ms": ms})
    now_ms = int(time.time() * 1000)

    log.add("progress", percent=1)

    if ms > now_ms:  # the script never goes back behind the last entry, so that is its time now
        expected = datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"
        assert log.read()[0].fields["timestamp"] == expected


def test_older_attempt_is_refused(fake: "Redis") -> None:
    """Once a later attempt has written, the earlier one gets LeaseLost and writes nothing."""
    old = TaskLog("t", fake, attempt=1, token="a")
    old.add("started", worker="a")
    TaskLog("t", fake, attempt=2, token="b").add("started", worker="b")

    with pytest.raises(LeaseLost, match="attempt 2"):
        old.add("progress", percent=1)

    assert [event.fields["attempt"] for event in old.read()] == [1, 2]


def test_same_attempt_with_another_token_is_refused(fake: "Redis") -> None:
    """Two workers with one attempt number, as after a failover, do not both write: the first to write stays."""
    TaskLog("t", fake, attempt=1, token="a").add("started", worker="a")

    with pytest.raises(LeaseLost):
        TaskLog("t", fake, attempt=1, token="b").add("started", worker="b")


@pytest.mark.parametrize("terminal", sorted(keys.TERMINAL))
def test_nothing_follows_a_terminal_event(fake: "Redis", terminal: str) -> None:
    """After the terminal event, its own attempt and every later one get StreamEnded, which names it."""
    log = TaskLog("t", fake, attempt=1, token="a")
    log.add(terminal)

    for writer in (log, TaskLog("t", fake, attempt=2, token="b")):
        with pytest.raises(StreamEnded, match=terminal):
            writer.add("progress", percent=1)

    assert len(log.read()) == 1


def test_stream_expires_only_after_its_end(fake: "Redis") -> None:
    """Stream and writer have no TTL while the task is under way, and one from the terminal event on."""
    log = TaskLog("t", fake, ttl_seconds=100)
    log.add("started", worker="w")
    before = [fake.ttl(keys.stream("t")), fake.ttl(keys.writer("t"))]

    log.add("completed", result=1)

    assert before == [-1, -1]
    assert all(0 < fake.ttl(key) <= 100 for key in (keys.stream("t"), keys.writer("t")))


def test_lease_that_is_over_by_ones_own_clock_is_not_believed(fake: "Redis") -> None:
    """Past the lease's deadline add() raises LeaseLost without asking the server."""
    log = TaskLog("t", fake, attempt=1, lease=Lease(deadline=time.monotonic() - 1))

    with pytest.raises(LeaseLost, match="is over"):
        log.add("progress", percent=1)

    assert not fake.exists(keys.stream("t"))


def test_cancellation_stops_the_next_add(fake: "Redis") -> None:
    """Once a cancellation was asked for, add() raises TaskCancelled with the reason; the worker may still write."""
    lease = Lease(deadline=time.monotonic() + 60, cancel_reason="not wanted")
    log = TaskLog("t", fake, attempt=1, lease=lease)

    with pytest.raises(TaskCancelled, match="not wanted"):
        log.add("progress", percent=1)
    log.add_always("cancelled", reason="not wanted")

    assert [event.name for event in log.read()] == ["cancelled"]


@pytest.mark.parametrize(
    ("event", "fields", "message"),
    [
        ("gap", {}, "not an event name"),
        ("two words", {}, "not an event name"),
        ("progress", {"seq": 1}, "'seq' is written by the log itself"),
        ("progress", {"percent": float("nan")}, "JSON"),
        ("llm_response", {"response": "x" * (MAX_EVENT_BYTES + 1)}, "the limit is 1,000,000"),
    ],
)
def test_what_cannot_be_an_event_is_refused(fake: "Redis", event: str, fields: dict[str, object], message: str) -> None:
    """A reserved name or field, a value that JSON cannot hold, or a huge one is a ValueError that says so."""
    log = TaskLog("t", fake)

    with pytest.raises(ValueError, match=message):
        log.add(event, **fields)
    log.add("progress", percent=1)

    assert len(log.read()) == 1


def test_field_name_that_utf_8_cannot_hold_is_refused(fake: "Redis") -> None:
    """A lone surrogate in a name is a ValueError, and the next event is written."""
    log = TaskLog("t", fake)

    with pytest.raises(ValueError, match="surrogates not allowed"):
        log.add("progress", **{"\ud800": 1})
    log.add("progress", percent=1)

    assert len(log.read()) == 1


def test_clock_that_steps_back_keeps_the_order(valkey: Server) -> None:
    """Where the server's clock is an hour behind the last entry, the next one still comes after it."""
    client = valkey.client()
    log = TaskLog("t", client)
    log.add("progress", percent=1)
    ahead = int(time.time() * 1000) + 3_600_000
    client.xadd(keys.stream("t"), {"event": "progress", "seq": 2}, id=f"{ahead}-2")
    client.hset(keys.writer("t"), mapping={"ms": ahead, "seq": 2})

    log.add("progress", percent=3)

    assert [event.fields["seq"] for event in log.read()] == [1, 2, 3]


def test_entry_added_by_hand_is_tolerated(valkey: Server) -> None:
    """XADD task_logs:t * … in redis-cli, even with a later id, does not stop the worker or its watchers."""
    client = valkey.client()
    log = TaskLog("t", client)
    log.add("progress", percent=1)
    client.xadd(keys.stream("t"), {"note": "by hand"}, id=f"{int(time.time() * 1000) + 5_000}-0")
    log.add("progress", percent=2)
    client.xadd(keys.stream("t"), {"note": "again"}, id=f"{int(time.time() * 1000) + 10_000}-0")
    log.add("completed", result=None)

    followed = list(log.follow())

    assert [event.name for event in followed] == ["progress", "", "progress", "", "completed"]


def test_long_stream_is_trimmed(valkey: Server) -> None:
    """A stream keeps about MAXLEN entries, whatever is added."""
    log = TaskLog("t", valkey.client(), maxlen=200)

    for n in range(1000):
        log.add("progress", percent=n)

    assert 200 <= len(log.read()) < 400


# -- following --------------------------------------------------------------------------------------------------


def test_follow_replays_from_any_entry_then_waits_and_ends(server: Server) -> None:
    """Followers from the start and from any entry get exactly what comes after it, live, up to the terminal event."""
    log = TaskLog("t", server.client())
    ids = [log.add("progress", percent=n) for n in range(5)]
    followers = [Follower(TaskLog("t", server.client()).follow(since)) for since in ["0", *ids]]
    wait_until(lambda: followers[0].names() == ["progress"] * 5, "the first has caught up")

    ids += [log.add("llm_delta", text="hello "), log.add("completed", result=1)]
    for follower in followers:
        follower.join(timeout=60)

    for place, follower in enumerate(followers):
        assert [event.id for event in follower.events] == ids[place:]
        assert not follower.is_alive()


def test_follow_from_the_end_ends_at_once(valkey: Server) -> None:
    """With the terminal event's id, or $ on a stream that has ended, there is nothing to wait for."""
    log = TaskLog("t", valkey.client())
    last = log.add("completed", result=1)

    assert list(log.follow(last, timeout_seconds=60)) == []
    assert list(log.follow("$", timeout_seconds=60)) == []


def test_dollar_is_resolved_once(valkey: Server) -> None:
    """Following from $ misses nothing between two reads, however long the follower takes with each event."""
    log = TaskLog("t", valkey.client())
    log.add("progress", percent=0)
    events = log.follow("$", timeout_seconds=60)
    got: list[object] = []

    def read_slowly() -> None:
        for event in events:
            got.append(event.fields.get("percent"))
            log.read()

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
def test_gap_tells_exactly_how_many_events_were_missed(server: Server, while_following: bool) -> None:
    """The stream is trimmed past a follower's cursor: it is told the exact number missed, then goes on."""
    client = server.client()
    log = TaskLog("t", client)
    ids = [log.add("progress", percent=n) for n in range(10)]
    events = log.follow(ids[1], timeout_seconds=60)
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


def test_replay_of_a_trimmed_stream_begins_with_the_gap(valkey: Server) -> None:
    """From the start, too, a reader is told what was trimmed away."""
    client = valkey.client()
    log = TaskLog("t", client)
    for n in range(9):
        log.add("progress", percent=n)
    log.add("completed", result=1)
    client.xtrim(keys.stream("t"), maxlen=1, approximate=False)

    names = [(event.name, event.fields.get("missed")) for event in log.follow()]

    assert names == [("gap", 9), ("completed", None)]


def test_cursor_ahead_of_the_stream_gets_reset(valkey: Server) -> None:
    """After a failover lost the stream's tail, a follower is told, and reads the stream anew."""
    log = TaskLog("t", valkey.client())
    log.add("progress", percent=1)
    log.add("completed", result=1)
    ahead = f"{int(time.time() * 1000) + 60_000}-99"

    names = [event.name for event in log.follow(ahead, timeout_seconds=60)]

    assert names == ["reset", "progress", "completed"]


def test_expired_stream_ends_the_follow(valkey: Server) -> None:
    """A task that has ended, and whose stream is gone, is not waited for."""
    client = valkey.client()
    client.hset(keys.record("t"), mapping={"status": "completed"})

    assert list(TaskLog("t", client).follow(timeout_seconds=60)) == []
    assert list(TaskLog("t", client).follow("1700000000000-5", timeout_seconds=60)) == []


def test_follow_gives_up_after_its_timeout(valkey: Server) -> None:
    """Where nothing comes, and where events come but no end, TimeoutError is raised."""
    log = TaskLog("t", valkey.client())
    log.add("progress", percent=1)

    got = []
    with pytest.raises(TimeoutError, match=r"0\.3 s"):
        got.extend(log.follow(timeout_seconds=0.3))

    with pytest.raises(TimeoutError):
        list(TaskLog("other", valkey.client()).follow(timeout_seconds=0.3))


def test_killed_connections_lose_and_repeat_nothing(server: Server) -> None:
    """CLIENT KILL of every connection, again and again: the follower and the writer go on, each event comes once."""
    log = TaskLog("t", server.client())
    follower = Follower(TaskLog("t", server.client()).follow(timeout_seconds=60))
    admin = server.client()

    for n in range(200):
        log.add("progress", percent=n)
        if n % 10 == 0:
            admin.client_kill_filter(_type="normal", skipme=True)
    log.add("completed", result=1)
    follower.join(timeout=60)

    assert follower.error is None
    assert [event.fields["seq"] for event in follower.events] == list(range(1, 202))


def test_server_restart_is_survived_by_writer_and_follower(server: Server) -> None:
    """The server restarts while both are at work: nothing acknowledged is lost, nothing comes twice."""
    server.client().config_set("appendfsync", "always")
    log = TaskLog("t", server.client(), lease=Lease(deadline=time.monotonic() + 60))
    follower = Follower(TaskLog("t", server.client()).follow(timeout_seconds=60))
    for n in range(50):
        log.add("progress", percent=n)

    server.stop()
    writer = threading.Thread(target=lambda: log.add("progress", percent=50), daemon=True)
    writer.start()
    server.start()
    writer.join(timeout=60)
    log.add("completed", result=1)
    follower.join(timeout=60)

    assert [event.fields["seq"] for event in follower.events] == list(range(1, 53))


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
