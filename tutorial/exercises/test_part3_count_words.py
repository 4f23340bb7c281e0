"""The check of part 3's exercise; fakeredis is a Redis in memory, so it needs no server."""

from typing import Any

import pytest
from fakeredis import FakeRedis
from part3_count_words import handle

from task_streams import PermanentFailure, Task, TaskLog


def story(payload: Any) -> tuple[Any, list[Any]]:
    """Run the handler on a task, and return its result and the steps in the task's stream."""
    task = Task("words", {"type": "count_words", "payload": payload})
    log = TaskLog(task.id, FakeRedis(decode_responses=True))
    result = handle(task, log)
    return result, [event.fields["step"] for event in log.read() if event.name == "processing"]


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
