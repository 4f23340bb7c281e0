"""`python -m task_streams`, as a person types it: what it prints, what it changes, and the exit code."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Result, typed
from conftest import ROOT, Server, free_port, wait_until
from redis import Redis
from streams import finish, take
from test_scripts import elements, finished, on_terminal

from ailf.messaging.redis import RedisUnavailable, embedded
from task_streams import LogReader, Task, TaskLog, TaskQueue, keys, run_worker
from task_streams.admin import main

Start = Callable[..., "subprocess.Popen[str]"]
ADMIN = ("-m", "task_streams")
PATIENCE_SECONDS = 60.0
HOSTILE = "[b]x[/no]\x1b[31m\x07"
SHOWN = r"[b]x[/no]\x1b[31m\x07"


@pytest.fixture
def queue(valkey: Server) -> TaskQueue:
    return TaskQueue(valkey.client())


@pytest.fixture
def admin(valkey: Server) -> Callable[..., Result]:
    """Type a command and wait for its end: admin("import", "-", stdin="…")."""

    def run(*command: str, url: str = valkey.url, **options: Any) -> Result:
        return typed(url, *ADMIN, *command, **options)

    return run


Admin = Callable[..., Result]


def status_of(admin: Admin) -> dict[str, Any]:
    result = admin("status", "--json")
    assert (result.code, len(result.lines)) == (0, 1)
    state: dict[str, Any] = json.loads(result.out)
    return state


def wait_for_status(admin: Admin, holds: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
    states: list[dict[str, Any]] = []

    def is_reached() -> object:
        states.append(status_of(admin))
        return holds(states[-1])

    wait_until(is_reached, what, PATIENCE_SECONDS)
    return states[-1]


@pytest.fixture
def worker(valkey: Server, script: Start, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start a worker whose tasks say what it does; see programs.py."""

    def start(*options: str) -> "subprocess.Popen[str]":
        command = ["tests/programs.py", str(tmp_path / "journal"), *options]
        return script(valkey.url, *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start


Worker = Callable[..., "subprocess.Popen[str]"]


class Terminal:
    """A command on a terminal of its own: what it has written, keys to press, its exit code."""

    def __init__(self, url: str, *command: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ.update(REDIS_URL=url, TERM="xterm-256color", COLUMNS="100", LINES="30")
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, *ADMIN, *command])
        self.seen = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.seen += os.read(self.master, 65536).decode()
            except OSError:  # Linux says EIO when the other side is closed
                return

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.seen, f"{text!r} is shown", PATIENCE_SECONDS)

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def end(self) -> int:
        """Wait for the end of the command and return its exit code."""
        code: list[int] = []

        def has_ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            code.extend([os.waitstatus_to_exitcode(status)] if pid else [])
            return bool(pid)

        wait_until(has_ended, "the command ends", PATIENCE_SECONDS)
        self.reader.join(PATIENCE_SECONDS)
        return code[0]


@pytest.fixture
def terminal(valkey: Server) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*command: str) -> Terminal:
        opened.append(Terminal(valkey.url, *command))
        return opened[-1]

    yield start
    for one in opened:
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # the test has seen its end
        os.close(one.master)


# -- status -----------------------------------------------------------------------------------------------------


def test_status_of_an_empty_queue_is_all_zeros(admin: Admin) -> None:
    """In a pipe: plain lines, a name and a number each."""
    result = admin("status")

    assert result.code == 0
    names = "waiting running parked resting dead completed failed cancelled workers"
    assert result.lines == [f"{name} 0" for name in names.split()]


def test_status_counts_what_waits_and_what_has_ended(admin: Admin, queue: TaskQueue) -> None:
    """By outcome, and the dead letters; the age is that of the task that is next."""
    for outcome in ("completed", "completed", "failed"):
        finished(queue, outcome)
    queue.put_many([{}, {}])

    state = status_of(admin)

    counts = {name: state[name] for name in ("waiting", "running", "resting", "dead", "completed", "failed")}
    assert counts == {"waiting": 2, "running": 0, "resting": 0, "dead": 1, "completed": 2, "failed": 1}
    assert state["oldest_waiting_seconds"] >= 0


def test_status_counts_a_waiting_task_once_although_it_is_suspected_to_be_lost(admin: Admin, queue: TaskQueue) -> None:
    """The audit gives short leases to tasks that were put together: they wait all the same, and do not rest."""
    queue.put_many([{}] * 30)
    queue.recover()
    assert queue.redis.zcard(keys.LEASES) > 0

    state = status_of(admin)

    assert (state["waiting"], state["resting"]) == (30, 0)


