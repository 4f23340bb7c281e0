"""Part 4: the agent thinks, uses real tools, reports each step as an event, and computes its result from the file."""

import argparse
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agent_consumer
from agent_consumer import MAX_RESULT_CHARS, MAX_STEPS, Agent, coalesce
from agent_tools import ToolError, ToolUnavailable, make_tools
from ailf.messaging.redis import RedisUnavailable
from ailf.messaging.redis.rate_limiter import Decision
from mock_llm import LLMError, MockLLM
from task_streams import PermanentFailure, Task, TaskCancelled
from task_streams.keys import EVENTS

LOAD = {"thought": "look", "action": {"tool": "data_processor.load_file", "arguments": {"file": "shop.csv"}}}
FINISH = {"thought": "enough", "finish": "3 rows"}
GIVE_UP = {"thought": "no way on", "give_up": "no such file"}
DATA_TASK = Task(id="7", data={"type": "process_data", "payload": {"file": "shop.csv"}}, attempt=1)
EMAIL = {"to": "a@example.org", "subject": "Report", "body": "All is well."}
EMAIL_TASK = Task(id="8", data={"type": "send_email", "payload": EMAIL}, attempt=1)


class FakeLog:
    """Collect what would be XADDed."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def add(self, event: str, **fields: Any) -> None:
        json.dumps(fields, allow_nan=False)  # what cannot be stored fails here, too
        self.events.append((event, fields))

    def check(self) -> None:
        """Nobody cancels this task."""

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


class ScriptedLLM:
    """Reply with the given texts (objects as JSON), one a call; remember the prompts."""

    model = "scripted"

    def __init__(self, *replies: Any) -> None:
        self.replies = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
        self.prompts: list[str] = []

    def stream(self, prompt: str) -> Iterator[str]:
        self.prompts.append(prompt)
        yield self.replies[min(len(self.prompts), len(self.replies)) - 1]  # the last one again and again


def load_file(file: str) -> dict[str, Any]:
    """Pretend to load a file."""
    return {"rows": 3}


def fake_tools(**actions: Any) -> dict[str, Any]:
    tools = {f"data_processor.{name}": action for name, action in {"load_file": load_file, **actions}.items()}
    return {**tools, "email_sender.send": lambda to, subject, body, message_id=None: {"sent": True}}


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


def work(llm: Any, tools: dict[str, Any], task: Task = DATA_TASK) -> tuple[dict[str, Any], FakeLog]:
    log = FakeLog()
    return Agent(llm, tools)(task, log), log  # type: ignore[arg-type]


def fail(llm: Any, tools: dict[str, Any], task: Task, error: type[Exception]) -> tuple[str, FakeLog]:
    log = FakeLog()
    with pytest.raises(error) as caught:
        Agent(llm, tools)(task, log)  # type: ignore[arg-type]
    return str(caught.value), log


# What a watcher sees


def test_events_of_a_data_task_come_in_order(shop: Path) -> None:
    """The task is put into words, then each step is: words, response, thought, tool started and completed, progress."""
    step = ["llm_delta", "llm_response", "chain_of_thought", "tool_usage", "tool_usage", "progress"]

    _, log = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    assert [event for event, _ in log.events] == [
        "chain_of_thought",
        *step * 4,
        *["llm_delta", "llm_response", "chain_of_thought", "progress"],
    ]
    assert log.events[0][1] == {"step": "analyzing_task", "prompt": "Process this data: shop.csv"}
    assert [call["action"] for call in log.of("tool_usage")[::2]] == [
        "load_file",
        "describe",
        "group_by",
        "find_outliers",
    ]


def test_events_have_the_fields_of_the_design(shop: Path) -> None:
    """No event has a field that keys.EVENTS does not name, and each has what a watcher relies on."""
    required = {
        "chain_of_thought": {"step"},
        "llm_delta": {"text"},
        "llm_response": {"model", "response"},
        "tool_usage": {"call_id", "tool", "action", "status"},
        "progress": {"percent", "step"},
    }

    _, log = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    for event, fields in log.events:
        assert required[event] <= fields.keys() <= set(EVENTS[event])


def test_a_thought_is_logged_with_each_decision() -> None:
    """chain_of_thought carries the LLM's own thought."""
    _, log = work(ScriptedLLM(LOAD, FINISH), fake_tools())

    assert log.of("chain_of_thought")[1:] == [
        {"step": "choosing_tool", "thought": "look"},
        {"step": "concluding", "thought": "enough"},
    ]


