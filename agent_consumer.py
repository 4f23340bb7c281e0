"""Pop tasks from the queue and be an agent: think, use tools, look at the results, and report every step live.

Usage:   python agent_consumer.py [--concurrency N] [--burst] [--llm-delay S] [--llm-fail-rate P] [--llm-rate 10/s]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server; email goes to $SMTP_URL, else to outbox/
Keys:    pops task_queue (BRPOP), appends to task_logs:<id> (XADD)
See:     tutorial/part4.md

One task is one loop:  prompt -> LLM -> {"thought": …, "action": …} -> tool -> result -> into the next prompt
It ends when the LLM says "finish" or "give_up". run_worker() does the rest: it pops and claims tasks, retries them, and
writes `started`, `error` and the terminal event. Everything between is written here, one log.add() = one XADD each.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_tools import ToolError, ToolUnavailable, make_tools
from ailf.messaging.redis import RedisRateLimiter, RedisUnavailable, to_json
from mock_llm import LLMError, MockLLM
from task_streams import PermanentFailure, Task, TaskLog
from task_streams.cli import run
from task_streams.keys import LLM_RATE
from task_streams.worker import add_worker_arguments, run_worker, worker_options

HERE = Path(__file__).resolve().parent
MAX_STEPS = 8  # questions to the LLM about one task: an agent that runs in circles is stopped
MAX_RESULT_CHARS = 20_000  # of one tool result, in the stream and in the prompt: both are paid for by size
POLL_SECONDS = 0.5  # how soon an agent that waits for its turn hears that its task was cancelled
DELTA_SECONDS = 0.06  # between two llm_delta entries: words still seem to flow, in fewer than 20 entries a second

Tools = dict[str, Callable[..., dict[str, Any]]]


@dataclass(frozen=True)
class TaskType:
    """What one type of task needs: text fields in its payload, and the tools that it may use, no others."""

    in_words: str
    fields: tuple[str, ...]
    tools: str  # a prefix: no text inside a data file can talk the LLM into sending email
    usual_steps: int  # for the progress bar; an estimate, since the LLM decides


TASK_TYPES = {
    "process_data": TaskType("Process this data: {file}", ("file",), "data_processor.", 4),
    "send_email": TaskType("Send this email to {to}: {subject}", ("to", "subject", "body"), "email_sender.", 1),
}

PROMPT = """\
You are an agent. You finish the task below step by step, with tools. Reply with one JSON object and nothing else:
{{"thought": "why", "action": {{"tool": "name", "arguments": {{}}}}}} to use a tool, whose result you will see next, or
{{"thought": "why", "finish": "a summary of what was found or done"}} once the results are enough, or
{{"thought": "why", "give_up": "the reason"}} if the errors among the results leave no way on.

TASK
{task}

TOOLS
{tools}