@pytest.mark.parametrize("element", ["nonsense", b"\xff", '{"id": "by-hand", "data": {}}'])
def test_element_that_was_pushed_by_hand_waits_for_an_unknown_time(
    admin: Admin, queue: TaskQueue, element: str | bytes
) -> None:
    """It counts, even if it is not a task."""
    queue.redis.lpush(keys.QUEUE, element)

    state = status_of(admin)

    assert (state["waiting"], state["oldest_waiting_seconds"]) == (1, None)


def test_status_does_not_read_the_tasks_that_wait(admin: Admin, queue: TaskQueue) -> None:
    """With 10,000 of them the server sends no more than some kilobytes."""
    queue.put_many({"n": n} for n in range(10_000))
    sent = queue.redis.info("stats")["total_net_output_bytes"]

    result = admin("status")

    assert "waiting 10000" in result.lines
    assert len(result.lines) < 15
    assert queue.redis.info("stats")["total_net_output_bytes"] - sent < 50_000


def take_all(queue: TaskQueue, worker: str) -> list[Task]:
    taken = []
    while (task := take(queue, worker=worker, lease_seconds=3600)) is not None:
        taken.append(task)
    return taken


def test_only_some_running_tasks_are_listed_and_the_rest_is_counted(admin: Admin, queue: TaskQueue) -> None:
    """The longest-running ones come first."""
    queue.put_many({"n": n} for n in range(50))
    take_all(queue, "test")

    state, lines = status_of(admin), admin("status").lines
    once = admin("status", "--once", terminal=True)

    assert (state["running"], [task["id"] for task in state["tasks"]]) == (50, [str(n) for n in range(1, 21)])
    assert sum(line.startswith("task ") for line in lines) == 20
    assert "running 50" in lines
    assert once.code == 0
    assert "20 of them shown" in once.out


def test_running_task_is_shown_with_its_worker_until_that_is_killed(
    admin: Admin, queue: TaskQueue, worker: Worker
) -> None:
    """kill -9: then it says that the worker is gone."""
    queue.put({"steps": 1_000, "seconds": 1})
    process = worker("--lease", "3600")

    alive = wait_for_status(admin, lambda state: state["running"], "it runs")
    process.kill()
    killed = wait_for_status(admin, lambda state: not state["workers"], "its worker is gone")

    [name] = alive["workers"]
    [before], [after] = alive["tasks"], killed["tasks"]
    assert name.endswith(f":{process.pid}")
    assert (before["id"], before["worker"], before["attempt"], before["note"]) == ("1", name, 1, "")
    assert (after["worker"], after["note"]) == (name, "its worker is gone")
    assert f"task 1 {name} " in admin("status").out


def test_task_that_waits_for_its_next_attempt_rests(admin: Admin, queue: TaskQueue, worker: Worker) -> None:
    """It neither waits in the list nor runs."""
    queue.put({"then": "raise"})
    worker("--backoff", "3600")

    state = wait_for_status(admin, lambda state: state["resting"], "it rests")

    assert (state["waiting"], state["running"], state["resting"]) == (0, 0, 1)


def test_status_on_a_terminal_is_live_until_ctrl_c(queue: TaskQueue, terminal: Callable[..., Terminal]) -> None:
    """What is put meanwhile shows. Ctrl-C ends it with 130, no traceback, and a cursor."""
    live = terminal("status")
    live.wait_for("python agent_consumer.py starts one")
    queue.put_many({"n": n} for n in range(1_234))
    live.wait_for("1,234")

    live.press("\x03")

    assert live.end() == 130
    assert "Traceback" not in live.seen
    assert live.seen.rindex("\x1b[?25h") > live.seen.rindex("\x1b[?25l")


def test_live_status_outlives_a_restart_of_the_server(
    valkey: Server, queue: TaskQueue, terminal: Callable[..., Terminal]
) -> None:
    """While the server is away it says so; then it goes on."""
    live = terminal("status")
    live.wait_for("every second until Ctrl-C")
    valkey.stop()
    live.wait_for("trying again")
    valkey.start()
    queue.put_many({"n": n} for n in range(1_234))

    live.wait_for("1,234")


def test_dumb_terminal_gets_one_look(admin: Admin) -> None:
    """It cannot be redrawn."""
    once = admin("status", terminal=True, term="dumb")

    assert once.code == 0
    assert "waiting" in once.out


