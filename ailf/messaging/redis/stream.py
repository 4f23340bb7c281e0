"""A stream of messages that workers share: each goes to one of a consumer group, and stays pending until it is done.

At least once: what a consumer has read and not acknowledged, because it failed or was killed, is delivered again. What
a handler does must bear being done twice. Entries beyond `maxlen` are trimmed, even those that nobody has read yet.
"""

import asyncio
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from redis import exceptions as errors

from .client import AsyncRedisClient, Client, RedisClient, async_client_of, blocking_client, client_of
from .codec import decode, encode
from .errors import REDIS_ERRORS, is_transient, reason_of, translated
from .lua import load
from .steps import Steps, run, run_async

MAX_DELIVERIES = 5  # of one entry, before it goes to <stream>:dead
STALE_MS = 30_000  # without a sign of life of its consumer an entry goes to another one
BLOCK_SECONDS = 1.0  # of one command: longer blocks are made of several, so that stop() is noticed
PAGE = 100  # pending entries looked up at one time
BACK_OFF_SECONDS = 0.5  # between two tries while Redis is away
MAX_ERROR_CHARS = 2_000  # of an exception in a dead letter

Entry = dict[str, Any]  # {"id": entry id, "data": what was added}; data is None where the entry was trimmed away
Handler = Callable[[dict[str, Any]], Any]

logger = logging.getLogger(__name__)


