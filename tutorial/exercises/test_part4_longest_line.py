"""The check of part 4's exercise. It needs no server: a log in memory, and an LLM that says what it was told to say."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from part4_longest_line import make_my_tools

from agent import Agent
from agent_tools import ToolError, Tools
from mock_llm import ToolCall
from task_streams import Task
from task_streams.testing import MemoryLog

NAME = "data_processor.longest_line"
POEM = "one\nthe longest line\ntwo words\n"


class ToldLLM:
    """Ask for the tool, then finish; keep the tools that were offered."""

    model = "told"

    def __init__(self) -> None:
        self.offered: list[dict[str, Any]] = []

    async def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncIterator[str | ToolCall]:
        self.offered = [tool["function"] for tool in tools]
        if messages[-1]["role"] == "user":
            yield "How long are its lines?"
            yield ToolCall("first", NAME, {"file": "poem.txt"})
        else:
            yield "That is it."


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    (tmp_path / "poem.txt").write_text(POEM)
    return make_my_tools(tmp_path, tmp_path / "outbox")


def test_the_longest_line_is_found(tools: Tools) -> None:
    """The line's end is not one of its characters."""
    assert tools[NAME](file="poem.txt") == {"line": "the longest line", "characters": 16}


def test_a_file_outside_is_refused(tools: Tools) -> None:
    """Like every tool it reads from the data root only, and says so in a ToolError."""
    with pytest.raises(ToolError, match="outside"):
        tools[NAME](file="../secret.txt")


def test_the_agent_uses_it(tools: Tools) -> None:
    """The LLM is told of the tool, and its result is in the task's stream."""
    llm, log = ToldLLM(), MemoryLog()

    asyncio.run(Agent(llm, tools)(Task("poem", {"type": "process_data", "payload": {"file": "poem.txt"}}), log))

    (told,) = [tool for tool in llm.offered if tool["name"] == NAME]
    assert told["description"].startswith("Find the longest line")
    assert told["parameters"]["required"] == ["file"]
    results = [fields["result"] for fields in log.of("tool_usage") if fields["status"] == "completed"]
    assert results == [{"line": "the longest line", "characters": 16}]
