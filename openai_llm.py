"""A real LLM, with the interface of mock_llm.py: any server that speaks OpenAI's chat completions.

agent_consumer.py takes it if LLM_URL is set. docs/agents.md: what to set for which server, and what becomes of errors.
"""

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI, Timeout

from ailf.messaging.redis import from_json, to_json
from mock_llm import LLMError, Message, Piece, ToolCall, Usage
from task_streams import PermanentFailure

SILENCE_SECONDS = 300.0  # before the next piece of a reply: a local server may first have to load the model


class OpenAILLM:
    """Ask the server at a URL. Raises LLMError if another try may help, PermanentFailure if none can."""

    def __init__(self, url: str, model: str, api_key: str = "", silence_seconds: float = SILENCE_SECONDS) -> None:
        # subtle: without a key the client would send the one in OPENAI_API_KEY, to whatever server this is
        self.model, self.api_key = model, api_key or "no-key"
        timeout = Timeout(silence_seconds, connect=10.0)  # a server that isn't listening is noticed sooner
        self.client = AsyncOpenAI(base_url=url, api_key=self.api_key, timeout=timeout, max_retries=0)
        self.name = f"the LLM at {self.client.base_url.netloc.decode()}"  # without a password that the URL may hold
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line a call, with the whole URL

    async def chat(self, messages: list[Message], tools: list[dict[str, Any]]) -> AsyncIterator[Piece]:
        """Yield the words of the reply as they come, then its tool calls, then its usage."""
        told: list[Any] = [m | {"tool_calls": wired(m["tool_calls"])} if "tool_calls" in m else m for m in messages]
        calls, chars, finish, usage = list[list[Any]](), 0, None, None
        try:
            async with await self.client.chat.completions.create(
                model=self.model, messages=told, tools=wired(tools), stream=True, stream_options={"include_usage": True}
            ) as stream:
                async for chunk in stream:
                    usage = chunk.usage or usage  # in the last chunk, which has no choices
                    for choice in chunk.choices or []:
                        finish = choice.finish_reason or finish
                        if text := choice.delta and choice.delta.content:  # Azure's filter sends chunks without delta
                            chars += len(text)
                            yield text
                        for part in (choice.delta and choice.delta.tool_calls) or []:
                            # a call begins with a new index or id: some servers number all calls 0, or give no ids
                            if not calls or part.index != calls[-1][0] or part.id not in (None, "", calls[-1][1]):
                                calls.append([part.index, part.id or f"call-{len(messages)}-{len(calls)}", "", ""])
                            if part.function:
                                calls[-1][2] = calls[-1][2] or part.function.name or ""
                                calls[-1][3] += part.function.arguments or ""
        except APIStatusError as error:  # `from None`: the worker logs what is chained, and that may hold the key
            message = f"{self.name} answered {error.status_code}: {self.reason(error)}"
            if error.status_code < 500 and error.status_code not in (408, 409, 429):  # these three may pass
                raise PermanentFailure(message) from None
            wait = error.response.headers.get("retry-after", "")  # LLM servers send seconds, no date
            raise LLMError(message, int(wait) if wait.isdecimal() else 0) from None
        except (APIError, ValueError, TypeError) as error:  # it's away, silent, breaks off, or sends something odd
            raise LLMError(f"{self.name} failed: {type(error).__name__}: {self.reason(error)}") from None
        if finish in (None, "length", "content_filter"):
            raise LLMError(f"{self.name} did not finish its reply: {finish or 'it was cut off'}")
        for _, call_id, name, arguments in calls:
            yield ToolCall(call_id, name.replace("__", "."), parse_arguments(arguments))
        # some servers don't tell their usage: with about four characters a token, --max-tokens holds all the same
        read, written = len(to_json(told)) // 4, (chars + len(to_json(calls))) // 4
        yield Usage(getattr(usage, "prompt_tokens", 0) or read, getattr(usage, "completion_tokens", 0) or written)

    def reason(self, error: Exception) -> str:
        """Return what the server or the network said, in one line and without the key."""
        body = getattr(error, "body", None)
        said = (body.get("message") or to_json(body)) if isinstance(body, dict) else body or str(error.__cause__ or "")
        return " ".join(str(said or error).replace(self.api_key, "…").split())[:500]


def wired(functions: list[dict[str, Any]]) -> Any:
    """Return tools or calls of tools under names that APIs take: data_processor.query -> data_processor__query."""
    names = [re.sub(r"[^\w-]", "_", one["function"]["name"].replace(".", "__"), flags=re.A) or "_" for one in functions]
    return [one | {"function": one["function"] | {"name": name}} for one, name in zip(functions, names, strict=True)]


def parse_arguments(text: str) -> dict[str, Any]:
    """Return a tool's arguments. For anything but a JSON object, return what no tool accepts: the LLM is told so."""
    try:
        arguments = from_json(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"text that is not a JSON object": text}
