"""What all tools share: their errors, and how a value is shown in one short line."""

import functools
import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

Result = dict[str, Any]  # JSON, small
Tools = dict[str, Callable[..., Result]]

MAX_LABEL_CHARS = 60


class ToolProblem(Exception):
    """A message of one printable line, whatever it quotes: it goes to logs, to terminals and to the LLM."""

    def __init__(self, message: str) -> None:
        message = message if message.isprintable() else repr(message)[1:-1]
        super().__init__(message if len(message) <= 500 else f"{message[:250]} … {message[-240:]}")


class ToolError(ToolProblem):
    """The input is wrong: the same call will fail again. The message says what, which value, what to do."""


class ToolUnavailable(ToolProblem):
    """Something outside does not answer now: the same call may work later."""

    def __init__(self, message: str, may_have_happened: bool = False) -> None:
        super().__init__(message)
        self.may_have_happened = may_have_happened  # nobody knows: the connection broke in the middle


Tool = TypeVar("Tool", bound=Callable[..., Any])


def safe_to_repeat(tool: Tool) -> Tool:
    """Mark a tool that may be called twice without harm: if nobody knows whether it ran, the agent calls it again."""

    @functools.wraps(tool)
    def same(*args: Any, **how: Any) -> Any:
        return tool(*args, **how)

    same.safe_to_repeat = True  # type: ignore[attr-defined]
    return same  # type: ignore[return-value]


def require_text(**arguments: Any) -> None:
    """Raise ToolError for an argument that isn't text: an LLM may pass any JSON value."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise ToolError(f"{name} = {value!r:.200}; expected text")


def label(value: Any, max_chars: int = MAX_LABEL_CHARS) -> str:
    r"""Return a value as short, printable text; a long one ends in its checksum. " a\tb " -> r"a\tb" """
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = repr(text)[1:-1]
    if len(text) > max_chars:
        text = f"{text[: max_chars - 9]}…{zlib.crc32(text.encode()):08x}"
    return text
