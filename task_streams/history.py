"""The steps in a task's stream. A new attempt reads them once, and then notes what it writes itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import PermanentFailure
from .questions import AGAIN, HAPPENED, Question
from .reader import START, Cursor, Event, order
from .steps import ASK, STEP_EVENTS, value_of

if TYPE_CHECKING:
    from .claims import Task
    from .log import TaskLog

PAGE = 100  # entries per XRANGE: each may hold a large result


@dataclass
class Recorded:
    """A step as the stream has it."""

    digest: str  # of its name and arguments
    is_safe: bool
    is_completed: bool = False
    has_value: bool = False  # False although it is completed: the result could not be stored
    value: Any = None
    error_type: str = ""  # not empty: the value is the message of an exception that was expected


class History:
    """The steps in a stream, by their keys, and its llm_delta entries, which may be dropped."""

    def __init__(self, log: "TaskLog") -> None:
        self._log = log
        self.steps: dict[str, Recorded] = {}
        self.problem = ""  # why the steps cannot be relied on
        self.hides_entries = False  # some are missing, and nobody knows what they said
        self.asked: Question | None = None  # the question that has no answer yet
        self.questions = 0  # how many were asked
        self.decided: dict[str, Any] = {}  # answers about what is in doubt that nobody has acted upon yet
        self.doubts: set[str] = set()  # steps, or "the journal", that are said to be in doubt
        self.allowed: set[str] = set()  # keys of steps in doubt that somebody wants to be done again
        self.told: dict[str, list[str]] = {}  # key of a look into the inbox -> the messages that it found
        self._starts = 0  # how many `started` there are
        self._words: list[str] = []  # the llm_delta entries at the end of the stream
        self._replaced: list[str] = []  # those that an llm_response repeats
        self._gone = 0  # entries that the stream has no more

    async def read(self, task: "Task") -> None:
        """Read the stream up to this attempt's `started`. From there on, only this attempt has written."""
        cursor, last, count = Cursor(), f"{task.epoch}-{task.seq}", 0
        while order(cursor.id) < order(last):
            page = await self._log.read(cursor.id, last, PAGE)
            for entry_id, pairs in page:
                event = Event.from_entry(entry_id, dict(zip(pairs[::2], pairs[1::2], strict=True)))
                if notice := cursor.step(entry_id, event.replaces):
                    self.hides_entries = True
                    self.problem = f"the log has a {notice.name} before its entry {entry_id}"
                    if cursor.id == START:  # it is read again from there
                        count = 0
                        break
                count += 1
                if not cursor.is_foreign:
                    self._read_event(event)
            if not page:
                break
        self._gone = task.seq - count
        # subtle: in a Cluster, the record may not know yet how far a lost stream had come
        if task.attempt > 1 and self._starts < 2 and not self.problem:
            self.hides_entries, self.problem = True, "nothing is left of the attempts before"

    def _read_event(self, event: Event) -> None:
        self.wrote(event.name, event.id)
        self._starts += event.name == "started"
        fields, key = event.fields, event.fields.get("key")
        if event.name == "resumed" and "reason" in fields:  # that attempt has started over
            self.start_over()
        elif event.name == "in_doubt":
            self.doubts.add(str(fields.get("step")))
        elif not isinstance(key, str):
            pass  # it is no step
        elif event.name in STEP_EVENTS and fields.get("status") == "started":
            self.steps[key] = Recorded(str(fields.get("digest")), fields.get("safe_to_repeat") is True)
            self.doubts.discard(key)
        elif event.name in STEP_EVENTS and key in self.steps:  # else it is from before an attempt started over
            self._read_end(self.steps[key], key, event)
        elif event.name == "input_required":
            text, digest, step = (str(fields.get(name, "")) for name in ("question", "digest", "step"))
            self.questions += 1
            self.asked = Question(key, digest, text, fields.get("options"), step)
        elif event.name == "input_received":
            self.answered(key, str(fields.get("digest")), fields.get("answer"), fields.get("step"))
        elif event.name == "steered":
            self.told.setdefault(key, []).append(str(fields.get("text")))

    def _read_end(self, found: Recorded, key: str, event: Event) -> None:
        if event.fields.get("status") == "completed":
            found.is_completed = True
            found.has_value, found.value = value_of(event)
        elif event.fields.get("is_result") is not None:
            found.is_completed = found.has_value = True
            found.value, found.error_type = event.fields.get("error"), str(event.fields["is_result"])
        elif found.is_safe or event.fields.get("nothing_happened") is True:
            del self.steps[key]

    def answered(self, key: str, digest: str, answer: Any, step: Any) -> None:
        """Note the answer to a question; or, if it is about a step in doubt, what it says about that step."""
        self.asked = None
        if key.startswith(f"{ASK}#"):
            self.steps[key] = Recorded(digest, True, True, True, answer)
        elif answer == HAPPENED:
            self.steps[step] = Recorded(digest, False, True, True)
        elif answer == AGAIN:
            self.steps.pop(step, None)
            self.allowed.add(step)
        else:
            self.decided[key] = answer

    def start_over(self) -> None:
        """Forget the steps, but not what people have answered."""
        self.steps = {key: one for key, one in self.steps.items() if key.startswith(f"{ASK}#")}
        self.decided, self.problem = {}, ""

    # -- llm_delta ----------------------------------------------------------------------------------------------

    def wrote(self, event: str, entry_id: str) -> None:
        """Note an entry of the stream."""
        if event == "llm_delta":
            self._words.append(entry_id)
            return
        if event == "llm_response":
            self._replaced += self._words
        self._words = []

    def more_fields(self, event: str) -> list[str]:
        """Return extra fields for the next entry: an llm_response says how many llm_delta entries it repeats.

        If those are dropped later, a reader knows that nothing is missing.
        """
        return ["replaces", str(len(self._words))] if event == "llm_response" and self._words else []

    async def make_room(self, most: int) -> None:
        """Drop llm_delta entries if the log is half full. Raise PermanentFailure if it is full of others.

        One entry more, and Redis might trim the oldest, which may be steps.
        """
        if self._log.seq - self._gone > most // 2 and self._replaced:
            dropped, self._replaced = self._replaced, []
            if await self._log.drop(dropped):
                self._gone += len(dropped)
            else:
                self._replaced = dropped + self._replaced
        if self._log.seq - self._gone >= most:
            raise PermanentFailure(
                f"the log is full: {most:,} entries, and older ones must stay, as a journal of steps"
            )