def test_names_cannot_steer_the_terminal(admin: Admin, queue: TaskQueue) -> None:
    """Control characters in ids, workers and reasons are shown as escapes, and Rich's markup as it is."""
    queue.put({})
    take_all(queue, HOSTILE)
    queue.redis.hset(keys.record(HOSTILE), mapping=queue.redis.hgetall(keys.record("1")))
    queue.redis.zadd(keys.LEASES, {HOSTILE: 1})
    queue.redis.lpush(keys.DEAD, json.dumps({"id": HOSTILE, "reason": HOSTILE, "attempts": HOSTILE}))
    on_screen = [admin("status", "--once", terminal=True), admin("dead", terminal=True)]

    assert [one.code for one in on_screen] == [0, 0]
    for text in [one.out for one in on_screen] + [admin("status").out, admin("dead").out]:
        assert "\x1b[31m" not in text
        assert "\x07" not in text
        assert text.count(SHOWN) >= 2
    assert "\x1b[31m" not in admin("requeue", HOSTILE).err


# -- cancel -----------------------------------------------------------------------------------------------------


def test_waiting_task_is_cancelled_with_the_reason(admin: Admin, queue: TaskQueue) -> None:
    """It ends at once. A second time is an error."""
    queue.put({}, id="t")

    result = admin("cancel", "t", "--reason", "the wrong file")
    again = admin("cancel", "t")

    end = LogReader("t", queue.redis).last()
    assert (result.code, result.out) == (0, "t\n")
    assert end is not None
    assert (end.name, end.fields["reason"]) == ("cancelled", "the wrong file")
    assert (again.code, again.out) == (1, "")
    assert again.err == "task_streams: task t has ended already: cancelled\n"


def test_running_task_is_ended_by_its_worker(admin: Admin, queue: TaskQueue, worker: Worker) -> None:
    """On a terminal it says so in words."""
    queue.put({"steps": 1_000, "seconds": 0.1})
    worker()
    wait_for_status(admin, lambda state: state["running"], "it runs")

    cancel = admin("cancel", "1", terminal=True)

    assert cancel.code == 0
    assert "task 1: asked to stop" in cancel.out
    wait_for_status(admin, lambda state: state["cancelled"], "it is cancelled")
    end = LogReader("1", queue.redis).last()
    assert end is not None
    assert end.fields["reason"] == "cancelled by hand"


def test_task_that_cannot_be_cancelled_does_not_keep_the_others(admin: Admin, queue: TaskQueue) -> None:
    """Each gets a line of its own; the exit code is 1."""
    queue.put_many([{}, {}])

    result = admin("cancel", "1", "nobody", "no id", "2", "1")

    assert (result.code, result.lines) == (1, ["1", "2"])
    assert [line.partition(":")[2][:12] for line in result.err.splitlines()] == [" no task nob", " no task no "]


# -- dead and requeue -------------------------------------------------------------------------------------------


def test_dead_letters_are_listed_newest_first(admin: Admin, queue: TaskQueue) -> None:
    """With the time, the attempts and the reason; a bounded number of them, and the rest is counted."""
    for n in range(25):
        queue.put({})
        [task] = take_all(queue, "test")
        finish(queue, task, "failed", f"reason {n}")

    result, some = admin("dead"), admin("dead", "--limit", "2", "--json")

    assert [line.split()[0] for line in result.lines] == [str(n) for n in range(25, 5, -1)]
    assert result.lines[0].endswith("Z 1 reason 24")
    assert result.err == "task_streams: 5 more dead letters; --limit 25 shows them all\n"
    newest, second = [json.loads(line) for line in some.lines]
    assert (newest["id"], newest["reason"], newest["attempts"]) == ("25", "reason 24", 1)
    assert newest["failed_at"] >= second["failed_at"]


def test_no_dead_letters_is_said_beside_an_empty_output(admin: Admin) -> None:
    """A pipe gets nothing."""
    assert admin("dead") == admin("dead", "--json") == (0, "", "task_streams: no dead letters\n")


def test_dead_tasks_are_queued_again(admin: Admin, queue: TaskQueue) -> None:
    """In a pipe the new ids, on a terminal a sentence."""
    finished(queue, "failed")

    result = admin("requeue")
    finished(queue, "failed")  # takes the older one, 1.r2
    shown = admin("requeue", terminal=True)

    assert (result.code, result.lines) == (0, ["1.r2"])
    assert shown.code == 0
    assert "task 1.r2 is queued again as 1.r3" in shown.out
    assert [element["data"] for element in elements(queue)] == [{"type": "process_data"}] * 2