class _Stream:
    """What RedisStream and AsyncRedisStream have in common: everything but how to wait (see steps.py)."""

    redis: Client  # for short commands
    _reader: Client  # for those that block, and for reading what others may have written

    def __init__(self, stream_name: str, maxlen: int | None, max_deliveries: int, stale_ms: int) -> None:
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
        self._unacknowledged: set[str] = set()  # entries that were handled, and Redis was not told
        self._unburied: dict[str, tuple[int, str]] = {}  # deliveries and error of entries that Redis did not bury
        self._done = 0  # entries that process_messages() has acknowledged

    def _use(self, redis: Client) -> None:
        self.redis = redis
        self._reader = blocking_client(redis, BLOCK_SECONDS)
        self._renew = load(redis, "renew")

    def stop(self) -> None:
        """Let process_messages() end: after the handler that runs now, or within a second."""
        self._stopped.set()

    def _check_group(self) -> None:
        if not self.group:
            raise ValueError("No consumer group set. Call create_consumer_group first.")

    def _begin(self, handler: Handler) -> None:
        self._check_group()
        if not callable(handler) or (isinstance(self, RedisStream) and inspect.iscoroutinefunction(handler)):
            raise TypeError(f"handler must be a function (a coroutine function: AsyncRedisStream), not {handler!r:.80}")
        self._stopped.clear()
        self._done = 0

    # How to wait, in one way or the other
    def _connect(self) -> Any:
        raise NotImplementedError

    def _sleep(self, seconds: float) -> Any:
        raise NotImplementedError

    def _call(self, handler: Handler, data: dict[str, Any]) -> Any:
        raise NotImplementedError

    # -- the commands -------------------------------------------------------------------------------------------

    def _add(self, data: dict[str, Any]) -> Steps[str]:
        yield self._connect()
        return str((yield self.redis.xadd(self.name, _fields(data), maxlen=self.maxlen)))

    def _read(self, count: int, block: int | None, last_id: str) -> Steps[list[Entry]]:
        yield self._connect()
        if last_id == "$":
            last_id = self._last_read or _newest((yield self._reader.xrevrange(self.name, count=1)))
        self._last_read = last_id
        for block_ms in _blocks(block):
            if entries := _entries((yield self._reader.xread({self.name: last_id}, count=count, block=block_ms))):
                self._last_read = entries[-1]["id"]
                return entries
        return []

    def _set_group(self, group: str, consumer: str, start_id: str) -> Steps[bool]:
        if not group or not consumer:
            raise ValueError("group and consumer need a name each")
        yield self._connect()
        if start_id == "$":  # subtle: made anew, the group must not leave out what came since
            start_id = _newest((yield self._reader.xrevrange(self.name, count=1)))
        created = yield from self._create_group(group, start_id)
        self.group, self.consumer, self._start_id = group, consumer, start_id
        return created

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

    def _pending(self, count: int) -> Steps[list[dict[str, Any]]]:
        self._check_group()
        names = ("message_id", "consumer", "time_since_delivered", "times_delivered")
        found = yield self.redis.xpending_range(self.name, self.group, "-", "+", count)
        return [
            dict(zip(("id", "consumer", "idle_ms", "deliveries"), map(one.get, names), strict=True)) for one in found
        ]

    def _claim_stale(self, min_idle_ms: int, count: int) -> Steps[list[Entry]]:
        self._check_group()
        entries, cursor = yield from self._claim(min_idle_ms, count, "0-0")
        while len(entries) < count and cursor != "0-0":
            more, cursor = yield from self._claim(min_idle_ms, count - len(entries), cursor)
            entries += more
        return entries

    def _claim(self, min_idle_ms: int, count: int, cursor: str) -> Steps[tuple[list[Entry], str]]:
        reply = yield self._reader.xautoclaim(self.name, self.group, self.consumer, min_idle_ms, cursor, count)
        for entry_id in reply[2] if len(reply) > 2 else ():  # Redis has taken them off the pending list
            self._warn_trimmed(entry_id)
        return _entries([(self.name, reply[1])]), reply[0]

    def _warn_trimmed(self, entry_id: str) -> None:
        logger.warning("stream %s: entry %s was trimmed before it was handled", self.name, entry_id)

    # -- the worker's round -------------------------------------------------------------------------------------

    def _process(self, handler: Handler, count: int, block: int, burst: bool) -> Steps[None]:
        away = group_gone = False
        block_ms = None if burst else next(_blocks(block or 0))  # one command's; the loop makes up the rest
        place = _Place(self.stale_ms)
        while not self._stopped.is_set():
            try:
                if away:
                    yield self.redis.exists(
                        self.name
                    )  # subtle: its connection may be dead; not an XACK should find out
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
                place = _Place(self.stale_ms)  # subtle: a lost reply left its entries pending, and not handled
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
                yield self._sleep(BACK_OFF_SECONDS)

    def _next(self, place: "_Place", count: int, block: int | None) -> Steps[tuple[list[Entry], int]]:
        """Return the next entries, and how often they have been delivered.

        subtle: what is delivered again comes one by one. If it kills its consumer, the others of its batch must not be
        counted as tried.
        """
        if place.own is not None:
            yield from self._find_own(place)
        while place.todo:
            if entry := (yield from self._take_own(place.todo.popleft())):
                return [entry], (yield from self._deliveries(entry["id"]))
        while time.monotonic() >= place.claim_at:
            entries, cursor = yield from self._claim(self.stale_ms, 1, place.cursor)
            place.move(cursor)
            if entries:
                return entries, (yield from self._deliveries(entries[0]["id"]))
        if self.max_deliveries == 1:
            count = 1  # the rest of a batch, delivered once and not tried, would be buried where its consumer ends
        return (yield from self._read_group(count, block, ">")), 1

    def _find_own(self, place: "_Place") -> Steps[None]:
        """Note which entries are pending for this consumer, except those that it has just failed on: they rest."""
        now = time.monotonic()
        self._resting = {entry_id: until for entry_id, until in self._resting.items() if until > now}
        while place.own is not None:
            found = yield self.redis.xpending_range(self.name, self.group, place.own, "+", PAGE, self.consumer)
            place.todo.extend(one["message_id"] for one in found if one["message_id"] not in self._resting)
            place.own = f"({found[-1]['message_id']}" if len(found) == PAGE else None

    def _take_own(self, entry_id: str) -> Steps[Entry | None]:
        """Deliver one of this consumer's own pending entries to it again (XCLAIM); None where it was trimmed."""
        entries = yield self._reader.xclaim(self.name, self.group, self.consumer, 0, [entry_id])
        if entries := _entries([(self.name, [one for one in entries if one])]):
            return entries[0]
        self._warn_trimmed(entry_id)
        return None

    def _deliveries(self, entry_id: str) -> Steps[int]:
        found = yield self.redis.xpending_range(self.name, self.group, entry_id, entry_id, 1)
        return int(found[0]["times_delivered"]) if found else 1

    def _handle(self, batch: list[Entry], tried: int, handler: Handler) -> Steps[None]:
        """Handle entries one after the other, and acknowledge them."""
        since = time.monotonic()
        for entry in batch:
            self._held = {entry["id"]}  # subtle: not the whole batch: while one takes long, others may have the rest
            if time.monotonic() - since > self.stale_ms / 3000:  # perhaps they have
                yield from self._keep_fresh()
            if self._stopped.is_set() or entry["id"] not in self._held:
                continue  # it stays pending, or it is another's now
            if entry["data"] is None:
                self._warn_trimmed(entry["id"])
            elif entry["id"] in self._unacknowledged:
                pass  # it was handled, but Redis went away before it heard of that
            elif tried > self.max_deliveries:
                yield from self._bury(entry, tried - 1, "its consumers ended without acknowledging it")
            elif (error := (yield from self._try(handler, entry))) is not None:
                if tried < self.max_deliveries:
                    self._resting[entry["id"]] = time.monotonic() + self.stale_ms / 1000
                    self._held.clear()
                    continue  # it stays pending, and becomes stale
                yield from self._bury(entry, tried, error)
            self._unacknowledged.add(entry["id"])
            self._done += yield from self._acknowledge(entry["id"])
            self._unacknowledged.discard(entry["id"])
            self._held.clear()

    def _try(self, handler: Handler, entry: Entry) -> Steps[str | None]:
        """Call the handler; return None where the entry is done, else why not."""
        try:
            if (yield self._call(handler, entry["data"])):
                return None
        except Exception as error:
            logger.exception("stream %s: the handler failed on entry %s", self.name, entry["id"])
            return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode()
        logger.warning("stream %s: the handler did not return true for entry %s", self.name, entry["id"])
        return "the handler did not return true"

    def _bury(self, entry: Entry, tried: int, error: str) -> Steps[None]:
        """Add an entry to <stream>:dead. Killed before it is acknowledged too, it will be there twice."""
        # subtle: Redis may refuse it (full memory); the next try must not lose the error to a later delivery
        tried, error = self._unburied.setdefault(entry["id"], (tried, error))
        # subtle: as it was added; the handler may have changed what it was given
        added = _entries([(self.name, (yield self._reader.xrange(self.name, entry["id"], entry["id"])))]) or [entry]
        letter = {"id": entry["id"], "error": error, "deliveries": tried, "data": added[0]["data"]}
        yield self.redis.xadd(f"{self.name}:dead", _fields(letter), maxlen=self.maxlen)
        del self._unburied[entry["id"]]
        logger.error("stream %s: entry %s is given up after %d deliveries: %s", self.name, entry["id"], tried, error)

    def _keep_fresh(self) -> Steps[None]:
        """Give a sign of life for the entry in hand; forget it if it went to another consumer."""
        held = list(self._held)
        try:
            if held:
                still = yield self._renew(keys=[self.name], args=[self.group, self.consumer, *held])
                self._held.difference_update(set(held) - set(still))
        except REDIS_ERRORS as error:
            logger.debug("stream %s: no sign of life given: %s", self.name, error)


