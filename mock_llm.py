"""The stubbed LLM: it reads the messages, decides by rules, and streams its words. No network, no Redis, no surprises.

An LLM has one method: chat(messages, tools), both as the OpenAI API has them. It yields the words of a reply as they
come, the tools it wants to use, and its usage. A reply without tools is the final answer. openai_llm.py is the same for
real LLMs. Errors that may pass (rate limits, lost connections) are LLMError: the worker retries the task.
"""

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mock_rules import decide

MAX_QUOTED_CHARS = 200  # of what somebody tells the agent, in the mock's own words
OPENINGS = ("Let me see.", "Well.", "One step at a time.", "Hm.")

Message = dict[str, Any]


class LLMError(Exception):
    """The LLM did not answer, or its answer is unusable. Another try may help, once retry_after_seconds are over."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class ToolCall:
    """A tool that the LLM wants to use. `id` is its own: the result is sent back under it."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """The tokens that calls to an LLM took: what it is paid for."""

    input: int = 0
    output: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.input + other.input, self.output + other.output)


Piece = str | ToolCall | Usage  # what chat() yields


class MockLLM:
    """Answer deterministically: the same messages give the same words, in every process.

    `delay_seconds` is what one answer takes. The share `fail_rate` of all calls raises LLMError before the first word;
    `seed` and the number of the call decide which ones.
    """

    model = "mock-llm-1"

    def __init__(self, delay_seconds: float = 0.0, fail_rate: float = 0.0, seed: int = 0) -> None:
        self.delay_seconds = delay_seconds
        self.fail_rate = fail_rate
        self.seed = seed
        self._calls = itertools.count(1)

    async def chat(self, messages: list[Message], tools: list[dict[str, Any]]) -> AsyncIterator[Piece]:
        """Yield the answer word by word, each with the space after it; the tool call if there is one; the usage."""
        number = next(self._calls)
        if fraction(f"{self.seed}:{number}") < self.fail_rate:
            raise LLMError(f"{self.model} is overloaded (simulated, call {number})")
        text, call = answer(messages)
        words = re.findall(r"\S+\s*", text)
        for word in words:
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds / len(words))
            yield word
        if call:
            yield call
        yield Usage(count_words([messages, tools]), len(words) + (count_words(call.arguments) if call else 0))


def count_words(value: Any) -> int:
    """Count the words of a JSON value. They stand for tokens: a real LLM has about four for three words."""
    return len(json.dumps(value).split())


def fraction(text: str) -> float:
    """Map a text to a number from 0 to below 1. Not by hash(): that differs from process to process."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:6]) / 2**48


def answer(messages: list[Message]) -> tuple[str, ToolCall | None]:
    """Return words, and a tool: without one the words are the final answer. mock_rules.py decides."""
    task, heard = "", list[str]()  # what people have said: first the task, later anything, since the last reply
    results = {}
    for message in messages:
        if message["role"] == "assistant":
            heard = []
        elif message["role"] == "tool":
            results[message["tool_call_id"]] = json.loads(message["content"])  # the mock's ids are steps
        elif message["role"] == "user" and not task:
            task = message["content"]
        elif message["role"] == "user":
            heard.append(message["content"])
    try:
        words, step, name, arguments = decide(json.loads(task), results)
    except (ValueError, KeyError, TypeError):
        return f"You wrote {len(task.split())} words, and I am only a mock: ask me about a task that I know.", None
    before = [f'You tell me: "{text[:MAX_QUOTED_CHARS]}"' for text in heard]
    if name and not before:
        before = [OPENINGS[int(fraction(json.dumps(messages)) * len(OPENINGS))]]
    return " ".join([*before, words]), ToolCall(step, name, arguments) if name else None


if __name__ == "__main__":  # python mock_llm.py --serve PORT
    from mock_server import main

    raise SystemExit(main())
