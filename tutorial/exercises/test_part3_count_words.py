"""The check of part 3's exercise. It needs no server: a log in memory keeps what the handler adds."""

import asyncio
from typing import Any

import pytest
from part3_count_words import handle

from task_streams import PermanentFailure, Task, TaskLog


class LogInMemory(TaskLog):
    """Keeps the events instead of sending them to Redis."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def add(self, event: str, /, **fields: Any) -> str:
        self.events.append((event, fields))
        return f"1-{len(self.events)}"


def story(payload: Any) -> tuple[Any, list[Any]]:
    """Run the handler on a task, and return its result and the steps that it logged."""
    log = LogInMemory()
    result = asyncio.run(handle(Task("words", {"type": "count_words", "payload": payload}), log))
    return result, [fields["step"] for event, fields in log.events if event == "processing"]


def test_the_words_are_counted() -> None:
    """The result is the number of words in all lines."""
    result, _ = story({"text": "one two\nthree"})

    assert result == {"words": 3}


def test_each_line_has_its_entry() -> None:
    """A watcher sees every line as it is counted."""
    _, steps = story({"text": "one two\n\nthree"})

    assert steps == ["line 1: 2 words", "line 2: 0 words", "line 3: 1 words"]


def test_without_text_it_fails_for_good() -> None:
    """A payload without text never gets better."""
    with pytest.raises(PermanentFailure):
        story({"number": 3})
