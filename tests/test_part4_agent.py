"""Part 4: the agent thinks, uses real tools, reports each step as an event, and computes its result from the file."""

import argparse
import asyncio
import csv
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import agent_consumer
from agent import MAX_STEPS, Agent
from agent_tools import ToolError, ToolUnavailable, make_tools
from agent_tools.schema import schema
from ailf.messaging.redis import RedisUnavailable
from ailf.messaging.redis.rate_limiter import Decision
from conversation import MAX_CHARS
from mock_llm import LLMError, MockLLM, Piece, ToolCall, Usage
from task_streams import PermanentFailure, Task, TaskCancelled
from task_streams.keys import EVENTS
from task_streams.testing import MemoryLog


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(f"id-{name}", name, arguments)


LOAD = ["look ", "first", call("data_processor.load_file", file="shop.csv")]
FINISH = ["3 ", "rows"]
GIVE_UP = ["no way on", call("give_up", reason="no such file")]
NOTHING = {"input": 0, "output": 0}  # an LLM that does not tell its usage
EMAIL = {"to": "a@example.org", "subject": "Report", "body": "All is well."}


def task_of(kind: str, payload: Any, task_id: str = "7", attempt: int = 1) -> Task:
    return Task(id=task_id, data={"type": kind, "payload": payload}, attempt=attempt)


DATA_TASK = task_of("process_data", {"file": "shop.csv"})
EMAIL_TASK = task_of("send_email", EMAIL, "8")


class ScriptedLLM:
    """Reply with the given pieces, one list a call; remember what it was told."""

    model = "scripted"

    def __init__(self, *replies: list[Piece]) -> None:
        self.replies = replies
        self.messages: list[list[dict[str, Any]]] = []
        self.tools: list[list[dict[str, Any]]] = []

    async def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncIterator[Piece]:
        self.messages.append([dict(message) for message in messages])
        self.tools.append(tools)
        for piece in self.replies[min(len(self.messages), len(self.replies)) - 1]:  # the last one again and again
            yield piece


def load_file(file: str) -> dict[str, Any]:
    """Pretend to load a file."""
    return {"rows": 3}


def send(to: str, subject: str, body: str, *, idempotency_key: str | None = None) -> dict[str, Any]:
    """Pretend to send."""
    return {"sent": True}


def fake_tools(**actions: Any) -> dict[str, Any]:
    tools = {f"data_processor.{name}": action for name, action in {"load_file": load_file, **actions}.items()}
    return {**tools, "email_sender.send": send}


def failing(error: Exception) -> Any:
    def load_file(file: str) -> dict[str, Any]:
        """Pretend to load a file, and fail."""
        raise error

    return load_file


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with shop.csv: 40 sales in three regions, one of them enormous."""
    with (tmp_path / "shop.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["order_id", "region", "units", "revenue"])
        for n in range(40):
            writer.writerow([f"A{n:03}", ("North", "South", "East")[n % 3], n % 7, 9000 if n == 20 else 100 + n])
    return tmp_path


def work(
    llm: Any, tools: dict[str, Any], task: Task = DATA_TASK, max_tokens: int | None = None
) -> tuple[dict[str, Any], MemoryLog]:
    log = MemoryLog(task)
    return asyncio.run(Agent(llm, tools, max_tokens=max_tokens)(task, log)), log


def fail(
    llm: Any, tools: dict[str, Any], task: Task, error: type[Exception], max_tokens: int | None = None
) -> tuple[str, MemoryLog]:
    log = MemoryLog(task)
    with pytest.raises(error) as caught:
        asyncio.run(Agent(llm, tools, max_tokens=max_tokens)(task, log))
    return str(caught.value), log


# What a watcher sees


def test_events_of_a_data_task(shop: Path) -> None:
    """The task in words; then for each step call, words, response, thought, tool started and completed, progress."""
    step = ["llm_call", "llm_delta", "llm_response", "chain_of_thought", "tool_usage", "tool_usage", "progress"]

    _, log = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    last = ["llm_call", "llm_delta", "llm_response", "chain_of_thought", "progress"]
    assert [event for event, _ in log.events] == ["chain_of_thought", *step * 4, *last]
    assert log.events[0][1] == {"step": "analyzing_task", "prompt": "Process this data: shop.csv"}
    actions = [call["action"] for call in log.of("tool_usage")[::2]]
    assert actions == ["load_file", "describe", "query", "query"]
    assert all(fields.keys() <= set(EVENTS[event]) for event, fields in log.events)


def test_a_thought_is_the_text_of_the_reply() -> None:
    """chain_of_thought and llm_response carry the LLM's own words; the deltas, joined, are the response."""
    _, log = work(ScriptedLLM(LOAD, FINISH), fake_tools())

    assert log.of("chain_of_thought")[1:] == [
        {"step": "choosing_tool", "thought": "look first"},
        {"step": "concluding", "thought": "3 rows"},
    ]
    said = [(one["model"], one["response"], one["usage"]) for one in log.of("llm_response")]
    assert said == [("scripted", "look first", NOTHING), ("scripted", "3 rows", NOTHING)]
    assert [delta["text"] for delta in log.of("llm_delta")] == ["look first", "3 rows"]