class _Place:
    """Where a worker is in its round: its own pending entries, then stale ones, then new ones."""

    def __init__(self, stale_ms: int) -> None:
        self.own: str | None = "-"  # from where on one's own pending entries are looked up; None: all were
        self.todo: deque[str] = deque()  # those that were found
        self.cursor = "0-0"  # of XAUTOCLAIM
        self.claim_at = 0.0  # time.monotonic() when stale entries are looked for again
        self._pause = stale_ms / 2000

    def move(self, cursor: str) -> None:
        self.cursor = cursor
        if cursor == "0-0":  # it has seen all pending entries
            self.claim_at = time.monotonic() + self._pause


class RedisStream(_Stream):
    """A stream, and with create_consumer_group() a consumer of it. One object for one thread that reads.

    maxlen: entries kept, approximately (None: all). max_deliveries: how often an entry is tried before it goes to
    `<stream>:dead`, with its error. stale_ms: after how long without a sign of life another consumer may have the
    entry; process_messages() gives such signs while a handler runs. RedisUnavailable is raised while Redis is away,
    except by process_messages(), which waits for it.
    """

    def __init__(
        self,
        stream_name: str,
        redis_client: RedisClient | Client | None = None,
        maxlen: int | None = 10_000,
        max_deliveries: int = MAX_DELIVERIES,
        stale_ms: int = STALE_MS,
    ) -> None:
        super().__init__(stream_name, maxlen, max_deliveries, stale_ms)
        self._own = redis_client is None
        self._use(client_of(redis_client))

    def _connect(self) -> None:
        """Do nothing: it is connected."""

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _call(self, handler: Handler, data: dict[str, Any]) -> Any:
        return handler(data)

    @translated
    def add(self, data: dict[str, Any]) -> str:
        """Append a message: a dict with text keys and JSON values, not empty. Return its entry id. Never repeated."""
        return run(self._add(data))

    @translated
    def read(self, count: int = 10, block: int | None = None, last_id: str = "$") -> list[Entry]:
        """Return up to `count` entries after an entry id, without a group. With `block` (ms; 0: no end) wait for one.

        "$" goes on where this object's last read() ended; the first time, where the stream ends then. So no entry is
        missed between two calls.
        """
        return run(self._read(count, block, last_id))

    @translated
    def create_consumer_group(self, group: str, consumer: str, start_id: str = "0") -> bool:
        """Read as this consumer of this group from now on; create the group if there is none: then return True.

        A new group gets what stands after start_id: "0" everything, "$" only what is added from now on. A consumer that
        comes back under its old name goes on with what it left pending.
        """
        return run(self._set_group(group, consumer, start_id))

    @translated
    def read_group(self, count: int = 10, block: int | None = None, last_id: str = ">") -> list[Entry]:
        """Return up to `count` entries that no consumer of the group has had (">"), or one's own pending ones after an
        entry id. With `block` (ms; 0: no end) wait for a new one. Raises ValueError without a group."""
        return run(self._read_group(count, block, last_id))

    @translated
    def acknowledge(self, entry_id: str) -> bool:
        """Take an entry off the group's pending list: it is done. False where it was not pending."""
        return run(self._acknowledge(entry_id))

    @translated
    def pending(self, count: int = 100) -> list[dict[str, Any]]:
        """Return the group's first `count` pending entries: {"id", "consumer", "idle_ms", "deliveries"} of each."""
        return run(self._pending(count))

    @translated
    def claim_stale(self, min_idle_ms: int, count: int = 10) -> list[Entry]:
        """Take over up to `count` entries that have been pending for min_idle_ms, and return them (XAUTOCLAIM)."""
        return run(self._claim_stale(min_idle_ms, count))

    @translated
    def process_messages(self, handler: Handler, count: int = 10, block: int = 1000, burst: bool = False) -> int:
        """Call handler(data) for each message until stop() or Ctrl-C; return how many were acknowledged. Blocks.

        First come the entries that this consumer left pending, then those that others left (XAUTOCLAIM, every half
        stale_ms), then new ones, `count` at a time, for which it waits `block` ms. An entry is acknowledged when its
        handler returns true. If it raises, or returns anything else, that is logged and the entry is delivered again
        after stale_ms, to any consumer; after max_deliveries it goes to `<stream>:dead`. With `burst` it returns when
        nothing is to be had. While Redis is away it waits. Raises ValueError without a group.
        """
        self._begin(handler)
        return self._work(handler, count, block, burst)

    def close(self) -> None:
        """Stop, and close the connections that are this object's own."""
        self.stop()
        self._reader.close()
        if self._own:
            self.redis.close()

    def process_in_thread(
        self, handler: Handler, count: int = 10, block: int = 1000, daemon: bool = True
    ) -> threading.Thread:
        """Run process_messages() in a new thread, which ends after stop()."""
        self._begin(handler)
        thread = threading.Thread(target=self._work, args=(handler, count, block, False), daemon=daemon)
        thread.start()
        return thread

    def _work(self, handler: Handler, count: int, block: int, burst: bool) -> int:
        ended = threading.Event()

        def keep_fresh() -> None:
            while not ended.wait(self.stale_ms / 3000):
                run(self._keep_fresh())

        threading.Thread(target=keep_fresh, daemon=True).start()
        try:
            run(self._process(handler, count, block, burst))
        except KeyboardInterrupt:
            pass  # the usual way to end a worker; what was in hand stays pending
        finally:
            ended.set()
            self._held.clear()
        return self._done


