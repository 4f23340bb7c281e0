"""A stream is rewritten while people watch it: each of them hears `reset` once, and then sees exactly what there is."""

import asyncio
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import dash
import httpx
import pytest
from conftest import Server, wait_until
from httpx_sse import connect_sse
from streams import Stream, take

from ailf.messaging.redis import blocking_client, connect_async
from task_streams import TaskQueue, keys
from task_streams.reader import BLOCK_SECONDS, follow
from web.hub import Hub
from web.watcher import Item

SECONDS = 60  # for a machine ten times slower
STREAM = keys.stream("t")
LIVE = 5  # entries that are watched before the stream is rewritten

Start = Callable[..., "subprocess.Popen[str]"]
Told = tuple[str, str]  # an event's name and entry id


def ids_of(server: Server) -> list[str]:
    return [entry_id for entry_id, _ in server.client().xrange(STREAM)]


# -- how a stream is rewritten --------------------------------------------------------------------------------------


class Past:
    """A task under way, and a copy of the server's data before its last entries."""

    def __init__(self, server: Server) -> None:
        self.server, self.redis = server, server.client()
        self.redis.config_set("appendfsync", "always")
        self.aof, self.copy = server.directory / "appendonlydir", server.directory / "copy"
        TaskQueue(self.redis).put({}, id="t")
        self.log = Stream("t", self.redis)
        for n in range(LIVE):
            if n == LIVE - 2:
                shutil.copytree(self.aof, self.copy)
            self.log.add("progress", percent=n, step="s")
        self.ids = ids_of(server)

    def replace(self, *entry_ids: str) -> None:
        """Put other entries in place of all, at once."""
        with self.redis.pipeline() as pipe:
            pipe.delete(STREAM)
            for entry_id in entry_ids:
                pipe.xadd(STREAM, {"event": "progress"}, id=entry_id)
            pipe.execute()

    def end(self, entry_id: str = "*") -> None:
        self.redis.xadd(STREAM, {"event": "completed"}, id=entry_id)


def with_lower_ids(past: Past) -> None:
    past.replace("5-1", "5-2", "5-3")


def with_higher_ids(past: Past) -> None:
    epoch = int(past.ids[-1].split("-")[0]) + 1000
    past.replace(f"{epoch}-1", f"{epoch}-2")


def with_the_same_length(past: Past) -> None:
    epoch = int(past.ids[-1].split("-")[0]) + 1000
    past.replace(*(f"{epoch}-{seq}" for seq in range(1, LIVE + 1)))


def with_nothing_yet(past: Past) -> None:
    past.redis.delete(STREAM)


def with_another_task(past: Past) -> None:
    past.redis.flushall()
    queue = TaskQueue(past.redis)
    queue.put({}, id="t")
    task = take(queue)
    assert task is not None and task.id == "t"
    log = Stream("t", past.redis, task.epoch)
    log.add("started", worker="w")
    log.add("progress", percent=1, step="s")


def with_the_last_entries_lost(past: Past) -> None:
    past.server.stop(signal.SIGKILL)
    shutil.rmtree(past.aof)
    shutil.copytree(past.copy, past.aof)
    past.server.start()
    assert ids_of(past.server) == past.ids[: LIVE - 2]


def with_others_in_their_place(past: Past) -> None:
    with_the_last_entries_lost(past)
    log = Stream("t", past.redis)  # of another attempt: its epoch is a later one
    for n in range(LIVE):
        log.add("progress", percent=n, step="s")


REWRITES = [
    with_lower_ids,
    with_higher_ids,
    with_the_same_length,
    with_nothing_yet,
    with_another_task,
    with_the_last_entries_lost,
    with_others_in_their_place,
]
rewritten = pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.__name__)


def end_of(past: Past) -> None:
    """Write the end of what there is now, by its rules: in the last epoch, or in a later one."""
    last = ids_of(past.server)[-1:] or ["0-0"]
    epoch, seq = map(int, last[0].split("-"))
    past.end(f"{max(epoch, 1)}-{seq + 1}")


def assert_reset_once(told: list[Told], past: Past) -> None:
    names = [name for name, _ in told]
    assert names.count("reset") == 1, names
    place = names.index("reset")
    before, after = [entry_id for _, entry_id in told[:place]], [entry_id for _, entry_id in told[place + 1 :]]
    assert before == past.ids[: len(before)]
    assert after == ids_of(past.server)


# -- all who watch --------------------------------------------------------------------------------------------------


class Watcher(threading.Thread):
    """Keep what somebody is told, in the background."""

    def __init__(self, events: Iterator[Told]) -> None:
        super().__init__(daemon=True)
        self.events = events
        self.told: list[Told] = []
        self.start()

    def run(self) -> None:
        for told in self.events:
            self.told.append(told)

    def has_heard(self, name: str) -> bool:
        return any(told[0] == name for told in self.told)


def by_follow(server: Server) -> Iterator[Told]:
    for event in Stream("t", server.client()).follow(timeout_seconds=SECONDS):
        yield event.name, event.id


def by_script(process: "subprocess.Popen[str]") -> Iterator[Told]:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        yield event["event"], event["id"]


def by_http(url: str) -> Iterator[Told]:
    with httpx.Client(timeout=SECONDS) as client, connect_sse(client, "GET", url) as source:
        for event in source.iter_sse():
            if event.data and event.event != "redis":
                yield event.event, event.json()["id"]


