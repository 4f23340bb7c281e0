"""The stubbed LLM: it reads the prompt, decides by rules, and streams its words. No network, no Redis, no surprises.

Two methods are all that the agent knows of an LLM: complete(prompt) and stream(prompt). A real client goes behind the
same two, for example (pip install anthropic; the key is in ANTHROPIC_API_KEY):

    class ClaudeLLM:
        def __init__(self, model: str) -> None:
            self.model = model
            self.client = anthropic.Anthropic()

        def stream(self, prompt: str) -> Iterator[str]:
            messages = [{"role": "user", "content": prompt}]
            with self.client.messages.stream(model=self.model, max_tokens=2000, messages=messages) as stream:
                yield from stream.text_stream

        def complete(self, prompt: str) -> str:
            return "".join(self.stream(prompt))

Its errors (rate limits, lost connections) are ordinary exceptions, so the worker retries the task, as with LLMError.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

ROWS_PER_GROUP = 4  # a text column with fewer rows per value than this is a name or a date, not a category
MONEY = ("revenue", "sales", "amount", "total", "price")  # what a column of interest is called, the best first
NO_TOTAL = ("price", "mean", "average", "avg", "rate", "percent", "pct", "growth")  # adding these up means nothing
OPENINGS = ("Let me see.", "Well.", "One step at a time.", "Hm.")


class LLMError(Exception):
    """The LLM did not answer, or not usably. Another try may succeed."""


class MockLLM:
    """Answer prompts deterministically: the same prompt gives the same words, in every process.

    A prompt with the sections TASK, TOOLS and RESULTS gets the next action as JSON; any other prompt gets a sentence.
    `delay_seconds` is what one answer takes. Of all calls the share `fail_rate` raises LLMError before the first word:
    which ones is fixed by `seed` and by the number of the call.
    """

    model = "mock-llm-1"

    def __init__(self, delay_seconds: float = 0.0, fail_rate: float = 0.0, seed: int = 0) -> None:
        self.delay_seconds = delay_seconds
        self.fail_rate = fail_rate
        self.seed = seed
        self._calls = itertools.count(1)  # next() on it is atomic: threads may share one MockLLM

    def complete(self, prompt: str) -> str:
        """Return the whole answer. Blocks for `delay_seconds`."""
        return "".join(self.stream(prompt))

    def stream(self, prompt: str) -> Iterator[str]:
        """Yield the answer word by word, each with the space after it: joined, they are what complete() returns."""
        call = next(self._calls)
        if fraction(f"{self.seed}:{call}") < self.fail_rate:
            raise LLMError(f"{self.model} is overloaded (simulated, call {call})")
        words = re.findall(r"\S+\s*", answer(prompt))
        for word in words:
            if self.delay_seconds:
                time.sleep(self.delay_seconds / len(words))
            yield word


def fraction(text: str) -> float:
    """Map a text to a number from 0 to below 1. Not by hash(): that differs from process to process."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:6]) / 2**48