def test_tool_call_is_two_entries_with_one_call_id() -> None:
    """A call is started with its arguments, then completed with its result and duration."""
    _, log = work(ScriptedLLM(LOAD, FINISH), fake_tools(), task_of("process_data", {"file": "shop.csv"}))

    started, completed = log.of("tool_usage")
    same = {"call_id": "call-1-2", "tool": "data_processor", "action": "load_file", "key": "data_processor.load_file#1"}
    assert started.items() >= {**same, "status": "started", "arguments": {"file": "shop.csv"}}.items()
    assert isinstance(completed.pop("duration_ms"), int)
    assert completed.items() >= {**same, "status": "completed", "result": {"rows": 3}}.items()


@pytest.mark.parametrize("steps", range(1, MAX_STEPS))
def test_progress_never_falls_and_ends_at_100(steps: int) -> None:
    """However many steps the LLM takes, percent grows or stays, and 100 is the last and only the last."""
    _, log = work(ScriptedLLM(*[LOAD] * steps, FINISH), fake_tools())

    percents = [progress["percent"] for progress in log.of("progress")]
    assert percents == sorted(percents)
    assert percents.index(100) == steps


def test_same_task_gives_the_same_events(shop: Path) -> None:
    """But for durations and the grouping of words, two runs of a task are equal."""
    runs = [work(MockLLM(), make_tools(shop, shop / "outbox", None)) for _ in range(2)]

    def fixed(log: MemoryLog) -> list[Any]:
        return [(event, {**fields, "duration_ms": 0}) for event, fields in log.events if event != "llm_delta"]

    assert runs[0][0] == runs[1][0]
    assert fixed(runs[0][1]) == fixed(runs[1][1])


# Words, joined


