"""For tests of your handlers: a log that keeps its events in memory. It needs no server.

log = MemoryLog(task)
result = asyncio.run(handle(task, log))
assert log.of("tool_usage")[1]["result"] == {"rows": 3}
"""

import json
from typing import Any

from .claims import Task
from .log import TaskLog


class MemoryLog(TaskLog):
    """The log of a first attempt. Its steps run as real ones do; a question raises Parked, as nobody answers."""

    def __init__(self, task: Task | None = None) -> None:
        self._task, self._journal = task or Task("1", {}, attempt=1), None
        self.refusal = None
        self.events: list[tuple[str, dict[str, Any]]] = []  # names and fields

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the fields of the events of that name."""
        return [fields for name, fields in self.events if name == event]

    async def add(self, event: str, /, **fields: Any) -> str:
        json.dumps(fields, allow_nan=False)  # what cannot be stored fails here, too
        self.events.append((event, fields))
        return f"1-{len(self.events)}"

    add_always = add

    async def messages(self, after: int) -> list[dict[str, str]]:
        return []

    async def open_question(self, question: str, expires_ms: int) -> tuple[str, int]:
        return "", expires_ms

    def check(self) -> None:
        """Nobody cancels this task."""
