"""A task's stream of events, `task_logs:<id>`: append to it, read it, follow it.

An entry's id is <epoch>-<seq>. The epoch belongs to one attempt and grows; seq counts 1, 2, 3 … over the task's whole
life. Redis takes an id only if it is greater than the last one, and that fences: once the next attempt has written, a
late append of an earlier one is refused. It also makes a repeated append harmless, and tells a reader what it missed.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from redis import RedisCluster
from redis.exceptions import ResponseError

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, connect, decode, encode, is_transient, reason_of

from . import keys
from .pipeline import AnyPipeline
from .retrying import delays

logger = logging.getLogger(__name__)

MAXLEN = 10_000  # entries kept of one stream, approximately (MAXLEN ~)
TTL_SECONDS = 24 * 3600  # how long a stream can be read after its end
MAX_ERROR_CHARS = 2_000  # of an exception's message in an event
MAX_EVENT_BYTES = 1_000_000  # of an event's fields; larger things belong in a file
BLOCK_SECONDS = 1.0  # of one XREAD: short, so that Ctrl-C is noticed within a second
PAGE = 500  # entries per XREAD: history comes in pages
START = "0-0"  # the entry id before the first
RESERVED = frozenset({"event", "timestamp"})


class LeaseLost(Exception):
    """This worker no longer holds the task: somebody else may. Stop working on it; nothing more is written."""


class StreamEnded(Exception):
    """The task has reached its terminal event already; the message names it."""


class TaskCancelled(Exception):
    """Somebody asked for this task's end, or its time is up; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a stream, decoded. `gap` and `reset` are a reader's own: no entry says them."""

    id: str  # the entry id, <epoch>-<seq>: the cursor to go on from
    name: str
    fields: dict[str, Any]

    @property
    def is_terminal(self) -> bool:
        return self.name in keys.TERMINAL

    def as_dict(self) -> dict[str, Any]:
        """Return one flat object: {"id": …, "event": …, "timestamp": …, …}."""
        return {"id": self.id, "event": self.name, **self.fields}

    @classmethod
    def from_entry(cls, entry_id: str, entry: dict[str, str]) -> "Event":
        values = {name: decode(text) for name, text in entry.items()}
        return cls(entry_id, str(values.pop("event", "")), values)


@dataclass(slots=True)
class Lease:
    """How long a worker may believe that it holds a task. The heartbeat renews it."""

    deadline: float  # time.monotonic()
    is_lost: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_lost or time.monotonic() > self.deadline


Finish = Callable[[str, Any, str, list[str]], Awaitable[bool]]  # event, result, entry id, fields -> False: lease lost


class TaskLog:
    """The log of one attempt: what its handler writes. For asyncio; BlockingLog is the same for a thread.

    The log owns an append, not the coroutine that asked for it. One is on its way at a time, in the order of the calls.
    A coroutine that is cancelled meanwhile changes nothing. An append whose reply was lost is sent again with the same
    bytes before the next one, so every event is written once.
    """

    def __init__(self, task_id: str, epoch: str, seq: int, lease: Lease, pipe: AnyPipeline, finish: Finish) -> None:
        self.task_id, self.epoch, self.seq = task_id, epoch, seq
        self.lease = lease
        self._pipe, self._finish = pipe, finish
        self._stream = keys.stream(task_id)
        self._in_order = asyncio.Lock()  # it lets the calls pass in the order in which they came
        self._closed: Exception | None = None  # why nothing more is appended
        self._has_ended = False  # the terminal event is written
        self._stopped: Exception | None = None  # why the handler may append no more
        self._writing: asyncio.Task[None] | None = None  # the last append; asyncio itself would not keep it

    async def add(self, event: str, /, **fields: Any) -> str:
        """Append one event (XADD) and return its entry id. Atomic; written once.

        While Redis is away it waits and tries again, until the lease is over. Raises LeaseLost, StreamEnded,
        TaskCancelled (then stop, the worker writes the end), ValueError or TypeError for what JSON cannot hold, and
        ValueError for a terminal event: a handler returns, or raises, instead.
        """
        self.check()
        if event in keys.TERMINAL:
            raise ValueError(f"{event!r} is written by the worker: return the result, or raise an exception")
        await self._pipe.ready()
        return await self.add_always(event, **fields)

    async def add_always(self, event: str, /, **fields: Any) -> str:
        """Append as add() does, even if the handler may append no more: the worker's way to say why."""
        pairs, done = self._prepare(event, fields), asyncio.get_running_loop().create_future()
        # subtle: in a task of its own, so that it is written whatever becomes of the coroutine that asked for it
        self._writing = asyncio.create_task(self._write_for(done, event, pairs))
        entry_id: str = await done
        return entry_id

    async def end(self, event: str, result: Any, /, **fields: Any) -> None:
        """Append the terminal event and close the task's record with `result`. Nothing can be appended after it.

        For the worker, which must not cancel it. Raises LeaseLost.
        """
        await self._write(event, self._prepare(event, fields), result)

    def check(self) -> None:
        """Raise what add() would raise, without writing: for a handler that waits."""
        if (why := self._closed or self._stopped) is not None:
            raise why
        if self.lease.is_over:
            raise LeaseLost(f"the lease of task {self.task_id} is over")

    def stop(self, reason: Exception) -> None:
        """Let the handler append no more: add() and check() raise this from now on."""
        self._stopped = self._stopped or reason

    def _prepare(self, event: str, fields: dict[str, Any]) -> list[str]:
        if self._closed is not None:
            raise self._closed
        pairs = entry_fields(event, fields)
        if event in keys.TERMINAL:
            self._closed = StreamEnded(event)
        return pairs

    async def _write_for(self, done: "asyncio.Future[str]", event: str, pairs: list[str]) -> None:
        try:
            entry_id = await self._write(event, pairs, None)
        except Exception as error:  # whatever it is, the one who waits raises it
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(entry_id)

    async def _write(self, event: str, pairs: list[str], result: Any) -> str:
        async with self._in_order:
            if self._has_ended:  # an append that was asked for before the end, by a coroutine that nobody awaited
                raise StreamEnded("the task has ended")
            entry_id = f"{self.epoch}-{self.seq + 1}"
            try:
                await self._insist(event, entry_id, pairs, result)
            except LeaseLost as lost:
                self.lease.is_lost, self._closed = True, lost
                raise
            self.seq += 1
            self._has_ended = event in keys.TERMINAL
            return entry_id

    async def _insist(self, event: str, entry_id: str, pairs: list[str], result: Any) -> None:
        """Write an entry with the same bytes until its outcome is known; after a terminal one, close the record."""
        is_end = event in keys.TERMINAL
        is_written = is_end and self._pipe.is_one_server  # there `finish` writes it in the same call
        for delay in delays():
            if self.lease.is_over:
                raise LeaseLost(f"the lease of task {self.task_id} is over")
            try:
                if not is_written:
                    await self._xadd(entry_id, pairs)
                    is_written = True
                if is_end and not await self._finish(event, result, entry_id, pairs):
                    raise LeaseLost(f"task {self.task_id} is held by somebody else now")
                return
            except REDIS_ERRORS as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(delay)

    async def _xadd(self, entry_id: str, pairs: list[str]) -> None:
        # subtle: NOMKSTREAM. If the stream is gone the writer is told (the reply is nil), not fooled.
        add = self._pipe.call("XADD", self._stream, "NOMKSTREAM", "MAXLEN", "~", MAXLEN, entry_id, *pairs)
        try:
            if await add is None:
                raise LeaseLost(f"the stream of task {self.task_id} is gone")
        except ResponseError as error:
            if "equal or smaller" not in str(error) and "last possible ID" not in str(error):
                raise
            # a greater id is in the stream: somebody else's, or this entry itself, from a try whose reply was lost
            found = await self._pipe.call("XRANGE", self._stream, entry_id, entry_id)
            if not found or list(found[0][1]) != pairs:
                raise LeaseLost(f"task {self.task_id} is written by somebody else now") from None


