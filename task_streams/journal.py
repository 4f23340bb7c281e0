"""Durable steps: a later attempt takes completed results from the stream instead of making the calls again.

    first attempt    append `started`, call, append `completed` with the result, return it
    a later one      finds `completed`: returns that result, and nothing runs
    in doubt         finds `started` and no more: repeats the step if that is safe; otherwise asks a person

The entries are those that people watch: `tool_usage`, or `llm_call` and `llm_response`. So the log is the journal.
A question is a step too: its answer is the result.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ailf.messaging.redis import REDIS_ERRORS

from .errors import InDoubt, LeaseLost, NothingHappened, Parked, PermanentFailure, StreamEnded, message_of
from .history import History, Recorded
from .questions import AGAIN, EXPIRES_SECONDS, FAIL, HAPPENED, START_OVER, Question, ask
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
        self._refusal: BaseException | None = None  # once a question is open, or a step in doubt, no other step runs
        self._running: set[str] = set()  # keys
        self._used: set[str] = set()  # keys of steps that this attempt has completed, or taken
        self._calls: dict[str, int] = {}  # name -> steps without a key so far
        self._failed: dict[str, str] = {}  # name -> digest of the last such step, if it failed
        self._is_asking = False  # the one that is running is a question
        self._looks = 0  # into the inbox
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
        if self._running and (step.expires_seconds or self._is_asking):
            raise PermanentFailure(f"a question while a step is running: {step.key} and {', '.join(self._running)}")
        self._running.add(step.key)
        self._is_asking = step.expires_seconds > 0
        try:
            await asyncio.sleep(0)  # subtle: so that a replay, too, notices two at the same time
            await self._read()
            value = await self._replay_or_run(step)
        except BaseException as error:
            if isinstance(error, step.expected):
                self._take(step, has_key)
            elif not has_key:
                self._failed[name] = step.digest
            raise
        finally:
            self._running.discard(step.key)
        self._take(step, has_key)
        return value

    def _take(self, step: Step, has_key: bool) -> None:
        """Note that this attempt has the step's result."""
        self._used.add(step.key)
        self._calls[step.name] = self._calls.get(step.name, 0) + (not has_key)

    async def _replay_or_run(self, step: Step) -> Any:
        if self._refusal is not None:
            raise self._refusal
        found = self.history.steps.get(step.key)
        if found is not None and found.digest != step.digest:
            await self._start_over(step.key, "it was recorded with another name or other arguments")
            found = None
        if found is not None and found.has_value:
            for kind in step.expected:
                if kind.__name__ == found.error_type:
                    raise kind(found.value)
            return found.value
        if step.expires_seconds:
            return await self._ask(Question(step.key, step.digest, *step.args), step.expires_seconds)
        why = ""
        if found is not None and not step.is_safe:
            why = "completed, but its result was not stored" if found.is_completed else "started, and not completed"
            why = f"it was {why}"
        elif self.history.hides_entries and not step.is_safe and step.key not in self.history.allowed:
            why = "the journal has lost entries, and it may have been among them"
        while not why or await self._may_repeat(step, why):
            try:
                return await self._run(step)
            except _Unclear as unclear:
                why = str(unclear)
        return None  # somebody says that it has happened

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
            except step.expected as error:
                event, fields = step.ended("failed", {"error": str(error), "is_result": type(error).__name__})
                await log.add_always(event, **fields, duration_ms=_ms_since(began))
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
        await self._say_doubt(step.key, why)
        if not isinstance(error, Exception):  # a cancellation goes on
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
            if self.history.problem:
                await self._start_over("the journal", self.history.problem)
            elif taken := sum(one.has_value for one in self.history.steps.values()):
                await self._log.add("resumed", steps=taken)

    async def resuming(self) -> bool:
        """Say whether steps are recorded that this attempt has not come to yet."""
        await self._read()
        return self.history.asked is not None or not self.history.steps.keys() <= self._used

    async def look_into_inbox(self) -> list[str]:
        """Return the messages that a person has sent; in a later attempt the same ones at the same place."""
        self._looks += 1
        key = f"inbox#{self._looks}"
        if await self.resuming() or key in self.history.told:
            return self.history.told.get(key, [])
        texts = self.history.told.setdefault(key, [])
        for message in await self._log.messages(after=sum(map(len, self.history.told.values()))):
            await self._log.add("steered", **message, key=key)
            texts.append(message["text"])
        return texts

    # -- in doubt -----------------------------------------------------------------------------------------------

    async def say_doubts(self) -> None:
        """Append `in_doubt` for each step in doubt if the task ends without another run of its handler."""
        if not self._is_read:
            await self.history.read(self._task)
            for key, one in self.history.steps.items():
                if not (one.is_safe or one.is_completed):
                    await self._say_doubt(key, "it was started, and not completed")

    async def _start_over(self, what: str, why: str) -> None:
        """Forget the recorded steps, and say so. If one of them is not safe to repeat, ask a person first."""
        if not all(one.is_safe for one in self.history.steps.values()):
            await self._ask_about(Question("", digest_of(what), what, (START_OVER, FAIL)), why)
        self.history.steps.clear()
        await self._log.add("resumed", steps=0, reason=f"{what}: {why}")

    async def _may_repeat(self, step: Step, why: str) -> bool:
        """Ask a person about a step in doubt; say whether to do it (again)."""
        question = Question("", step.digest, step.key, (HAPPENED, AGAIN, FAIL), step.key)
        return await self._ask_about(question, why) == AGAIN

    async def _ask_about(self, about: Question, why: str) -> str:
        """Ask a person about what is in doubt, `about.text`; raise InDoubt if the task is to fail."""
        what, key = about.text, f"{about.text} in doubt"
        asked = self.history.asked
        if asked is None or asked.key != key:  # else why it is in doubt was said before
            await self._say_doubt(what, why)
            asked = replace(about, key=key, text=f"{what} is in doubt: {why}.")
        answer = await self._ask(asked, EXPIRES_SECONDS)
        if answer is None or answer == FAIL:
            who = "nobody has answered" if answer is None else "a person let it fail"
            self._refusal = InDoubt(f"{asked.text} {who.capitalize()}.")
            raise self._refusal
        return answer

    async def _ask(self, question: Question, expires_seconds: float) -> str | None:
        history = self.history
        was_asked = history.asked is not None and history.asked.key == question.key
        try:
            answer = await ask(self._log, question, history.answers + 1, was_asked, expires_seconds)
        except Parked as parked:
            self._refusal = self._log.parked = parked
            raise
        history.answered(question.key, question.digest, answer, question.step)
        return answer

    async def _say_doubt(self, what: str, why: str) -> None:
        if what not in self.history.doubts:
            with suppress(
                LeaseLost, StreamEnded, *REDIS_ERRORS
            ):  # if the lease is lost, the worker finds that out, too
                await self._log.add_always("in_doubt", step=what, reason=why)
                self.history.doubts.add(what)


class _Unclear(Exception):
    """A call ended so that nobody knows whether it has happened."""


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