RESULTS
{results}"""


class LLM(Protocol):
    """The part of an LLM client that the agent uses."""

    model: str

    def stream(self, prompt: str) -> Iterator[str]: ...


class Agent:
    """Work on one task, and return {"summary", "rows" (of data), "findings"}: the handler that run_worker() calls.

    It keeps nothing between calls, so one Agent serves many tasks at once. LLMError and ToolUnavailable pass through:
    the worker retries such a task. PermanentFailure means that trying again would not help.
    """

    def __init__(self, llm: LLM, tools: Tools, limiter: RedisRateLimiter | None = None) -> None:
        self.llm = llm
        self.tools = tools
        self.limiter = limiter

    def __call__(self, task: Task, log: TaskLog) -> dict[str, Any]:
        kind, payload = check_task(task.data)
        tools = {name: tool for name, tool in self.tools.items() if name.startswith(kind.tools)}
        log.add("chain_of_thought", step="analyzing_task", prompt=kind.in_words.format(**payload))

        results: list[dict[str, Any]] = []  # of every tool call so far: the agent's whole memory
        for step in range(1, MAX_STEPS + 1):
            reply = self.decide(task, tools, results, log)
            thought = str(reply.get("thought", ""))
            if "give_up" in reply:
                log.add("chain_of_thought", step="giving_up", thought=thought)
                raise PermanentFailure(reply["give_up"])
            if "finish" in reply:
                log.add("chain_of_thought", step="concluding", thought=thought)
                log.add("progress", percent=100, step="done")
                return {"summary": reply["finish"], **collect(results)}

            log.add("chain_of_thought", step="choosing_tool", thought=thought)
            name, arguments = reply["action"]["tool"], reply["action"]["arguments"]
            if name == "email_sender.send":
                # subtle: ours, never the LLM's. A retry of this task gives the same id, so it sends no second email;
                # another task, on another server that counts from 1 as well, does not.
                digest = hashlib.sha256(to_json(task.data).encode()).hexdigest()
                arguments["message_id"] = f"task-{task.id}-{digest[:8]}"
            results.append(self.use_tool(name, arguments, f"call-{task.attempt}-{step}", log))
            log.add("progress", percent=min(95, 100 * step // (kind.usual_steps + 1)), step=name)
        raise PermanentFailure(f"the LLM came to no end within {MAX_STEPS} steps")

    def decide(self, task: Task, tools: Tools, results: list[dict[str, Any]], log: TaskLog) -> dict[str, Any]:
        """Ask the LLM for the next step; ask once more, saying what was wrong, if its reply is unusable."""
        prompt, problem = build_prompt(task.data, tools, results), ""
        for _ in range(2):
            reply = self.ask(prompt, log)
            try:
                return parse_reply(reply, tools, results)
            except ValueError as error:
                problem = str(error)
                prompt += f"\n\nCORRECTION\nYour last reply was unusable: {problem}. Reply as told at the top."
        # For a retry, not for good: a real LLM does not say the same thing every time.
        raise LLMError(f"the LLM's reply was unusable twice: {problem}")

    def ask(self, prompt: str, log: TaskLog) -> str:
        """Put one prompt to the LLM, and let everybody watch the words arrive. All calls to the LLM pass here."""
        self.await_turn(log)
        reply = ""
        for text in coalesce(self.llm.stream(prompt)):
            log.add("llm_delta", text=clip(text))
            reply += text
        log.add("llm_response", model=self.llm.model, response=clip(reply))
        return reply

    def await_turn(self, log: TaskLog) -> None:
        """Wait until the limit that all workers share allows one more call to the LLM; tell the watchers why."""
        told = False
        while self.limiter is not None:
            try:
                allowed, _, wait_seconds = self.limiter.check(self.llm.model)
            except RedisUnavailable:  # wait as log.add does: for as long as the lease may be believed
                allowed, wait_seconds = False, POLL_SECONDS
            if allowed:
                return
            if not told:
                limit = f"{self.limiter.rate} in {self.limiter.period:g} s"
                log.add("rate_limited", limit=limit, wait_ms=round(wait_seconds * 1000))
            told = True
            time.sleep(min(wait_seconds, POLL_SECONDS))
            log.check()

    def use_tool(self, name: str, arguments: dict[str, Any], call_id: str, log: TaskLog) -> dict[str, Any]:
        """Call a tool between two `tool_usage` entries, and return what the LLM is told of it.

        Wrong input (ToolError) is told to the LLM, which may know better; ToolUnavailable is raised, to be retried.
        """
        tool, action = name.split(".", 1)
        call = {"call_id": call_id, "tool": tool, "action": action}
        told = {"tool": name, "arguments": clip(arguments)}
        log.add("tool_usage", **call, status="started", arguments=told["arguments"])
        begin = time.monotonic()
        try:
            result = clip(self.tools[name](**arguments))
        except (ToolError, ToolUnavailable) as error:
            log.add("tool_usage", **call, status="failed", result=str(error), duration_ms=elapsed_ms(begin))
            if isinstance(error, ToolUnavailable):
                raise
            return {**told, "error": str(error)}
        log.add("tool_usage", **call, status="completed", result=result, duration_ms=elapsed_ms(begin))
        return {**told, "result": result}


def check_task(data: Any) -> tuple[TaskType, dict[str, Any]]:
    """Return the type and the payload of a task; raise PermanentFailure if it is none that an agent knows."""
    payload = data.get("payload") if isinstance(data, dict) else None
    if not isinstance(payload, dict):
        raise PermanentFailure(f'expected {{"type": "…", "payload": {{…}}}}, got {to_json(data):.100}')
    kind = TASK_TYPES.get(data["type"]) if isinstance(data.get("type"), str) else None
    if kind is None:
        raise PermanentFailure(f"unknown task type {data.get('type')!r:.100}; known: {', '.join(TASK_TYPES)}")
    for field in kind.fields:
        if not isinstance(payload.get(field), str):
            raise PermanentFailure(f"{data['type']} needs payload.{field} as text, got {payload.get(field)!r:.100}")
    return kind, payload


def build_prompt(task: Any, tools: Tools, results: list[dict[str, Any]]) -> str:
    """Write the prompt: the task, the tools with their signatures, and the results so far, one JSON object a line.

    A line of JSON has its line breaks escaped, so no text in a task or in a file can pass for a heading.
    """
    return PROMPT.format(
        task=to_json(task),
        tools="\n".join(f"- {name}{inspect.signature(tool)}: {summary(tool)}" for name, tool in tools.items()),
        results="\n".join(map(to_json, results)) or "(none yet)",
    )


def parse_reply(text: str, tools: Tools, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Find and check the JSON object in a reply; raise ValueError, in words meant for the LLM, if it is unusable.

    Example: 'Sure! {"thought": "t", "finish": "3 rows"}' -> {"thought": "t", "finish": "3 rows"}
    """
    if "{" not in text:
        raise ValueError("it holds no JSON object")
    # What follows the object is ignored. A JSONDecodeError is a ValueError, too.
    reply: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    if len(reply.keys() & {"action", "finish", "give_up"}) != 1:
        raise ValueError("it must hold exactly one of action, finish and give_up")
    match reply:
        case {"give_up": str()}:
            pass
        case {"finish": str()}:
            if not any("result" in result for result in results):
                raise ValueError("no tool has succeeded yet, so there is nothing to finish with")
        case {"action": {"tool": str(name), "arguments": dict(arguments)}}:
            if name not in tools:
                raise ValueError(f"there is no tool {name}; there are {', '.join(tools)}")
            try:
                inspect.signature(tools[name]).bind(**arguments)
            except TypeError as error:  # a missing argument, or one too many
                raise ValueError(f"{name}: {error}") from None
        case _:
            raise ValueError("finish and give_up must be text, action must be an object with tool and arguments")
    return reply