def deltas(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> list[str]:
    """The texts of the llm_delta entries, if so many seconds pass before each word."""
    now = 0.0

    class SlowLLM(ScriptedLLM):
        async def chat(self, messages: Any, tools: Any) -> AsyncIterator[Piece]:
            nonlocal now
            for n, gap in enumerate(seconds):
                now += gap
                yield f"{n} "
            yield GIVE_UP[1]

    monkeypatch.setattr("agent.time.monotonic", lambda: now)
    log = MemoryLog()
    asyncio.run(Agent(SlowLLM(), {}).ask([], {}, log, None))
    return [delta["text"] for delta in log.of("llm_delta")]


def test_words_that_come_close_together_are_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are held until the interval has passed, then come as one text; the rest comes at the end."""
    assert deltas(monkeypatch, [0.02, 0.02, 0.03, 0.5, 0.01]) == ["0 1 2 ", "3 ", "4 "]
    assert deltas(monkeypatch, []) == []


def test_fast_llm_writes_at_most_20_entries_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 words in a second come as at most 20 texts, and no word is lost."""
    texts = deltas(monkeypatch, [0.001] * 1000)

    assert 10 <= len(texts) <= 20
    assert "".join(texts).split() == [str(n) for n in range(1000)]


# The result


def test_result_equals_an_independent_computation(shop: Path) -> None:
    """Rows, sums by region and the outlier are those of the file, and the summary tells them to people."""
    with (shop / "shop.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["region"]] += float(row["revenue"])

    result, _ = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    _, described, groups, outliers = [finding["result"] for finding in result["findings"]]
    assert result["rows"] == len(rows) == 40
    assert described["columns"]["revenue"]["sum"] == sum(sums.values())
    assert dict(groups["rows"]) == dict(sums)
    assert outliers["rows"] == [[9000]]
    assert "40 rows" in result["summary"]
    assert "East" in result["summary"]  # n = 20 is East's, and enormous
    assert result["summary"].endswith("Outliers: 1.")


def test_another_file_gives_another_result(shop: Path) -> None:
    """The mock decides by the file's columns: without numbers there is nothing to group or to search."""
    (shop / "names.csv").write_text("name\nAda\nGrace\n")

    result, _ = work(MockLLM(), make_tools(shop, shop / "outbox", None), task_of("process_data", {"file": "names.csv"}))

    assert result["rows"] == 2
    tools = [finding["tool"] for finding in result["findings"]]
    assert tools == ["data_processor.load_file", "data_processor.describe"]


def test_email_is_sent_once_under_a_key_of_its_step(shop: Path) -> None:
    """Another attempt without a journal, as after a lost stream, sends no second one."""
    tools = make_tools(shop, shop / "outbox", None)

    for _ in range(2):
        result, log = work(MockLLM(), tools, task_of("send_email", EMAIL, "8"))

        assert log.of("tool_usage")[0]["arguments"] == EMAIL
        [sent] = (shop / "outbox").iterdir()
        assert re.fullmatch(r"task-8-[0-9a-f]{16}\.eml", sent.name)
        assert "a@example.org" in result["summary"]


def test_several_tools_in_one_reply_are_used_in_order() -> None:
    calls = [call("data_processor.load_file", file="a.csv"), call("data_processor.load_file", file="b.csv")]

    result, log = work(ScriptedLLM(["both", *calls], FINISH), fake_tools())

    assert [finding["arguments"]["file"] for finding in result["findings"]] == ["a.csv", "b.csv"]
    assert [usage["call_id"] for usage in log.of("tool_usage")[::2]] == ["call-1-2", "call-1-3"]


# What the LLM is told


def test_conversation_is_that_of_llm_apis() -> None:
    """System, the task as user, then the assistant's call and the tool's result under the LLM's own id."""
    llm = ScriptedLLM(LOAD, FINISH)

    work(llm, fake_tools())

    system, user, assistant, tool = llm.messages[1]
    function = {"name": "data_processor.load_file", "arguments": '{"file": "shop.csv"}'}
    tool_call = {"id": "id-data_processor.load_file", "type": "function", "function": function}
    assert system["role"] == "system"
    assert (user["role"], json.loads(user["content"])) == ("user", DATA_TASK.data)
    assert assistant == {"role": "assistant", "content": "look first", "tool_calls": [tool_call]}
    assert tool == {"role": "tool", "tool_call_id": tool_call["id"], "content": '{"result": {"rows": 3}}'}


@pytest.mark.parametrize(("task", "prefix"), [(DATA_TASK, "data_processor."), (EMAIL_TASK, "email_sender.")])
def test_only_the_tools_of_the_task_type_are_offered(task: Task, prefix: str) -> None:
    """No text inside a data file can talk the LLM into sending email."""
    llm = ScriptedLLM(GIVE_UP)

    fail(llm, fake_tools(), task, PermanentFailure)

    *names, last = [tool["function"]["name"] for tool in llm.tools[0]]
    assert names and all(name.startswith(prefix) for name in names)
    assert last == "give_up"


def test_tool_is_described_by_its_signature() -> None:
    """Keyword-only parameters are the agent's own: the LLM does not hear of them."""
    text = {"type": "string"}

    described = schema("email_sender.send", send)

    assert described == {
        "type": "function",
        "function": {
            "name": "email_sender.send",
            "description": "Pretend to send.",
            "parameters": {
                "type": "object",
                "properties": {"to": text, "subject": text, "body": text},
                "required": ["to", "subject", "body"],
                "additionalProperties": False,
            },
        },
    }


def test_huge_result_is_cut_in_event_and_message() -> None:
    """A result of 100 kB is cut to 20 kB, and says so."""
    llm = ScriptedLLM(LOAD, FINISH)

    _, log = work(llm, fake_tools(load_file=lambda file: {"rows": 3, "text": "x" * 100_000}))

    for text in (log.of("tool_usage")[1]["result"], llm.messages[1][-1]["content"]):
        assert len(text) < MAX_CHARS + 200
        assert "truncated" in text


def test_tool_may_ask_whether_its_task_is_cancelled() -> None:
    """A tool with a parameter `check` gets one that raises when the task was cancelled; it ends the attempt."""

    class Cancelled(MemoryLog):
        def check(self) -> None:
            raise TaskCancelled("not wanted")

    def load_file(file: str, *, check: Callable[[], None]) -> dict[str, Any]:
        check()
        return {}

    with pytest.raises(TaskCancelled):
        work_with = Agent(ScriptedLLM(LOAD), fake_tools(load_file=load_file))
        asyncio.run(work_with(DATA_TASK, Cancelled()))  # type: ignore[arg-type]


# What the LLM gets wrong

UNUSABLE = [
    ([], "it is empty"),
    ([" "], "it is empty"),
    (["hm", call("shell.run")], "no tool shell.run"),
    (["hm", call("email_sender.send", **EMAIL)], "no tool email_sender.send"),
    (["hm", call("data_processor.load_file")], "'file'"),
    (["hm", call("data_processor.load_file", file="f", x=1)], "'x'"),
    (["hm", call("give_up")], "'reason'"),
    (["hm", LOAD[2], call("shell.run")], "no tool shell.run"),
    (FINISH, "no tool has succeeded yet"),
]


@pytest.mark.parametrize(("reply", "why"), UNUSABLE)
def test_unusable_reply_is_asked_for_once_more(reply: list[Any], why: str) -> None:
    """The LLM is told what was wrong with its reply and may do better. Nothing of that reply is done."""
    llm = ScriptedLLM(reply, LOAD, FINISH)

    result, log = work(llm, fake_tools())

    assert result["summary"] == "3 rows"
    assert why in llm.messages[1][-1]["content"]
    calls = [piece for piece in reply if isinstance(piece, ToolCall)]
    told = [message["role"] for message in llm.messages[1][3:]]
    assert told == (["tool"] * len(calls) or ["user"])
    assert len(log.of("tool_usage")) == 2


@pytest.mark.parametrize("argument", ["idempotency_key", "check"])
def test_llm_cannot_fill_in_what_is_the_agents_own(argument: str) -> None:
    wrong = ["hm", call("email_sender.send", **EMAIL, **{argument: "mine"})]

    message, _ = fail(ScriptedLLM(wrong), fake_tools(), EMAIL_TASK, LLMError)

    assert argument in message


def test_reply_unusable_twice_is_an_llm_error() -> None:
    """After two unusable replies in a row the attempt fails with LLMError, which is retried, and no tool has run."""
    message, log = fail(ScriptedLLM(["Hm."]), fake_tools(), DATA_TASK, LLMError)

    assert message.startswith("the LLM's reply was unusable twice: no tool has succeeded yet")
    assert len(log.of("llm_response")) == 2
    assert not log.of("tool_usage")


def test_steps_are_bounded() -> None:
    """An LLM that never finishes is asked MAX_STEPS times, then the task fails for good."""
    llm = ScriptedLLM(LOAD)

    message, _ = fail(llm, fake_tools(), DATA_TASK, PermanentFailure)

    assert str(MAX_STEPS) in message
    assert len(llm.messages) == MAX_STEPS


def test_huge_reply_is_cut_in_the_stream() -> None:
    _, log = work(ScriptedLLM(LOAD, ["x" * 100_000]), fake_tools())

    for text in (log.of("llm_response")[1]["response"], log.of("llm_delta")[1]["text"]):
        assert len(text) < MAX_CHARS + 100


def test_llm_failure_passes_through() -> None:
    """An LLMError is not caught by the agent: the worker logs it and retries the task."""
    _, log = fail(MockLLM(fail_rate=1), fake_tools(), DATA_TASK, LLMError)

    assert [event for event, _ in log.events] == ["chain_of_thought", "llm_call", "llm_response"]
    assert log.of("llm_response")[0]["status"] == "failed"


# What a task or a tool gets wrong


def test_wrong_input_is_told_to_the_llm() -> None:
    """A ToolError becomes tool_usage failed and the tool's message; the LLM may find another way, or give up."""
    llm = ScriptedLLM(LOAD, GIVE_UP)

    message, log = fail(llm, fake_tools(load_file=failing(ToolError("no shop.csv"))), DATA_TASK, PermanentFailure)

    failed = log.of("tool_usage")[1]
    assert (failed["status"], failed["error"], failed["call_id"]) == ("failed", "no shop.csv", "call-1-2")
    assert llm.messages[1][-1]["content"] == '{"error": "no shop.csv"}'
    assert message == "no such file"
    assert log.of("chain_of_thought")[-1] == {"step": "giving_up", "thought": "no way on"}


def test_missing_file_fails_for_good_with_the_tools_message(shop: Path) -> None:
    """With the mock and the real tools, a file that is not there is a PermanentFailure that names it."""
    task = task_of("process_data", {"file": "gone.csv"})

    message, log = fail(MockLLM(), make_tools(shop, shop / "outbox", None), task, PermanentFailure)

    assert "gone.csv" in message
    assert message == log.of("tool_usage")[-1]["error"]


def test_unavailable_tool_is_raised_after_its_failed_entry() -> None:
    """ToolUnavailable closes the call's pair of entries and passes through: the worker retries the task."""
    tools = fake_tools(load_file=failing(ToolUnavailable("the mail server is away")))

    message, log = fail(ScriptedLLM(LOAD), tools, DATA_TASK, ToolUnavailable)

    assert message == "the mail server is away"
    assert [usage["status"] for usage in log.of("tool_usage")] == ["started", "failed"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "got null"),
        ("shop.csv", 'got "shop.csv"'),
        ({"type": "process_data"}, "payload"),
        ({"type": "process_data", "payload": "shop.csv"}, "payload"),
        ({"payload": {}}, "process_data, send_email"),
        ({"type": "dance", "payload": {}}, "'dance'; known: process_data, send_email"),
        ({"type": ["dance"], "payload": {}}, "process_data, send_email"),
        ({"type": "process_data", "payload": {}}, "payload.file"),
        ({"type": "process_data", "payload": {"file": 5}}, "payload.file as text, got 5"),
        ({"type": "send_email", "payload": {"to": "a@example.org", "subject": "Hi"}}, "payload.body"),
    ],
)
def test_task_that_is_no_task_fails_for_good_in_one_line(data: Any, why: str) -> None:
    """Data of the wrong shape is a PermanentFailure that says what was expected; the LLM is not asked."""
    llm = ScriptedLLM(FINISH)

    message, log = fail(llm, fake_tools(), Task(id="7", data=data, attempt=1), PermanentFailure)

    assert why in message
    assert "\n" not in message
    assert not llm.messages and not log.events


