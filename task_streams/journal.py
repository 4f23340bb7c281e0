"""Durable steps: a later attempt takes completed results from the stream instead of making the calls again.

    first attempt    append `started`, call, append `completed` with the result, return it
    a later one      finds `completed`: returns that result, and nothing runs
    in doubt         finds `started` and no more: repeats the step if that is safe; otherwise the task fails

The entries are those that people watch: `tool_usage`, or `llm_call` and `llm_response`. So the log is the journal.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ailf.messaging.redis import REDIS_ERRORS

from .errors import InDoubt, LeaseLost, NothingHappened, PermanentFailure, StreamEnded, message_of
from .history import History, Recorded
from .reader import Event
from .steps import Step, digest_of, value_of

if TYPE_CHECKING:
    from .claims import Task
    from .log import TaskLog


class Journal:
    """The steps of one task, as one attempt sees them. Handlers use it through TaskLog.step()."""

    def __init__(self, log: "TaskLog", task: "Task") -> None:
        self._log, self._task = log, task
        # subtle: the first seq tells more than the attempt, which counts from 1 again if the record was lost
        self._is_read = task.attempt <= 1 and task.seq <= 1
        self._reading = asyncio.Lock()
        self.history = History(log)
        self._refusal: InDoubt | None = None  # once a step is in doubt, no other one runs
        self._running: set[str] = set()  # keys
        self._used: set[str] = set()  # keys of steps that this attempt has completed, or taken
        self._calls: dict[str, int] = {}  # name -> steps without a key so far
        self._failed: dict[str, str] = {}  # name -> digest of the last such step, if it failed
        self._count = 0  # of the calls that this attempt has made

    async def do(self, step: Step) -> Any:
        """Return the step's result from the journal, or run it. `step.key` may be empty."""
        name, has_key = step.name, bool(step.key)
        if not has_key:
            # subtle: a failed step that is tried again keeps its number; otherwise a replay would count differently
            self._calls[name] = self._calls.get(name, 0) + (self._failed.pop(name, step.digest) != step.digest)
            step.key = f"{name}#{self._calls[name] + 1}"
        if step.key in self._running | self._used:
            raise PermanentFailure(f"two steps {step.key} in one attempt: give each step {name} a key of its own")
        self._running.add(step.key)
        try:
            await asyncio.sleep(0)  # subtle: so that a replay, too, notices two at the same time
            await self._read()
            value = await self._replay_or_run(step)
        except BaseException:
            if not has_key:
                self._failed[name] = step.digest
            raise
        finally:
            self._running.discard(step.key)
        self._used.add(step.key)
        self._calls[name] = self._calls.get(name, 0) + (not has_key)
        return value

    async def _replay_or_run(self, step: Step) -> Any:
        if self._refusal is not None:
            raise self._refusal
        found = self.history.steps.get(step.key)
        if found is not None and found.digest != step.digest:
            await self._start_over(step.key, "it was recorded with another name or other arguments")
            found = None
        if found is not None and found.has_value:
            return found.value
        if found is not None and not step.is_safe:
            what = "completed, but its result was not stored" if found.is_completed else "started, and not completed"
            raise await self._doubt(step.key, f"it was {what}")
        if self.history.hides_entries and not step.is_safe:
            raise await self._doubt(step.key, "the journal has lost entries, and it may have been among them")
        return await self._run(step)

    async def _run(self, step: Step) -> Any:
        log = self._log
        self._count += 1
        step.call_id = f"call-{self._task.attempt}-{self._count}"
        # subtle: with the data, since another server gives the same ids to other tasks
        step.idempotency_key = f"task-{self._task.id}-{digest_of(self._task.data, step.key)}"
        async with step.ready() as call:
            event, fields = step.started()
            await log.add(event, **fields)
            self.history.steps[step.key] = Recorded(step.digest, step.is_safe)
            log.check()  # subtle: this process may have been frozen, and somebody else have the task
            began = time.monotonic()
            try:
                result = await call()
            except BaseException as error:
                await self._note_failure(step, error, began)
                raise
        duration = {"duration_ms": round((time.monotonic() - began) * 1000)}
        # from here on the step has happened: it is written although the handler may append no more
        try:
            stored = step.result_fields(result)
            event, fields = step.ended("completed", {**stored, **duration})
            await log.add_always(event, **fields)
        except (ValueError, TypeError) as unfit:
            event, fields = step.ended("completed", {"error": f"the result was not stored: {unfit}", **duration})
            await log.add_always(event, **fields)
            return result
        return value_of(Event("", event, fields))[1]

    async def _note_failure(self, step: Step, error: BaseException, began: float) -> None:
        """Write that a call raised or was cancelled; raise InDoubt if it may have happened and must not be repeated."""
        has_happened = not isinstance(error, NothingHappened)
        if step.is_safe or not has_happened:
            self.history.steps.pop(step.key, None)
        more = {"error": message_of(error), "duration_ms": round((time.monotonic() - began) * 1000)}
        event, fields = step.ended("failed", {**more, "nothing_happened": not has_happened})
        with suppress(LeaseLost, StreamEnded, *REDIS_ERRORS):  # then `started` stands alone, which says as much
            await self._log.add_always(event, **fields)
        if has_happened and not step.is_safe:
            doubt = await self._doubt(step.key, f"its call ended with {type(error).__name__}: {message_of(error)}")
            if isinstance(error, Exception):  # else it is a cancellation, which goes on
                self._log.check()  # a lost lease, or a cancelled task, is the better reason
                raise doubt from error

    async def _read(self) -> None:
        """Read the journal, once. An attempt without one before it reads nothing."""
        async with self._reading:
            if self._is_read:
                return
            await self.history.read(self._task)
            self._is_read = True
            if self.history.problem:
                await self._start_over("the journal", self.history.problem)
            elif taken := sum(one.has_value for one in self.history.steps.values()):
                await self._log.add("resumed", steps=taken)

    async def say_doubts(self) -> None:
        """Append `in_doubt` for each step in doubt if the task ends without another run of its handler."""
        if not self._is_read:
            await self.history.read(self._task)
            for key, one in self.history.steps.items():
                if not (one.is_safe or one.is_completed):
                    await self._doubt(key, "it was started, and not completed")

    async def _start_over(self, what: str, why: str) -> None:
        """Forget the recorded steps, and say so; raise InDoubt if one of them is not safe to repeat."""
        if not all(one.is_safe for one in self.history.steps.values()):
            raise await self._doubt(what, why)
        self.history.steps.clear()
        await self._log.add("resumed", steps=0, reason=f"{what}: {why}")

    async def _doubt(self, what: str, why: str) -> InDoubt:
        """Write that a step is in doubt; return the error, which every later step of this attempt raises, too."""
        advice = f"Find out what has happened. `python -m task_streams requeue {self._task.id}` does the task again"
        self._refusal = InDoubt(f"{what} is in doubt: {why}. {advice}")
        with suppress(LeaseLost, StreamEnded, *REDIS_ERRORS):  # if the lease is lost, the worker finds that out as well
            await self._log.add_always("in_doubt", step=what, reason=why)
        return self._refusal