def test_named_dead_tasks_are_queued_again_and_the_others_stay(admin: Admin, queue: TaskQueue) -> None:
    """Also after their records have expired. A name that is not there is an error, after the others are done."""
    for _ in range(4):
        finished(queue, "failed")
    queue.redis.delete(keys.record("2"))

    result = admin("requeue", "4", "nobody", "2")
    again = admin("requeue", "4")

    assert (result.code, result.lines) == (1, ["2.r2", "4.r2"])
    assert result.err == "task_streams: task nobody is not among the dead letters\n"
    assert [json.loads(letter)["id"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)] == ["3", "1"]
    assert (again.code, again.out) == (1, "")


MALFORMED: list[str | bytes] = [
    "nonsense",
    b'{"id": "\xff", "data": 1}',
    "[1]",
    "7",
    '"text"',
    '{"data": 1}',
    '{"id": "no data"}',
    '{"id": [1], "data": 1}',
    '{"id": "not an id", "data": 1}',
    '{"id": "%s", "data": 1}' % ("x" * 128),
    '{"id": "large", "data": "%s"}' % ("x" * 1_100_000),
    '{"id": "deep", "data": %s}' % ("[" * 100_000),
    '{"id": "many", "data": 1, "reason": ["a", null], "attempts": {}}',
]


def test_malformed_dead_letters_stand_in_nobodys_way(admin: Admin, queue: TaskQueue) -> None:
    """They are listed with what is known; requeue leaves those that hold no task, and says how many."""
    finished(queue, "failed")
    queue.redis.lpush(keys.DEAD, *MALFORMED)
    queue.redis.lpush(keys.DEAD, json.dumps({"reason": "not JSON", "element": "nonsense"}))
    finished(queue, "failed")

    listed, as_json = admin("dead"), admin("dead", "--json")
    requeued = admin("requeue")

    assert [result.code for result in (listed, as_json, requeued)] == [0, 0, 0]
    assert len(listed.lines) == len(as_json.lines) == len(MALFORMED) + 3
    assert max(map(len, listed.lines)) < 1_000
    assert json.loads(as_json.lines[1])["element"] == "nonsense"
    assert requeued.lines == ["1.r2", "many.r2", "2.r2"]
    assert requeued.err.startswith(f"task_streams: {len(MALFORMED)} dead letter(s) hold no task")


# -- import -----------------------------------------------------------------------------------------------------

GOOD = '{"type": "t", "payload": {}}\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GOOD + "nonsense\n", "line 2: not JSON"),
        (GOOD + "\n\n" + '{"type": 5}\n', "line 4: not a task"),
        (GOOD.encode() + b'{"type": "\xff"}\n', "line 2: 'utf-8' codec can't decode byte 0xff"),
        (GOOD + '{"type": "t", "payload": NaN}\n', "line 2: not JSON: NaN"),
        (GOOD + "[" * 100_000 + "\n", "line 2: nested too deep"),
        (GOOD + '{"type": "t", "payload": "' + "x" * 1_100_000 + '"}\n', "line 2: the task's data has 1,100,0"),
    ],
    ids=["not JSON", "no task", "not UTF-8", "NaN", "deep", "large"],
)
def test_bad_line_is_named_and_nothing_is_queued_unless_told(
    admin: Admin, queue: TaskQueue, text: str | bytes, complaint: str
) -> None:
    """The line's number and what is wrong. With --skip-bad the good ones are queued all the same."""
    refused = admin("import", "-", stdin=text)
    queued = queue.redis.llen(keys.QUEUE)
    skipped = admin("import", "-", "--skip-bad", stdin=text)

    assert (refused.code, refused.out, queued) == (1, "", 0)
    assert complaint in refused.err
    assert len(refused.err.splitlines()) == 2
    assert (skipped.code, skipped.lines) == (0, ["1"])


def test_file_of_tasks_is_queued_in_order(admin: Admin, queue: TaskQueue, tmp_path: Path) -> None:
    """A byte order mark, Windows line ends and blank lines do no harm."""
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(b'{"type": "t", "payload": %d}\r\n\r\n' % n for n in range(2_500)))

    result = admin("import", str(file))

    assert result.lines == [str(n) for n in range(1, 2_501)]
    assert [element["data"]["payload"] for element in elements(queue)] == list(range(2_500))