def coalesce(
    words: Iterable[str], seconds: float = DELTA_SECONDS, clock: Callable[[], float] = time.monotonic
) -> Iterator[str]:
    """Join words until `seconds` have passed, then yield them as one text; yield the rest at the end.

    One XADD a word would be hundreds a second from a fast LLM, more than anybody can read.
    """
    waiting, since = "", clock()
    for word in words:
        waiting += word
        if clock() - since >= seconds:
            yield waiting
            waiting, since = "", clock()
    if waiting:
        yield waiting


def collect(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather what the tools found: {"rows": …, "findings": {"describe": …, …}}, of a repeated action the last."""
    found = {result["tool"].split(".", 1)[1]: result["result"] for result in results if "result" in result}
    rows = [result["rows"] for result in found.values() if isinstance(result, dict) and "rows" in result]
    return {"rows": rows[0], "findings": found} if rows else {"findings": found}


def clip(value: Any) -> Any:
    """Return a JSON value as it is, or, if it is too long, the beginning of its text and a remark that says so."""
    text = value if isinstance(value, str) else to_json(value)
    if len(text) <= MAX_RESULT_CHARS:
        return value
    return f"{text[:MAX_RESULT_CHARS]} … (truncated: {MAX_RESULT_CHARS} of {len(text)} characters)"


def summary(tool: Callable[..., Any]) -> str:
    return (inspect.getdoc(tool) or "").partition("\n")[0]


def elapsed_ms(begin: float) -> int:
    return round((time.monotonic() - begin) * 1000)


def number(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)  # a ValueError becomes argparse's own line; nan fails the comparison
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    return parse


def rate(text: str) -> tuple[int, float]:
    """Return calls and seconds. rate("10/s") -> (10, 1.0); rate("100/m") -> (100, 60.0); rate("1/0.5s") -> (1, 0.5)"""
    match = re.fullmatch(r"([0-9]+)/([0-9]+(?:\.[0-9]+)?)?(s|m|h)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not a rate, as 10/s, 100/m or 1/5s")
    calls, seconds = int(match[1]), float(match[2] or 1) * {"s": 1, "m": 60, "h": 3600}[match[3]]
    if not calls or not seconds:
        raise argparse.ArgumentTypeError(f"{text} would allow nothing")
    return calls, seconds


def directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Work on tasks as an agent, and report each step live.")
    add_worker_arguments(parser)
    add = parser.add_argument
    add("--llm-delay", type=number(0, 60), default=0.5, metavar="S", help="seconds that the LLM takes to reply (0.5)")
    add("--llm-fail-rate", type=number(0, 1), default=0.0, metavar="P", help="share of the LLM's calls that fail (0)")
    add("--llm-rate", type=rate, metavar="R", help="calls to the LLM by all workers together: 10/s, 100/m (no limit)")
    add("--data-root", type=directory, default=HERE, metavar="DIR", help="the only folder that tools read from")
    add("--outbox", type=Path, default=HERE / "outbox", metavar="DIR", help="where email goes without SMTP_URL")
    args = parser.parse_args(argv)

    llm = MockLLM(args.llm_delay, args.llm_fail_rate)  # a real client goes here: mock_llm.py shows how
    tools = make_tools(args.data_root, args.outbox, os.environ.get("SMTP_URL"))
    limiter = None
    if args.llm_rate:  # counted in Redis, so that all workers together stay below the LLM provider's limit
        calls, seconds = args.llm_rate
        limiter = RedisRateLimiter(f"{LLM_RATE}:{seconds:g}s", calls, seconds)  # a count for each length of window
    # LPUSH by producer.py; here BRPOP, claim, Agent(task, log) with its XADDs, then `completed`, `failed` or a retry.
    return run_worker(Agent(llm, tools, limiter), **worker_options(args))


if __name__ == "__main__":
    raise SystemExit(run(main))
