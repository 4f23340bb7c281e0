"""Questions to people: a task asks, is parked without a process, and goes on when somebody has answered.

    ask       the question into the record (ask.lua) and, as `input_required`, into the stream; then the handler ends
    park      its worker gives the task up; the lease lasts as long as the question may be answered (release.lua)
    answer    into the record, and the task is pushed (answer.lua); the first answer counts, and "too late" is one
    go on     the next attempt comes to the same question, finds the answer, appends `input_received`, and returns it

queue.py has what people do: answer() and questions().
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ailf.messaging.redis import encode, from_json, to_json

from .errors import Parked
from .keys import TERMINAL

if TYPE_CHECKING:
    from .log import TaskLog

EXPIRES_SECONDS = 24 * 3600.0  # how long a question may be answered; a task always ends
LONGEST_SECONDS = 10_000_000  # four months
MAX_CHARS = 20_000  # of a question with its options, and of an answer
MOST_QUESTIONS = 100  # that a task may ask in its life: it must end
MOST_MESSAGES = 100  # that a task may be told in its life
HAPPENED, AGAIN, START_OVER, FAIL = "it happened", "do it again", "start over", "fail"


@dataclass(frozen=True)
class Question:
    """A question as its entry in the stream has it. `step`: the step in doubt that it is about."""

    key: str  # as of a step: the same in each attempt
    digest: str
    text: str
    options: Sequence[str] | None = None
    step: str = ""

    def asking(self, text: str) -> "Question":
        return replace(self, text=text)

    def as_json(self, number: int) -> str:
        """Return it as the record has it. The number makes a question that is asked once more another one."""
        return to_json({"number": number, "key": self.key, "question": self.text, "options": self.options})


def check(text: str, options: Sequence[str] | None, expires_seconds: float) -> None:
    """Raise ValueError if a handler cannot ask that."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("a question needs a text")
    texts = list(options) if isinstance(options, list | tuple) else []
    if options is not None and not (texts and all(isinstance(one, str) and one.strip() for one in texts)):
        raise ValueError("options must be a list of texts, or None if any answer will do")
    if len(encode([text, texts])) > MAX_CHARS:
        raise ValueError(f"a question with its options may have {MAX_CHARS:,} characters at most")
    if not 0 < expires_seconds <= LONGEST_SECONDS:
        raise ValueError(
            f"a question expires in more than 0 s and at most {LONGEST_SECONDS:,} s, not in {expires_seconds}"
        )


async def ask(log: "TaskLog", question: Question, number: int, was_asked: bool, expires_seconds: float) -> str | None:
    """Return the answer, None if nobody answered in time; or raise Parked, and let the task rest until then.

    `was_asked`: the stream has the question, but no answer. `number`: of this question among all of the task.
    """
    text, expires_at = await log.open_question(question.as_json(number), round(expires_seconds * 1000))
    fields = {"key": question.key, "digest": question.digest, **({"step": question.step} if question.step else {})}
    if not was_asked:
        about = {"question": question.text, "options": question.options, "expires_at": expires_at, "number": number}
        await log.add("input_required", **about, **fields)
    if not text:
        raise Parked(question.text)
    answer = from_json(text) or {"text": None, "by": ""}
    await log.add("input_received", answer=answer["text"], by=answer["by"], **fields)
    return None if answer["text"] is None else str(answer["text"])


def question_in(
    status: str | None, question: str | None, answer: str | None, expires_at: str | None
) -> dict[str, Any] | None:
    """Return the question in a record's fields that can be answered now; None if none can."""
    if question is None or expires_at is None or answer is not None or status in TERMINAL:
        return None
    try:
        return {**from_json(question), "expires_at": int(expires_at)}
    except (ValueError, TypeError):  # somebody has spoilt the record
        return None


def choose(text: str, options: Sequence[str] | None, what: str = "answer") -> str:
    """Return the option that an answer means, in any case of its letters; or the text, if any answer will do.

    Raises ValueError, with a reason for the person who answers. choose("YES ", ["yes", "no"]) -> 'yes'
    """
    text = text.strip()
    if not text or len(text) > MAX_CHARS:
        raise ValueError(f"the {what} " + (f"has over {MAX_CHARS:,} characters" if text else "is empty"))
    if options is None:
        return text
    for fold in (str, str.casefold):  # exactly, or else in any case of the letters
        for option in options:
            if fold(option.strip()) == fold(text):
                return option
    raise ValueError(f"{text[:80]!r} is not one of the answers: {', '.join(options)}")
