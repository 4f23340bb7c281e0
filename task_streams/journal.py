"""Durable steps: a later attempt takes completed results from the stream instead of making the calls again.

    first attempt    append `started`, call, append `completed` with the result, return it
    a later one      finds `completed`: returns that result, and nothing runs
    in doubt         finds `started` and no more: repeats the step if that is safe; otherwise asks a person (doubts.py)

The entries are those that people watch: `tool_usage`, or `llm_call` and `llm_response`. So the log is the journal.
A question is a step too: its answer is the result.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ailf.messaging.redis import REDIS_ERRORS

from .doubts import Doubts
from .errors import LeaseLost, NothingHappened, Parked, PermanentFailure, StreamEnded, message_of
from .history import History, Recorded
from .questions import Question
from .reader import Event
from .steps import Step, digest_of, value_of

if TYPE_CHECKING:
    from .claims import Task
    from .log import TaskLog


class StepMisuse(PermanentFailure, NothingHappened):
    """The handler uses steps in a way that a replay could not follow."""


class Journal:
    """The steps of one task, as one attempt sees them. Handlers use it through TaskLog."""

    def __init__(self, log: "TaskLog", task: "Task") -> None:
        self._log, self._task = log, task
        # subtle: the first seq tells more than the attempt, which counts from 1 again if the record was lost
        self._is_read = task.attempt <= 1 and task.seq <= 1
        self._reading, self._looking = asyncio.Lock(), asyncio.Lock()
        self.history = History(log)
        self._doubts = Doubts(log, self.history)
        self._running: dict[str, Step] = {}  # by their keys
        self._parking: set[str] = set()  # keys of those that wait for the others before they park the task
        self._changed = asyncio.Condition()  # one has ended, or waits
        self._used: set[str] = set()  # keys of steps that this attempt has completed, or taken
        self._calls: dict[str, int] = {}  # name -> steps without a key so far
        self._failed: dict[str, str] = {}  # name -> digest of the last such step, if it failed
        self._looks = 0  # into the inbox
        self._count = 0  # of the calls that this attempt has made

    async def do(self, step: Step) -> Any:
        """Return the step's result from the journal, or run it. `step.key` may be empty."""
        name, has_key = step.name, bool(step.key)
        if not has_key:
            # subtle: a failed step that is tried again keeps its number; otherwise a replay would count differently
            self._calls[name] = self._calls.get(name, 0) + (self._failed.pop(name, step.digest) != step.digest)
            step.key = f"{name}#{self._calls[name] + 1}"
        if step.key in self._running or step.key in self._used:
            raise StepMisuse(f"two steps {step.key} in one attempt: give each step {name} a key of its own")
        if self._running and (step.is_question or any(one.is_question for one in self._running.values())):
            raise StepMisuse(f"a question while a step is running: {step.key} and {', '.join(self._running)}")
        self._running[step.key] = step
        is_result = False
        try:
            await asyncio.sleep(0)  # subtle: so that a replay, too, notices two at the same time
            await self._read()
            value = await self._replay_or_run(step)
            is_result = True
            return value
        except Parked:
            self._parking.add(step.key)  # the others end first: their results belong to this attempt
            async with self._changed:
                self._changed.notify_all()
                await self._changed.wait_for(lambda: self._running.keys() <= self._parking)
            raise
        except Exception as error:
            is_result = isinstance(error, step.expected)
            raise
        finally:
            if is_result:
                self._used.add(step.key)
                self._calls[name] = self._calls.get(name, 0) + (not has_key)
            elif not has_key:
                self._failed[name] = step.digest
            del self._running[step.key]
            async with self._changed:
                self._changed.notify_all()

    async def _replay_or_run(self, step: Step) -> Any:
        self._doubts.check()
        await self._doubts.settle()
        found = self.history.steps.get(step.key)
        if found is not None and found.digest != step.digest:
            if step.is_question:  # an answer to another question does not count here
                del self.history.steps[step.key]
            else:
                await self._start_over(step.key, "it was recorded with another name or other arguments")
            found = None
        if found is not None and found.has_value:
            if found.error_type:
                raise step.expected_error(found.error_type, str(found.value))
            return found.value
        if step.is_question:
            return await self._doubts.ask(Question(step.key, step.digest, *step.args), step.expires_seconds)
        why = ""
        if found is not None and not step.is_safe:
            why = "completed, but its result was not stored" if found.is_completed else "started, and not completed"
            why = f"it was {why}"
        elif self.history.hides_entries and not step.is_safe and step.key not in self.history.allowed:
            why = "the journal has lost entries, and it may have been among them"
        while not why or await self._doubts.may_repeat(step, why):
            try:
                return await self._run(step)
            except _Unclear as unclear:
                why = str(unclear)
        return None  # somebody says that it has happened

    async def _run(self, step: Step) -> Any:
        log, steps = self._log, self.history.steps
        self._count += 1
        step.call_id = f"call-{self._task.attempt}-{self._count}"
        # subtle: with the data, since another server gives the same ids to other tasks
        step.idempotency_key = f"task-{self._task.id}-{digest_of(self._task.data, step.key)}"
        async with step.ready() as call:
            event, fields = step.started()
            await log.add(event, **fields)
            steps[step.key] = Recorded(step.digest, step.is_safe)
            self.history.doubts.discard(step.key)
            log.check()  # subtle: this process may have been frozen, and somebody else have the task
            began = time.monotonic()
            try:
                result = await call()
            except step.expected as error:
                text, name = step.as_expected(error)
                event, fields = step.ended("failed", {"error": text, "is_result": name})
                await log.add_always(event, **fields, duration_ms=_ms_since(began))
                steps[step.key] = Recorded(step.digest, step.is_safe, True, True, text, name)
                raise
            except BaseException as error:
                if why := await self._note_failure(step, error, began):
                    raise _Unclear(why) from error
                raise
        duration = {"duration_ms": _ms_since(began)}
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

    async def _note_failure(self, step: Step, error: BaseException, began: float) -> str:
        """Write that a call raised or was cancelled; return why it is in doubt, "" if it is not."""
        has_happened = not isinstance(error, NothingHappened)
        if step.is_safe or not has_happened:
            self.history.steps.pop(step.key, None)
        more = {"error": message_of(error), "duration_ms": _ms_since(began)}
        event, fields = step.ended("failed", {**more, "nothing_happened": not has_happened})
        with suppress(LeaseLost, StreamEnded, *REDIS_ERRORS):  # then `started` stands alone, which says as much
            await self._log.add_always(event, **fields)
        if step.is_safe or not has_happened:
            return ""
        why = f"its call ended with {type(error).__name__}: {message_of(error)}"
        await self._doubts.say(step.key, why)
        if not isinstance(error, Exception):  # a cancellation goes on; if the handler goes on too, its next step asks
            self._doubts.cut.append((step, why))
            return ""
        self._log.check()  # a lost lease, or a cancelled task, is the better reason
        return why

    async def _read(self) -> None:
        """Read the journal, once. An attempt without one before it reads nothing."""
        async with self._reading:
            if self._is_read:
                return
            await self.history.read(self._task)
            self._is_read = True
            taken = sum(one.has_value for one in self.history.steps.values())
            await self._doubts.settle()  # subtle: now, since the answer is for no other question
            if self.history.problem:
                await self._start_over("the journal", self.history.problem)
            elif taken:
                await self._log.add("resumed", steps=taken)

    async def resuming(self) -> bool:
        """Say whether steps are recorded that this attempt has not come to yet."""
        await self._read()
        return not self.history.steps.keys() <= self._used

    async def was_asked(self, step: Step) -> bool:
        """Say whether the next question, as an earlier attempt has asked it, was this one."""
        await self._read()
        found = self.history.steps.get(f"{step.name}#{self._calls.get(step.name, 0) + 1}")
        return found is not None and found.digest == step.digest

    async def look_into_inbox(self) -> list[str]:
        """Return the messages that a person has sent; in a later attempt the same ones at the same place."""
        async with self._looking:
            self._looks += 1
            key, told = f"inbox#{self._looks}", self.history.told
            if await self.resuming() or key in told:
                return list(told.get(key, []))
            texts = told.setdefault(key, [])
            for message in await self._log.messages(after=sum(map(len, told.values()))):
                texts.append(message["text"])  # first, since the log writes it even if this is cancelled
                await self._log.add("steered", **message, key=key)
            return list(texts)

    async def say_doubts(self) -> None:
        """Append `in_doubt` for each step in doubt if the task ends without another run of its handler."""
        if not self._is_read:
            await self.history.read(self._task)
            for key, one in self.history.steps.items():
                if not (one.is_safe or one.is_completed):
                    await self._doubts.say(key, "it was started, and not completed")

    async def _start_over(self, what: str, why: str) -> None:
        """Forget the recorded steps, but not people's answers. If a step is not safe to repeat, ask a person first."""
        if not all(one.is_safe for one in self.history.steps.values()):
            await self._doubts.ask_to_start_over(what, why)
        await self._log.add("resumed", steps=0, reason=f"{what}: {why}")
        self.history.start_over()


class _Unclear(Exception):
    """A call ended so that nobody knows whether it has happened."""


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