def test_tool_call_is_two_entries_with_one_call_id() -> None:
    """A call is started with its arguments, then completed with its result and duration; ids differ by attempt."""
    task = Task(id="7", data=DATA_TASK.data, attempt=2)

    _, log = work(ScriptedLLM(LOAD, FINISH), fake_tools(), task)

    started, completed = log.of("tool_usage")
    call = {"call_id": "call-2-1", "tool": "data_processor", "action": "load_file"}
    assert started == {**call, "status": "started", "arguments": {"file": "shop.csv"}}
    assert isinstance(completed.pop("duration_ms"), int)
    assert completed == {**call, "status": "completed", "result": {"rows": 3}}


def test_deltas_joined_are_the_response(shop: Path) -> None:
    """Who joins the llm_delta texts up to an llm_response has read exactly the response."""
    _, log = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    text = ""
    for event, fields in log.events:
        if event == "llm_delta":
            text += fields["text"]
        elif event == "llm_response":
            assert fields == {"model": "mock-llm-1", "response": text}
            text = ""


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

    def fixed(log: FakeLog) -> list[Any]:
        return [(event, {**fields, "duration_ms": 0}) for event, fields in log.events if event != "llm_delta"]

    assert runs[0][0] == runs[1][0]
    assert fixed(runs[0][1]) == fixed(runs[1][1])


# Words, joined


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def spoken(clock: Clock, gaps: list[float]) -> Iterator[str]:
    for n, gap in enumerate(gaps):
        clock.now += gap
        yield f"{n} "


def test_coalesce_joins_words_that_come_close_together() -> None:
    """Words are held until the interval has passed, then come as one text; the rest comes at the end."""
    clock = Clock()

    texts = list(coalesce(spoken(clock, [0.02, 0.02, 0.02, 0.5, 0.01]), seconds=0.05, clock=clock))

    assert texts == ["0 1 2 ", "3 ", "4 "]


def test_coalesce_of_nothing_is_nothing() -> None:
    """An LLM that says nothing causes no empty entry."""
    assert list(coalesce([], clock=Clock())) == []


def test_coalesce_writes_at_most_20_entries_a_second() -> None:
    """A fast LLM, 1000 words in a second, comes as at most 20 texts, and no word is lost."""
    clock = Clock()

    texts = list(coalesce(spoken(clock, [0.001] * 1000), clock=clock))

    assert 10 <= len(texts) <= 20
    assert "".join(texts).split() == [str(n) for n in range(1000)]


# The result