# What it costs

PRICED = [[*reply, Usage(10, 5)] for reply in (LOAD, LOAD, FINISH)]  # three calls of 15 tokens each


def test_usage_is_told_for_each_call_and_summed_in_the_result() -> None:
    """Each llm_response has the tokens of its call; the result has those of all, unusable replies too."""
    result, log = work(ScriptedLLM([Usage(1, 2)], *PRICED), fake_tools())

    assert [response["usage"] for response in log.of("llm_response")] == [
        {"input": 1, "output": 2},
        *[{"input": 10, "output": 5}] * 3,
    ]
    assert result["usage"] == {"input": 31, "output": 17}


def test_mock_counts_the_same_tokens_in_every_run(shop: Path) -> None:
    """Its tokens are words. The conversation grows, so that each call has more input than the one before."""
    results = [work(MockLLM(), make_tools(shop, shop / "outbox", None)) for _ in range(2)]

    inputs = [response["usage"]["input"] for response in results[0][1].of("llm_response")]
    assert results[0][0]["usage"] == results[1][0]["usage"]
    assert inputs == sorted(set(inputs))
    assert all(response["usage"]["output"] > 0 for response in results[0][1].of("llm_response"))


@pytest.mark.parametrize(("limit", "calls"), [(1, 1), (15, 1), (16, 2), (30, 2)])
def test_task_that_reaches_its_limit_fails_before_the_next_call(limit: int, calls: int) -> None:
    """It fails for good, with the limit and what was used; the LLM is not asked again."""
    llm = ScriptedLLM(*PRICED)

    message, log = fail(llm, fake_tools(), DATA_TASK, PermanentFailure, limit)

    assert message == f"the limit of {limit} tokens is reached: {10 * calls} input, {5 * calls} output"
    assert len(llm.messages) == len(log.of("llm_response")) == calls


