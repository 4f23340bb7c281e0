"""A stream of messages that workers share: each goes to one of a consumer group, and stays pending until it is done.

At least once: what a consumer has read and not acknowledged, because it failed or was killed, is delivered again. So
a handler must be idempotent. Entries beyond `maxlen` are trimmed, even those that nobody has read yet.
"""

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from redis import exceptions as errors

from .base import OnAsyncio, OnThreads, Utility
from .client import AsyncRedisClient, RedisClient, blocking_client
from .codec import decode, encode
from .errors import REDIS_ERRORS, is_transient, reason_of
from .lua import load
from .steps import Steps, both
from .topologies import Client

MAX_DELIVERIES = 5  # of one entry, before it goes to <stream>:dead
STALE_MS = 30_000  # without a sign of life of its consumer an entry goes to another one
BLOCK_SECONDS = 1.0  # of one command: longer blocks are made of several, so that stop() is noticed
BACK_OFF_SECONDS = 0.5  # between two tries while Redis is away
MAX_ERROR_CHARS = 2_000  # of an exception in a dead letter

Entry = dict[str, Any]  # {"id": entry id, "data": what was added}; data is None where the entry was trimmed away
Handler = Callable[[dict[str, Any]], Any]

logger = logging.getLogger(__name__)


class _Stream(Utility):
    _reader: Client = None  # for commands that block, and for reading what others may have written

    def __init__(
        self,
        stream_name: str,
        redis_client: RedisClient | AsyncRedisClient | Client | None = None,
        maxlen: int | None = 10_000,
        max_deliveries: int = MAX_DELIVERIES,
        stale_ms: int = STALE_MS,
    ) -> None:
        if not isinstance(stream_name, str) or not stream_name:
            raise ValueError(f"stream_name must be a name, not {stream_name!r}")
        for name, value in (("maxlen", maxlen), ("max_deliveries", max_deliveries), ("stale_ms", stale_ms)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.name, self.maxlen = stream_name, maxlen
        self.max_deliveries, self.stale_ms = max_deliveries, stale_ms
        self.group = self.consumer = ""
        self._start_id = "0"
        self._last_read: str | None = None
        self._stopped = threading.Event()
        self._held: set[str] = set()  # the entry in hand, which must not become stale
        self._resting: dict[str, float] = {}  # entries that failed -> time.monotonic() when they are stale
        # Entries that were handled, while Redis was not told -> None, or how often and why they failed
        self._untold: dict[str, tuple[int, str] | None] = {}
        self._done = 0  # entries that process_messages() has acknowledged
        self._open(redis_client)

    def _prepare(self) -> None:
        self._reader = blocking_client(self.redis, BLOCK_SECONDS)
        self._renew = load(self.redis, "renew")

    # -- the commands -------------------------------------------------------------------------------------------

    @both
    def add(self, data: dict[str, Any]) -> Steps[str]:
        """Append a message: a dict with text keys and JSON values, not empty. Return its entry id. Never repeated."""
        if self.redis is None:
            yield self.connected()
        return str((yield self.redis.xadd(self.name, _fields(data), maxlen=self.maxlen)))

    @both
    def read(self, count: int = 10, block: int | None = None, last_id: str = "$") -> Steps[list[Entry]]:
        """Return up to `count` entries after an entry id, without a group. With `block` (ms; 0: no end) wait for one.

        "$" goes on where this object's last read() ended; the first time, where the stream ends then. So no entry is
        missed between two calls.
        """
        yield self.connected()
        if last_id == "$":
            last_id = self._last_read or (yield from self._end())
        self._last_read = last_id
        for block_ms in _blocks(block):
            if entries := _entries((yield self._reader.xread({self.name: last_id}, count=count, block=block_ms))):
                self._last_read = entries[-1]["id"]
                return entries
        return []

    @both
    def create_consumer_group(self, group: str, consumer: str, start_id: str = "0") -> Steps[bool]:
        """Read as this consumer of this group from now on. Return True if the group is new, and was created.

        A new group gets whatever comes after start_id: "0" everything, "$" only what is added from now on. A consumer
        that comes back under its old name goes on with what it left pending.
        """
        if not group or not consumer:
            raise ValueError("group and consumer need a name each")
        yield self.connected()
        if start_id == "$":  # subtle: made anew, the group must not leave out what came since
            start_id = yield from self._end()
        created = yield from self._create_group(group, start_id)
        self.group, self.consumer, self._start_id = group, consumer, start_id
        return created

    @both
    def read_group(self, count: int = 10, block: int | None = None, last_id: str = ">") -> Steps[list[Entry]]:
        """Return up to `count` entries that no consumer of the group has had (">"), or one's own pending ones after an
        entry id. With `block` (ms; 0: no end) wait for a new one. Raises ValueError without a group."""
        return (yield from self._read_group(count, block, last_id))

    @both
    def acknowledge(self, entry_id: str) -> Steps[bool]:
        """Take an entry off the group's pending list: it is done. False if it was not pending."""
        return (yield from self._acknowledge(entry_id))

    @both
    def pending(self, count: int = 100) -> Steps[list[dict[str, Any]]]:
        """Return the group's first `count` pending entries: {"id", "consumer", "idle_ms", "deliveries"} of each."""
        self._check_group()
        found = yield self.redis.xpending_range(self.name, self.group, "-", "+", count)
        return [dict(zip(("id", "consumer", "idle_ms", "deliveries"), one.values(), strict=True)) for one in found]

    @both
    def claim_stale(self, min_idle_ms: int, count: int = 10) -> Steps[list[Entry]]:
        """Take over up to `count` entries that have been pending for min_idle_ms, and return them (XAUTOCLAIM)."""
        self._check_group()
        entries, cursor = yield from self._claim(min_idle_ms, count, "0-0")
        while len(entries) < count and cursor != "0-0":
            more, cursor = yield from self._claim(min_idle_ms, count - len(entries), cursor)
            entries += more
        return entries

    @both
    def process_messages(self, handler: Handler, count: int = 10, block: int = 1000, burst: bool = False) -> Steps[int]:
        """Call handler(data) for each message until stop() or Ctrl-C; return how many were acknowledged. Blocks.

        First come the entries that this consumer left pending, then those that others left (XAUTOCLAIM, every half
        stale_ms), then new ones, `count` at a time, for which it waits `block` ms. An entry is acknowledged when its
        handler returns true. If it raises, or returns anything else, that is logged and the entry is delivered again
        after stale_ms, to any consumer; after max_deliveries it goes to `<stream>:dead`. With `burst` it returns when
        nothing is left to do. While Redis is away it waits. Raises ValueError without a group.
        """
        self._begin(handler)
        done: int = yield self._process(handler, count, block, burst)
        return done

    def stop(self) -> None:
        """Let process_messages() end: after the handler that runs now, or within a second."""
        self._stopped.set()

    def _finish(self) -> Steps[None]:
        self.stop()
        if self._reader is not self.redis:  # as a test's double is, and None before the first use
            yield self.close_one(self._reader)
        yield from super()._finish()

    def _check_group(self) -> None:
        if not self.group:
            raise ValueError("No consumer group set. Call create_consumer_group first.")

    def _begin(self, handler: Handler) -> None:
        self._check_group()
        if not callable(handler) or (isinstance(self, RedisStream) and inspect.iscoroutinefunction(handler)):
            raise TypeError(f"handler must be a function (a coroutine function: AsyncRedisStream), not {handler!r:.80}")
        self._stopped.clear()
        self._done = 0
        now = time.monotonic()
        self._resting = {entry_id: until for entry_id, until in self._resting.items() if until > now}

    def _end(self) -> Steps[str]:
        """Return the id of the stream's last entry."""
        return next((str(entry_id) for entry_id, _ in (yield self._reader.xrevrange(self.name, count=1))), "0-0")

    def _create_group(self, group: str, start_id: str) -> Steps[bool]:
        try:
            yield self.redis.xgroup_create(self.name, group, id=start_id, mkstream=True)
        except errors.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
            return False
        return True

    def _read_group(self, count: int, block: int | None, last_id: str) -> Steps[list[Entry]]:
        self._check_group()
        streams = {self.name: last_id}
        for block_ms in _blocks(block if last_id == ">" else None):
            reply = yield self._reader.xreadgroup(self.group, self.consumer, streams, count, block_ms)
            if entries := _entries(reply):
                return entries
        return []

    def _acknowledge(self, entry_id: str) -> Steps[bool]:
        self._check_group()
        return bool((yield self.redis.xack(self.name, self.group, entry_id)))

    def _claim(self, min_idle_ms: int, count: int, cursor: str) -> Steps[tuple[list[Entry], str]]:
        reply = yield self._reader.xautoclaim(self.name, self.group, self.consumer, min_idle_ms, cursor, count)
        for entry_id in reply[2] if len(reply) > 2 else ():  # Redis has taken them off the pending list
            self._warn_trimmed(entry_id)
        return _entries([(self.name, reply[1])]), reply[0]

    def _warn_trimmed(self, entry_id: str) -> None:
        logger.warning("stream %s: entry %s was trimmed before it was handled", self.name, entry_id)

    # -- the worker's round -------------------------------------------------------------------------------------

    @both
    def _process(self, handler: Handler, count: int, block: int, burst: bool) -> Steps[int]:
        ended = self.new_event()
        self._fresh = self.begin(self._stay_fresh(ended), f"fresh {self.name}")
        try:
            with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a worker; its entry stays pending
                yield from self._work(handler, count, block, burst)
        finally:
            ended.set()
            self._held.clear()
        return self._done

    def _work(self, handler: Handler, count: int, block: int, burst: bool) -> Steps[None]:
        away = group_gone = False
        block_ms = None if burst else next(_blocks(block or 0))  # one command's; the loop makes up the rest
        place = _Place()
        while not self._stopped.is_set():
            try:
                if away:  # subtle: the connection may be dead; not an XACK should find out
                    yield self.redis.exists(self.name)
                if group_gone:
                    yield from self._create_group(self.group, self._start_id)
                group_gone = False
                batch, tried = yield from self._next(place, count, block_ms)
                if burst and not batch:
                    break
                yield from self._handle(batch, tried, handler)
                if away:
                    logger.warning("stream %s: Redis is back", self.name)
                away = False
            except REDIS_ERRORS as error:
                place = _Place()  # subtle: a lost reply left its entries pending, and not handled
                self._held.clear()
                if str(error).startswith("NOGROUP"):
                    logger.warning("stream %s: group %s is gone; creating it again", self.name, self.group)
                    group_gone = True
                    continue
                if not is_transient(error):
                    raise
                if not away and not self._stopped.is_set():  # close() has cut it
                    logger.warning("stream %s: Redis does not serve (%s); waiting", self.name, reason_of(error))
                away = True
                yield self.sleep(BACK_OFF_SECONDS)

    def _next(self, place: "_Place", count: int, block: int | None) -> Steps[tuple[list[Entry], int]]:
        """Return the next entries, and how often they have been delivered.

        subtle: what is delivered again comes one by one. If it kills its consumer, the others of its batch must not be
        counted as tried.
        """
        while place.own:
            if taken := (yield from self._take_own(place)):
                return taken
        while time.monotonic() >= place.claim_at:
            entries, place.cursor = yield from self._claim(self.stale_ms, 1, place.cursor)
            if place.cursor == "0-0":  # it has seen all pending entries
                place.claim_at = time.monotonic() + self.stale_ms / 2000
            if entries:
                return entries, (yield from self._deliveries(entries[0]["id"]))
        if self.max_deliveries == 1:
            count = 1  # the rest of a batch, delivered once and not tried, would be buried if its consumer ended
        return (yield from self._read_group(count, block, ">")), 1

    def _take_own(self, place: "_Place") -> Steps[tuple[list[Entry], int] | None]:
        """Deliver the next of this consumer's own pending entries to it again, except if it has just failed on it."""
        found = yield self.redis.xpending_range(self.name, self.group, place.own, "+", 1, self.consumer)
        place.own = f"({found[0]['message_id']}" if found else ""
        if not found or self._resting.get(found[0]["message_id"], 0) > time.monotonic():
            return None
        entry_id = found[0]["message_id"]
        claimed = yield self._reader.xclaim(self.name, self.group, self.consumer, 0, [entry_id])
        if entries := _entries([(self.name, [one for one in claimed if one])]):
            return entries, found[0]["times_delivered"] + 1
        self._warn_trimmed(entry_id)
        return None

    def _deliveries(self, entry_id: str) -> Steps[int]:
        found = yield self.redis.xpending_range(self.name, self.group, entry_id, entry_id, 1)
        return int(found[0]["times_delivered"]) if found else 1

    def _handle(self, batch: list[Entry], tried: int, handler: Handler) -> Steps[None]:
        """Handle entries one after the other, and acknowledge them."""
        since = time.monotonic()
        for entry in batch:
            entry_id = entry["id"]
            self._held = {entry_id}  # subtle: not the whole batch: while one takes long, others may have the rest
            if time.monotonic() - since > self.stale_ms / 3000:  # perhaps they have
                yield from self._keep_fresh()
            if self._stopped.is_set() or entry_id not in self._held:
                continue  # it stays pending, or it is another's now
            if entry_id not in self._untold:  # else it was handled, but Redis went away before it heard of that
                error = yield from self._try(handler, entry, tried)
                if error and tried < self.max_deliveries:
                    self._resting[entry_id] = time.monotonic() + self.stale_ms / 1000
                    self._held.clear()
                    continue  # it stays pending, and becomes stale
                self._untold[entry_id] = (tried - (tried > self.max_deliveries), error) if error else None
            if failure := self._untold[entry_id]:
                yield from self._bury(entry, *failure)
                self._untold[entry_id] = None
            self._done += yield from self._acknowledge(entry_id)
            del self._untold[entry_id]
            self._held.clear()

    def _try(self, handler: Handler, entry: Entry, tried: int) -> Steps[str | None]:
        """Call the handler; return None if the entry is done, else why not."""
        if entry["data"] is None:
            self._warn_trimmed(entry["id"])
            return None
        if tried > self.max_deliveries:
            return "its consumers ended without acknowledging it"
        try:
            if (yield self.call(handler, entry["data"])):
                return None
        except Exception as error:
            logger.exception("stream %s: the handler failed on entry %s", self.name, entry["id"])
            return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode()
        logger.warning("stream %s: the handler did not return true for entry %s", self.name, entry["id"])
        return "the handler did not return true"

    def _bury(self, entry: Entry, tried: int, error: str) -> Steps[None]:
        """Add an entry to <stream>:dead. Killed before it is acknowledged too, it will be there twice."""
        # subtle: as it was added; the handler may have changed what it was given
        added = _entries([(self.name, (yield self._reader.xrange(self.name, entry["id"], entry["id"])))]) or [entry]
        letter = {"id": entry["id"], "error": error, "deliveries": tried, "data": added[0]["data"]}
        yield self.redis.xadd(f"{self.name}:dead", _fields(letter), maxlen=self.maxlen)
        logger.error("stream %s: entry %s is given up after %d deliveries: %s", self.name, entry["id"], tried, error)

    def _stay_fresh(self, ended: Any) -> Steps[None]:
        while not (yield self.wait_for(ended, self.stale_ms / 3000)):
            yield from self._keep_fresh()

    def _keep_fresh(self) -> Steps[None]:
        """Give a sign of life for the entry in hand; forget it if it went to another consumer."""
        held = list(self._held)
        try:
            if held:
                still = yield self._renew(keys=[self.name], args=[self.group, self.consumer, *held])
                self._held.difference_update(set(held) - set(still))
        except REDIS_ERRORS as error:
            logger.debug("stream %s: no sign of life given: %s", self.name, error)


@dataclass
class _Place:
    """Where a worker is in its round: its own pending entries, then stale ones, then new ones."""

    own: str = "-"  # from where on its own pending entries are looked up; "": it had all
    cursor: str = "0-0"  # of XAUTOCLAIM
    claim_at: float = 0.0  # time.monotonic() when stale entries are looked for again


class RedisStream(_Stream, OnThreads):
    """A stream, and with create_consumer_group() a consumer of it. One object for one thread that reads.

    maxlen: entries kept, approximately (None: all). max_deliveries: how often an entry is tried before it goes to
    `<stream>:dead`, with its error. stale_ms: after how long without a sign of life another consumer may have the
    entry; process_messages() gives such signs while a handler runs. RedisUnavailable is raised while Redis is away,
    except by process_messages(), which waits for it. close() stops it, and closes the connections of its own.
    """

    def process_in_thread(
        self, handler: Handler, count: int = 10, block: int = 1000, daemon: bool = True
    ) -> threading.Thread:
        """Run process_messages() in a new thread, which ends after stop()."""
        self._begin(handler)
        thread = threading.Thread(target=self._process, args=(handler, count, block, False), daemon=daemon)
        thread.start()
        return thread


class AsyncRedisStream(_Stream, OnAsyncio):
    """RedisStream for asyncio: await every method but stop(). A handler may be a function or a coroutine function.

    It connects on first use. A handler that blocks the event loop for longer than stale_ms loses its entries to others.
    """

    def process_in_task(self, handler: Handler, count: int = 10, block: int = 1000) -> "asyncio.Task[int]":
        """Run process_messages() in a new task, which ends after stop()."""
        self._begin(handler)
        return asyncio.create_task(self._process(handler, count, block, False))


def _fields(data: dict[str, Any]) -> dict[str, str]:
    """Return a message as the fields of an entry. _fields({"type": "x", "n": 7}) -> {"type": "x", "n": "7"}"""
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise TypeError(f"a message must be a dict with text keys, not {data!r:.80}")
    if not data:
        raise ValueError("a message must not be empty: Redis has no entry without fields")
    return {key: encode(value) for key, value in data.items()}


def _entries(reply: Any) -> list[Entry]:
    """Return the entries of one stream in a reply of XREAD or XREADGROUP, decoded."""
    streams = reply.items() if isinstance(reply, dict) else reply or []
    return [
        {"id": entry_id, "data": {key: decode(text) for key, text in fields.items()} if fields else None}
        for _, entries in streams
        for entry_id, fields in entries
    ]


def _blocks(block: int | None) -> Iterator[int | None]:
    """Yield the block times (ms, a second at most) that make up `block`; None for one read at once, 0 without end."""
    if block is None:
        yield None
        return
    if block < 0:
        raise ValueError(f"block must be milliseconds (0: no end), not {block}")
    deadline = time.monotonic() + block / 1000 if block else float("inf")
    while (left := deadline - time.monotonic()) > 0:
        yield max(1, int(min(left, BLOCK_SECONDS) * 1000))
