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

import conversation
from agent_tools import ToolError, Tools, ToolUnavailable
from agent_tools.schema import call_tool, schema
from ailf.messaging.redis import AsyncRedisRateLimiter, RedisUnavailable
from conversation import clip, give_up
from mock_llm import LLMError, Message, Piece, ToolCall, Usage
from task_streams import NothingHappened, PermanentFailure, Task, TaskLog

MAX_STEPS = 8  # questions to the LLM about one task: an agent that runs in circles is stopped
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
        kind, payload = conversation.check_task(task.data)
        tools = {name: tool for name, tool in self.tools.items() if name.startswith(kind.tools)} | {"give_up": give_up}
        await say(log, "chain_of_thought", step="analyzing_task", prompt=kind.in_words.format(**payload))

        messages = conversation.first_messages(task.data)
        findings: list[dict[str, Any]] = []  # of the tool calls that succeeded
        steps, problem, spent, may_conclude = 0, "", Usage(), False
        for _ in range(MAX_STEPS):
            messages += [{"role": "user", "content": text} for text in await log.inbox()]
            if self.max_tokens is not None and spent.input + spent.output >= self.max_tokens:
                used = f"{spent.input} input, {spent.output} output"
                raise PermanentFailure(f"the limit of {self.max_tokens} tokens is reached: {used}")
            judge = partial(conversation.problem_of, tools=tools, may_conclude=may_conclude)
            text, calls, usage = await self.ask(messages, tools, log, judge if problem else None)
            spent += usage
            messages.append(conversation.as_message(text, calls))
            if problem := judge(text, calls):
                messages += conversation.as_correction(problem, calls)
                continue
            step = "concluding" if not calls else "giving_up" if calls[0].name == "give_up" else "choosing_tool"
            await say(log, "chain_of_thought", step=step, thought=text)
            if not calls:
                await say(log, "progress", percent=100, step="done")
                return conversation.summed_up(text, findings) | {"usage": asdict(spent)}
            for call in calls:
                steps += 1
                outcome = await self.use_tool(call, tools[call.name], log)
                messages.append(conversation.as_result(call, outcome))
                may_conclude |= "error" not in outcome
                if "result" in outcome:
                    findings.append({"tool": call.name, "arguments": clip(call.arguments), **outcome})
                await say(log, "progress", percent=min(95, 100 * steps // (kind.usual_steps + 1)), step=call.name)
        raise PermanentFailure(f"the LLM did not finish within {MAX_STEPS} steps")

    async def ask(
        self, messages: list[Message], tools: Tools, log: TaskLog, judge: Judge | None
    ) -> tuple[str, list[ToolCall], Usage]:
        """Ask the LLM, as a step. All calls to the LLM pass here."""
        call, about = partial(self.chat, tools, log, judge), {"model": self.llm.model}
        answer = await log.step("llm", call, messages, sorted(tools), safe_to_repeat=True, about=about)
        return answer["response"], [ToolCall(**call) for call in answer["calls"]], Usage(**answer["usage"])

    async def chat(
        self, tools: Tools, log: TaskLog, judge: Judge | None, messages: list[Message], _: list[str]
    ) -> dict[str, Any]:
        """Let everybody watch the words arrive; return the reply as `llm_response` has it.

        With a judge the reply must be usable. If it is not, a retry may help: a real LLM may say something else then.
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

        Wrong input (ToolError) is told to the LLM, which may know better. ToolUnavailable is raised: it is tried again.
        """
        if tool is give_up:
            give_up(**call.arguments)
        question, options = conversation.question_about(call), ["yes", "no"]
        # an answer counts for every worker, also for one that would not have asked
        needs_answer = call.name in self.approve or await log.was_asked(question, options)
        if needs_answer and (answer := await log.ask(question, options)) != "yes":
            return {"declined": conversation.declined(answer)}

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