@pytest.mark.parametrize("limit", [31, 45, None])
def test_last_answer_may_pass_the_limit(limit: int | None) -> None:
    """What has been paid for is not thrown away: only a call that would come after the limit is refused."""
    result, _ = work(ScriptedLLM(*PRICED), fake_tools(), max_tokens=limit)

    assert result["usage"] == {"input": 30, "output": 15}


# The command line


def test_main_puts_the_options_into_the_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """main() runs a worker around an Agent made as the options say, and returns the worker's exit code."""
    seen: list[Agent] = []

    def fake_worker(handler: Agent, **options: Any) -> int:
        seen.append(handler)
        return 5

    monkeypatch.setattr(agent_consumer, "run_worker", fake_worker)

    options = ["--llm-delay", "0", "--llm-fail-rate", "0.25", "--max-tokens", "500", "--data-root", str(tmp_path)]
    code = agent_consumer.main(options)

    llm = seen[0].llm
    assert seen[0].max_tokens == 500
    assert code == 5
    assert isinstance(llm, MockLLM)
    assert (llm.delay_seconds, llm.fail_rate) == (0, 0.25)


@pytest.mark.parametrize(
    "options",
    [
        ["--llm-delay", "-1"],
        ["--llm-delay", "nan"],
        ["--llm-delay", "inf"],
        ["--llm-delay", "soon"],
        ["--llm-fail-rate", "1.5"],
        ["--llm-fail-rate", "nan"],
        ["--max-tokens", "0"],
        ["--max-tokens", "1.5"],
        ["--data-root", "/no/such/folder"],
        ["--approve", "email_sender.sned"],
    ],
)
def test_bad_option_is_a_usage_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A bad option value ends with argparse's exit code 2 and a line that names the option."""
    with pytest.raises(SystemExit) as caught:
        agent_consumer.main(options)

    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_unknown_tool_to_approve_is_one_line_that_lists_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        agent_consumer.main(["--approve", "email_sender.sned"])

    [line] = [line for line in capsys.readouterr().err.splitlines() if "sned" in line]
    assert "data_processor.query, email_sender.send" in line


