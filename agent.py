"""The agent loop: ask the LLM, use the tools it wants, tell it the results, until it answers without a tool.

One task is one conversation: a list of messages, as LLM APIs have them. Each call of the LLM and of a tool is a step of
the task's log, so an agent that dies in the middle goes on where it was, and nothing is paid for or sent twice. The
worker around it writes `started`, `error` and the terminal event, and tries a task again if this raises.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from agent_tools import ToolError, Tools, ToolUnavailable
from agent_tools.schema import call_tool, schema
from ailf.messaging.redis import AsyncRedisRateLimiter, RedisUnavailable, to_json
from conversation import DECLINED, SYSTEM, as_message, as_result, check_task, clip, give_up, problem_of
from mock_llm import LLMError, Message, Piece, ToolCall, Usage
from task_streams import NothingHappened, PermanentFailure, Task, TaskLog

MAX_STEPS = 8  # questions to the LLM about one task: an agent that runs in circles is stopped
MAX_SHOWN_CHARS = 10_000  # of a tool's arguments in the question whether to run it
LONGEST_WAIT_SECONDS = 5.0  # before it asks again whether it may call the LLM: the count may be lost
POLL_SECONDS = 0.5  # between two looks whether Redis is back, for an agent that waits for its turn
DELTA_SECONDS = 0.06  # between two llm_delta entries: words still seem to flow, in fewer than 20 entries a second

Judge = Callable[[str, list[ToolCall]], str]  # why a reply is unusable; "" if it is fine


class LLM(Protocol):
    """What the agent needs of an LLM."""

    model: str

    def chat(self, messages: list[Message], tools: list[dict[str, Any]]) -> AsyncIterator[Piece]: ...


class NotReached(ToolUnavailable, NothingHappened):
    """What the tool uses was away before anything had happened: it may run again."""


@dataclass(frozen=True)
class Agent:
    """Work on one task and return {"summary", "rows" (of data), "findings", "usage"}: run_worker() calls this handler.

    It keeps nothing between calls, so one Agent serves many tasks at once. LLMError and ToolUnavailable pass through:
    the worker tries such a task again. PermanentFailure means that trying again would not help.
    """

    llm: LLM
    tools: Tools
    limiter: AsyncRedisRateLimiter | None = None
    max_tokens: int | None = None  # that one task may use, input and output together, over all its attempts
    approve: frozenset[str] = frozenset()  # tools before whose calls a person is asked

    async def __call__(self, task: Task, log: TaskLog) -> dict[str, Any]:
        kind, payload = check_task(task.data)
        tools = {name: tool for name, tool in self.tools.items() if name.startswith(kind.tools)} | {"give_up": give_up}
        await say(log, "chain_of_thought", step="analyzing_task", prompt=kind.in_words.format(**payload))

        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": to_json(task.data)}]
        findings: list[dict[str, Any]] = []  # of the tool calls that succeeded
        steps, problem, spent, may_conclude = 0, "", Usage(), False
        for _ in range(MAX_STEPS):
            messages += [{"role": "user", "content": text} for text in await log.inbox()]
            self.check_budget(spent)
            judge = partial(problem_of, tools=tools, may_conclude=may_conclude)
            text, calls, usage = await self.ask(messages, tools, log, judge if problem else None)
            spent += usage
            messages.append(as_message(text, calls))
            if problem := judge(text, calls):
                told = f"Nothing was done, because your reply was unusable: {problem}. Try again."
                messages += [as_result(call, {"error": told}) for call in calls] or [{"role": "user", "content": told}]
                continue
            step = "concluding" if not calls else "giving_up" if calls[0].name == "give_up" else "choosing_tool"
            await say(log, "chain_of_thought", step=step, thought=text)
            if not calls:
                await say(log, "progress", percent=100, step="done")
                results = [finding["result"] for finding in findings if isinstance(finding["result"], dict)]
                rows = [{"rows": result["rows"]} for result in results if isinstance(result.get("rows"), int)]
                return {"summary": text, **(rows[0] if rows else {}), "findings": findings, "usage": asdict(spent)}
            for call in calls:
                steps += 1
                outcome = await self.use_tool(call, tools[call.name], log)
                messages.append(as_result(call, outcome))
                may_conclude |= "error" not in outcome
                if "result" in outcome:
                    findings.append({"tool": call.name, "arguments": clip(call.arguments), **outcome})
                await say(log, "progress", percent=min(95, 100 * steps // (kind.usual_steps + 1)), step=call.name)
        raise PermanentFailure(f"the LLM did not finish within {MAX_STEPS} steps")

    def check_budget(self, spent: Usage) -> None:
        if self.max_tokens is not None and spent.input + spent.output >= self.max_tokens:
            used = f"{spent.input} input, {spent.output} output"
            raise PermanentFailure(f"the limit of {self.max_tokens} tokens is reached: {used}")

    async def ask(
        self, messages: list[Message], tools: Tools, log: TaskLog, judge: Judge | None
    ) -> tuple[str, list[ToolCall], Usage]:
        """Ask the LLM, as a step. All calls to the LLM pass here."""
        call = partial(self.chat, tools, log, judge)
        answer = await log.step("llm", call, messages, [*tools], safe_to_repeat=True, about={"model": self.llm.model})
        return answer["response"], [ToolCall(**call) for call in answer["calls"]], Usage(**answer["usage"])

    async def chat(
        self, tools: Tools, log: TaskLog, judge: Judge | None, messages: list[Message], _: list[str]
    ) -> dict[str, Any]:
        """Let everybody watch the words arrive; return the reply as `llm_response` has it.

        With a judge the reply must be usable: it is the second chance, and a retry may help, since a real LLM does not
        say the same thing every time.
        """
        await self.await_turn(log)
        text, unsent, calls, usage, sent_at = "", "", list[ToolCall](), Usage(), time.monotonic()
        async for piece in self.llm.chat(messages, [schema(name, tool) for name, tool in tools.items()]):
            if isinstance(piece, Usage):
                usage = piece
            elif isinstance(piece, ToolCall):
                calls.append(piece)
            else:
                text, unsent = text + piece, unsent + piece
            if unsent and time.monotonic() - sent_at >= DELTA_SECONDS:
                await log.add("llm_delta", text=clip(unsent))
                unsent, sent_at = "", time.monotonic()
        if unsent:
            await log.add("llm_delta", text=clip(unsent))
        if judge is not None and (problem := judge(text, calls)):
            raise LLMError(f"the LLM's reply was unusable twice: {problem}")
        return {"response": clip(text), "calls": [asdict(call) for call in calls], "usage": asdict(usage)}

    async def await_turn(self, log: TaskLog) -> None:
        """Wait until the limit that all workers share allows one more call to the LLM; tell the watchers why."""
        told = False
        while self.limiter is not None:
            try:
                allowed, _, wait_seconds = await self.limiter.check(self.llm.model)
            except RedisUnavailable:  # wait as log.add does: for as long as the lease may be believed
                allowed, wait_seconds = False, POLL_SECONDS
            if allowed:
                return
            if not told:
                limit = f"{self.limiter.rate} in {self.limiter.period:g} s"
                await log.add("rate_limited", limit=limit, wait_ms=round(wait_seconds * 1000))
            told = True
            await asyncio.sleep(min(wait_seconds, LONGEST_WAIT_SECONDS))

    async def use_tool(self, call: ToolCall, tool: Callable[..., Any], log: TaskLog) -> dict[str, Any]:
        """Call a tool, as a step; return {"result"}, or {"error"} or {"declined"}, for the LLM to read.

        Wrong input (ToolError) is told to the LLM, which may know better. ToolUnavailable is raised: the task is
        tried again.
        """
        if tool is give_up:
            give_up(**call.arguments)
        if call.name in self.approve:
            shown = clip(to_json(call.arguments), MAX_SHOWN_CHARS)
            if await log.ask(f"Run {call.name} with {shown}?", ["yes", "no"]) != "yes":
                return {"declined": DECLINED}

        is_safe, about = getattr(tool, "safe_to_repeat", False), {"arguments": clip(call.arguments)}

        def run(arguments: dict[str, Any], idempotency_key: str) -> Any:
            try:
                return clip(call_tool(tool, arguments, check=log.check, idempotency_key=idempotency_key))
            except ToolUnavailable as error:
                if is_safe or error.may_have_happened:
                    raise
                raise NotReached(str(error)) from error

        try:
            step = log.step(call.name, run, call.arguments, safe_to_repeat=is_safe, about=about, expected=(ToolError,))
            return {"result": await step}
        except ToolError as error:
            return {"error": str(error)}


async def say(log: TaskLog, event: str, **fields: Any) -> None:
    """Append an event, unless an earlier attempt has done it: while a replay takes its steps from the log."""
    if not await log.resuming():
        await log.add(event, **fields)
