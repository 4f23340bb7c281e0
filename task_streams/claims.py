"""Claims: what a worker does with an element that it popped, until the task's record is closed.

    claim     a lease of some seconds, a token that proves it, and the first event of the attempt (claim.lua)
    finish    the terminal event, and the record closed (finish.lua)
    release   hand the task back, let it rest until its next attempt, or park it (release.lua)

Each is one script, and repeating it changes nothing, so it is repeated when a connection is lost. On one server claim
and first event share a call, and so do terminal event and finish. In a Cluster the record and the stream are on
different nodes, and the calls go there one after the other.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ailf.messaging.redis import encode, from_json, to_json

from . import keys
from .log import MAXLEN, TTL_SECONDS, now_text
from .lua import load
from .pipeline import AnyPipeline, Call, first_transient

logger = logging.getLogger(__name__)

LEASE_SECONDS = 10.0  # a killed worker's tasks run again within 15 s; a frozen server of 6.5 s is survived
RECORD_TTL_SECONDS = 48 * 3600  # twice the stream's, so that "expired" is not mistaken for "never started"
RECENT_TASKS = 10_000  # ids kept for lists
DEAD_LETTERS = 10_000  # kept in `dead`; older ones go
FINISHED_TASKS = 10_000  # entries kept of `finished`, approximately
MAX_DATA_BYTES = 1_000_000  # of a task's data as JSON; larger things belong in a file that the task names
MOST_CLAIMS_ABOVE = 5  # how often an epoch is drawn again because a stream has a later one
MOST_TOGETHER = 16  # tasks in one call: with more, worker and server would wait for each other instead of overlapping

_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
DROPPED = {"held": "it runs, or it is not due yet", "done": "a task of that id has ended"}


@dataclass(frozen=True, slots=True)
class Task:
    """A task; from a claim on also with the proof of it (token) and its history."""

    id: str
    data: Any
    attempt: int = 0  # claims so far
    token: str = ""
    epoch: str = "0"  # of this attempt's entries
    seq: int = 0  # of its first entry
    failures: int = 0  # attempts that ended with an error
    losses: int = 0  # attempts that ended because their worker was gone
    cancel_reason: str = ""  # not empty: its cancellation was asked for
    ended: str = ""  # not empty: the stream has this terminal event already, only the record is open
    problem: str = ""  # not empty: why it can never succeed
    is_new: bool = field(default=True, compare=False)  # False: put() found a task of that id, this one

    def __str__(self) -> str:
        return self.id


class Malformed(ValueError):
    """An element of the list is not a task; the message says why."""


def parse_element(element: bytes, token: str = "") -> Task:
    """Return the task in a list element, b'{"id": 7, "data": …}'. Raises Malformed with the reason."""
    if len(element) > MAX_DATA_BYTES + 1_000:  # id and punctuation have room in the rest
        raise Malformed(f"the element has {len(element):,} bytes; the limit is {MAX_DATA_BYTES:,}")
    try:
        value = from_json(element.decode())
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed("nested too deep") from error
    except ValueError as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed("not a JSON object")
    if "id" not in value or "data" not in value:
        raise Malformed(f'has no "{"data" if "id" in value else "id"}"')
    try:
        return Task(check_id(value["id"]), value["data"], token=token)
    except ValueError as error:
        raise Malformed(str(error)) from error


def check_id(task_id: object) -> str:
    """Return a task's id as text. check_id(7) -> '7'. Raises ValueError if it is not a valid id."""
    text = str(task_id) if isinstance(task_id, int | str) and not isinstance(task_id, bool) else ""
    if not _ID.fullmatch(text):
        raise ValueError(f"not a task id: {str(task_id)[:80]!r} (letters, digits and . _ : @ - only, 128 at most)")
    return text


def id_json(task_id: str) -> str:
    """Return an id as JSON, as put.lua writes it. id_json("7") -> '7'; id_json("a7") -> '"a7"'"""
    return task_id if task_id.isascii() and task_id.isdigit() and task_id[0] != "0" else f'"{task_id}"'


def new_token() -> str:
    return secrets.token_hex(16)


# -- the calls --------------------------------------------------------------------------------------------------