def answer(prompt: str) -> str:
    """Answer a prompt: with JSON if it has the agent's sections, else with a sentence."""
    opening = OPENINGS[int(fraction(prompt) * len(OPENINGS))]
    parts = re.split(r"^([A-Z]+)$", prompt, flags=re.MULTILINE)  # ["…", "TASK", "{…}", "TOOLS", "…", …]
    sections = {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    if not {"TASK", "TOOLS", "RESULTS"} <= sections.keys():
        return f"{opening} You wrote {len(prompt.split())} words, and I am only a mock: ask me about a task."

    task = json.loads(sections["TASK"])
    # subtle: not splitlines(), which also splits at U+2028 inside of a JSON text
    results = [json.loads(line) for line in sections["RESULTS"].split("\n") if line.startswith("{")]
    decide = {"process_data": decide_data, "send_email": decide_email}.get(task["type"], decide_unknown)
    decision = decide(task["payload"], results)
    decision["thought"] = f"{opening} {decision['thought']}"
    return json.dumps(decision, ensure_ascii=False)


Decision = dict[str, Any]


def decide_unknown(payload: dict[str, Any], results: list[dict[str, Any]]) -> Decision:
    return give_up("I have no rules for this type of task.")


def decide_email(payload: dict[str, Any], results: list[dict[str, Any]]) -> Decision:
    if not results:
        arguments = {field: payload[field] for field in ("to", "subject", "body")}
        return use("email_sender.send", arguments, "The email is complete, so I send it as it is.")
    if "error" in results[-1]:
        return give_up(results[-1]["error"])
    return {"thought": "The email is on its way.", "finish": f"Sent {payload['subject']!r} to {payload['to']}."}


def decide_data(payload: dict[str, Any], results: list[dict[str, Any]]) -> Decision:
    """Load, describe, then group and look for outliers if the columns, which describe() told, are such."""
    file = payload["file"]
    tried = {result["tool"].removeprefix("data_processor."): result for result in results}
    if "load_file" not in tried:
        return use("data_processor.load_file", {"file": file}, f"First I load {file} to see what is in it.")
    if "error" in tried["load_file"]:
        return give_up(tried["load_file"]["error"])
    if "describe" not in tried:
        return use("data_processor.describe", {"file": file}, "Which columns are numbers, which are categories?")
    if "error" in tried["describe"]:
        return give_up(tried["describe"]["error"])

    described = tried["describe"]["result"]
    columns = described["columns"] if isinstance(described, dict) else {}  # a result that was too long came as text
    category, number = choose_category(columns), choose_number(columns)
    if category and number and "group_by" not in tried:
        how = "sum" if adds_up(number) else "mean"
        arguments = {"file": file, "by": category, "value": number, "how": how}
        return use("data_processor.group_by", arguments, f"{category} has few values: the {how} of {number} for each?")
    if number and "find_outliers" not in tried:
        arguments = {"file": file, "column": number}
        return use("data_processor.find_outliers", arguments, f"Is any {number} far from the others?")

    return {"thought": "These results answer the task.", "finish": summarise(file, number, tried)}


def choose_category(columns: dict[str, Any]) -> str | None:
    """Return the first text column with few distinct values: the one worth grouping by."""
    for name, column in columns.items():
        if column["type"] == "text" and 2 <= column.get("distinct", 0) <= column["count"] / ROWS_PER_GROUP:
            return name
    return None


def choose_number(columns: dict[str, Any]) -> str | None:
    """Return the number column that looks most like money, else the one that varies most."""
    numbers = [name for name, column in columns.items() if column["type"] == "number"]
    for word in MONEY:
        for name in numbers:
            if word in name.lower():
                return name
    return max(reversed(numbers), key=lambda name: spread(columns[name]), default=None)


def spread(column: dict[str, Any]) -> float:
    """Return a column's standard deviation as a share of its mean."""
    return float((column.get("stdev") or 0) / abs(column.get("mean") or 1))


def adds_up(name: str) -> bool:
    """Whether a column's total means something, as far as its name tells. "revenue" -> True; "mean_c" -> False"""
    return any(word in name.lower() for word in MONEY) and not any(word in name.lower() for word in NO_TOTAL)


def summarise(file: str, number: str | None, tried: dict[str, Any]) -> str:
    """Say in a sentence or two what the results are; all numbers are theirs, and what they lack is left out."""
    found = {action: call["result"] for action, call in tried.items() if isinstance(call.get("result"), dict)}
    rows, described = found.get("load_file", {}).get("rows", "an unknown number of"), found.get("describe", {})
    if "words" in described:
        return f"{file}: {described['lines']:,} lines, {described['words']:,} words."
    text = f"{file}: {rows} rows"
    column = described["columns"][number] if number else {}
    figures: dict[str, Any] = {name: column.get(name) for name in ("mean", "min", "max")}
    if number and adds_up(number):
        figures["total"] = column.get("sum")
    if number and None not in figures.values():  # it has no figures where there are no rows, or numbers beyond floats
        text += f"; {number}: " + ", ".join(f"{name} {in_words(value)}" for name, value in figures.items())
        if column["missing"]:
            text += f" ({column['count']} of {rows} rows have a value)"
        text += in_groups(found.get("group_by", {}), column)
    if "count" in found.get("find_outliers", {}):
        text += f". Outliers: {found['find_outliers']['count']}"
    return text + "."


def in_groups(grouped: dict[str, Any], column: dict[str, Any]) -> str:
    """Name the first group; a share only where it is one: of a total, to which every number adds."""
    groups = {name: value for name, value in grouped.get("groups", {}).items() if value is not None}
    if not groups:
        return ""
    best, how = max(groups, key=lambda name: float(groups[name])), grouped["how"]
    if how == "sum" and column["min"] >= 0 and column["sum"] > 0:
        return f". Largest share by {grouped['by']}: {best}, {100 * groups[best] / column['sum']:.3g} %"
    return f". Highest {how} by {grouped['by']}: {best} ({in_words(groups[best])})"


def in_words(number: float) -> str:
    """Write a number for a person. 118107.0 -> "118,107"; 992.4957 -> "992.50"; 0.00123 -> "0.00123" """
    if number == int(number):
        return f"{number:,.15g}"
    return f"{number:,.2f}" if abs(number) >= 1 else f"{number:.3g}"


def use(tool: str, arguments: dict[str, Any], thought: str) -> Decision:
    return {"thought": thought, "action": {"tool": tool, "arguments": arguments}}


def give_up(error: str) -> Decision:
    return {"thought": "The tool says that this cannot be done.", "give_up": error}
