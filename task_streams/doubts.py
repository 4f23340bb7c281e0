"""What a task asks people: its handler's questions, and what has become of a step in doubt.

One question is open at a time. A person who answers means the question that they have read, so an open one is settled
before anything else is asked. Once a question is open, or a person lets the task fail, no step of the attempt runs.
"""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from ailf.messaging.redis import REDIS_ERRORS

from .errors import InDoubt, LeaseLost, Parked, PermanentFailure, StreamEnded
from .history import History, Recorded
from .questions import AGAIN, EXPIRES_SECONDS, FAIL, HAPPENED, MOST_QUESTIONS, START_OVER, Question, ask
from .steps import Step, digest_of

if TYPE_CHECKING:
    from .log import TaskLog


class Doubts:
    """The questions of one attempt."""

    def __init__(self, log: "TaskLog", history: History) -> None:
        self._log, self._history = log, history
        self._one_at_a_time = asyncio.Lock()
        self.cut: list[tuple[Step, str]] = []  # unsafe steps that the handler has cancelled, and why they are in doubt

    async def ask(self, question: Question, expires_seconds: float) -> str | None:
        """Return the answer, None if nobody answered in time; or raise Parked."""
        history = self._history
        async with self._one_at_a_time:
            self.check()
            was_asked = history.asked is question
            number = history.questions + (not was_asked)
            if number > MOST_QUESTIONS:
                raise PermanentFailure(f"the task has asked {MOST_QUESTIONS} questions, which is the limit")
            try:
                answer = await ask(self._log, question, number, was_asked, expires_seconds)
            except Parked as parked:
                self._log.refusal = parked
                raise
        history.questions = number
        history.answered(question.key, question.digest, answer, question.step)
        return answer

    def check(self) -> None:
        """Raise what ended this attempt's steps."""
        if self._log.refusal is not None:
            raise self._log.refusal

    async def settle(self) -> None:
        """Ask what is open: the last question in the stream, and steps that the handler has cancelled."""
        if self._history.asked is not None:
            await self.ask(self._history.asked, EXPIRES_SECONDS)
        while self.cut:
            step, why = self.cut.pop()
            if not await self.may_repeat(step, why):
                self._history.steps[step.key] = Recorded(step.digest, False, True, True)

    async def may_repeat(self, step: Step, why: str) -> bool:
        """Ask what has become of a step in doubt; say whether to do it again. Raises InDoubt if the task is to fail."""
        question = Question(f"{step.key} in doubt", step.digest, "", (HAPPENED, AGAIN, FAIL), step.key)
        return await self._decide(question, step.key, why) == AGAIN

    async def ask_to_start_over(self, what: str, why: str) -> None:
        """Ask whether to do every step again although some are not safe. Raises InDoubt if the task is to fail."""
        await self._decide(Question(f"{what} unfit", digest_of(what), "", (START_OVER, FAIL)), what, why)

    async def _decide(self, question: Question, what: str, why: str) -> str | None:
        text = f"{what} is in doubt: {why}."
        if question.key in self._history.decided:  # the attempt that got the answer has died
            answer: str | None = self._history.decided.pop(question.key)
        else:
            await self.say(what, why)
            answer = await self.ask(question.asking(text), EXPIRES_SECONDS)
            self._history.decided.pop(question.key, None)
        if answer is None or answer == FAIL:
            self._log.refusal = InDoubt(
                f"{text} {'Nobody has answered' if answer is None else 'A person let the task fail'}."
            )
            raise self._log.refusal
        return answer

    async def say(self, what: str, why: str) -> None:
        """Append `in_doubt`, once."""
        if what not in self._history.doubts:
            with suppress(
                LeaseLost, StreamEnded, *REDIS_ERRORS
            ):  # if the lease is lost, the worker finds that out, too
                await self._log.add_always("in_doubt", step=what, reason=why)
                self._history.doubts.add(what)