def claim_steps(
    tasks: Sequence[tuple[Task, str]],
    worker: str,
    lease_seconds: float,
    is_one_server: bool,
    first: tuple[str, str, str] | None = None,
) -> Generator[Call, Any, list[Task | Exception | None]]:
    """Claim tasks, each with its token, and write the first event of each: `started`, or `first` with its one field.

    Each task comes with its data as JSON, or "" if only a known task may be claimed. Yields calls and is sent their
    replies, so that one algorithm serves threads and asyncio. Returns for each task what was claimed; None if its
    element is to be dropped; or the error that concerns it alone. Raises an error that may go away by itself: then
    repeat all of it.
    """
    first = first or ("started", "worker", worker)
    timestamp = now_text()

    def claim(some: Sequence[tuple[Task, str]], above: str = "0") -> Call:
        script_keys: list[str] = [keys.LEASES, keys.UNFINISHED, keys.RECENT]
        args: list[Any] = [
            1 + is_one_server,
            worker,
            int(lease_seconds * 1000),
            RECENT_TASKS,
            MAXLEN,
            timestamp,
            *first,
        ]
        for task, text in some:
            script_keys += [keys.record(task.id), keys.stream(task.id)][: 1 + is_one_server]
            args += (task.id, task.token, text, above)
        return load("claim"), script_keys, args

    claimed: list[Task | Exception | None] = []
    replies = yield claim(tasks)
    first_transient(replies)
    for (task, text), reply in zip(tasks, replies, strict=True):
        for _ in range(0 if is_one_server else MOST_CLAIMS_ABOVE):
            if isinstance(reply, Exception) or reply[0] != "claimed":
                break
            attempt = ("attempt", reply[1]) if first[0] == "started" else ()
            epochs, put_at, lost = reply[9:]
            about = [reply[2], put_at, epochs, reply[3], lost, MAXLEN, timestamp, *first, *attempt]
            [begun] = yield load("start"), [keys.stream(task.id)], about
            first_transient([begun])
            if isinstance(begun, Exception):
                reply = begun
                break
            if begun[0] == "lost":  # by its token the task is ours all the same
                [reply] = yield claim([(task, text)], begun[1])
                first_transient([reply])
                continue
            if begun[0] == "ok":
                reply[3], reply[8] = begun[1], begun[3]
            else:
                reply = begun
            break
        claimed.append(reply if isinstance(reply, Exception) else _claimed(task, reply))
    return claimed


def _claimed(task: Task, reply: list[Any]) -> Task | None:
    if reply[0] == "ended":
        return replace(task, ended=reply[1])
    if reply[0] != "claimed":
        logger.info("task %s: dropped an element with its id (%s)", task.id, DROPPED.get(reply[0], reply[0]))
        return None
    _, attempt, epoch, seq, failures, losses, cancel, text, spoilt, *_ = reply
    data, problem = task.data, f"somebody has spoilt its stream ({spoilt}), which was deleted" if spoilt else ""
    try:
        data = from_json(text) if text else data
    except (ValueError, RecursionError) as error:
        problem = f"the data in its record cannot be read: {error}"
    return Task(
        task.id, data, int(attempt), task.token, epoch, int(seq), int(failures), int(losses), cancel, problem=problem
    )


class End(NamedTuple):
    """How a task ended. With `entry_id` and `fields`, finish.lua writes the terminal event too."""

    task: Task
    event: str
    result: Any
    entry_id: str = ""
    fields: Sequence[str] = ()


def finish_call(ends: Sequence[End], is_one_server: bool) -> Call:
    """Return the call that closes records; the reply has for each task 1, 0 (the lease is lost) or an error."""
    script_keys = [keys.LEASES, keys.UNFINISHED, keys.TOTALS, keys.FINISHED, keys.DEAD]
    args: list[Any] = [1 + is_one_server, RECORD_TTL_SECONDS * 1000, TTL_SECONDS * 1000, MAXLEN]
    args += (DEAD_LETTERS, FINISHED_TASKS)
    for task, event, result, entry_id, fields in ends:
        letter = dead_letter(task.id, task.data, result, task.attempt) if event == "failed" else ""
        script_keys += [keys.record(task.id), keys.stream(task.id)][: 1 + is_one_server]
        args += (task.id, task.token, event, to_json(result), letter, encode(task.id), entry_id, len(fields), *fields)
    return load("finish"), script_keys, args


def release_call(
    task: Task, delay_seconds: float | None = None, is_lost: bool = False, until_answered: bool = False
) -> Call:
    """Return the call that hands a task back; with a delay counts a failure and lets it rest; or parks it until its
    question is answered. 0: lease lost.
    """
    rest: int | str = "park" if until_answered else "" if delay_seconds is None else int(delay_seconds * 1000)
    counted = "losses" if is_lost else "" if delay_seconds is None else "failures"
    args = [task.id, task.token, id_json(task.id), rest, counted]
    return load("release"), [keys.QUEUE, keys.LEASES, keys.record(task.id)], args