class BlockingLog:
    """A TaskLog for a handler that is a plain function: it runs in a thread, and each call blocks it."""

    def __init__(self, log: TaskLog, loop: asyncio.AbstractEventLoop) -> None:
        self.task_id, self._log, self._loop = log.task_id, log, loop

    def add(self, event: str, /, **fields: Any) -> str:
        """Append one event, as TaskLog.add() does."""
        return asyncio.run_coroutine_threadsafe(self._log.add(event, **fields), self._loop).result()

    def check(self) -> None:
        """Raise what add() would raise, without writing: for a handler that waits."""
        self._log.check()


def entry_fields(event: str, fields: dict[str, Any]) -> list[str]:
    """Return an event as the names and values of a stream's entry, with the time at which it happened.

    entry_fields("progress", {"percent": 5}) -> ["event", "progress", "timestamp", "2026-…Z", "percent", "5"]
    Raises ValueError or TypeError for what cannot be stored.
    """
    if not event.isidentifier() or event in ("gap", "reset"):
        raise ValueError(f"not an event name: {event!r}")
    if clash := RESERVED & fields.keys():
        raise ValueError(f"the field {min(clash)!r} is written by the log itself")
    pairs = ["event", event, "timestamp", now_text()]
    for name, value in fields.items():
        pairs += (name, encode(value))
    "".join(fields).encode()  # subtle: a name that UTF-8 cannot hold is this call's error and nobody else's
    if sum(map(len, pairs)) > MAX_EVENT_BYTES // 4 and (size := len("".join(pairs).encode())) > MAX_EVENT_BYTES:
        raise ValueError(f"the event {event} has {size:,} bytes; the limit is {MAX_EVENT_BYTES:,}")
    return pairs


