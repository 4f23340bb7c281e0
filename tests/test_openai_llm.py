"""A real client on a real wire: what a server sends becomes pieces of a reply, or an error that says what is next."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DEADLINE_SECONDS, Server

import agent_consumer
from agent import Agent
from agent_tools import make_tools
from ailf.messaging.redis import connect
from mock_llm import LLMError, MockLLM, Piece, ToolCall, Usage
from mock_server import make_app
from openai_llm import OpenAILLM
from task_streams import LogReader, PermanentFailure, Task, TaskQueue
from task_streams.testing import MemoryLog

Start = Callable[..., "subprocess.Popen[str]"]
Reply = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]

KEY = "sk-very-secret"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
SAY = [{"role": "user", "content": "Say something."}]
USAGE = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}}


# -- a tiny server ----------------------------------------------------------------------------------------------


class Fake:
    """A server that answers each request with the next reply, the last one again and again."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.heads: list[str] = []  # of the requests
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        length = re.search(r"content-length: (\d+)", self.heads[-1], re.IGNORECASE)
        assert length
        self.bodies.append(json.loads(await reader.readexactly(int(length[1]))))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            if callable(reply):
                await reply(writer)
            else:
                writer.write(reply)
                await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()


def events(*chunks: Any, done: bool = True) -> bytes:
    return b"".join(f"data: {json.dumps(c)}\n\n".encode() for c in chunks) + (b"data: [DONE]\n\n" if done else b"")


def stream(*chunks: Any, done: bool = True) -> bytes:
    return HEAD + b"\r\n" + events(*chunks, done=done)


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def part(index: int, call_id: str | None = None, name: str | None = None, arguments: str = "") -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | ({"id": call_id, "type": "function"} if call_id else {})


