"""Append to a task's stream of events, `task_logs:<id>`.

An entry's id is <epoch>-<seq>. The epoch belongs to one attempt and grows; seq counts 1, 2, 3 … over the task's whole
life. Redis takes an id only if it is greater than the last one, and that fences: once the next attempt has written, a
late append of an earlier one is refused. It also makes a repeated append harmless.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from ailf.messaging.redis import REDIS_ERRORS, encode, from_json, is_transient

from . import keys
from .errors import LeaseLost, StreamEnded
from .journal import Journal
from .lua import load
from .questions import EXPIRES_SECONDS, MOST_MESSAGES
from .questions import check as check_question
from .retrying import delays
from .steps import ASK, Step, no_call

if TYPE_CHECKING:
    from .claims import Claims, Task

MAXLEN = 10_000  # entries kept of one stream, approximately (MAXLEN ~)
TTL_SECONDS = 24 * 3600  # how long a stream can be read after its end
MAX_EVENT_BYTES = 1_000_000  # of an event's fields; larger things belong in a file
RESERVED = frozenset({"event", "timestamp"})


class TaskLog:
    """The log of one attempt: what its handler writes. For asyncio; BlockingLog is the same for a thread.

    The log owns an append, not the coroutine that asked for it. One is on its way at a time, in the order of the calls.
    A coroutine that is cancelled meanwhile changes nothing. An append whose reply was lost is sent again with the same
    bytes before the next one, so every event is written once.
    """

    def __init__(self, task: "Task", claims: "Claims", deadline: float) -> None:
        self.task_id, self.epoch, self.seq = task.id, task.epoch, task.seq
        self.deadline = deadline  # time.monotonic() until which the task is believed to be ours; heartbeats move it
        self.is_lost = False
        self._task, self._claims, self._pipe = task, claims, claims.pipe
        self._stream = keys.stream(task.id)
        self._in_order = asyncio.Lock()  # it lets the calls pass in the order in which they came
        self._closed: Exception | None = None  # why nothing more is appended
        self._has_ended = False  # the terminal event is written
        # Parked or InDoubt: no step runs any more, and this is how the attempt ends, whatever its handler makes of it
        self.refusal: BaseException | None = None
        self._stopped: Exception | None = None  # why the handler may append no more
        self._journal: Journal | None = None  # from the first step on

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
        if self._journal is not None:
            await self._journal.history.make_room(MAXLEN)
        return await self.add_always(event, **fields)

    async def step(
        self,
        name: str,
        call: Callable[..., Any],
        /,
        *args: Any,
        key: str | None = None,
        safe_to_repeat: bool = False,
        kind: str = "",
        about: Mapping[str, Any] | None = None,
        expected: tuple[type[Exception], ...] = (),
    ) -> Any:
        """Return call(*args), which a later attempt takes from the stream: a completed step does not run again.

        The call is async, or a plain function, which runs in a thread. If it has a parameter `idempotency_key`, it gets
        the step's key for the outside world, the same in each attempt. The value returned is the one that is stored: a
        tuple comes back as a list. A step is known by its `key`, or else by its name and the number of its call; two
        of one name at the same time need keys. `kind` is "tool" (`tool_usage`: the name is tool.action) or "llm"
        (`llm_call`, `llm_response`), the latter also by the name "llm". `about` has more fields for its entries.
        Exceptions of the types in `expected` are results too: a later attempt raises them again, made of their message.

        If nobody knows whether it has happened (its worker was lost, or the call raised), a step that is
        `safe_to_repeat` is done again. About another one a person is asked, as by ask(), unless the call raised
        NothingHappened: "it happened" (then this returns None), "do it again" or "fail" (InDoubt, also if nobody
        answers within a day). Raises what the call and add() raise.
        """
        is_llm = (kind or name.partition(".")[0]) == "llm"
        step = Step(name, call, args, safe_to_repeat, is_llm, about or {}, expected, key=key or "")
        return await self._steps().do(step)

    async def ask(
        self, question: str, options: Sequence[str] | None = None, expires_seconds: float | None = None
    ) -> str | None:
        """Ask a person, and return the answer: one of the options, or any text without them; None if nobody answers.

        The task is parked: this raises Parked, a BaseException, and no process holds the task until somebody answers
        (`python -m task_streams answer`) or the question expires, after a day by default. Then another attempt comes to
        the same question, and there this returns. So all that the handler does before belongs in steps. One question at
        a time, and none while a step runs. Raises ValueError for an impossible question, and what add() raises.
        """
        seconds = EXPIRES_SECONDS if expires_seconds is None else expires_seconds
        check_question(question, options, seconds)
        step = Step(ASK, no_call, (question, options), True, False, expires_seconds=seconds)
        answer: str | None = await self._steps().do(step)
        return answer

    async def inbox(self) -> list[str]:
        """Return the messages that people have sent since the last call (`python -m task_streams tell`); log `steered`.

        A later attempt gets the same messages at the same place among its steps.
        """
        return await self._steps().look_into_inbox()

    async def resuming(self) -> bool:
        """Say whether the journal holds steps that this attempt has not come to yet.

        While it does, the stream has already what a handler says around them.
        """
        return await self._steps().resuming()

    async def was_asked(self, question: str, options: Sequence[str] | None = None) -> bool:
        """Say whether an earlier attempt has asked this at this place: then ask() returns its answer."""
        return await self._steps().was_asked(Step(ASK, no_call, (question, options), True, False))

    def _steps(self) -> Journal:
        self._journal = self._journal or Journal(self, self._task)
        return self._journal

    async def say_doubts(self) -> None:
        """Append `in_doubt` for each step in doubt, before the end of a task whose handler does not run again."""
        await Journal(self, self._task).say_doubts()

    async def read(self, after: str, until: str, count: int) -> list[Any]:
        """Return entries as the server sends them (XRANGE)."""
        call = self._pipe.call
        return list(await self._insist(lambda: call("XRANGE", self._stream, f"({after}", until, "COUNT", count)))

    async def messages(self, after: int) -> list[dict[str, str]]:
        """Return the messages in the task's inbox, {"text", "by"}, behind the first `after` ones."""
        names = [f"told:{after + 1 + n}" for n in range(MOST_MESSAGES)]
        texts = await self._insist(lambda: self._pipe.call("HMGET", keys.record(self.task_id), *names))
        found = [from_json(text) for text in texts if text]
        return [{"text": one["text"], "by": one["by"]} for one in found]

    async def open_question(self, question: str, expires_ms: int) -> tuple[str, int]:
        """Note a question in the record; return the answer as JSON ("" if nobody has answered) and its expiry (ms)."""
        call = load("ask"), [keys.record(self.task_id)], [self._task.token, question, expires_ms]
        reply = await self._insist(lambda: self._pipe.run(call))
        if reply is None:
            raise LeaseLost(f"task {self.task_id} is held by somebody else now")
        return reply[0], reply[1]

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat a call while Redis is away, until the lease is over."""
        for delay in delays():
            self.check()
            try:
                return await call()
            except REDIS_ERRORS as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("delays() never ends")

    async def drop(self, entry_ids: list[str]) -> bool:
        """Delete entries (XDEL). False: Redis is away, and nobody knows."""
        try:
            await self._pipe.call("XDEL", self._stream, *entry_ids)
        except REDIS_ERRORS as error:
            if not is_transient(error):
                raise
            return False
        return True

    async def add_always(self, event: str, /, **fields: Any) -> str:
        """Append as add() does, even if the handler may append no more: the worker's way to say why."""
        # subtle: in a task of its own, so that it is written whatever becomes of the coroutine that asked for it. If
        # that is cancelled, nobody else looks at the task's error.
        writing = asyncio.create_task(self._write(self._prepare(event, fields)))
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(writing)

    async def end(self, event: str, result: Any, /, **fields: Any) -> None:
        """Append the terminal event and close the task's record with `result`. Nothing can be appended after it.

        For the worker, which must not cancel it. Raises LeaseLost; ValueError or TypeError for what JSON cannot hold.
        """
        pairs = self._prepare(event, fields)
        self._closed = StreamEnded(event)
        await self._write(pairs, event, result)

    def check(self) -> None:
        """Raise what add() would raise, without writing: for a handler that waits."""
        if (why := self._closed or self._stopped) is not None:
            raise why
        if self.is_over:
            raise LeaseLost(f"the lease of task {self.task_id} is over")

    def stop(self, reason: Exception) -> None:
        """Let the handler append no more: add() and check() raise this from now on."""
        self._stopped = self._stopped or reason

    @property
    def is_over(self) -> bool:
        """Whether this worker must assume that it no longer holds the task."""
        return self.is_lost or time.monotonic() > self.deadline

    def _prepare(self, event: str, fields: dict[str, Any]) -> list[str]:
        if self._closed is not None:
            raise self._closed
        return entry_fields(event, fields)

    async def _write(self, pairs: list[str], ending: str = "", result: Any = None) -> str:
        """XADD an entry with the same bytes until its outcome is known; if it ends the task, close the record."""
        async with self._in_order:
            if self._has_ended:  # an append that was asked for before the end, by a coroutine that nobody awaited
                raise StreamEnded("the task has ended")
            entry_id = f"{self.epoch}-{self.seq + 1}"
            if self._journal is not None:
                pairs = pairs + self._journal.history.more_fields(pairs[1])
            try:
                for delay in delays():
                    if self.is_over:
                        raise LeaseLost(f"the lease of task {self.task_id} is over")
                    try:
                        if not (ending and self._pipe.is_one_server):  # there `finish` writes it in the same call
                            await self._xadd(entry_id, pairs)
                        if ending and not await self._claims.finish(self._task, ending, result, entry_id, pairs):
                            raise LeaseLost(f"task {self.task_id} is held by somebody else now")
                        break
                    except REDIS_ERRORS as error:
                        if not is_transient(error):
                            raise
                    await asyncio.sleep(delay)
            except LeaseLost as lost:
                self.is_lost, self._closed = True, lost
                raise
            self.seq += 1
            self._has_ended = bool(ending)
            if self._journal is not None:
                self._journal.history.wrote(pairs[1], entry_id)
            return entry_id

    async def _xadd(self, entry_id: str, pairs: list[str]) -> None:
        try:
            # subtle: NOMKSTREAM. If the stream is gone the writer is told (the reply is nil), not fooled.
            add = self._pipe.call("XADD", self._stream, "NOMKSTREAM", "MAXLEN", "~", MAXLEN, entry_id, *pairs)
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

    def step(self, name: str, call: Callable[..., Any], /, *args: Any, **how: Any) -> Any:
        """Return call(*args), once, as TaskLog.step() does. Threads at the same time need keys, too."""
        return asyncio.run_coroutine_threadsafe(self._log.step(name, call, *args, **how), self._loop).result()

    def ask(
        self, question: str, options: Sequence[str] | None = None, expires_seconds: float | None = None
    ) -> str | None:
        """Ask a person, as TaskLog.ask() does: it raises Parked, and another attempt gets the answer."""
        return asyncio.run_coroutine_threadsafe(self._log.ask(question, options, expires_seconds), self._loop).result()

    def inbox(self) -> list[str]:
        """Return the messages that people have sent, as TaskLog.inbox() does."""
        return asyncio.run_coroutine_threadsafe(self._log.inbox(), self._loop).result()

    def was_asked(self, question: str, options: Sequence[str] | None = None) -> bool:
        """Say whether an earlier attempt has asked this at this place, as TaskLog.was_asked() does."""
        return asyncio.run_coroutine_threadsafe(self._log.was_asked(question, options), self._loop).result()

    def resuming(self) -> bool:
        """Say whether the journal holds steps that this attempt has not come to yet."""
        return asyncio.run_coroutine_threadsafe(self._log.resuming(), self._loop).result()

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


def now_text() -> str:
    """Return the time as events have it: "2026-11-24T20:15:00.123Z"."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