def dead_letter(task_id: str, data: Any, reason: Any, attempts: int) -> str:
    return to_json({"id": task_id, "data": data, "reason": reason, "attempts": attempts})


class Claims:
    """The claims of one worker, for asyncio. They raise redis-py's errors while Redis is away: then repeat them."""

    def __init__(self, pipe: AnyPipeline, worker: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self.pipe, self.worker, self.lease_seconds = pipe, worker, lease_seconds
        self._ends: list[tuple[End, asyncio.Future[bool]]] = []  # of this turn of the event loop
        self._sending: set[asyncio.Task[None]] = set()

    async def claim(self, elements: Sequence[tuple[bytes, str]]) -> list[Task]:
        """Claim the tasks of popped elements, each with a token of its own; return those that are ours now.

        Left out: copies of tasks that are held or have ended, and malformed elements, which go to `dead`. To repeat a
        claim pass the same tokens.
        """
        found = []
        for element, token in elements:
            try:
                task = parse_element(element, token)
                found.append((task, to_json(task.data)))
            except ValueError as error:  # Malformed, or nested deeper than Python can write
                await self._bury(element, str(error))
        if not found:
            return []
        steps = claim_steps(found, self.worker, self.lease_seconds, self.pipe.is_one_server)
        call = next(steps)
        try:
            while True:
                call = steps.send(await self.pipe.run(call))
        except StopIteration as done:
            claimed: list[Task | Exception | None] = done.value
        for problem in [one for one in claimed if isinstance(one, Exception)]:
            logger.error("a task was left to its lease: %s", problem)
        return [task for task in claimed if isinstance(task, Task)]

    async def _bury(self, element: bytes, reason: str) -> None:
        logger.warning("an element of %s is not a task: %s; it is in %s now", keys.QUEUE, reason, keys.DEAD)
        text = element[:MAX_DATA_BYTES].decode(errors="backslashreplace")
        await self.pipe.call("LPUSH", keys.DEAD, to_json({"reason": reason, "element": text, "bytes": len(element)}))
        await self.pipe.call("LTRIM", keys.DEAD, 0, DEAD_LETTERS - 1)

    async def finish(self, task: Task, event: str, result: Any, entry_id: str = "", fields: Sequence[str] = ()) -> bool:
        """Close a task's record. With `entry_id` on one server, write its terminal event too. False: lease lost.

        The ends of one turn of the event loop share a call.
        """
        end = End(task, event, result, entry_id, fields)
        if not (entry_id and self.pipe.is_one_server):  # the stream has its end, and may be on another node
            await self.pipe.call("PEXPIRE", keys.stream(task.id), TTL_SECONDS * 1000)
            [reply] = await self.pipe.run(finish_call([end], is_one_server=False))
            if isinstance(reply, Exception):
                raise reply
            return bool(reply)
        loop = asyncio.get_running_loop()
        if not self._ends:
            loop.call_soon(self._send_ends)
        done: asyncio.Future[bool] = loop.create_future()
        self._ends.append((end, done))
        return await done

    def _send_ends(self) -> None:
        ends, self._ends = self._ends, []
        for at in range(0, len(ends), MOST_TOGETHER):
            task = asyncio.create_task(self._finish_all(ends[at : at + MOST_TOGETHER]))
            self._sending.add(task)  # subtle: asyncio itself would not keep it
            task.add_done_callback(self._sending.discard)

    async def _finish_all(self, ends: list[tuple[End, "asyncio.Future[bool]"]]) -> None:
        try:
            replies = await self.pipe.run(finish_call([end for end, _ in ends], is_one_server=True))
        except Exception as error:  # whatever it is, everybody who waits gets it
            replies = [error] * len(ends)
        for (_, done), reply in zip(ends, replies, strict=True):
            if isinstance(reply, Exception) and not done.done():
                done.set_exception(reply)
            elif not done.done():
                done.set_result(bool(reply))

    async def release(self, task: Task, delay_seconds: float | None = None, **how: bool) -> bool:
        """Give a claim up, as release_call() says. False: lease lost.

        `is_lost` counts a lost attempt: somebody else writes its stream, or the stream is gone.
        """
        return bool(await self.pipe.run(release_call(task, delay_seconds, **how)))
