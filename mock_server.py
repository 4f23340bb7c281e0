"""The stubbed LLM behind the wire of a real one, so that openai_llm.py can be tried without a key or a network.

Usage:   python mock_llm.py --serve PORT     (0: any free port)
See:     docs/agents.md

It speaks OpenAI's chat completions as a stream (POST /v1/chat/completions), and lists its one model (GET /v1/models).
"""

import argparse
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mock_llm import MockLLM, Piece, Usage


def make_app(llm: MockLLM) -> Starlette:
    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": llm.model, "object": "model", "owned_by": "mock"}]})

    async def chat(request: Request) -> Response:
        try:
            asked = await request.json()
            messages, tools = asked["messages"], asked.get("tools", [])
            if asked["model"] != llm.model or asked["stream"] is not True:
                raise ValueError
            for call in [*tools, *(call for message in messages for call in message.get("tool_calls", []))]:
                call["function"]["name"] = call["function"]["name"].replace("__", ".")  # as it was before the wire
        except (ValueError, KeyError, TypeError, AttributeError):
            return JSONResponse({"error": {"message": f"expected messages for {llm.model}, with stream: true"}}, 400)
        return StreamingResponse(as_events(llm.model, llm.chat(messages, tools)), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])


async def as_events(model: str, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """Yield a reply as server-sent events: a chunk for a word, two for a tool call, then why it ends, the usage."""

    def event(choices: list[Any], **more: Any) -> str:
        about = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 0, "model": model}
        return f"data: {json.dumps({**about, 'choices': choices, **more})}\n\n"

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        return event([{"index": 0, "delta": delta, "finish_reason": finish}])

    finish = "stop"
    async for piece in pieces:
        if isinstance(piece, str):
            yield chunk({"content": piece})
        elif isinstance(piece, Usage):
            yield chunk({}, finish)
            yield event([], usage={"prompt_tokens": piece.input, "completion_tokens": piece.output})
        else:  # the mock uses one tool at a time
            finish, function = "tool_calls", {"name": piece.name.replace(".", "__"), "arguments": ""}
            yield chunk({"tool_calls": [{"index": 0, "id": piece.id, "type": "function", "function": function}]})
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": json.dumps(piece.arguments)}}]})
    yield "data: [DONE]\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve the stubbed LLM as real ones are served, on 127.0.0.1.")
    parser.add_argument("--serve", type=int, required=True, metavar="PORT", help="port to listen on (0: any free one)")
    args = parser.parse_args()
    try:
        listener = socket.create_server(("127.0.0.1", args.serve))  # for this machine only: it asks for no key
    except (OSError, OverflowError) as error:
        parser.error(f"--serve {args.serve}: {error}")
    with listener, contextlib.suppress(KeyboardInterrupt):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        print(f"export LLM_URL={url} LLM_MODEL={MockLLM.model}", flush=True)
        uvicorn.Server(uvicorn.Config(make_app(MockLLM()), log_level="warning")).run([listener])
    return 0
