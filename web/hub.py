"""One reader of Redis for everybody who watches, however many they are.

    Hub        knows who watches which task, and whether Redis answers
    Reader     XREAD BLOCK on one connection, over just the streams that somebody watches
    Watcher    an async iterator over the events of some tasks (web/watcher.py)

A watcher joins within a round trip: CLIENT UNBLOCK ends the XREAD under way, and the next one includes its streams.
For a Redis Cluster, web/cluster.py replaces the parts that need to know its nodes.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any
from weakref import WeakSet

from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisError

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, explain, reason_of, url_of
from task_streams import Event, keys
from task_streams.reader import START, order
from task_streams.retrying import delays

from .watcher import Item, Watcher, may_pass

BLOCK_MS = 5_000  # of one XREAD; a watcher that joins does not wait for its end
STREAMS_PER_READER = 1_000  # more would make each XREAD slow
PAGE = 500  # entries per XRANGE, and of each stream per XREAD
COMMANDS_AT_ONCE = 8  # of all watchers together; each takes a connection as long as it lasts
UNBLOCK_SECONDS = 0.005  # between two tries to end an XREAD
NEW_TASKS_SECONDS = 0.5  # between two looks for new tasks, which also tell whether Redis answers
OVERLAP_MS = 1_000  # by which two such looks overlap
LOST_STREAMS_SECONDS = 2.0  # between two looks for watched streams that have expired, or were rewritten

logger = logging.getLogger(__name__)


class Hub:
    """Reads the watched streams of one Redis. Start it with `async with`; watch() gives watchers."""

    def __init__(self, redis: Client) -> None:
        self.given = redis
        self.client = blocking_client(redis, 0)  # of its own: one that is strict about UTF-8 stops at a bad entry
        self.away: set[str] = set()  # the nodes that do not answer, by name; one server has the name ""
        self.position: int | None = None  # tasks put up to then (ms) were offered to all who watch everything
        self.watchers: dict[str, set[Watcher]] = {}  # task id -> who watches it
        # subtle: weak, since nobody tells the hub of a watcher that is never iterated over (HEAD, or a lost client)
        self.everything: WeakSet[Watcher] = WeakSet()  # those who watch every task
        self.all_watchers: WeakSet[Watcher] = WeakSet()
        self.on_event: Callable[[str], None] | None = None  # called with the entry id of each event that is read
        self.readers: list[Reader] = []
        self._room = asyncio.Semaphore(COMMANDS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: set[str] = set()  # the tasks that the last look found
        self._said: set[str] = set()  # what is logged about Redis: each line once

    async def __aenter__(self) -> "Hub":
        await self.look(self._find_new_tasks)  # before anybody asks: a task that is put after this is new
        self.spawn(self._keep_looking(self._find_new_tasks, NEW_TASKS_SECONDS))
        self.spawn(self._keep_looking(self._find_lost_streams, LOST_STREAMS_SECONDS))
        return self

    async def __aexit__(self, *_: object) -> None:
        for watcher in list(self.all_watchers):
            watcher.close()
        while self._tasks:  # subtle: again, since wait_for of Python 3.11, in redis-py, may swallow a cancellation
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)
        await self.client.aclose()

    def watch(
        self, cursors: dict[str, str], since: int | None = None, put_at: Mapping[str, float] | None = None
    ) -> Watcher:
        """Return a watcher of the events after a cursor (entry id) of each task.

        With `since`, a time in ms, it also watches each task that was put after it, and that will be put. `put_at` says
        when (ms) tasks of `cursors` were put, so that a position can stand for them.
        """
        return Watcher(self, cursors, since, put_at)

    async def history(self, task_id: str, until: str) -> AsyncIterator[Event]:
        """Yield the events up to an entry id, "$" for all, in pages. While Redis is away it waits."""
        # subtle: XRANGE takes an id without its number for the last one of that time
        last = "+" if until == "$" else until if "-" in until else f"{until}-0"
        cursor, wait, has_more = START, delays(), True
        while has_more:
            try:
                events, has_more = await self.page(task_id, cursor, last)
            except REDIS_ERRORS as error:
                if not may_pass(error):
                    raise
                await asyncio.sleep(next(wait))
                continue
            for event in events:
                yield event
                cursor, wait = event.id, delays()

    async def page(self, task_id: str, after: str, last: str = "+") -> tuple[list[Event], bool]:
        """Return the next events after an entry id, and whether there may be more."""
        entries = await self.ask("xrange", keys.stream(task_id), f"({after}", last, count=PAGE)
        return [Event.from_entry(*entry) for entry in entries], len(entries) == PAGE

    async def newest(self, task_id: str) -> tuple[str, dict[str, str]]:
        """Return a stream's last entry; (START, {}) if there is none."""
        found = await self.ask("xrevrange", keys.stream(task_id), count=1)
        return found[0] if found else (START, {})

    async def has_expired(self, task_id: str) -> bool:
        """Say whether a task has ended and its stream is gone."""
        status = await self.ask("hget", keys.record(task_id), "status")
        # subtle: only then the stream. The end is written there before the record says so.
        return status in keys.TERMINAL and not await self.ask("exists", keys.stream(task_id))

    # -- asking Redis -------------------------------------------------------------------------------------------

    async def ask(self, command: str, key: str, *args: Any, **options: Any) -> Any:
        """Run one command on a key, as `await hub.ask("xrange", key)`; at once LostConnection while Redis is away.

        COMMANDS_AT_ONCE run together, since each takes a connection.
        """
        async with self._room:
            if (node := self.node_of(key)) in self.away:
                raise LostConnection("Redis is away")
            try:
                return await self.run(command, key, *args, **options)
            except REDIS_ERRORS as error:
                if may_pass(error):
                    self.went(error, node)  # whatever finds that it is back tells the watchers
                raise

    async def run(self, command: str, *args: Any, **options: Any) -> Any:
        return await getattr(self.client, command)(*args, **options)

    async def time(self) -> tuple[int, int]:
        """Return the time of the server that holds the queue, as seconds and microseconds."""
        seconds, microseconds = await self.client.time()
        return seconds, microseconds

    def node_of(self, key: str) -> str:
        """Return the name of the node that holds a key."""
        return ""

    @property
    def core(self) -> str:
        """The node that holds the queue and the records."""
        return self.node_of(keys.RECENT)

    def is_readable(self, task_id: str) -> bool:
        """Say whether the nodes answer that hold a task's stream and its record."""
        return not self.away or self.away.isdisjoint((self.node_of(keys.stream(task_id)), self.core))

    # -- for watchers -------------------------------------------------------------------------------------------

    def join(self, watcher: Watcher, task_id: str, last: str) -> None:
        """Give the watcher what is appended to a task's stream after its entry `last`."""
        if task_id in self.watchers:
            self.watchers[task_id].add(watcher)
        else:
            self.watchers[task_id] = {watcher}
            self.assign(task_id, last)

    def leave(self, watcher: Watcher, task_id: str) -> None:
        """Give it nothing of this task any more. A stream that nobody watches is not read."""
        those = self.watchers.get(task_id, set())
        those.discard(watcher)
        if not those:
            self.watchers.pop(task_id, None)
            for reader in self.readers:
                reader.cursors.pop(task_id, None)

    def rewind(self, task_id: str, last: str) -> None:
        """Go on reading a stream that was rewritten after its end, `last`, if its reader is ahead of that."""
        for reader in self.readers:
            if order(last) < order(reader.cursors.get(task_id, START)):
                reader.add(task_id, last)
                self.read_again(task_id)

    def read_again(self, task_id: str) -> None:
        for watcher in self.watchers.get(task_id, ()):
            watcher.read_again(task_id)

    def assign(self, task_id: str, last: str) -> None:
        """Let a reader of the node that holds a task's stream read it."""
        node = self.node_of(keys.stream(task_id))
        those = (one for one in self.readers if one.node == node and len(one.cursors) < STREAMS_PER_READER)
        reader = next(those, None)
        if reader is None:
            reader = self.new_reader(node)
            self.readers.append(reader)
            self.spawn(reader.run())
        reader.add(task_id, last)

    def new_reader(self, node: str) -> "Reader":
        return Reader(self, node)

    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        """Run something in the background for as long as the hub lives."""
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- for readers --------------------------------------------------------------------------------------------

    def bring(self, task_id: str, event: Event) -> None:
        """Give an event to everybody who watches its task."""
        if self.on_event is not None:
            self.on_event(event.id)
        item = Item(task_id, event)
        for watcher in self.watchers.get(task_id, ()):
            watcher.push(item)

    def went(self, error: Exception, node: str) -> None:
        """Note that a node is away, and tell the watchers of its streams."""
        if node in self.away:
            return
        self.away.add(node)
        if may_pass(error):
            self._say(f"lost Redis{node and f' at {node}'}", f" ({reason_of(error)}); waiting for it")
        else:
            self._say(explain(error, url_of(self.given)))
        self._tell_watchers(node)

    def came(self, node: str) -> None:
        """Note that a node is back: those who watch a task there read again from their cursors."""
        if node not in self.away:
            return
        self.away.remove(node)
        if (lost := f"lost Redis{node and f' at {node}'}") in self._said:
            self._said.remove(lost)
            logger.warning("Redis%s is back", node and f" at {node}")
        self._tell_watchers(node)

    def _say(self, what: str, more: str = "") -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s%s", what, more)

    def _tell_watchers(self, node: str) -> None:
        for watcher in self.all_watchers:
            watcher.tell(node)

    # -- looking around -----------------------------------------------------------------------------------------

    async def _keep_looking(self, what: Callable[[], Awaitable[None]], seconds: float) -> None:
        wait = delays()
        while True:
            await asyncio.sleep(next(wait) if self.away else seconds)
            await self.look(what)
            if not self.away:
                wait = delays()

    async def look(self, what: Callable[[], Awaitable[None]]) -> None:
        try:
            await what()
        except REDIS_ERRORS as error:
            self.went(error, self.core)

    async def _find_new_tasks(self) -> None:
        """Offer each task that was put since the last look to those who watch everything.

        The position is a millisecond that is over. So all tasks up to it were put before the look, and none after it.
        """
        seconds, microseconds = await self.time()
        until = seconds * 1000 + microseconds // 1000 - 1
        # A replica that took over may have a clock that is behind, so each look goes back a little further.
        # subtle: so does the first look, although it offers nothing. Otherwise the second look would take tasks for new
        # that were put just before the first, and a watcher that came with a position may have had them already.
        since = (until if self.position is None else self.position) - OVERLAP_MS
        found = await self.run("zrange", keys.RECENT, since, until, byscore=True, withscores=True)
        for task_id, put_at in found if self.position is not None else ():
            if task_id not in self._known:
                for watcher in self.everything:
                    watcher.offer(task_id, put_at)
        self._known, self.position = {task_id for task_id, _ in found}, until
        self.came(self.core)  # only here: the look for lost streams asks nothing of a node that is away

    async def _find_lost_streams(self) -> None:
        """Let watchers read again whose stream has expired with its end unread, or ends before its reader's cursor."""
        for reader in [one for one in self.readers if one.node not in self.away]:
            task_ids = list(reader.cursors)
            try:
                for at in range(0, len(task_ids), PAGE):
                    await self._find_lost_among(reader, task_ids[at : at + PAGE])
            except REDIS_ERRORS as error:
                self.went(error, reader.node)

    async def _find_lost_among(self, reader: "Reader", task_ids: list[str]) -> None:
        cursors = {task_id: reader.cursors.get(task_id, START) for task_id in task_ids}
        async with self.client.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.xrevrange(keys.stream(task_id), count=1)
                pipe.hget(keys.record(task_id), "status")
            replies = await pipe.execute()
        for task_id, newest, status in zip(task_ids, replies[::2], replies[1::2], strict=True):
            last = newest[0][0] if newest else START
            if order(last) < order(cursors[task_id]):
                self.rewind(task_id, last)
            elif not newest and status in keys.TERMINAL:
                self.read_again(task_id)