def refusal(status: int, message: str, *headers: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": "fake", "code": None}})
    lines = [f"HTTP/1.1 {status} No", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", body]).encode()


WORDS = stream(delta(role="assistant", content=""), delta(content="It "), delta(content="works."), delta("stop"), USAGE)


def ask(fake: Fake, tools: list[dict[str, Any]] | None = None, silence_seconds: float = 60) -> list[Piece]:
    """Everything that one call yields."""

    async def collect() -> list[Piece]:
        async with fake.serve() as url:
            llm = OpenAILLM(url, "fake-1", KEY, silence_seconds)
            return [piece async for piece in llm.chat(SAY, tools or [])]

    return asyncio.run(collect())


def calls_of(*parts: dict[str, Any]) -> list[ToolCall]:
    reply = stream(*(delta(tool_calls=[one]) for one in parts), delta("tool_calls"), USAGE)
    return [piece for piece in ask(Fake(reply)) if isinstance(piece, ToolCall)]


# -- what is sent, what comes back ------------------------------------------------------------------------------


def test_words_come_as_they_are_sent_then_the_usage() -> None:
    assert ask(Fake(WORDS)) == ["It ", "works.", Usage(12, 3)]


def test_request_is_one_that_apis_accept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names have no dots, in the tools and in the conversation; the stream is asked for with its usage."""
    fake = Fake(
        stream(
            delta(tool_calls=[part(0, "c1", "data_processor__load_file", '{"file": "a.txt"}')]), delta("tool_calls")
        ),
        WORDS,
    )
    (tmp_path / "a.txt").write_text("one two\n")

    run_agent(fake, tmp_path)

    names = [tool["function"]["name"] for body in fake.bodies for tool in body["tools"]]
    assistant, result = fake.bodies[1]["messages"][2:]
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert assistant["tool_calls"][0]["function"]["name"] == "data_processor__load_file" in names
    assert result["tool_call_id"] == assistant["tool_calls"][0]["id"] == "c1"
    assert fake.bodies[0]["stream"] is True
    assert fake.bodies[0]["stream_options"] == {"include_usage": True}
    assert fake.bodies[0]["model"] == "fake-1"


@pytest.mark.parametrize(("key", "sent"), [(KEY, KEY), ("", "no-key")])
def test_only_the_key_for_this_server_is_sent(monkeypatch: pytest.MonkeyPatch, key: str, sent: str) -> None:
    """A key for OpenAI in the environment does not go to whatever server LLM_URL names."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-only")
    fake = Fake(WORDS)

    async def call() -> None:
        async with fake.serve() as url:
            assert [piece async for piece in OpenAILLM(url, "fake-1", key).chat(SAY, [])]

    asyncio.run(call())

    assert f"Bearer {sent}\r\n" in fake.heads[0]
    assert "openai-only" not in fake.heads[0]


def test_tool_calls_are_put_together_from_their_parts() -> None:
    """Two calls, the arguments of each in pieces."""
    assert calls_of(
        part(0, "c1", "data_processor__query"),
        part(0, arguments='{"file": "a.csv", '),
        part(0, arguments='"sql": "SELECT 1"}'),
        part(1, "c2", "give_up", '{"reason"'),
        part(1, arguments=': "no"}'),
    ) == [
        ToolCall("c1", "data_processor.query", {"file": "a.csv", "sql": "SELECT 1"}),
        ToolCall("c2", "give_up", {"reason": "no"}),
    ]


def test_tool_calls_of_servers_that_number_or_name_them_badly() -> None:
    """All with index 0; or with an id in every part; or without ids: then the agent needs some that differ."""
    assert calls_of(part(0, "c1", "a", "{}"), part(0, "c2", "b", "{}")) == [
        ToolCall("c1", "a", {}),
        ToolCall("c2", "b", {}),
    ]
    assert calls_of(part(0, "c1", "a", '{"x":'), part(0, "c1", "a", ' "1"}')) == [ToolCall("c1", "a", {"x": "1"})]
    first, second = calls_of(part(0, None, "a"), part(1, None, "b"))
    assert (first.name, second.name, first.arguments) == ("a", "b", {})
    assert first.id != second.id


def test_usage_is_estimated_if_the_server_does_not_tell_it() -> None:
    """About four characters a token: a limit holds with such servers too."""
    *_, usage = ask(Fake(stream(delta(content="word " * 100), delta("stop"))))

    assert isinstance(usage, Usage)
    assert usage.output == pytest.approx(125, abs=5)
    assert usage.input > 0


def test_first_token_may_take_its_time() -> None:
    """Nothing comes until the server has loaded its model; comments keep the connection open meanwhile."""

    async def call() -> list[Piece]:
        loaded, is_asked = asyncio.Event(), asyncio.Event()

        async def slowly(writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + b"\r\n: loading\n\n")
            is_asked.set()
            await loaded.wait()
            writer.write(events(delta(content="At last."), delta("stop"), USAGE))

        async with Fake(slowly).serve() as url:

            async def collect() -> list[Piece]:
                return [piece async for piece in OpenAILLM(url, "fake-1").chat(SAY, [])]

            asking = asyncio.create_task(collect())
            await is_asked.wait()
            assert not asking.done()
            loaded.set()
            return await asking

    assert asyncio.run(call()) == ["At last.", Usage(12, 3)]


def test_cancelled_task_closes_its_stream() -> None:
    """The server hears that nobody wants the rest: it would be paid for."""

    async def call() -> None:
        is_gone, first = asyncio.Event(), asyncio.Event()

        async def endlessly(writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + b"\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(events(delta(content="and "), done=False))
                    await writer.drain()
                    await asyncio.sleep(0.01)
            is_gone.set()

        async with Fake(endlessly).serve() as url:

            async def listen() -> None:
                async for _ in OpenAILLM(url, "fake-1").chat(SAY, []):
                    first.set()

            listening = asyncio.create_task(listen())
            await first.wait()
            listening.cancel()
            await asyncio.wait_for(is_gone.wait(), DEADLINE_SECONDS)

    asyncio.run(call())


# -- the table of errors in docs/agents.md ----------------------------------------------------------------------


def error_of(fake: Fake, kind: type[Exception], silence_seconds: float = 60) -> Any:
    """The error of one call: of one request, in one line, without the key, and with nothing chained to it."""
    with pytest.raises(kind) as caught:
        ask(fake, silence_seconds=silence_seconds)
    logged = "".join(traceback.format_exception(caught.value))
    assert len(fake.heads) == 1
    assert KEY not in logged
    assert "\n" not in str(caught.value)
    assert "the LLM at 127.0.0.1:" in str(caught.value)
    assert "direct cause" not in logged and "During handling" not in logged
    return caught.value


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_what_may_pass_is_retried(status: int) -> None:
    error = error_of(Fake(refusal(status, "come back later")), LLMError)

    assert str(error).endswith(f"answered {status}: come back later")
    assert error.retry_after_seconds == 0


@pytest.mark.parametrize(("header", "seconds"), [("17", 17), ("", 0), ("-3", 0), ("soon", 0)])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_taken_along(status: int, header: str, seconds: int) -> None:
    """The worker lets the task rest for so long: tests/test_worker.py."""
    error = error_of(Fake(refusal(status, "too many", f"Retry-After: {header}")), LLMError)

    assert error.retry_after_seconds == seconds


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_stays_is_not_retried(status: int) -> None:
    """A server that repeats the key in its message does not bring it into the log."""
    error = error_of(Fake(refusal(status, f"no, {KEY}\nis not\nright")), PermanentFailure)

    assert str(error).endswith(f"answered {status}: no, … is not right")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"error": "model 'x' not found"}, "model 'x' not found"),
        ({"detail": "Not Found"}, '{"detail": "Not Found"}'),
        ("404 page not found", "404 page not found"),
        ("<html>" + "x" * 100_000, "<html>xxx"),
    ],
)
def test_servers_message_is_told_whatever_its_form(body: Any, told: str) -> None:
    """Cut, if it is a whole page."""
    kind, text = ("application/json", json.dumps(body)) if isinstance(body, dict) else ("text/html", body)
    head = f"HTTP/1.1 404 No\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
    message = str(error_of(Fake((head + text).encode()), PermanentFailure))

    assert f" answered 404: {told}" in message
    assert len(message) < 700