def message_of(error: BaseException) -> str:
    """Return what an exception says, as events have it: cut, and as text that UTF-8 can hold."""
    try:
        return str(error)[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode() or repr(error)
    except Exception:  # an exception of somebody else's, whose __str__ fails
        return type(error).__name__


def now_text() -> str:
    """Return the time as events have it: "2026-11-24T20:15:00.123Z"."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LogReader:
    """Reads the stream of one task. Without a client it connects by the policy. For threads; it blocks."""

    def __init__(self, task_id: str | int, client: Client | None = None) -> None:
        self.task_id = str(task_id)
        self.redis = connect() if client is None else client

    @cached_property
    def _blocking(self) -> Client:
        return blocking_client(self.redis, BLOCK_SECONDS)

    def read(self, since: str = "0", count: int | None = None) -> list[Event]:
        """Return the events after an entry id (XRANGE), without waiting."""
        entries = self.redis.xrange(keys.stream(self.task_id), f"({since}", "+", count=count)
        return [Event.from_entry(*entry) for entry in entries]

    def last(self) -> Event | None:
        """Return the newest event, or None."""
        return next(iter(self.newest(1)), None)

    def newest(self, count: int) -> list[Event]:
        """Return the last `count` events, the newest first."""
        return [Event.from_entry(*entry) for entry in self.redis.xrevrange(keys.stream(self.task_id), count=count)]

    def follow(self, since: str = "0", timeout_seconds: float | None = None) -> Iterator[Event]:
        """Yield the events after an entry id, then block for more, and end after the terminal event.

        `since`: an entry id, "0" for all, or "$" for only what comes from now on (resolved once). Every event comes
        once and in order. If entries were trimmed before they were read, a `gap` event says how many. If the stream was
        rewritten, as after a failover, a `reset` event comes and the stream is read from its start (see Cursor). Lost
        connections are made again. Ends, too, if the task has ended and its stream has expired; raises TimeoutError
        after timeout_seconds.
        """
        for _, event in follow({self.task_id: since}, self._blocking, timeout_seconds):
            if event is not None:
                yield event


def seq_of(entry_id: str) -> int | None:
    """Return the `seq` in an entry id; None for a mere time. seq_of("1700000000000-7") -> 7; seq_of("0") -> 0"""
    ms, _, seq = entry_id.partition("-")
    return int(seq or 0) if int(seq or 0) or not int(ms) else None


def check_cursor(entry_id: str) -> str:
    """Return the entry id unchanged. Raises ValueError if it is not valid."""
    ms, dash, seq = entry_id.partition("-")
    numbers = [ms, seq] if dash else [ms]
    if entry_id != "$" and not all(n.isascii() and n.isdigit() and int(n) < 2**64 for n in numbers):
        raise ValueError(f"not an entry id: {entry_id!r} (expected <milliseconds>-<number>, as in 1700000000000-7)")
    return entry_id


def order(entry_id: str) -> tuple[int, int]:
    """Return an entry id as numbers, to compare. order("1700000000000-7") -> (1700000000000, 7)"""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


class Cursor:
    """Where a reader is in one stream. Says `gap` if entries were trimmed, and `reset` if the history was rewritten.

    An entry's id is <epoch>-<seq>. The epoch grows with each attempt; seq counts 1, 2, 3 … over the task's whole life.
    So a jump in seq is a gap. A seq that was there before, or a stream that ends before the cursor, belongs to another
    history than the one that was read. A seq of 0 is somebody's own XADD: it is shown, and not counted.

        5-1 5-2 9-3    nothing to say: two events of one attempt, then one of the next
        5-1 5-4        gap, 2 missed
        5-1 5-2 9-2    reset: a second event was read before, and this is another one
        5-1 7-0 9-2    nothing to say: 7-0 is somebody's own

    It is pure: it neither reads nor waits. After a `reset` read again from `cursor.id`, the start. Whatever
    stands in a stream, reading it to its end takes no more resets than it has entries.
    """

    __slots__ = ("_is_foreign", "_quiet_until", "id", "seq")

    def __init__(self, entry_id: str = START) -> None:
        self.id = entry_id  # read on after this entry
        self.seq = seq_of(entry_id)  # of the last entry that counts; None: not known, so the next one cannot be a gap
        self._is_foreign = self.seq is None  # the entry at the cursor
        self._quiet_until = (0, 0)  # up to this entry a history is read again: no second reset

    def take(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield events that were read, with each `gap`; stop after a `reset`, since the rest must be read again."""
        for event in events:
            if notice := self.step(event.id):
                yield notice
                if notice.name == "reset":
                    return
            yield event

    def step(self, entry_id: str) -> Event | None:
        """Move to an entry that was read; return the notice that comes before it, if any.

        A `gap` precedes the entry. A `reset` takes its place: the cursor is at the start, and the entry comes again.
        """
        (ms, seq), (last_ms, last_seq), notice = order(entry_id), order(self.id), None
        # subtle: several XADD * within a millisecond get the ids <ms>-0, <ms>-1, <ms>-2 …
        follows_foreign = self._is_foreign and (ms, seq) == (last_ms, last_seq + 1)
        self._is_foreign = seq == 0 or (follows_foreign and seq - 1 != self.seq)
        if not self._is_foreign:
            if self.seq is None or seq == self.seq + 1:
                self.seq = seq
            elif seq > self.seq:
                notice = Event(self.id, "gap", {"missed": seq - self.seq - 1})
                self.seq = seq
            elif (ms, seq) > self._quiet_until:
                return self._reset(entry_id)
            else:
                self.seq = None  # subtle: a strange entry among ours; counting goes on after it
        self.id = entry_id
        return notice

    def check_end(self, last_id: str) -> Event | None:
        """Compare with the id of the stream's last entry, START for an empty stream: whenever there is nothing to read.

        Returns a `reset` if the cursor is ahead of the stream.
        """
        self._quiet_until = min(self._quiet_until, order(last_id))
        return self._reset(last_id) if order(last_id) < order(self.id) else None

    def _reset(self, last_id: str) -> Event:
        notice = Event(self.id, "reset", {"cursor": self.id, "last": last_id})
        self.id, self.seq, self._quiet_until = START, 0, order(last_id)
        return notice


# Streams with the entry ids after which to read, and ms to block -> XREAD's reply.
Read = Callable[[dict[str, str], int], Any]


def xread(redis: Client) -> Read:
    """Return the call that reads streams with XREAD BLOCK."""
    return lambda streams, block_ms: redis.xread(streams, count=PAGE, block=block_ms)


def follow(
    cursors: dict[str, str], blocking: Client, timeout_seconds: float | None = None, read: Read | None = None
) -> Iterator[tuple[str, Event | None]]:
    """Yield (task id, event) of several streams over one connection, until all have ended.

    `cursors` maps task ids to entry ids; the caller owns it and may add tasks while following. After BLOCK_SECONDS
    without an event comes ("", None), so that the caller can look around. `blocking` is a blocking_client; `read` is
    how it is asked, by XREAD. See LogReader.follow for the rest.
    """
    read = read or xread(blocking)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    at: dict[str, Cursor] = {}
    look_at = 0.0  # time.monotonic() at which to look at the ends of all streams
    away, wait = False, delays()
    while cursors:
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"no end within {timeout_seconds:g} s")
        try:
            # subtle: look again, since the caller may add a task after each event
            while (new := [one for one in cursors if one not in at]) or (cursors and time.monotonic() >= look_at):
                if not new:
                    look_at = time.monotonic() + BLOCK_SECONDS
                yield from _look(new or list(cursors), cursors, at, blocking)
            if not cursors:
                return
            left = BLOCK_SECONDS if deadline is None else deadline - time.monotonic()
            block_ms = max(1, int(min(left, BLOCK_SECONDS) * 1000))  # subtle: 0 would block for ever
            streams = {keys.stream(task_id): cursor.id for task_id, cursor in at.items()}
            if not isinstance(blocking, RedisCluster):
                reply = read(streams, block_ms)
            else:  # they are on different nodes: one after the other
                each_ms = max(1, block_ms // len(streams))
                reply = [found for one in streams.items() for found in read(dict([one]), each_ms)]
        except REDIS_ERRORS as error:
            if not is_transient(error):
                raise
            if not away:
                logger.warning("lost Redis (%s); waiting for it", reason_of(error))
            away, look_at = True, 0.0  # after a failover a cursor may be ahead of its stream
            time.sleep(next(wait))
            continue
        if away:
            logger.warning("Redis is back")
        away, wait = False, delays()
        if not reply:
            yield "", None
        for stream, entries in reply:
            task_id = stream.removeprefix(keys.stream(""))
            for event in at[task_id].take(Event.from_entry(*entry) for entry in entries):
                cursors[task_id] = event.id  # of a notice, the id before it
                if event.is_terminal:
                    del cursors[task_id], at[task_id]
                yield task_id, event
                if event.is_terminal:
                    break


def _look(
    task_ids: list[str], cursors: dict[str, str], at: dict[str, Cursor], redis: Client
) -> Iterator[tuple[str, Event]]:
    """Look at the ends of streams: begin to read the new ones, yield a `reset` for those that end before the cursor,
    and drop those of which there is nothing more to come."""
    with redis.pipeline(transaction=False) as pipe:
        for task_id in task_ids:  # subtle: in this order, since a task may begin and end between the two
            pipe.hget(keys.record(task_id), "status")
            pipe.xrevrange(keys.stream(task_id), count=1)
        replies = pipe.execute()
    for task_id, status, newest in zip(task_ids, replies[::2], replies[1::2], strict=True):
        last, entry = newest[0] if newest else (START, {})
        since = cursors[task_id]
        cursor = at.setdefault(task_id, Cursor(last if since == "$" else since))
        has_expired = not newest and status in keys.TERMINAL
        if not has_expired and (reset := cursor.check_end(last)):
            yield task_id, reset
        cursors[task_id] = cursor.id
        if has_expired or (entry.get("event") in keys.TERMINAL and order(cursor.id) == order(last)):
            del cursors[task_id], at[task_id]
