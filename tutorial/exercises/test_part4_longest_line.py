"""The check of part 4's exercise: fakeredis for the stream, and an LLM that says what it was told to say."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakeredis import FakeRedis
from part4_longest_line import make_my_tools

from agent_consumer import Agent
from agent_tools import ToolError, Tools
from task_streams import Task, TaskLog

NAME = "data_processor.longest_line"
POEM = "one\nthe longest line\ntwo words\nthe longest lino\n"


class ToldLLM:
    """Ask for the tool, then finish; keep the prompts."""

    model = "told"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def stream(self, prompt: str) -> Iterator[str]:
        self.prompts.append(prompt)
        ask = {"thought": "How long are its lines?", "action": {"tool": NAME, "arguments": {"file": "poem.txt"}}}
        yield json.dumps(ask if len(self.prompts) == 1 else {"thought": "That is it.", "finish": "done"})


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    (tmp_path / "poem.txt").write_text(POEM)
    return make_my_tools(tmp_path, tmp_path / "outbox")


def test_the_longest_line_is_found(tools: Tools) -> None:
    """The number of the line counts from 1; its end is not one of its characters."""
    assert tools[NAME](file="poem.txt") == {"line": 2, "characters": 16}


def test_a_file_outside_is_refused(tools: Tools) -> None:
    """Like every tool it reads from the data root only, and says so in a ToolError."""
    with pytest.raises(ToolError, match="outside"):
        tools[NAME](file="../secret.txt")


def test_the_agent_uses_it(tools: Tools) -> None:
    """The LLM is told of the tool, and its result is in the task's stream."""
    llm, log = ToldLLM(), TaskLog("poem", FakeRedis(decode_responses=True))

    Agent(llm, tools)(Task("poem", {"type": "process_data", "payload": {"file": "poem.txt"}}), log)

    assert f"- {NAME}(file: str) -> dict[str, typing.Any]: Find the longest line" in llm.prompts[0]
    results = [event.fields["result"] for event in log.read() if event.fields.get("status") == "completed"]
    assert results == [{"line": 2, "characters": 16}]
