"""One reader of Redis for all the watchers of this process.

    reader     XREAD BLOCK over just the streams that somebody watches, 1,000 a connection at most; in a cluster a
               reader for each node, which polls, so that a node that fails holds up only its own streams
    watcher    an async iterator over the events of some tasks: history in pages, then what the reader brings

A watcher joins within a round trip: CLIENT UNBLOCK ends the XREAD that runs, and the next one has its streams too. Each
watcher has a cursor per task and a small buffer. Where the buffer is full, or Redis was away, it reads from its cursors
again at its own pace, so that it neither loses an event nor slows another watcher. All of them share a few connections.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from typing import Any
from weakref import WeakSet

from redis.asyncio import RedisCluster
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisClusterException, RedisError, SlotNotCoveredError

from ailf.messaging.redis import Client, blocking_client, explain, is_transient, reason_of, url_of
from task_streams import Event, keys
from task_streams.reader import START, Cursor, order
from task_streams.retrying import delays

BLOCK_MS = 5_000  # of one XREAD; whoever joins does not wait for its end
STREAMS_PER_READER = 1_000  # more would make each XREAD slow
POLL_SECONDS = 0.05  # between two reads of a cluster's node: one command cannot read several slots
REGROUP_SECONDS = 1.0  # between two looks whether a cluster's streams are on their nodes still
PAGE = 500  # entries of history per XRANGE, and of each stream per XREAD
BUFFER = 1_000  # events that may wait for a watcher before it reads at its own pace
COMMANDS_AT_ONCE = 8  # of all watchers together; each takes a connection as long as it lasts
NEW_TASKS_SECONDS = 0.5  # between two looks for new tasks, which also tell whether Redis answers
OVERLAP_MS = 1_000  # by which two such looks overlap
LOST_STREAMS_SECONDS = 2.0  # between two looks for watched streams that have expired, or were rewritten

logger = logging.getLogger(__name__)


class Item:
    """An event of a task on its way to watchers; what they share is computed once."""

    __slots__ = ("event", "frame", "is_notice", "task_id")

    def __init__(self, task_id: str, event: Event, is_notice: bool = False) -> None:
        self.task_id, self.event = task_id, event
        self.is_notice = is_notice  # a `gap` or `reset` of the hub's own, not an entry that somebody named so
        self.frame: bytes | None = None  # for whoever encodes it


class Hub:
    """Reads the watched streams of one Redis. Start it with `async with`; watch() gives watchers."""

    def __init__(self, redis: Client) -> None:
        self.given = redis
        self.client = blocking_client(redis, 0)  # of its own, since one that is strict about UTF-8 stops at a bad entry
        self.redis: Client = _Sparing(self)
        self.away: set[str] = set()  # the nodes that do not answer, by name
        self._lost: set[str] = set()  # those of them that were said to be lost
        self._refusals: set[str] = set()  # what Redis will not do, as where rights are missing: each is said once
        self.position: int | None = None  # when the last tasks were put (ms) that who watches everything was offered
        self.watchers: dict[str, set[Watcher]] = {}  # task id -> who watches it
        # subtle: weak, since nobody tells of a watcher that was never iterated over (HEAD, or a client that went)
        self.everything: WeakSet[Watcher] = WeakSet()  # who watches every task
        self.on_event: Callable[[str], None] | None = None  # called with the entry id of each that a reader brings
        self._all: WeakSet[Watcher] = WeakSet()
        self._is_cluster = isinstance(redis, RedisCluster)
        self._readers: list[_Reader] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: set[str] = set()  # new tasks that the last look has found

    async def __aenter__(self) -> "Hub":
        if self._is_cluster:
            await self.client.initialize()  # from now on it knows which node holds what
            self.client.reinitialize_steps = 0  # else it closes all connections at each fifth slot that has moved
        await self._look_around(self._find_new_tasks)  # before anybody asks: what is put after this is new
        self.spawn(self._keep_looking(self._find_new_tasks, NEW_TASKS_SECONDS))
        self.spawn(self._keep_looking(self._find_lost_streams, LOST_STREAMS_SECONDS))
        if self._is_cluster:
            self.spawn(self._look_after_nodes())
        return self

    async def __aexit__(self, *_: object) -> None:
        for watcher in self.all_watchers():
            watcher.close()
        while self._tasks:  # subtle: again, since the wait_for of Python 3.11, in redis-py, may swallow a cancellation
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)
        for reader in self._readers:
            await reader.close()
        await self.client.aclose()

    def watch(
        self, cursors: dict[str, str], since: int | None = None, put_at: Mapping[str, float] | None = None
    ) -> "Watcher":
        """Return a watcher of the events after a cursor (entry id) of each task; with `since`, a time in ms, also of
        every task that was put after it, and that will be put. `put_at`: when (ms) those tasks were put of `cursors`
        that a position must be able to stand for."""
        return Watcher(self, cursors, since, put_at)

    async def history(self, task_id: str, until: str) -> AsyncIterator[Event]:
        """Yield the events up to an entry id, "$" for all, in pages; wait where Redis is away."""
        # subtle: XRANGE takes an id without its number for the last one of that time
        last = "+" if until == "$" else until if "-" in until else f"{until}-0"
        cursor, wait = "-", delays()
        while True:
            try:
                page = await self.redis.xrange(keys.stream(task_id), cursor, last, count=PAGE)
            except (RedisError, RedisClusterException) as error:
                if not may_pass(error):
                    raise
                await asyncio.sleep(next(wait))
                continue
            for entry in page:
                yield Event.from_entry(*entry)
            if not page:
                return
            cursor, wait = f"({page[-1][0]}", delays()

    async def has_expired(self, task_id: str) -> bool:
        """Say whether a task has ended and its stream is gone."""
        status = await self.redis.hget(keys.record(task_id), "status")
        # subtle: only then the stream, which has the end before the record: it may be written just now
        return status in keys.TERMINAL and not await self.redis.exists(keys.stream(task_id))

    def all_watchers(self) -> "WeakSet[Watcher]":
        return self._all

    # -- nodes --------------------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        return not self.away

    @property
    def core(self) -> str:
        """The node that holds the queue and the records."""
        return self.node_of(keys.RECENT)

    def node_of(self, key: str) -> str:
        """Return the name of the node that holds a key; "" where there is but one server."""
        if not self._is_cluster:
            return ""
        try:
            return str(self.client.get_node_from_key(key).name)
        except SlotNotCoveredError:
            return "no node"  # which is away as soon as somebody wants to read there

    async def do(self, command: str, *args: Any, **options: Any) -> Any:
        """Run one command, as `await do("xrange", key)`."""
        if not self._is_cluster:
            return await getattr(self.client, command)(*args, **options)
        # subtle: in a pipeline. Where a node fails, a cluster's client closes its connections to all, and may then
        # ask that very node what commands there are; its pipeline only fails.
        async with self.client.pipeline() as pipe:
            getattr(pipe, command)(*args, **options)
            return (await pipe.execute())[0]

    def is_readable(self, task_id: str) -> bool:
        """Say whether the nodes answer that hold a task's stream and its record."""
        return not self.away or self.away.isdisjoint((self.node_of(keys.stream(task_id)), self.core))

    # -- for watchers -------------------------------------------------------------------------------------------

    def enter(self, watcher: "Watcher", everything: bool) -> None:
        self._all.add(watcher)
        if everything:
            self.everything.add(watcher)

    def forget(self, watcher: "Watcher") -> None:
        self._all.discard(watcher)
        self.everything.discard(watcher)

    def join(self, watcher: "Watcher", task_id: str, last: str) -> None:
        """Let the watcher have what is appended to a task's stream after its entry `last`."""
        if task_id in self.watchers:
            self.watchers[task_id].add(watcher)
            return
        self.watchers[task_id] = {watcher}
        self.assign(task_id, last)

    def assign(self, task_id: str, last: str) -> None:
        """Let a reader of the node that holds a task's stream read it."""
        node = self.node_of(keys.stream(task_id))
        those = (one for one in self._readers if one.node == node and len(one.cursors) < STREAMS_PER_READER)
        reader = next(those, None)
        if reader is None:
            reader = _Reader(self, node)
            self._readers.append(reader)
            self.spawn(reader.run())
        reader.add(task_id, last)

    def leave(self, watcher: "Watcher", task_id: str) -> None:
        """Bring it nothing of this task any more; a stream that nobody watches is not read."""
        those = self.watchers.get(task_id, set())
        those.discard(watcher)
        if not those:
            self.watchers.pop(task_id, None)
            for reader in self._readers:
                reader.cursors.pop(task_id, None)

    def rewind(self, task_id: str, last: str) -> None:
        """Go on reading a stream that was rewritten after its end, `last`, if its reader is ahead of that."""
        for reader in self._readers:
            if order(last) < order(reader.cursors.get(task_id, START)):
                reader.add(task_id, last)
                self.read_again(task_id)

    def read_again(self, task_id: str) -> None:
        """Let all who watch a task read its stream from their cursors on."""
        for watcher in self.watchers.get(task_id, ()):
            watcher.read_again(task_id)

    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        """Run something beside, as long as the hub lives."""
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- for readers --------------------------------------------------------------------------------------------

    def bring(self, task_id: str, event: Event) -> None:
        """Give an event to all who watch its task."""
        if self.on_event is not None:
            self.on_event(event.id)
        item = Item(task_id, event)
        for watcher in self.watchers.get(task_id, ()):
            watcher.push(item)

    def went(self, error: Exception, node: str) -> None:
        """Note that a node is away, and tell the watchers whom it concerns."""
        if node in self.away:
            return
        self.away.add(node)
        if may_pass(error):
            logger.warning("lost Redis%s (%s); waiting for it", node and f" at {node}", reason_of(error))
            self._lost.add(node)
        elif (text := explain(error, url_of(self.given))) not in self._refusals:
            logger.error("%s", text)
            self._refusals.add(text)
        self._tell_all(node)

    def came(self, node: str) -> None:
        """Note that a node is back: who watches a task there reads again from the cursor."""
        if node in self.away:
            self.away.remove(node)
            if node in self._lost:
                logger.warning("Redis%s is back", node and f" at {node}")
                self._lost.remove(node)
            self._tell_all(node)

    def _tell_all(self, node: str) -> None:
        for watcher in self._all:
            watcher.tell(node)

    # -- looking around -----------------------------------------------------------------------------------------

    async def _keep_looking(self, look: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> None:
        wait = delays()
        while True:
            await asyncio.sleep(seconds if self.is_up else next(wait))
            await self._look_around(look)
            if self.is_up:
                wait = delays()

    async def _look_around(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await look()
        except (RedisError, RedisClusterException) as error:
            self.went(error, self.core)

    async def _find_new_tasks(self) -> None:
        """Let those who watch everything have each task that was put since the last look.

        The position is a millisecond that is over, so all tasks up to it were put before the look, none after it.
        """
        target = {"target_nodes": self.client.get_node_from_key(keys.RECENT)} if self._is_cluster else {}
        seconds, microseconds = await self.do("execute_command", "TIME", **target)
        until = seconds * 1000 + microseconds // 1000 - 1
        # The clock of a replica that took over may be behind, so each look goes back a little further.
        # subtle: the first look does too, although it offers nothing. Otherwise the second look would take tasks for
        # new that were put just before the first, and a watcher that came with a position may have had them already.
        since = (until if self.position is None else self.position) - OVERLAP_MS
        found = await self.do("zrange", keys.RECENT, since, until, byscore=True, withscores=True)
        for task_id, put_at in found if self.position is not None else ():
            if task_id not in self._known:
                for watcher in self.everything:
                    watcher.offer(task_id, put_at)
        self._known, self.position = {task_id for task_id, _ in found}, until
        self.came(self.core)  # only here: the look for lost streams leaves out what is away

    async def _find_lost_streams(self) -> None:
        """Let those read again whose stream has expired with its end unread, or ends before its reader's cursor."""
        for reader in list(self._readers):
            if reader.node in self.away:
                continue
            try:
                await self._find_lost_streams_of(reader)
            except (RedisError, RedisClusterException) as error:
                if not self._is_cluster or not may_pass(error):
                    raise
                self.went(error, reader.node)

    async def _find_lost_streams_of(self, reader: "_Reader") -> None:
        cursors = dict(reader.cursors)
        task_ids = list(cursors)
        for some in (task_ids[at : at + PAGE] for at in range(0, len(task_ids), PAGE)):
            async with self.client.pipeline(transaction=False) as pipe:
                for task_id in some:
                    pipe.xrevrange(keys.stream(task_id), count=1)
                    pipe.hget(keys.record(task_id), "status")
                replies = await pipe.execute()
            for task_id, newest, status in zip(some, replies[::2], replies[1::2], strict=True):
                last = newest[0][0] if newest else START
                if order(last) < order(cursors[task_id]):
                    self.rewind(task_id, last)
                elif not newest and status in keys.TERMINAL:
                    self.read_again(task_id)

    async def _look_after_nodes(self) -> None:
        """Of a cluster: ask those nodes again that are away, and give streams that have moved to the readers there."""
        while True:
            await asyncio.sleep(REGROUP_SECONDS)
            try:
                if self.away:
                    await self.client.nodes_manager.initialize()  # after a failover others hold their slots
                for reader in self._readers:
                    moved = [t for t in reader.cursors if self.node_of(keys.stream(t)) != reader.node]
                    for task_id in moved:
                        self.assign(task_id, reader.cursors.pop(task_id))
            except (RedisError, RedisClusterException) as error:
                if not may_pass(error):
                    logger.exception("cannot ask for the cluster's nodes; trying again")
            await asyncio.gather(*map(self._ask, self.away - {self.core}))

    async def _ask(self, node: str) -> None:
        """Note that a node is back, if it holds nothing that is watched, or answers for one that is."""
        watched = {task_id for watcher in self._all for task_id in watcher.cursors}
        there = next((task_id for task_id in watched if self.node_of(keys.stream(task_id)) == node), None)
        try:
            if there is not None:
                await self.do("exists", keys.stream(there))
        except (RedisError, RedisClusterException) as error:
            if not may_pass(error):
                logger.exception("cannot read from %s; trying again", node)
        else:
            self.came(node)


class _Sparing:
    """A client whose commands wait for each other beyond COMMANDS_AT_ONCE, and fail at once while Redis is away.

    redis-py makes a connection for each command that runs, and a pool refuses the 101st. The first argument is the key.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub, self._room = hub, asyncio.Semaphore(COMMANDS_AT_ONCE)

    def __getattr__(self, command: str) -> Any:
        hub = self._hub

        async def call(key: str, *args: Any, **options: Any) -> Any:
            async with self._room:
                if (node := hub.node_of(key)) in hub.away:
                    raise LostConnection("Redis is away")
                try:
                    return await hub.do(command, key, *args, **options)
                except (RedisError, RedisClusterException) as error:
                    if may_pass(error):
                        hub.went(error, node)  # who finds that it is back will tell
                    raise

        return call


class _Reader:
    """One connection that reads up to STREAMS_PER_READER streams of one node."""

    def __init__(self, hub: Hub, node: str) -> None:
        self.hub, self.node = hub, node
        self.cursors: dict[str, str] = {}  # task id -> entry id after which it reads
        self._asked: dict[str, str] = {}  # stream -> entry id after which the read under way reads
        self._blocking = None if node else blocking_client(hub.given, BLOCK_MS / 1000)
        self._wanted = self._reading = 0  # how often streams were added; how many of these the XREAD under way knows
        self._added = asyncio.Event()
        self._is_unblocking = False
        self._client_id: int | None = None

    async def close(self) -> None:
        """Close the connection; run() has been cancelled."""
        if self._blocking is not None:
            await self._blocking.aclose()

    def add(self, task_id: str, cursor: str) -> None:
        """Read this stream too, at once."""
        self.cursors[task_id] = cursor
        self._wanted += 1
        self._added.set()
        if self._blocking is not None and not self._is_unblocking:
            self._is_unblocking = True
            self.hub.spawn(self._unblock())

    async def _unblock(self) -> None:
        """End the XREAD under way, if it does not know the latest stream; again if it had not begun to block."""
        while self._reading < self._wanted and self._client_id is not None:
            with contextlib.suppress(RedisError):  # then the XREAD has failed as well, and the next one knows
                await self.hub.client.client_unblock(self._client_id)
            await asyncio.sleep(0.005)
        self._is_unblocking = False

    async def run(self) -> None:
        wait = delays()
        while True:
            try:
                async with aclosing(self._blocked() if self._blocking else self._polled()) as replies:
                    async for reply in replies:
                        wait = delays()
                        self.hub.came(self.node)
                        self._bring(reply)
            except Exception as error:  # the boundary of this task: whatever it is, all these watchers depend on it
                if not isinstance(error, RedisError | RedisClusterException):
                    logger.exception("cannot read the streams; trying again")
                self.hub.went(error, self.node)
                await asyncio.sleep(next(wait))

    async def _until_watched(self) -> None:
        while not self.cursors:
            self._added.clear()
            await self._added.wait()

    async def _blocked(self) -> AsyncGenerator[list[Any]]:
        """Yield the replies of one XREAD BLOCK after the other, on one connection, whose id is known."""
        assert self._blocking is not None
        async with self._blocking.client() as connection:
            try:
                self._client_id = await connection.client_id()
                while True:
                    await self._until_watched()
                    self._asked = {keys.stream(task_id): cursor for task_id, cursor in self.cursors.items()}
                    self._reading = self._wanted
                    yield await connection.xread(self._asked, count=PAGE, block=BLOCK_MS)
            finally:
                self._client_id = None

    async def _polled(self) -> AsyncGenerator[list[Any]]:
        """Yield what a pipeline of an XRANGE for each stream brings, all from one node of a cluster.

        A stream that has moved is read where it is now (redis-py follows MOVED), until _look_after_nodes has noticed.
        """
        while True:
            await self._until_watched()
            self._asked = {keys.stream(task_id): cursor for task_id, cursor in self.cursors.items()}
            async with self.hub.client.pipeline() as pipe:
                # subtle: not XREAD, of each of which redis-py would ask some node first where its keys are
                for stream, cursor in self._asked.items():
                    pipe.xrange(stream, f"({cursor}", "+", count=PAGE)
                replies = await pipe.execute()
            found = [pair for pair in zip(self._asked, replies, strict=True) if pair[1]]
            yield found
            if not found:
                await asyncio.sleep(POLL_SECONDS)

    def _bring(self, reply: list[Any]) -> None:
        for stream, entries in reply:
            task_id = stream.removeprefix(keys.stream(""))
            if self.cursors.get(task_id) != self._asked[stream]:
                continue  # nobody watches it any more, or it is read from another entry on: then it comes again
            for entry_id, fields in entries:
                self.cursors[task_id] = entry_id
                self.hub.bring(task_id, Event.from_entry(entry_id, fields))


class Watcher:
    """An async iterator over Item, or over True and False when Redis comes back and goes. Ends when all tasks have.

    `cursors` maps each task that has not ended to the last entry id that was yielded: from there a new watcher goes on.
    """

    def __init__(
        self, hub: Hub, cursors: dict[str, str], since: int | None, put_at: Mapping[str, float] | None = None
    ) -> None:
        self.hub = hub
        self.cursors = dict(cursors)
        self.put_at = dict(put_at or {})  # task id -> when it was put (ms), of those that nobody named
        self._named = frozenset(cursors)
        self._since = since
        self._joined_at = hub.position or 0  # what was put up to then, the hub offers no more
        self._has_begun = False
        self._from_now = [task_id for task_id, cursor in cursors.items() if cursor == "$"]
        self._at: dict[str, Cursor] = {}  # of the tasks whose streams have been read
        self._behind = dict.fromkeys(cursors)  # tasks whose stream must be read from the cursor on, in order of coming
        self._queue: deque[Item] = deque()
        self._is_up = True  # as it was told
        self._notices: deque[bool] = deque(maxlen=2)
        self._wake = asyncio.Event()
        self._closed = False
        hub.enter(self, since is not None)
        for node in hub.away:
            self.tell(node)

    @property
    def position(self) -> int:
        """When the last tasks were put (ms) that `cursors` has, or that have ended and were yielded as a whole."""
        assert self._since is not None
        return max(self._since, self.hub.position or 0) if self._has_begun else self._since

    def offer(self, task_id: str, put_at: float) -> None:
        """Watch a task that was put just now, from its start, unless it is one of those named at first."""
        if self._since is not None and self._joined_at < put_at <= self._since:
            return  # another dashboard, which was a little ahead, has sent it to this client
        if task_id not in self._named and task_id not in self.cursors:
            self.cursors[task_id], self.put_at[task_id] = "0", put_at
            self.read_again(task_id)

    def push(self, item: Item) -> None:
        """Take an event from a reader; where there is no room for it, read it later."""
        if item.task_id in self._behind:
            return
        if len(self._queue) < BUFFER:
            self._queue.append(item)
        else:  # subtle: all of the buffer is read later too, or it would still be full when this one has been read
            self._behind.update((queued.task_id, None) for queued in self._queue if queued.task_id in self.cursors)
            self._behind[item.task_id] = None
            self._queue.clear()
        self._wake.set()

    def read_again(self, task_id: str) -> None:
        """Read a task's stream from the cursor on."""
        self._behind[task_id] = None
        self._wake.set()

    def tell(self, node: str) -> None:
        """Note that a node went or came; after that nothing that it brought is taken for complete."""
        there = [task_id for task_id in self.cursors if self.hub.node_of(keys.stream(task_id)) == node]
        self._behind.update(dict.fromkeys(there))
        is_up = self.hub.core not in self.hub.away and all(map(self.hub.is_readable, self.cursors))
        if is_up != self._is_up:
            self._is_up = is_up
            self._notices.append(is_up)
        self._wake.set()

    def close(self) -> None:
        """End the iteration, as when the server stops."""
        self._closed = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Item | bool]:
        try:
            while not self._closed and (self.cursors or self in self.hub.everything):
                self._wake.clear()
                if self._notices:
                    yield self._notices.popleft()
                elif not self._has_begun and self._can_begin():
                    await self._begin()
                elif not self._has_begun:
                    await self._wake.wait()
                elif (task_id := next(filter(self.hub.is_readable, self._behind), None)) is not None:
                    async for item in self._catch_up(task_id):
                        yield item
                        # subtle: sending never waits where a socket has room, or is lost: let others run
                        await asyncio.sleep(0)
                elif self._queue:
                    queued = self._queue.popleft()
                    # subtle: where reading a stream has failed half-way, what came meanwhile is not what comes next
                    for item in self._take(queued) if queued.task_id not in self._behind else ():
                        yield item
                        await asyncio.sleep(0)  # as above
                else:
                    await self._wake.wait()
        finally:
            self.hub.forget(self)
            for task_id in list(self.cursors):
                self._leave(task_id)

    def _can_begin(self) -> bool:
        return self.hub.core not in self.hub.away and all(map(self.hub.is_readable, self._from_now))

    async def _begin(self) -> None:
        """Find out what "$" is, and the tasks that were put since the position: before anything is yielded, so that
        who goes on from the cursors later does not miss any."""
        redis = self.hub.redis
        try:
            while self._from_now:
                newest = await redis.xrevrange(keys.stream(self._from_now[-1]), count=1)
                self.cursors[self._from_now.pop()] = newest[0][0] if newest else START
            if self._since is not None and self._since < self._joined_at:
                span = {"start": f"({self._since}", "end": self._joined_at, "byscore": True, "withscores": True}
                missed = await redis.zrange(keys.UNFINISHED, **span)  # more, and older ones, than RECENT keeps
                for task_id, put_at in sorted(missed + await redis.zrange(keys.RECENT, **span), key=lambda of: of[1]):
                    self.offer(task_id, put_at)
        except (RedisError, RedisClusterException) as error:
            if not may_pass(error):
                raise
        else:
            self._has_begun = True

    async def _catch_up(self, task_id: str) -> AsyncIterator[Item]:
        """Yield what a stream holds after the cursor, in pages; join the reader first, so that nothing is missed."""
        redis, stream = self.hub.redis, keys.stream(task_id)
        self._behind.pop(task_id, None)  # subtle: first, so that what is found out meanwhile lets it be read once more
        try:
            newest = await redis.xrevrange(stream, count=1)
            last = newest[0][0] if newest else START
            if not newest and await self.hub.has_expired(task_id):
                self._leave(task_id)  # it ended long ago, and its stream has expired
                return
            cursor = self._at.setdefault(task_id, Cursor(self.cursors[task_id]))
            if reset := cursor.check_end(last):
                yield Item(task_id, reset, is_notice=True)
                self._start_over(task_id)
                self.hub.rewind(task_id, last)
                return
            has_ended = bool(newest) and newest[0][1].get("event") in keys.TERMINAL
            if has_ended and order(cursor.id) == order(last):
                self._leave(task_id)
                return
            if not has_ended:
                self.hub.join(self, task_id, last)
            while task_id in self.cursors and not self._closed:
                page = await redis.xrange(stream, f"({cursor.id}", "+", count=PAGE)
                for entry in page:
                    for item in self._take(Item(task_id, Event.from_entry(*entry))):
                        yield item
                    if cursor.id == START:
                        return  # it starts over
                if len(page) < PAGE:
                    break
        except (RedisError, RedisClusterException) as error:
            if not may_pass(error):
                raise
            if task_id in self.cursors:
                self._behind[task_id] = None  # it is read when its node is back

    def _take(self, item: Item) -> Iterator[Item]:
        """Yield an event that comes next, after its `gap`, or a `reset` in its place; nothing if it came before."""
        task_id, event = item.task_id, item.event
        cursor = self._at.get(task_id)
        if cursor is None or order(event.id) <= order(cursor.id):
            return
        if notice := cursor.step(event.id, event.replaces):
            yield Item(task_id, notice, is_notice=True)
        if cursor.id == START:
            self._start_over(task_id)
            return
        self.cursors[task_id] = event.id  # subtle: not before the gap is out: who goes on from there has not this event
        if event.is_terminal:
            self._leave(task_id)
        yield item

    def _start_over(self, task_id: str) -> None:
        """Read a stream that was rewritten from its start."""
        self.cursors[task_id] = START
        # subtle: what waits may be of the old history, with ids above those of the new one
        self._queue = deque(item for item in self._queue if item.task_id != task_id)
        self.read_again(task_id)

    def _leave(self, task_id: str) -> None:
        self.cursors.pop(task_id, None)
        self.put_at.pop(task_id, None)
        self._at.pop(task_id, None)
        self._behind.pop(task_id, None)
        self.hub.leave(self, task_id)


def may_pass(error: BaseException) -> bool:
    """Say whether an error may go away by itself, also where no node of a cluster can be reached."""
    return isinstance(error, RedisClusterException) or is_transient(error)
