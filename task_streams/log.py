"""A task's stream of events, `task_logs:<id>`: append to it, read it, follow it.

Every event is appended by one script (append.lua), which checks the writer, numbers the event and writes it once. The
entry id is <ms>-<seq>, so it serves as the cursor everywhere and tells how many events a reader missed.
"""

import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from redis import RedisCluster

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, connect, decode, encode, is_transient, reason_of

from . import keys
from .batching import Call, SharedScript
from .lua import load
from .retrying import delays

logger = logging.getLogger(__name__)

MAXLEN = 10_000  # entries kept of one stream, approximately (MAXLEN ~)
TTL_SECONDS = 24 * 3600  # how long a stream can be read after its end
MAX_EVENT_BYTES = 1_000_000  # of an event's fields; larger things belong in a file
BLOCK_SECONDS = 1.0  # of one XREAD: short, so that Ctrl-C is noticed within a second
PAGE = 500  # entries per XREAD: history comes in pages
UNLEASED_PATIENCE_SECONDS = 15.0  # how long an append without a lease is repeated while Redis is away
START = "0-0"  # the entry id before the first
RESERVED = frozenset({"event", "timestamp", "attempt", "seq"})


class LeaseLost(Exception):
    """This worker no longer holds the task: somebody else may. Stop working on it; nothing more is written."""


class StreamEnded(Exception):
    """The task has reached its terminal event already; the message names it."""


class TaskCancelled(Exception):
    """Somebody asked for this task's end; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a stream, decoded. `gap` and `reset` are a reader's own: no entry says them."""

    id: str  # the entry id, <ms>-<seq>: the cursor to go on from
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


@dataclass
class Lease:
    """What a worker knows of its lease; shared by the log that appends and the thread that renews."""

    deadline: float  # time.monotonic() after which it must not be believed
    lost: threading.Event = field(default_factory=threading.Event)
    cancel_reason: str | None = None

    @property
    def is_over(self) -> bool:
        return self.lost.is_set() or time.monotonic() > self.deadline


