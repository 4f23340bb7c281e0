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

ROWS_PER_GROUP = 4  # a text column with fewer rows per value than this is a name or a date, not a category
MONEY = ("revenue", "sales", "amount", "total", "price")  # names of an interesting column, the best first
NO_TOTAL = ("price", "mean", "average", "avg", "rate", "percent", "pct", "growth")  # adding these up means nothing
OPENINGS = ("Let me see.", "Well.", "One step at a time.", "Hm.")

Message = dict[str, Any]
Results = dict[str, dict[str, Any]]  # step -> {"result": …} or {"error": …}


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


Decision = tuple[str, ToolCall | None]  # words, and a tool: without one the words are the final answer


def answer(messages: list[Message]) -> Decision:
    """Decide by the task in the first user message and by the results so far."""
    asked = next((message["content"] for message in messages if message["role"] == "user"), "")
    told = [message for message in messages if message["role"] == "tool"]
    results = {message["tool_call_id"]: json.loads(message["content"]) for message in told}  # the mock's ids are steps
    try:
        task = json.loads(asked)
        decide = {"process_data": decide_data, "send_email": decide_email}[task["type"]]
        words, call = decide(task["payload"], results)
    except (ValueError, KeyError, TypeError):
        return f"You wrote {len(asked.split())} words, and I am only a mock: ask me about a task that I know.", None
    opening = OPENINGS[int(fraction(json.dumps(messages)) * len(OPENINGS))]
    if messages[-1]["role"] == "user" and messages[-1]["content"] != asked:  # somebody has told the agent something
        opening = f'You tell me: "{messages[-1]["content"]}"'
    return (f"{opening} {words}", call) if call else (words, None)


def give_up(reason: str) -> Decision:
    return "The tool says that this cannot be done.", ToolCall("give_up", "give_up", {"reason": reason})


def decide_email(payload: dict[str, Any], results: Results) -> Decision:
    if "send" not in results:
        arguments = {field: payload[field] for field in ("to", "subject", "body")}
        return "The email is complete, so I send it as it is.", ToolCall("send", "email_sender.send", arguments)
    if "declined" in results["send"]:
        return "I did not send the email, because you said no.", None
    if "error" in results["send"]:
        return give_up(results["send"]["error"])
    return f"Sent {payload['subject']!r} to {payload['to']}.", None


def decide_data(payload: dict[str, Any], results: Results) -> Decision:
    """Load, describe, then write SQL for groups and outliers if describe() has told of columns that fit."""
    file = payload["file"]
    for step, words in (
        ("load_file", f"First I load {file} to see what is in it."),
        ("describe", "Which columns are numbers, which are categories?"),
    ):
        if step not in results:
            return words, ToolCall(step, f"data_processor.{step}", {"file": file})
        if "result" not in results[step]:
            return give_up(results[step].get("error") or results[step]["declined"])

    described = results["describe"]["result"]
    columns = described["columns"] if isinstance(described, dict) else {}  # a result that was too long came as text
    category, number = choose_category(columns), choose_number(columns)
    if category and number and "groups" not in results:
        how = "sum" if adds_up(number) else "mean"
        sql = f"SELECT {name(category)}, {how}({name(number)}) AS {how} FROM data GROUP BY 1 ORDER BY 2 DESC NULLS LAST"
        words = f"{category} has few values: the {how} of {number} for each?"
        return words, ToolCall("groups", "data_processor.query", {"file": file, "sql": sql})
    if number and "outliers" not in results:
        column = name(number)
        far = f"abs({column} - (SELECT avg({column}) FROM data)) > 3 * (SELECT stddev({column}) FROM data)"
        sql = f"SELECT {column} FROM data WHERE {far} ORDER BY 1 DESC"
        words = f"Is any value of {number} far from the others?"
        return words, ToolCall("outliers", "data_processor.query", {"file": file, "sql": sql})
    return summarise(file, category, number, results), None


def name(column: str) -> str:
    """Return a column's name as SQL writes it. name("unit price") -> '"unit price"'"""
    return '"' + column.replace('"', '""') + '"'


def choose_category(columns: dict[str, Any]) -> str | None:
    """Return the first text column with few distinct values: the one worth grouping by."""
    for column, found in columns.items():
        if found["type"] == "text" and 2 <= found.get("distinct", 0) <= found["count"] / ROWS_PER_GROUP:
            return column
    return None


def choose_number(columns: dict[str, Any]) -> str | None:
    """Return the number column that looks most like money, else the one that varies most, measured by its mean."""

    def interest(column: str) -> tuple[int, float]:
        words = [-place for place, word in enumerate(MONEY) if word in column.lower()]
        found = columns[column]
        return max(words, default=-len(MONEY)), (found.get("stdev") or 0) / abs(found.get("mean") or 1)

    return max((column for column in columns if columns[column]["type"] == "number"), key=interest, default=None)


def adds_up(column: str) -> bool:
    """Whether a column's total means something, as far as its name tells. "revenue" -> True; "mean_c" -> False"""
    return any(word in column.lower() for word in MONEY) and not any(word in column.lower() for word in NO_TOTAL)


def summarise(file: str, category: str | None, number: str | None, results: Results) -> str:
    """Say in a sentence or two what the results are. All numbers are theirs; missing ones are left out."""
    found = {step: call["result"] for step, call in results.items() if isinstance(call.get("result"), dict)}
    rows, described = found.get("load_file", {}).get("rows", "an unknown number of"), found.get("describe", {})
    if "words" in described:
        return f"{file}: {described['lines']:,} lines, {described['words']:,} words."
    text = f"{file}: {rows} rows"
    column = described["columns"][number] if number else {}
    if number and column.get("mean") is not None:  # a column without numbers has no figures
        figures = {figure: column[figure] for figure in ("mean", "min", "max")}
        figures |= {"total": column["sum"]} if adds_up(number) else {}
        text += f"; {number}: " + ", ".join(f"{figure} {in_words(value)}" for figure, value in figures.items())
        if column["missing"]:
            text += f" ({column['count']} of {rows} rows have a value)"
        groups = [row for row in found.get("groups", {}).get("rows", []) if row[1] is not None]
        if groups:
            name, value = groups[0][0] or "(missing)", groups[0][1]
            if adds_up(number) and column["min"] >= 0 and column["sum"] > 0:  # only then is there a share of a total
                text += f". Largest share by {category}: {name}, {100 * value / column['sum']:.3g} %"
            else:
                text += f". Highest {found['groups']['columns'][1]} by {category}: {name} ({in_words(value)})"
    if "rows" in found.get("outliers", {}):
        text += f". Outliers: {len(found['outliers']['rows']) + found['outliers'].get('rows_left_out', 0)}"
    return text + "."


def in_words(number: float) -> str:
    """Write a number for a person. 118107.0 -> "118,107"; 992.4957 -> "992.50"; 0.00123 -> "0.00123" """
    if number == int(number):
        return f"{number:,.15g}"
    return f"{number:,.2f}" if abs(number) >= 1 else f"{number:.3g}"


if __name__ == "__main__":  # python mock_llm.py --serve PORT
    from mock_server import main

    raise SystemExit(main())