# The limit that all workers share


class TwoPerCall:
    """A limiter that lets every call wait twice, and once has no server."""

    rate, period = 10, 1.0

    def __init__(self) -> None:
        self.answers = [Decision(False, 0, 0.02), RedisUnavailable("away"), Decision(True, 9, 0.0)]

    async def check(self, key: str) -> Decision:
        answer = self.answers.pop(0)
        self.answers.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_waiting_for_the_limit_is_told_once_a_call() -> None:
    """Before the LLM's words comes one rate_limited, with the limit and how long until it may be asked again."""
    log = MemoryLog()
    agent = Agent(ScriptedLLM(LOAD, FINISH), fake_tools(), TwoPerCall())  # type: ignore[arg-type]

    asyncio.run(agent(DATA_TASK, log))

    assert log.of("rate_limited") == [{"limit": "10 in 1 s", "wait_ms": 20}] * 2
    assert [event for event, _ in log.events][1:4] == ["llm_call", "rate_limited", "llm_delta"]


def test_task_is_cancelled_while_it_waits_for_the_limit() -> None:
    """An agent whose turn never comes is interrupted, as the worker does it."""
    log, limiter = MemoryLog(), TwoPerCall()
    limiter.answers = [Decision(False, 0, 3600.0)]
    agent = Agent(ScriptedLLM(FINISH), fake_tools(), limiter)  # type: ignore[arg-type]

    async def cancel() -> None:
        working = asyncio.create_task(agent(DATA_TASK, log))
        while not log.of("rate_limited"):
            await asyncio.sleep(0)
        working.cancel()
        await working

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("10/s", (10, 1)), ("100/m", (100, 60)), ("5/10s", (5, 10)), ("1/0.5s", (1, 0.5)), ("2/h", (2, 3600))],
)
def test_rate_is_read(text: str, parsed: tuple[int, float]) -> None:
    """Calls a second, minute, hour, or a number of them."""
    assert agent_consumer.rate(text) == parsed


@pytest.mark.parametrize("text", ["", "10", "0/s", "1/0s", "-1/s", "x/s", "1/d", "1/.s", "1/s "])
def test_bad_rate_is_refused(text: str) -> None:
    """What would allow nothing, or is no rate, is an error of the command line."""
    with pytest.raises(argparse.ArgumentTypeError):
        agent_consumer.rate(text)