class TaskLog:
    """The stream of one task. Without a client it connects by the policy. Thread-safe.

    A worker's log carries the attempt and token of its claim, and appends only while it holds the lease. A log without
    them may write a stream that no worker has written yet, as its only writer. Logs that are used by many threads at
    the same time may have one `script` in common (SharedScript of append.lua).
    """

    def __init__(
        self,
        task_id: str | int,
        client: Client | None = None,
        *,
        attempt: int = 0,
        token: str = "",
        lease: Lease | None = None,
        script: SharedScript | None = None,
        maxlen: int = MAXLEN,
        ttl_seconds: float = TTL_SECONDS,
    ) -> None:
        self.task_id = str(task_id)
        self.redis = connect() if client is None else client
        self.attempt, self.token, self.lease = attempt, token or secrets.token_hex(16), lease
        self.maxlen, self.ttl_seconds = maxlen, ttl_seconds
        self._append = script or SharedScript(self.redis, load(self.redis, "append"))
        self._number = 0
        self._ending = ""  # the terminal event that call() gave away
        self._lock = threading.Lock()

    @cached_property
    def _blocking(self) -> Client:
        return blocking_client(self.redis, BLOCK_SECONDS)

    # -- appending ----------------------------------------------------------------------------------------------

    def add(self, event: str, /, **fields: Any) -> str:
        """Append one event and return its entry id. Atomic, and written once even where it is repeated.

        While Redis is away it blocks and tries again, until the lease is over. Raises LeaseLost, StreamEnded,
        TaskCancelled (then stop, the worker writes `cancelled`), ValueError or TypeError for what JSON cannot hold.
        """
        if self.lease is not None and self.lease.cancel_reason is not None:
            raise TaskCancelled(self.lease.cancel_reason)
        return self.add_always(event, **fields)

    def check(self) -> None:
        """Raise LeaseLost or TaskCancelled where add() would, without writing: for a handler that waits."""
        if self.lease is not None:
            if self.lease.cancel_reason is not None:
                raise TaskCancelled(self.lease.cancel_reason)
            self._check_lease()

    def add_always(self, event: str, /, **fields: Any) -> str:
        """Append as add() does, even when a cancellation was asked for: the worker's way to write the end."""
        with self._lock:  # subtle: a repeated append is known by its number, so the numbers must arrive in order
            if self._ending:  # as a thread finds that a handler has left behind
                raise StreamEnded(self._ending)
            outcome = self.outcome(self._insist(self._prepare(event, fields)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def call(self, event: str, /, *more_keys: str, **fields: Any) -> Call:
        """Return the call that adds this event, to be sent with others, once or again; outcome() reads its reply.

        The number of the event is taken: what is added next comes after it, and nothing behind a terminal event.
        Raises as add() does.
        """
        with self._lock:
            args = self._prepare(event, fields)
            self._ending = event if event in keys.TERMINAL else ""
        return self._append.script, [*self._keys, *more_keys], args

    def _prepare(self, event: str, fields: dict[str, Any]) -> list[Any]:
        if not event.isidentifier() or event in ("gap", "reset"):
            raise ValueError(f"not an event name: {event!r}")
        if clash := RESERVED & fields.keys():
            raise ValueError(f"the field {min(clash)!r} is written by the log itself")
        "".join(fields).encode()  # a name that UTF-8 cannot hold is refused here, not among the calls of others
        pairs = [text for name, value in fields.items() for text in (name, encode(value))]
        characters = sum(map(len, pairs))
        if characters > MAX_EVENT_BYTES // 4 and (size := len("".join(pairs).encode())) > MAX_EVENT_BYTES:
            raise ValueError(f"the event {event} has {size:,} bytes; the limit is {MAX_EVENT_BYTES:,}")
        self._number += 1
        terminal = int(event in keys.TERMINAL)
        ttl_ms = int(self.ttl_seconds * 1000)
        return [self.attempt, self.token, self._number, terminal, self.maxlen, ttl_ms, event, *pairs]

    def outcome(self, reply: Any) -> str | Exception:
        """Return the entry id that a reply of append.lua holds, or what add() is to raise for it."""
        if isinstance(reply, Exception):
            return reply
        if reply[0] == "lost":
            if self.lease is not None:
                self.lease.lost.set()
            if int(reply[1]) < self.attempt:
                return LeaseLost(f"what attempt {self.attempt} of task {self.task_id} wrote is gone, and its claim too")
            return LeaseLost(f"task {self.task_id} is written by its attempt {reply[1]} now")
        return StreamEnded(reply[1]) if reply[0] == "ended" else str(reply[1])

    @property
    def _keys(self) -> list[str]:
        return [keys.stream(self.task_id), keys.writer(self.task_id)]

    def _insist(self, args: list[Any]) -> Any:
        """Run append.lua, again and again while Redis is away, for as long as the lease may be believed."""
        limit = time.monotonic() + UNLEASED_PATIENCE_SECONDS
        wait = None
        while True:
            self._check_lease()
            try:
                return self._append(keys=self._keys, args=args)
            except REDIS_ERRORS as error:
                wait = wait or delays()
                delay = next(wait)
                if not is_transient(error) or (self.lease is None and time.monotonic() + delay > limit):
                    raise
            if self.lease is not None:
                self.lease.lost.wait(delay)
            else:
                time.sleep(delay)

    def _check_lease(self) -> None:
        if self.lease is not None and self.lease.is_over:
            raise LeaseLost(f"the lease of task {self.task_id} (attempt {self.attempt}) is over")

    # -- reading ------------------------------------------------------------------------------------------------

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
    """Return an entry id as it is. Raises ValueError where it is none."""
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

    It is pure: it reads nothing and waits for nothing. After a `reset` read again from `cursor.id`, the start. Whatever
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


def follow(
    cursors: dict[str, str], blocking: Client, timeout_seconds: float | None = None
) -> Iterator[tuple[str, Event | None]]:
    """Yield (task id, event) of several streams over one connection, until all have ended.

    `cursors` maps task ids to entry ids; it is the caller's, who may add tasks while following. After BLOCK_SECONDS
    without an event comes ("", None), so that the caller can look around. `blocking` is a blocking_client. See
    TaskLog.follow for the rest.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    at: dict[str, Cursor] = {}
    look_at = 0.0  # time.monotonic() at which to look at the ends of all streams
    away, wait = False, delays()
    while cursors:
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"no end within {timeout_seconds:g} s")
        try:
            # subtle: again, since whoever gets an event may add a task
            while (new := [one for one in cursors if one not in at]) or (cursors and time.monotonic() >= look_at):
                if not new:
                    look_at = time.monotonic() + BLOCK_SECONDS
                yield from _look(new or list(cursors), cursors, at, blocking)
            if not cursors:
                return
            left = BLOCK_SECONDS if deadline is None else deadline - time.monotonic()
            block_ms = max(1, int(min(left, BLOCK_SECONDS) * 1000))  # subtle: 0 would block for ever
            reply = _xread(blocking, {keys.stream(task_id): cursor.id for task_id, cursor in at.items()}, block_ms)
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


def _xread(blocking: Client, streams: dict[str, str], block_ms: int) -> list[Any]:
    """XREAD all streams at once; in a cluster, where they are in different slots, one after the other."""
    if not isinstance(blocking, RedisCluster):
        return list(blocking.xread(streams, count=PAGE, block=block_ms))
    each_ms = max(1, block_ms // len(streams))
    replies = [blocking.xread({stream: cursor}, count=PAGE, block=each_ms) for stream, cursor in streams.items()]
    return [reply for stream_replies in replies for reply in stream_replies]


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