class Reader:
    """One connection that reads up to STREAMS_PER_READER streams of one node, and gives the hub what is new."""

    def __init__(self, hub: Hub, node: str) -> None:
        self.hub, self.node = hub, node
        self.cursors: dict[str, str] = {}  # task id -> entry id after which it reads
        self.client_id: int | None = None  # of the connection that blocks
        self._asked: dict[str, str] = {}  # stream -> entry id after which the read under way reads
        self._added = asyncio.Event()
        self._wanted = self._reading = 0  # how often streams were added; how many of these the XREAD under way knows
        self._is_unblocking = False

    def add(self, task_id: str, cursor: str) -> None:
        """Read this stream too, at once."""
        self.cursors[task_id] = cursor
        self._wanted += 1
        self._added.set()
        if not self._is_unblocking:
            self._is_unblocking = True
            self.hub.spawn(self._unblock())

    async def _unblock(self) -> None:
        """End the XREAD under way if it does not know the latest stream; again if it had not begun to block."""
        while self._reading < self._wanted and self.client_id is not None:
            with contextlib.suppress(RedisError):  # then the XREAD has failed as well, and the next one knows
                await self.hub.client.client_unblock(self.client_id)
            await asyncio.sleep(UNBLOCK_SECONDS)
        self._is_unblocking = False

    async def run(self) -> None:
        wait = delays()
        while True:
            try:
                async with aclosing(self.replies()) as replies:
                    async for reply in replies:
                        wait = delays()
                        self.hub.came(self.node)
                        self._bring(reply)
            except Exception as error:  # the boundary of this task: all these watchers depend on it
                if not isinstance(error, REDIS_ERRORS):
                    logger.exception("cannot read the streams; trying again")
                self.hub.went(error, self.node)
                await asyncio.sleep(next(wait))

    async def replies(self) -> AsyncGenerator[list[Any]]:
        """Yield what is new in the streams, as XREAD returns it. Raises redis-py's errors."""
        blocking = blocking_client(self.hub.given, BLOCK_MS / 1000)
        try:
            async with blocking.client() as connection:
                self.client_id = await connection.client_id()
                while True:
                    streams = await self.next_streams()
                    yield await connection.xread(streams, count=PAGE, block=BLOCK_MS)
        finally:
            self.client_id = None
            await blocking.aclose()

    async def next_streams(self) -> dict[str, str]:
        """Return the streams to read, and after which entries; wait until there is one."""
        while not self.cursors:
            self._added.clear()
            await self._added.wait()
        self._asked = {keys.stream(task_id): cursor for task_id, cursor in self.cursors.items()}
        self._reading = self._wanted
        return self._asked

    def _bring(self, reply: list[Any]) -> None:
        for stream, entries in reply:
            task_id = stream.removeprefix(keys.stream(""))
            if self.cursors.get(task_id) != self._asked[stream]:
                continue  # nobody watches it any more, or it is read from another entry on: then it comes again
            for entry_id, fields in entries:
                self.cursors[task_id] = entry_id
                self.hub.bring(task_id, Event.from_entry(entry_id, fields))