class AsyncRedisStream(_Stream):
    """RedisStream for asyncio. It connects on first use. A handler may be a function or a coroutine function.

    A handler that blocks the event loop for longer than stale_ms loses its entries to others.
    """

    def __init__(
        self,
        stream_name: str,
        redis_client: AsyncRedisClient | Client | None = None,
        maxlen: int | None = 10_000,
        max_deliveries: int = MAX_DELIVERIES,
        stale_ms: int = STALE_MS,
    ) -> None:
        super().__init__(stream_name, maxlen, max_deliveries, stale_ms)
        self._own = redis_client is None
        self._source = AsyncRedisClient() if redis_client is None else redis_client  # it connects once for all tasks
        self.redis = None

    async def _connect(self) -> None:
        if self.redis is None:
            redis = await async_client_of(self._source)
            if self.redis is None:  # subtle: asked again, for another task may have come first
                self._use(redis)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _call(self, handler: Handler, data: dict[str, Any]) -> Any:
        result = handler(data)
        return await result if inspect.isawaitable(result) else result

    @translated
    async def add(self, data: dict[str, Any]) -> str:
        return await run_async(self._add(data))

    @translated
    async def read(self, count: int = 10, block: int | None = None, last_id: str = "$") -> list[Entry]:
        return await run_async(self._read(count, block, last_id))

    @translated
    async def create_consumer_group(self, group: str, consumer: str, start_id: str = "0") -> bool:
        return await run_async(self._set_group(group, consumer, start_id))

    @translated
    async def read_group(self, count: int = 10, block: int | None = None, last_id: str = ">") -> list[Entry]:
        return await run_async(self._read_group(count, block, last_id))

    @translated
    async def acknowledge(self, entry_id: str) -> bool:
        return await run_async(self._acknowledge(entry_id))

    @translated
    async def pending(self, count: int = 100) -> list[dict[str, Any]]:
        return await run_async(self._pending(count))

    @translated
    async def claim_stale(self, min_idle_ms: int, count: int = 10) -> list[Entry]:
        return await run_async(self._claim_stale(min_idle_ms, count))

    @translated
    async def process_messages(self, handler: Handler, count: int = 10, block: int = 1000, burst: bool = False) -> int:
        """Call handler(data) for each message until stop(), or until the task is cancelled. See RedisStream."""
        self._begin(handler)
        return await self._work(handler, count, block, burst)

    async def close(self) -> None:
        self.stop()
        if self.redis is not None:
            await self._reader.aclose()
        if self._own:
            await self._source.close()

    def process_in_task(self, handler: Handler, count: int = 10, block: int = 1000) -> "asyncio.Task[int]":
        """Run process_messages() in a new task, which ends after stop()."""
        self._begin(handler)
        return asyncio.create_task(self._work(handler, count, block, False))

    async def _work(self, handler: Handler, count: int, block: int, burst: bool) -> int:
        async def keep_fresh() -> None:
            while True:
                await asyncio.sleep(self.stale_ms / 3000)
                await run_async(self._keep_fresh())

        fresh = asyncio.create_task(keep_fresh())
        try:
            await run_async(self._process(handler, count, block, burst))
        finally:
            fresh.cancel()
            self._held.clear()
        return self._done


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


def _newest(entries: Iterable[Any]) -> str:
    return next((str(entry_id) for entry_id, _ in entries), "0-0")


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
