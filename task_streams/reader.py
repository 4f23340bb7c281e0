"""Read a task's stream of events, `task_logs:<id>`: once, or live.

An entry's id is <epoch>-<seq>. The epoch grows with each attempt; seq counts 1, 2, 3 … over the task's whole life. That
tells a reader what it missed, and whether it still reads the history that it began with (Cursor).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from redis import RedisCluster

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, connect, decode, is_transient, reason_of

from . import keys
from .retrying import delays

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 1.0  # of one XREAD: short, so that Ctrl-C is noticed within a second
PAGE = 500  # entries per XREAD: history comes in pages
START = "0-0"  # the entry id before the first


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a stream, decoded. `gap` and `reset` are a reader's own: no entry says them."""

    id: str  # the entry id, <epoch>-<seq>: the cursor to go on from
    name: str
    fields: dict[str, Any]

    @property
    def is_terminal(self) -> bool:
        return self.name in keys.TERMINAL

    @property
    def replaces(self) -> int:
        """How many entries right before an llm_response it repeats: they may have been dropped, and are not missed."""
        count = self.fields.get("replaces") if self.name == "llm_response" else 0
        return count if isinstance(count, int) else 0

    def as_dict(self) -> dict[str, Any]:
        """Return one flat object: {"id": …, "event": …, "timestamp": …, …}."""
        return {"id": self.id, "event": self.name, **self.fields}

    @classmethod
    def from_entry(cls, entry_id: str, entry: dict[str, str]) -> "Event":
        values = {name: decode(text) for name, text in entry.items()}
        return cls(entry_id, str(values.pop("event", "")), values)


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

    __slots__ = ("_quiet_until", "id", "is_foreign", "seq")

    def __init__(self, entry_id: str = START) -> None:
        self.id = entry_id  # read on after this entry
        self.seq = seq_of(entry_id)  # of the last entry that counts; None: not known, so the next one cannot be a gap
        self.is_foreign = self.seq is None  # the entry at the cursor is somebody's own, and does not count
        self._quiet_until = (0, 0)  # up to this entry a history is read again: no second reset

    def take(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield events that were read, with each `gap`; stop after a `reset`, since the rest must be read again."""
        for event in events:
            if notice := self.step(event.id, event.replaces):
                yield notice
                if notice.name == "reset":
                    return
            yield event

    def step(self, entry_id: str, replaces: int = 0) -> Event | None:
        """Move to an entry that was read; return the notice that comes before it, if any.

        `replaces`: how many entries right before this one are repeated by it; if they are gone, they are not missed.
        A `gap` precedes the entry. A `reset` takes its place: the cursor is at the start, and the entry comes again.
        """
        (ms, seq), (last_ms, last_seq), notice = order(entry_id), order(self.id), None
        # subtle: several XADD * within a millisecond get the ids <ms>-0, <ms>-1, <ms>-2 …
        follows_foreign = self.is_foreign and (ms, seq) == (last_ms, last_seq + 1)
        self.is_foreign = seq == 0 or (follows_foreign and seq - 1 != self.seq)
        if not self.is_foreign:
            if self.seq is None or seq == self.seq + 1:
                self.seq = seq
            elif seq > self.seq:
                if (missed := seq - self.seq - 1 - max(replaces, 0)) > 0:
                    notice = Event(self.id, "gap", {"missed": missed})
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
    cursors: dict[str, str],
    blocking: Client,
    timeout_seconds: float | None = None,
    read: Callable[[dict[str, str], int], Any] | None = None,
) -> Iterator[tuple[str, Event | None]]:
    """Yield (task id, event) of several streams over one connection, until all have ended.

    `cursors` maps task ids to entry ids; the caller owns it and may add tasks while following. After a read without an
    event, at least once in BLOCK_SECONDS, it yields ("", None), so that the caller can look around. `blocking` is a
    blocking_client. `read` gets the streams, each with the entry id after which to read, and ms to block, and returns
    XREAD's reply. See LogReader.follow for the rest.
    """
    read = read or (lambda streams, block_ms: blocking.xread(streams, count=PAGE, block=block_ms))
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
    and drop those that have ended."""
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