def test_result_equals_an_independent_computation(shop: Path) -> None:
    """Rows, sums by region and the outlier are those of the file."""
    with (shop / "shop.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["region"]] += float(row["revenue"])

    result, _ = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    assert result["rows"] == len(rows) == 40
    assert result["findings"]["describe"]["columns"]["revenue"]["sum"] == sum(sums.values())
    assert result["findings"]["group_by"]["groups"] == dict(sums)
    assert "9000" in json.dumps(result["findings"]["find_outliers"])


def test_summary_names_the_top_group(shop: Path) -> None:
    """The summary is a sentence for people with the numbers of the file in it."""
    result, _ = work(MockLLM(), make_tools(shop, shop / "outbox", None))

    assert "40 rows" in result["summary"]
    assert "East" in result["summary"]  # n = 20 is East's, and enormous


def test_another_file_gives_another_result(shop: Path) -> None:
    """The mock decides by the file's columns: without numbers there is nothing to group or to search."""
    (shop / "names.csv").write_text("name\nAda\nGrace\n")
    task = Task(id="9", data={"type": "process_data", "payload": {"file": "names.csv"}}, attempt=1)

    result, _ = work(MockLLM(), make_tools(shop, shop / "outbox", None), task)

    assert result["rows"] == 2
    assert result["findings"].keys() == {"load_file", "describe"}


def test_email_task_sends_the_email(shop: Path) -> None:
    """A send_email task leaves one email in the outbox, under the task's own message id."""
    result, log = work(MockLLM(), make_tools(shop, shop / "outbox", None), EMAIL_TASK)

    arguments = log.of("tool_usage")[0]["arguments"]
    assert arguments == {**EMAIL, "message_id": arguments["message_id"]}
    assert re.fullmatch(r"task-8-[0-9a-f]{8}", arguments["message_id"])
    assert len(list((shop / "outbox").iterdir())) == 1
    assert "a@example.org" in result["summary"]


def test_retry_does_not_send_twice(shop: Path) -> None:
    """A second attempt at a send_email task, after the first has sent it, completes without a second email."""
    tools = make_tools(shop, shop / "outbox", None)
    work(MockLLM(), tools, EMAIL_TASK)

    result, _ = work(MockLLM(), tools, Task(id="8", data=EMAIL_TASK.data, attempt=2))

    assert len(list((shop / "outbox").iterdir())) == 1
    assert "a@example.org" in result["summary"]


# What the LLM is told


def test_results_are_fed_into_the_next_prompt() -> None:
    """The second prompt holds the first call with its result."""
    llm = ScriptedLLM(LOAD, FINISH)

    work(llm, fake_tools())

    assert '"rows": 3' not in llm.prompts[0]
    told = {"tool": "data_processor.load_file", "arguments": {"file": "shop.csv"}, "result": {"rows": 3}}
    assert json.dumps(told) in llm.prompts[1]


def test_prompt_lists_the_tools_of_the_task_type_only() -> None:
    """A data task's prompt shows signatures and descriptions of the data tools, and no email_sender."""
    llm = ScriptedLLM(LOAD, FINISH)

    work(llm, fake_tools())

    assert "- data_processor.load_file(file: str)" in llm.prompts[0]
    assert "Pretend to load a file." in llm.prompts[0]
    assert "email_sender" not in llm.prompts[0]


def test_huge_result_is_truncated_in_event_and_prompt() -> None:
    """A result of 100 kB is cut to 20 kB, and says so."""

    def load_file(file: str) -> dict[str, Any]:
        return {"rows": 3, "text": "x" * 100_000}

    llm = ScriptedLLM(LOAD, FINISH)

    _, log = work(llm, fake_tools(load_file=load_file))

    result = log.of("tool_usage")[1]["result"]
    assert len(result) < MAX_RESULT_CHARS + 100
    assert "truncated" in result
    assert len(llm.prompts[1]) < MAX_RESULT_CHARS + 2_000


# What the LLM gets wrong


def test_reply_with_prose_around_the_json_is_understood() -> None:
    """Real LLMs wrap their JSON in politeness and fences; that is no error."""
    llm = ScriptedLLM(f"Sure!\n```json\n{json.dumps(LOAD)}\n```\nAnything else?", FINISH)

    result, _ = work(llm, fake_tools())

    assert result == {"summary": "3 rows", "rows": 3, "findings": {"load_file": {"rows": 3}}}


UNUSABLE = [
    ("I'd rather not.", "no JSON object"),
    ('{"thought": "…", "finish": ', "Expecting value"),
    ({"thought": "hm"}, "exactly one of"),
    ({**FINISH, **GIVE_UP}, "exactly one of"),
    ({"thought": "hm", "finish": 5}, "must be text"),
    ({"thought": "hm", "action": "load"}, "must be an object"),
    ({"thought": "hm", "action": {"tool": "shell.run", "arguments": {}}}, "no tool shell.run"),
    ({"thought": "hm", "action": {"tool": "email_sender.send", "arguments": EMAIL}}, "no tool email_sender.send"),
    ({"thought": "hm", "action": {"tool": "data_processor.load_file", "arguments": {}}}, "'file'"),
    (
        {"thought": "hm", "action": {"tool": "data_processor.load_file", "arguments": {"file": "f", "x": 1}}},
        "'x'",
    ),
    (FINISH, "no tool has succeeded yet"),
]


@pytest.mark.parametrize(("reply", "why"), UNUSABLE)
def test_unusable_reply_is_asked_for_once_more(reply: Any, why: str) -> None:
    """The LLM is told what was wrong with its reply, and may do better; the task goes on."""
    llm = ScriptedLLM(reply, LOAD, FINISH)

    result, _ = work(llm, fake_tools())

    assert result["summary"] == "3 rows"
    assert "CORRECTION" not in llm.prompts[0] + llm.prompts[2]
    assert why in llm.prompts[1].partition("CORRECTION")[2]


def test_reply_unusable_twice_is_an_llm_error() -> None:
    """After two unusable replies in a row the attempt fails with LLMError, which is retried, and no tool has run."""
    message, log = fail(ScriptedLLM("Hm.", "Hm."), fake_tools(), DATA_TASK, LLMError)

    assert message == "the LLM's reply was unusable twice: it holds no JSON object"
    assert len(log.of("llm_response")) == 2
    assert not log.of("tool_usage")


def test_steps_are_bounded() -> None:
    """An LLM that never finishes is asked MAX_STEPS times, then the task fails for good."""
    llm = ScriptedLLM(LOAD)

    message, _ = fail(llm, fake_tools(), DATA_TASK, PermanentFailure)

    assert str(MAX_STEPS) in message
    assert len(llm.prompts) == MAX_STEPS


def test_huge_reply_is_cut_in_the_stream_only() -> None:
    """A reply of 100 kB does not fill the stream; the agent itself reads all of it."""
    _, log = work(ScriptedLLM(LOAD, {"finish": "3 rows", "thought": "x" * 100_000}), fake_tools())

    assert len(log.of("llm_response")[1]["response"]) < MAX_RESULT_CHARS + 100
    assert len(log.of("llm_delta")[1]["text"]) < MAX_RESULT_CHARS + 100


def test_llm_failure_passes_through() -> None:
    """An LLMError is not caught by the agent: the worker logs it and retries the task."""
    _, log = fail(MockLLM(fail_rate=1), fake_tools(), DATA_TASK, LLMError)

    assert [event for event, _ in log.events] == ["chain_of_thought"]


# What a task or a tool gets wrong


def test_wrong_input_is_told_to_the_llm() -> None:
    """A ToolError becomes tool_usage failed and a line in the next prompt; the LLM may find another way."""
    llm = ScriptedLLM(LOAD, GIVE_UP)

    message, log = fail(llm, fake_tools(load_file=failing(ToolError("no shop.csv"))), DATA_TASK, PermanentFailure)

    failed = log.of("tool_usage")[1]
    assert (failed["status"], failed["result"], failed["call_id"]) == ("failed", "no shop.csv", "call-1-1")
    assert '"error": "no shop.csv"' in llm.prompts[1]
    assert message == "no such file"
    assert log.of("chain_of_thought")[-1] == {"step": "giving_up", "thought": "no way on"}


def test_missing_file_fails_for_good_with_the_tool_s_message(shop: Path) -> None:
    """With the mock and the real tools, a file that is not there is a PermanentFailure that names it."""
    task = Task(id="9", data={"type": "process_data", "payload": {"file": "gone.csv"}}, attempt=1)

    message, log = fail(MockLLM(), make_tools(shop, shop / "outbox", None), task, PermanentFailure)

    assert "gone.csv" in message
    assert message == log.of("tool_usage")[-1]["result"]


def test_unavailable_tool_is_raised_after_its_failed_entry() -> None:
    """ToolUnavailable closes the call's pair of entries and passes through: the worker retries the task."""
    tools = fake_tools(load_file=failing(ToolUnavailable("the mail server is away")))

    message, log = fail(ScriptedLLM(LOAD), tools, DATA_TASK, ToolUnavailable)

    assert message == "the mail server is away"
    assert [call["status"] for call in log.of("tool_usage")] == ["started", "failed"]


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
    assert not llm.prompts and not log.events


# The command line


def test_main_puts_the_options_into_the_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """main() runs a worker around an Agent made as the options say, and returns the worker's exit code."""
    seen: list[Agent] = []

    def fake_worker(handler: Agent, **options: Any) -> int:
        seen.append(handler)
        return 5

    monkeypatch.setattr(agent_consumer, "run_worker", fake_worker)

    code = agent_consumer.main(["--llm-delay", "0", "--llm-fail-rate", "0.25", "--data-root", str(tmp_path)])

    llm = seen[0].llm
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
        ["--data-root", "/no/such/folder"],
    ],
)
def test_bad_option_is_a_usage_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A bad option value ends with argparse's exit code 2 and a line that names the option."""
    with pytest.raises(SystemExit) as caught:
        agent_consumer.main(options)

    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