@pytest.mark.parametrize(
    "chunk", [{"index": 0, "finish_reason": None}, {"index": 0, "delta": None, "finish_reason": None}]
)
def test_chunk_without_a_delta_is_passed_over(chunk: dict[str, Any]) -> None:
    """Azure's filter for content sends such ones."""
    pieces = ask(Fake(stream(delta(content="Hi"), {"choices": [chunk]}, delta("stop"), USAGE)))

    assert pieces == ["Hi", Usage(12, 3)]


def test_usage_without_a_number_is_estimated() -> None:
    pieces = ask(Fake(stream(delta(content="Hi there"), delta("stop"), {"choices": [], "usage": {"prompt_tokens": 5}})))

    assert pieces[-1] == Usage(5, 2)


def test_reply_of_odd_types_is_an_llm_error() -> None:
    odd = {"index": 0, "function": {"name": "x", "arguments": {"no": "text"}}}
    error_of(Fake(stream(delta(tool_calls=[odd]), delta("tool_calls"), USAGE)), LLMError)


def test_server_that_is_not_there_is_retried() -> None:
    async def call() -> None:
        async with Fake(WORDS).serve() as url:
            pass  # nobody listens there any more
        assert [piece async for piece in OpenAILLM(url, "fake-1").chat(SAY, [])]

    with pytest.raises(LLMError, match=r"the LLM at 127\.0\.0\.1:\d+ failed: \S+"):
        asyncio.run(call())


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HALF = events(delta(content="It wor"), done=False)

CUT = {
    "the connection breaks": CHUNKED + b"%x\r\n%b\r\n" % (len(HALF), HALF),
    "the stream just ends": HEAD + b"\r\n" + HALF,
    "it says done too early": HEAD + b"\r\n" + HALF + b"data: [DONE]\n\n",
    "an error comes instead": HEAD + b"\r\n" + HALF + events({"error": {"message": "out of memory"}}),
    "a chunk is no JSON": HEAD + b"\r\n" + HALF + b"data: {broken\n\n",
    "the tokens are used up": stream(delta(content="It wor"), delta("length"), USAGE),
    "a filter stops it": stream(delta(content="It wor"), delta("content_filter"), USAGE),
    "half a tool call": stream(delta(tool_calls=[part(0, "c1", "a", '{"x')]), done=False),
    "nothing at all": b"",
    "another kind of page": HEAD.replace(b"event-stream", b"html") + b"\r\n<html>Welcome</html>",
}


@pytest.mark.parametrize("reply", CUT.values(), ids=CUT.keys())
def test_reply_that_is_cut_is_retried(reply: bytes) -> None:
    """Half a reply is no reply: a tool call in it is not made."""
    error_of(Fake(reply), LLMError)


