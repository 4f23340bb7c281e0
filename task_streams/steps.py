"""One durable step: how it is written, and how its call is made. When it runs, and when not, is in journal.py."""

import asyncio
import hashlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ailf.messaging.redis import decode, encode, to_json

from .errors import message_of
from .reader import Event
from .threads import Outcome, in_thread

THREADS = 4  # plain functions that run at once in a process: a data tool may take 300 MB
MAX_ARGUMENTS_CHARS = 20_000  # of the arguments in an entry, which only people read
ASK = "ask()"  # the name of a step that is a question
STEP_EVENTS = ("tool_usage", "llm_call", "llm_response")
ANSWER = ("response", "calls", "usage")  # a dict of exactly these becomes the fields of `llm_response`

Entry = tuple[str, dict[str, Any]]  # an event and its fields

_slots: "WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]" = WeakKeyDictionary()


@dataclass
class Step:
    """What log.step() was asked to do."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    is_safe: bool
    is_llm: bool
    about: Mapping[str, Any] = field(default_factory=dict)  # more fields of its entries
    expected: tuple[type[Exception], ...] = ()  # exceptions that are results, too
    expires_seconds: float = 0.0  # not 0: it is a question, and its arguments are the text and the options
    key: str = ""
    call_id: str = ""
    idempotency_key: str = ""  # the same in each attempt, for the outside world to tell a repeated call by
    digest: str = field(init=False)  # of its name and its arguments

    @property
    def is_question(self) -> bool:
        return self.expires_seconds > 0

    def __post_init__(self) -> None:
        self.digest = digest_of(self.name, *self.args)
        self.is_plain = not inspect.iscoroutinefunction(self.call)
        self.is_plain &= not inspect.iscoroutinefunction(getattr(self.call, "__call__", None))  # noqa: B004

    # -- how it is written --------------------------------------------------------------------------------------

    def started(self) -> Entry:
        first = {} if self.is_llm else {"arguments": arguments_of(self.call, self.args)}
        fields = {**self._fields(), **first, **self.about, "status": "started", "safe_to_repeat": self.is_safe}
        return "llm_call" if self.is_llm else "tool_usage", fields

    def ended(self, status: str, more: Mapping[str, Any]) -> Entry:
        about = {name: value for name, value in self.about.items() if name != "arguments"}
        return "llm_response" if self.is_llm else "tool_usage", {**self._fields(), **about, "status": status, **more}

    def result_fields(self, result: Any) -> dict[str, Any]:
        """Return the fields that hold a result, as they will be read. Raises ValueError or TypeError if none can."""
        is_answer = self.is_llm and isinstance(result, dict) and result.keys() == set(ANSWER)
        fields = result if is_answer else {"response" if self.is_llm else "result": result}
        stored = {name: decode(encode(value)) for name, value in fields.items()}
        if any(isinstance(value, str) and not isinstance(fields[name], str) for name, value in stored.items()):
            raise ValueError("it is nested too deep")  # decode() leaves as text what it cannot read
        return stored

    def as_expected(self, error: BaseException) -> tuple[str, str]:
        """Return an expected exception as it is stored: its text, and the name of the class that was expected."""
        is_quoted = isinstance(error, KeyError) and len(error.args) == 1  # subtle: its str() has quotes
        text = message_of(Exception(*error.args) if is_quoted else error)
        return text, next(kind.__name__ for kind in self.expected if isinstance(error, kind))

    def expected_error(self, name: str, text: str) -> Exception:
        """Return the exception that was stored. One whose class wants more than a text is made without its help."""
        kind = next((one for one in self.expected if one.__name__ == name), Exception)
        try:
            return kind(text)
        except TypeError:
            return kind.__new__(kind, text)

    def _fields(self) -> dict[str, Any]:
        if self.is_llm:
            return {"key": self.key, "digest": self.digest}
        tool, _, action = self.name.partition(".")
        about_call = {"call_id": self.call_id, "tool": tool, "action": action or "call"}
        return {**about_call, "key": self.key, "digest": self.digest}

    # -- how it is called ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
        """Wait until the call may begin; yield what makes it. A plain function runs in one of a few threads."""
        options = {"idempotency_key": self.idempotency_key} if "idempotency_key" in parameters_of(self.call) else {}
        call = partial(self.call, *self.args, **options)
        if not self.is_plain:
            yield partial(guarded, call)
            return
        slots = _slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(THREADS))
        await slots.acquire()
        running: asyncio.Future[Outcome] | None = None

        async def in_slot() -> Any:
            nonlocal running
            running = in_thread(call, f"step {self.key}")
            result, error = await asyncio.shield(running)
            if error is not None:
                raise error
            return await result if inspect.isawaitable(result) else result

        try:
            yield partial(guarded, in_slot)
        finally:
            if running is None:
                slots.release()
            else:  # subtle: a thread cannot be cancelled; it keeps its slot until it ends
                running.add_done_callback(lambda _: slots.release())


async def guarded(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:  # subtle: a plain handler's step is a task, which they would pass
        raise RuntimeError(f"the call raised {error!r}") from error


def no_call() -> None:
    """Stand in for the call of a question: a question makes no call."""


def value_of(event: Event) -> tuple[bool, Any]:
    """Return whether the last entry of a step holds its result, and the result."""
    fields = event.fields
    if event.name == "input_received":
        return True, fields.get("answer")
    if event.name == "llm_response" and fields.keys() >= set(ANSWER):
        return True, {name: fields[name] for name in ANSWER}
    name = "response" if event.name == "llm_response" else "result"
    return name in fields, fields.get(name)


def digest_of(*values: Any) -> str:
    return hashlib.sha256(to_json(values).encode()).hexdigest()[:16]


def parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call).parameters
    except (TypeError, ValueError):  # some builtins have none
        return {}


def arguments_of(call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return arguments for people: with the names of the parameters, and cut if they are long."""
    names = [name for name, one in parameters_of(call).items() if one.kind is not one.VAR_POSITIONAL]
    named = dict(zip(names, args, strict=False)) if len(args) <= len(names) else list(args)
    text = to_json(named)
    return named if len(text) <= MAX_ARGUMENTS_CHARS else f"{text[:MAX_ARGUMENTS_CHARS]} … ({len(text):,} characters)"