@contextmanager
def everybody(server: Server, script: Start, directory: Path) -> Iterator[dict[str, Watcher]]:
    """Watch the task in each way that there is."""
    with dash.dashboard(server.url, directory) as board:
        yield {
            "follow": Watcher(by_follow(server)),
            "stream_reader.py": Watcher(by_script(script(server.url, "stream_reader.py", "t", "--json"))),
            "one task": Watcher(by_http(f"{board.url}/api/tasks/t/events")),
            "named tasks": Watcher(by_http(f"{board.url}/api/events?task=t")),
        }


@rewritten
def test_terminal_and_browser_hear_reset_once(
    valkey: Server, script: Start, tmp_path: Path, rewrite: Callable[[Past], None]
) -> None:
    """Whatever has happened to the stream; then each of them sees what XRANGE gives, to the end."""
    past = Past(valkey)
    with everybody(valkey, script, tmp_path) as watchers:
        for who, watcher in watchers.items():
            wait_until(lambda w=watcher: len(w.told) == LIVE, f"{who} sees the first entries", SECONDS)

        rewrite(past)
        for who, watcher in watchers.items():
            wait_until(lambda w=watcher: w.has_heard("reset"), f"{who} hears of it", SECONDS)
        end_of(past)

        for who, watcher in watchers.items():
            watcher.join(SECONDS)
            assert not watcher.is_alive(), who
            assert_reset_once(watcher.told, past)


@pytest.mark.parametrize("rewrite", [one for one in REWRITES if one is not with_nothing_yet])
def test_reader_that_comes_later_is_told_too(valkey: Server, script: Start, rewrite: Callable[[Past], None]) -> None:
    """stream_reader.py --since the last entry that it saw, with and without following."""
    past = Past(valkey)
    rewrite(past)
    end_of(past)
    for options in ([], ["--no-follow"]):
        command = ["stream_reader.py", "t", "--json", "--since", past.ids[-1], *options]
        assert_reset_once([*by_script(script(valkey.url, *command))], past)


def test_rewritten_stream_is_noticed_beside_a_busy_one(valkey: Server) -> None:
    """Events of other tasks do not keep a follower from looking."""
    past, over = Past(valkey), threading.Event()

    def keep_busy() -> None:
        log = Stream("busy", valkey.client())
        while not over.wait(0.01):
            log.add("progress", percent=1, step="s")

    def events() -> Iterator[Told]:
        for task_id, event in follow({"busy": "0", "t": "0"}, blocking_client(past.redis, BLOCK_SECONDS)):
            if event is not None and task_id == "t":
                yield event.name, event.id

    busy = threading.Thread(target=keep_busy, daemon=True)
    busy.start()
    watcher = Watcher(events())
    wait_until(lambda: len(watcher.told) == LIVE, "it sees the first entries", SECONDS)
    with_lower_ids(past)
    end_of(past)
    wait_until(lambda: watcher.has_heard("completed"), "it sees the end", SECONDS)
    over.set()
    busy.join(SECONDS)

    assert_reset_once(watcher.told, past)


# -- the hub --------------------------------------------------------------------------------------------------------


class Reading:
    """One watcher of the hub, and what it is told. `may_go_on` holds it after an item."""

    def __init__(self, hub: Hub, cursor: str, since: int | None = None) -> None:
        self.told: list[Told] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.watcher = hub.watch({"t": cursor}, since)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.watcher:
            if isinstance(item, Item):
                self.told.append((item.event.name, item.event.id))
                await self.may_go_on.wait()

    async def has_begun(self) -> None:
        while self.watcher not in self.watcher.hub.watchers.get("t", ()):
            await asyncio.sleep(0.01)

    async def has_told(self, predicate: Callable[[list[Told]], object]) -> None:
        while not predicate(self.told):
            await asyncio.sleep(0.01)


@rewritten
def test_each_watcher_of_the_hub_hears_reset_once(valkey: Server, rewrite: Callable[[Past], None]) -> None:
    """Whoever shares the reader: at the end, resumed, slow, watching all tasks, or come after it was rewritten."""
    past = Past(valkey)

    async def main(hub: Hub) -> None:
        readings = [Reading(hub, "0"), Reading(hub, "0"), Reading(hub, "0", hub.position)]
        for reading in readings:
            await reading.has_told(lambda told: len(told) == LIVE)
        slow = Reading(hub, "0")
        slow.may_go_on.clear()
        await slow.has_told(len)
        for n in range(2):  # which wait for the slow one when the stream is rewritten
            past.ids.append(past.log.add("progress", percent=n, step="s"))
        for reading in readings:
            await reading.has_told(lambda told: told[-1][1] == past.ids[-1])
        resumed = Reading(hub, past.ids[-1])
        await resumed.has_begun()

        await asyncio.to_thread(rewrite, past)
        late = Reading(hub, past.ids[-1])
        readings += [resumed, late]
        for reading in readings:
            await reading.has_told(lambda told: any(name == "reset" for name, _ in told))
        slow.may_go_on.set()
        await asyncio.to_thread(end_of, past)
        for reading in (*readings, slow):
            await reading.has_told(lambda told: told[-1][0] == "completed")
            reading.watcher.close()
            await reading.task
            assert_reset_once(reading.told, past)

    async def whole() -> None:
        async with asyncio.timeout(SECONDS), aclosing(await connect_async(valkey.url)) as client, Hub(client) as hub:
            await main(hub)

    asyncio.run(whole())