@pytest.mark.parametrize("begin", [b"", HEAD + b"\r\n" + HALF], ids=["from the start", "in the middle"])
def test_silent_server_is_given_up_on(begin: bytes) -> None:
    async def fall_silent(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        await writer.drain()
        await asyncio.sleep(3600)

    assert "timed out" in str(error_of(Fake(fall_silent), LLMError, silence_seconds=0.2)).lower()


# -- with the agent ---------------------------------------------------------------------------------------------


def run_agent(fake: Fake, folder: Path, file: str = "a.txt") -> tuple[dict[str, Any], MemoryLog]:
    log = MemoryLog()
    task = Task(id="7", data={"type": "process_data", "payload": {"file": file}}, attempt=1)

    async def work() -> dict[str, Any]:
        async with fake.serve() as url:
            agent = Agent(OpenAILLM(url, "fake-1", KEY), make_tools(folder, folder / "outbox", None))
            return await agent(task, log)

    return asyncio.run(work()), log


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("data_processor__load_file", '{"file": "a.t', "'file'"),
        ("data_processor__load_file", "[" * 10_000, "'file'"),
        ("data_processor__load_file", '["a.txt"]', "'file'"),
        ("data_processor__load_file", '{"file": NaN}', "'file'"),
        ("data_processor__load_file", "", "'file'"),
        ("data_processor__load_file", '{"file": 5}', "file = 5; expected text"),
        ("email_sender__send", "{}", "no tool email_sender.send"),
        ("rm -rf", "{}", "no tool rm -rf"),
        ("", "{}", "there is no tool"),
    ],
)
def test_bad_tool_call_is_told_to_the_llm(tmp_path: Path, name: str, arguments: str, told: str) -> None:
    """Nothing of it is done. The LLM reads what was wrong, and may do better."""
    (tmp_path / "a.txt").write_text("one two\n")

    def calling(name: str, arguments: str) -> bytes:
        return stream(delta(tool_calls=[part(0, "c1", name, arguments)]), delta("tool_calls"), USAGE)

    fake = Fake(calling(name, arguments), calling("data_processor__load_file", '{"file": "a.txt"}'), WORDS)

    result, _ = run_agent(fake, tmp_path)

    *_, own, answer = fake.bodies[1]["messages"]
    echo = own["tool_calls"][0]["function"]
    assert told in answer["content"]
    assert re.fullmatch("[a-zA-Z0-9_-]+", echo["name"])  # or the API would refuse the whole conversation from now on
    assert json.loads(echo["arguments"]) in ({}, {"file": 5}, {"text that is not a JSON object": arguments})
    assert [finding["arguments"] for finding in result["findings"]] == [{"file": "a.txt"}]
    assert result["usage"] == {"input": 36, "output": 9}


# -- mock_llm.py --serve ----------------------------------------------------------------------------------------


@pytest.fixture
def served(script: Start) -> dict[str, str]:
    """The environment that `python mock_llm.py --serve 0` says to export."""
    process = script("", "mock_llm.py", "--serve", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"export LLM_URL=http://127\.0\.0\.1:\d+/v1 LLM_MODEL=mock-llm-1\n", line), line
    return dict(word.split("=") for word in line.split()[1:])


TASKS = [
    {"type": "process_data", "payload": {"file": "sales.csv"}},
    {"type": "process_data", "payload": {"file": "nowhere.csv"}},
    {"type": "send_email", "payload": {"to": "ann@example.org", "subject": "Ä__b.c", "body": "All is\nwell."}},
]


def test_wire_changes_nothing(served: dict[str, str], tmp_path: Path) -> None:
    """The same tasks with the mock in process and over the wire: the same events, field by field, and results."""

    async def story(llm: Any, data: Any) -> list[Any]:
        log, tools = MemoryLog(), make_tools(agent_consumer.HERE / "sample_data", tmp_path / "outbox", None)
        shutil.rmtree(tmp_path / "outbox", ignore_errors=True)
        try:
            end: Any = await Agent(llm, tools)(Task(id="7", data=data, attempt=1), log)
        except PermanentFailure as error:
            end = str(error)
        words = "".join(fields["text"] for event, fields in log.events if event == "llm_delta")  # grouped by time
        others = [(event, {**fields, "duration_ms": 0}) for event, fields in log.events if event != "llm_delta"]
        return [words, *others, end]

    async def both() -> list[tuple[list[Any], list[Any]]]:
        real = OpenAILLM(served["LLM_URL"], served["LLM_MODEL"])
        return [(await story(MockLLM(), data), await story(real, data)) for data in TASKS]

    for in_process, over_the_wire in asyncio.run(both()):
        assert over_the_wire == in_process