# The limit that all workers share


class TwoPerCall:
    """A limiter that lets every call wait twice, and once has no server."""

    rate, period = 10, 1.0

    def __init__(self) -> None:
        self.answers = [Decision(False, 0, 0.02), RedisUnavailable("away"), Decision(True, 9, 0.0)]

    def check(self, key: str) -> Decision:
        answer = self.answers.pop(0)
        self.answers.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_waiting_for_the_limit_is_told_once_a_call() -> None:
    """Before the LLM's words comes one rate_limited, with the limit and how long until it may be asked again."""
    log = FakeLog()
    agent = Agent(ScriptedLLM(LOAD, FINISH), fake_tools(), TwoPerCall())  # type: ignore[arg-type]

    agent(DATA_TASK, log)  # type: ignore[arg-type]

    assert log.of("rate_limited") == [{"limit": "10 in 1 s", "wait_ms": 20}] * 2
    assert [event for event, _ in log.events][1:3] == ["rate_limited", "llm_delta"]


def test_task_is_cancelled_while_it_waits_for_the_limit() -> None:
    """An agent whose turn never comes still hears that its task was cancelled."""

    class Cancelled(FakeLog):
        def check(self) -> None:
            raise TaskCancelled("not wanted")

    limiter = TwoPerCall()
    limiter.answers = [Decision(False, 0, 3600.0)]
    agent = Agent(ScriptedLLM(FINISH), fake_tools(), limiter)  # type: ignore[arg-type]

    with pytest.raises(TaskCancelled):
        agent(DATA_TASK, Cancelled())  # type: ignore[arg-type]


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
