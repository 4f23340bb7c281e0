"""What one person watches: an async iterator over the events of some tasks, each once and in order.

A watcher has a cursor per task and a small buffer, which the hub's readers fill. If the buffer is full, or Redis was
away, the watcher reads from its cursors again, at its own pace: it misses no event and slows nobody down.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisClusterException

from ailf.messaging.redis import REDIS_ERRORS, is_transient
from task_streams import Cursor, Event, keys
from task_streams.reader import START, order

if TYPE_CHECKING:
    from .hub import Hub

BUFFER = 1_000  # events that may wait for a watcher before it reads at its own pace


class Item:
    """An event of a task on its way to watchers; what they share is computed once."""

    __slots__ = ("event", "frame", "is_notice", "task_id")

    def __init__(self, task_id: str, event: Event, is_notice: bool = False) -> None:
        self.task_id, self.event = task_id, event
        self.is_notice = is_notice  # a `gap` or `reset` of the reader's own, not an entry that somebody named so
        self.frame: bytes | None = None  # for whoever encodes it


class Watcher:
    """An async iterator over Item, and over True and False when Redis comes back and goes. Ends when all tasks have.

    `cursors` maps each task that has not ended to the last entry id that was yielded. A new watcher can go on from it.
    """

    def __init__(
        self, hub: "Hub", cursors: dict[str, str], since: int | None, put_at: Mapping[str, float] | None = None
    ) -> None:
        self.hub = hub
        self.cursors = dict(cursors)
        self.put_at = dict(put_at or {})  # task id -> when it was put (ms), of those that nobody named
        self._named = frozenset(cursors)
        self._since = since
        self._joined_at = hub.position or 0  # the hub does not offer what was put up to then
        self._has_begun = False
        self._from_now = [task_id for task_id, cursor in cursors.items() if cursor == "$"]
        self._at: dict[str, Cursor] = {}  # of the tasks whose streams have been read
        self._behind = dict.fromkeys(cursors)  # tasks whose stream must be read from the cursor on, as they came
        self._queue: deque[Item] = deque()
        self._is_up = True  # as it was told
        self._notices: deque[bool] = deque(maxlen=2)
        self._wake = asyncio.Event()
        self._closed = False
        hub.all_watchers.add(self)
        if since is not None:
            hub.everything.add(self)
        for node in hub.away:
            self.tell(node)

    @property
    def position(self) -> int:
        """When (ms) the last tasks were put that `cursors` has, or that have ended and were yielded completely."""
        assert self._since is not None
        return max(self._since, self.hub.position or 0) if self._has_begun else self._since

    # -- for the hub --------------------------------------------------------------------------------------------

    def offer(self, task_id: str, put_at: float) -> None:
        """Watch a task that was just put, from its start, unless it is one of those named at first."""
        if self._since is not None and self._joined_at < put_at <= self._since:
            return  # another dashboard, which was a little ahead, has sent it to this client
        if task_id not in self._named and task_id not in self.cursors:
            self.cursors[task_id], self.put_at[task_id] = "0", put_at
            self.read_again(task_id)

    def push(self, item: Item) -> None:
        """Take an event from a reader; if there is no room for it, read it later."""
        if item.task_id in self._behind:
            return
        if len(self._queue) < BUFFER:
            self._queue.append(item)
        else:  # subtle: read all of the buffer later too, or it would still be full when this event has been read
            self._behind.update((queued.task_id, None) for queued in self._queue if queued.task_id in self.cursors)
            self._behind[item.task_id] = None
            self._queue.clear()
        self._wake.set()

    def read_again(self, task_id: str) -> None:
        """Read a task's stream from the cursor on."""
        self._behind[task_id] = None
        self._wake.set()

    def tell(self, node: str) -> None:
        """Note that a node went or came. What it brought before may be incomplete, so its streams are read again."""
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

    # -- the iteration ------------------------------------------------------------------------------------------

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
                        await asyncio.sleep(0)  # subtle: sending does not wait while a socket has room: let others run
                elif self._queue:
                    queued = self._queue.popleft()
                    # subtle: if reading a stream has failed half-way, what came meanwhile is not what comes next
                    for item in self._take(queued) if queued.task_id not in self._behind else ():
                        yield item
                        await asyncio.sleep(0)  # as above
                else:
                    await self._wake.wait()
        finally:
            self.hub.all_watchers.discard(self)
            self.hub.everything.discard(self)
            for task_id in list(self.cursors):
                self._leave(task_id)

    def _can_begin(self) -> bool:
        return self.hub.core not in self.hub.away and all(map(self.hub.is_readable, self._from_now))

    async def _begin(self) -> None:
        """Find out what "$" is, and which tasks were put since the position.

        This comes before anything is yielded, so that a client that goes on from the cursors later misses none of them.
        """
        try:
            while self._from_now:
                last, _ = await self.hub.newest(self._from_now[-1])
                self.cursors[self._from_now.pop()] = last
            if self._since is not None and self._since < self._joined_at:
                span = {"start": f"({self._since}", "end": self._joined_at, "byscore": True, "withscores": True}
                missed = await self.hub.ask("zrange", keys.UNFINISHED, **span)  # more, and older ones, than RECENT
                missed += await self.hub.ask("zrange", keys.RECENT, **span)
                for task_id, put_at in sorted(missed, key=lambda of: of[1]):
                    self.offer(task_id, put_at)
        except REDIS_ERRORS as error:
            if not may_pass(error):
                raise
        else:
            self._has_begun = True

    async def _catch_up(self, task_id: str) -> AsyncIterator[Item]:
        """Yield what a stream holds after the cursor, in pages; join the reader first, so that nothing is missed."""
        hub = self.hub
        self._behind.pop(task_id, None)  # subtle: first, so that what is noticed meanwhile makes it be read once more
        try:
            last, entry = await hub.newest(task_id)
            if not entry and await hub.has_expired(task_id):
                self._leave(task_id)  # it ended long ago, and its stream has expired
                return
            cursor = self._at.setdefault(task_id, Cursor(self.cursors[task_id]))
            if reset := cursor.check_end(last):
                yield Item(task_id, reset, is_notice=True)
                self._start_over(task_id)
                hub.rewind(task_id, last)
                return
            has_ended = entry.get("event") in keys.TERMINAL
            if has_ended and order(cursor.id) == order(last):
                self._leave(task_id)
                return
            if not has_ended:
                hub.join(self, task_id, last)
            has_more = True
            while has_more and task_id in self.cursors and not self._closed:
                events, has_more = await hub.page(task_id, cursor.id)
                for event in events:
                    for item in self._take(Item(task_id, event)):
                        yield item
                    if cursor.id == START:
                        return  # it starts over
        except REDIS_ERRORS as error:
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
        self.cursors[task_id] = event.id  # subtle: not before the gap is out; a client may go on from the gap's id
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
        parts: tuple[dict[str, Any], ...] = (self.cursors, self.put_at, self._at, self._behind)
        for part in parts:
            part.pop(task_id, None)
        self.hub.leave(self, task_id)


def may_pass(error: BaseException) -> bool:
    """Say whether an error may go away by itself, also if no node of a cluster can be reached."""
    return isinstance(error, RedisClusterException) or is_transient(error)