def test_worker_asks_the_model_of_the_environment(
    served: dict[str, str], valkey: Server, script: Start, tmp_path: Path
) -> None:
    """agent_consumer.py with LLM_URL: the task completes, and its log is free of the client's chatter."""
    queue = TaskQueue(connect(valkey.url))
    task = queue.put({"type": "process_data", "payload": {"file": "sample_data/sales.csv"}})
    environment = {**served, "LLM_API_KEY": KEY}

    worker = script(valkey.url, "agent_consumer.py", "--burst", "--outbox", str(tmp_path), env=environment)
    _, logged = worker.communicate(timeout=60)

    last = LogReader(task.id, queue.redis).last()
    assert last is not None and last.name == "completed", logged
    assert last.fields["result"]["usage"]["input"] > 0
    assert "HTTP" not in logged and KEY not in logged and "Traceback" not in logged


def test_mock_server_lists_its_model_and_refuses_others() -> None:
    async def call() -> tuple[httpx.Response, list[httpx.Response]]:
        transport = httpx.ASGITransport(make_app(MockLLM()))
        wrong: list[Any] = [
            {"model": "gpt-9", "messages": SAY, "stream": True},
            {"model": "mock-llm-1", "messages": SAY},
            {"model": "mock-llm-1", "stream": True},
            {"model": "mock-llm-1", "messages": 5, "stream": True},
            [],
        ]
        async with httpx.AsyncClient(transport=transport, base_url="http://mock/v1") as client:
            refused = [await client.post("/chat/completions", json=one) for one in wrong]
            return await client.get("/models"), refused

    listed, refused = asyncio.run(call())

    assert [model["id"] for model in listed.json()["data"]] == ["mock-llm-1"]
    assert [response.status_code for response in refused] == [400] * 5
    assert "mock-llm-1" in refused[0].json()["error"]["message"]


# -- the environment --------------------------------------------------------------------------------------------


def set_up(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Any:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return agent_consumer.make_llm(0, 0)


def test_environment_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(set_up(monkeypatch), MockLLM)
    assert isinstance(set_up(monkeypatch, LLM_URL=""), MockLLM)

    llm = set_up(monkeypatch, LLM_URL="http://me:secret@localhost:11434/v1", LLM_MODEL="qwen3", LLM_API_KEY=f"{KEY}\n")

    assert isinstance(llm, OpenAILLM)
    assert (llm.model, llm.api_key, llm.name) == ("qwen3", KEY, "the LLM at localhost:11434")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LLM_URL": "localhost:11434", "LLM_MODEL": "m"}, "http://"),
        ({"LLM_URL": "http://[", "LLM_MODEL": "m"}, "http://"),
        ({"LLM_URL": "http://", "LLM_MODEL": "m"}, "http://"),
        ({"LLM_URL": "http://localhost:11434/v1"}, "LLM_MODEL"),
        ({"LLM_URL": "http://localhost:11434/v1", "LLM_MODEL": "m", "LLM_API_KEY": "käy"}, "LLM_API_KEY"),
        ({"LLM_URL": "http://localhost:11434/v1", "LLM_MODEL": "m", "LLM_API_KEY": "a\nb"}, "LLM_API_KEY"),
    ],
)
def test_incomplete_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        set_up(monkeypatch, **variables)

    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "a\nb" not in str(caught.value)


def test_missing_package_is_one_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """openai is in requirements-dev.txt only. The line there and the one that is printed ask for the same versions."""
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "openai_llm")

    with pytest.raises(SystemExit) as caught:
        set_up(monkeypatch, LLM_URL="http://localhost:11434/v1", LLM_MODEL="m")

    command = re.search(r"-m pip install '(openai\S+)'$", str(caught.value))
    assert command
    assert command[1] in (agent_consumer.HERE / "requirements-dev.txt").read_text()