def test_import_on_a_terminal_names_the_first_tasks(valkey: Server, tmp_path: Path) -> None:
    """At the end it says how to watch. A type cannot steer the terminal."""
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"type": HOSTILE}) + "\n" + GOOD * 2_499)

    shown = on_terminal(valkey.url, *ADMIN, "import", str(tmp_path / "tasks.jsonl"))

    assert f"task 1: {SHOWN}" in shown
    assert "task 10: t" in shown
    assert "task 11: t" not in shown
    assert "… task 2500: 2,500 tasks in all" in shown
    assert "watch it: python stream_reader.py 2500" in shown


@pytest.mark.parametrize(
    ("file", "complaint"),
    [("/nonexistent", "cannot read /nonexistent: No such file"), ("/tmp", "cannot read /tmp: Is a directory")],
)
def test_file_that_cannot_be_read_is_one_line(admin: Admin, file: str, complaint: str) -> None:
    """What is wrong, with its name; exit code 1."""
    result = admin("import", file)

    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert complaint in result.err


def test_ctrl_c_ends_an_import_that_reads(valkey: Server, script: Start) -> None:
    """Exit code 130, no traceback."""
    process = script(valkey.url, *ADMIN, "import", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write("nonsense\n")
    process.stdin.flush()
    assert "line 1: not JSON" in process.stderr.readline()

    process.send_signal(signal.SIGINT)
    process.wait(timeout=PATIENCE_SECONDS)

    assert (process.returncode, process.stderr.read()) == (130, "")


def test_output_that_nobody_reads_is_no_traceback(valkey: Server, script: Start, tmp_path: Path) -> None:
    """import … | head -1"""
    (tmp_path / "tasks.jsonl").write_text(GOOD * 20_000)
    process = script(valkey.url, *ADMIN, "import", str(tmp_path / "tasks.jsonl"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()

    assert process.stderr.read() == ""
    assert process.wait(timeout=PATIENCE_SECONDS) == 141


# -- which server, and usage ------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> list[tuple[str, ...]]:
    """Every command that talks to Redis."""
    (tmp_path / "tasks.jsonl").write_text(GOOD)
    file = str(tmp_path / "tasks.jsonl")
    return [("status",), ("status", "--json"), ("cancel", "1"), ("dead",), ("requeue",), ("import", file)]


def test_command_without_a_server_says_so_in_one_line(admin: Admin, commands: list[tuple[str, ...]]) -> None:
    """REDIS_URL is set and nobody is there: exit code 1."""
    for command in commands:
        result = admin(*command, url="redis://me:secret@127.0.0.1:1")

        assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1), command
        assert "cannot reach Redis at redis://me@127.0.0.1:1" in result.err


def test_paused_server_is_one_line(admin: Admin, valkey: Server, commands: list[tuple[str, ...]]) -> None:
    """It is given up as the connection policy says: exit code 1."""
    valkey.send(signal.SIGSTOP)
    for command in (commands[0], commands[-1]):  # one that only looks, and import, which would start a server
        result = admin(*command)

        assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1), command
        assert "cannot reach Redis" in result.err


def test_looking_does_not_start_the_embedded_server(
    monkeypatch: pytest.MonkeyPatch, valkey: Server, commands: list[tuple[str, ...]], queue: TaskQueue
) -> None:
    """Without REDIS_URL only import starts it, as a producer does; the others say that there is none."""
    started: list[int] = []

    def start() -> tuple[int, bool]:
        started.append(valkey.port)
        return valkey.port, True

    monkeypatch.delenv("REDIS_URL")
    monkeypatch.setattr(embedded, "find", lambda: None)
    monkeypatch.setattr(embedded, "find_or_start", start)

    for command in commands[:-1]:
        with pytest.raises(RedisUnavailable, match="the embedded server is not running"):
            main(list(command))
    assert started == []
    assert main(list(commands[-1])) == 0
    assert (len(started), queue.redis.llen(keys.QUEUE)) == (1, 1)


def test_embedded_server_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A second time there is none, and that is no error."""
    port, _ = embedded.find_or_start(free_port(), tmp_path)
    monkeypatch.setattr(embedded.stop, "__defaults__", (tmp_path,))

    codes = [main(["stop"]), main(["stop"])]

    assert codes == [0, 0]
    assert capsys.readouterr().out.splitlines() == ["embedded server stopped", "no embedded server is running"]
    with pytest.raises(Exception, match="refused"):
        Redis(port=port).ping()


def test_command_explains_itself(admin: Admin) -> None:
    """--help exits with 0; without a command, the usage names them all on stderr, with 2."""
    everything, bare = admin("--help"), admin()

    assert (everything.code, bare.code, bare.out) == (0, 2, "")
    for command in ("status", "cancel", "dead", "requeue", "import", "stop"):
        assert f"    {command} " in everything.out
        assert command in bare.err
        explained = admin(command, "--help")
        assert explained.code == 0
        assert explained.out.startswith(f"usage: python -m task_streams {command} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("status", "--nonsense"),
        ("cancel",),
        ("dead", "--limit", "0"),
        ("dead", "--limit", "many"),
        ("import",),
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_sense_are_a_usage_error(admin: Admin, arguments: tuple[str, ...]) -> None:
    """Exit code 2, and the last line says what is wrong."""
    result = admin(*arguments)

    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err.splitlines()[-1]


# -- questions, answer, tell ------------------------------------------------------------------------------------


@pytest.fixture
def asking(valkey: Server, queue: TaskQueue) -> str:
    """The id of a task that asks "Send it?", and reports its answer and its messages."""

    async def handle(task: Task, log: TaskLog) -> Any:
        return [await log.ask(f"Send it? {HOSTILE}", ["yes", "no"]), await log.inbox()]

    def work() -> None:
        run_worker(handle, url=valkey.url, burst=True)

    task = queue.put({})
    work()
    queue.work = work  # type: ignore[attr-defined]
    return task.id


def test_question_is_listed_and_answered(admin: Admin, queue: TaskQueue, asking: str) -> None:
    """The list is safe to print; --json has all of it. The task's log names the person."""
    [line] = admin("questions").lines
    assert line.startswith(f"task {asking}, until 20")
    assert line.endswith(f"Z: Send it? {SHOWN} (yes / no)")
    [question] = [json.loads(line) for line in admin("questions", "--json").lines]
    assert (question["task"], question["number"], question["options"]) == (asking, 1, ["yes", "no"])
    assert status_of(admin)["parked"] == 1
    shown = admin("questions", terminal=True).out
    assert f"python -m task_streams answer {asking} --number 1 yes" in shown

    assert admin("tell", asking, "be quick", "--by", "bob").out == f"{asking}\n"
    assert admin("answer", asking, "Yes", "--by", "anna").out == f"{asking}\n"
    queue.work()  # type: ignore[attr-defined]

    history = LogReader(asking, queue.redis).read()
    assert history[-1].fields["result"] == ["yes", ["be quick"]]
    said = [(event.name, event.fields.get("by")) for event in history if "by" in event.fields]
    assert said == [("input_received", "anna"), ("steered", "bob")]
    after = admin("questions")
    assert (after.code, after.out, after.err) == (0, "", "task_streams: no open questions\n")


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (("answer", "7777", "yes"), "no task 7777: it was never put, or it finished long ago"),
        (("answer", "1", "maybe"), "'maybe' is not one of the answers: yes, no"),
        (("answer", "1", "yes", "--number", "2"), "task 1 asks question 1 now, not 2"),
        (("tell", "1", " "), "the message is empty"),
        (("tell", "7777", "hello"), "no task 7777: it was never put, or it finished long ago"),
    ],
)
def test_answer_or_message_that_cannot_count_is_one_clear_line(
    admin: Admin, asking: str, command: tuple[str, ...], complaint: str
) -> None:
    result = admin(*command)
    assert (result.code, result.out, result.err) == (1, "", f"task_streams: {complaint}\n")


def test_answer_to_a_task_that_has_ended_is_one_clear_line(admin: Admin, queue: TaskQueue, asking: str) -> None:
    admin("cancel", asking)
    for command in ("answer", "tell"):
        result = admin(command, asking, "yes")
        assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
        assert "ended" in result.err


def test_reader_shows_a_question_with_the_command_that_answers_it(
    valkey: Server, queue: TaskQueue, asking: str
) -> None:
    piped = typed(valkey.url, "stream_reader.py", asking, "--no-follow")
    assert "input_required Send it?" in piped.out
    shown = typed(valkey.url, "stream_reader.py", asking, "--no-follow", terminal=True).out
    assert f"python -m task_streams answer {asking} --number 1 yes" in " ".join(shown.split())
    assert piped.code == 3
