"""The examples, as their docstrings type them, and the archive, killed again and again."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, wait_until
from streams import Stream, take
from streams import finish as close

from task_streams import TaskQueue, keys

Start = Callable[..., "subprocess.Popen[str]"]
ARCHIVE = "examples/archive_tasks.py"
KILL_EVERY_SECONDS = 0.3


@pytest.fixture
def run(valkey: Server, script: Start) -> Callable[..., "tuple[int, str, str]"]:
    """Run an example to its end; return exit code, stdout and stderr."""

    def run(*command: str) -> tuple[int, str, str]:
        process = script(valkey.url, *command)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    return run


Run = Callable[..., "tuple[int, str, str]"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- each in its terminals --------------------------------------------------------------------------------------


def test_pubsub_example_carries_out_a_command(valkey: Server, script: Start, run: Run) -> None:
    """The publisher's command reaches the subscriber, whose result comes back; with --once both end."""
    subscriber = script(valkey.url, "examples/redis_pubsub_example.py", "--role", "subscriber", "--once")
    assert subscriber.stdout is not None
    assert "waiting for commands" in subscriber.stdout.readline()

    code, out, _ = run("examples/redis_pubsub_example.py", "--role", "publisher", "--once")

    assert (code, out) == (0, "'Streams keep what they are told.' has 6 words\n")
    assert subscriber.wait(timeout=60) == 0


def test_pubsub_example_says_that_nobody_listens(run: Run) -> None:
    """A channel keeps nothing, so the publisher says what to start first."""
    code, _, err = run("examples/redis_pubsub_example.py", "--role", "publisher")

    assert code == 1
    assert "start the subscriber first" in err


def test_pubsub_example_ends_by_ctrl_c(valkey: Server, script: Start) -> None:
    """Without a traceback; exit code 0, or 130 if it came before run() was reached."""
    subscriber = script(valkey.url, "examples/redis_pubsub_example.py", "--role", "subscriber")
    assert subscriber.stdout is not None
    subscriber.stdout.readline()

    subscriber.send_signal(signal.SIGINT)
    _, err = subscriber.communicate(timeout=60)

    assert subscriber.returncode in (0, 130)
    assert err == ""


def test_stream_example_shares_documents_among_workers(valkey: Server, script: Start, run: Run) -> None:
    """A document that was added before any worker came is done, once."""
    run("examples/redis_stream_example.py", "--role", "dispatcher", "--once")

    first = run("examples/redis_stream_example.py", "--role", "worker", "--id", "anna", "--once")
    second = run("examples/redis_stream_example.py", "--role", "worker", "--id", "ben", "--once")

    assert first[1].splitlines()[1:] == [
        "anna: document 1 ...",
        "anna: document 1 done",
        "anna: stopped after 1 document(s)",
    ]
    assert second[1].splitlines()[1:] == ["ben: stopped after 0 document(s)"]


def test_stream_example_ends_by_ctrl_c(valkey: Server, script: Start) -> None:
    """Exit code 0, without a traceback."""
    worker = script(valkey.url, "examples/redis_stream_example.py", "--role", "worker", "--id", "anna")
    assert worker.stdout is not None
    worker.stdout.readline()
    wait_until(lambda: valkey.client().info("clients")["blocked_clients"] == 1, "it waits for documents")

    worker.send_signal(signal.SIGINT)
    _, err = worker.communicate(timeout=60)

    assert (worker.returncode, err) == (0, "")


def test_lock_example_counts(run: Run) -> None:
    """Each round counts one further, with a greater token."""
    outputs = [run("examples/redis_lock_example.py", "--once") for _ in range(2)]

    assert [out.split(") ")[1] for _, out, _ in outputs] == ["counted to 1\n", "counted to 2\n"]
    tokens = [int(out.split("(token ")[1].split(")")[0]) for _, out, _ in outputs]
    assert tokens[0] < tokens[1]


def test_rate_limiter_example_makes_its_calls(run: Run) -> None:
    """All 15 calls are made."""
    code, out, _ = run("examples/redis_rate_limiter_example.py")

    assert (code, len(out.splitlines())) == (0, 15)


# -- the archive ------------------------------------------------------------------------------------------------


def finish(queue: TaskQueue, count: int, outcome: str = "completed") -> list[str]:
    """Put tasks and bring them to their ends; return their ids."""
    ids = []
    for n in range(count):
        task_id = queue.put({"n": n}).id
        task = take(queue, worker="test")
        assert task is not None
        Stream(task.id, queue.redis, task.epoch).add(outcome)
        close(queue, task, outcome, {"n": n})  # type: ignore[arg-type]
        ids.append(task_id)
    return ids


def test_archive_holds_what_became_of_each_task(run: Run, valkey: Server, tmp_path: Path) -> None:
    """Id, status, data, result, times; what finished before it existed, too; a second run adds the new ones."""
    queue = TaskQueue(valkey.client())
    file = tmp_path / "archive.jsonl"
    first = finish(queue, 2)
    code, _, err = run(ARCHIVE, str(file), "--once")
    second = finish(queue, 1, "failed")
    run(ARCHIVE, str(file), "--once")

    entries = lines(file)

    assert (code, err) == (0, f"2 finished task(s) archived in {file}\n")
    assert [entry["id"] for entry in entries] == first + second
    assert [entry["status"] for entry in entries] == ["completed", "completed", "failed"]
    assert entries[1]["data"] == entries[1]["result"] == {"n": 1}
    assert entries[0]["put_at"] <= entries[0]["finished_at"]


def test_line_that_was_not_written_to_its_end_is_written_again(run: Run, valkey: Server, tmp_path: Path) -> None:
    """As after kill -9 or a full disk amid a write, before Redis was told: no half line, none missing, none twice."""
    queue = TaskQueue(valkey.client())
    file = tmp_path / "archive.jsonl"
    ids = finish(queue, 3)
    run(ARCHIVE, str(file), "--once")
    whole = file.read_bytes()
    group = queue.redis.xinfo_groups(keys.FINISHED)[0]["name"]
    queue.redis.xgroup_setid(keys.FINISHED, group, "0")  # it has forgotten what it knew of this archive

    for cut in (len(whole) - 1, len(whole) - 20, whole.index(b"\n") + 1, 5):
        file.write_bytes(whole[:cut])
        queue.redis.xgroup_setid(keys.FINISHED, group, "0")
        run(ARCHIVE, str(file), "--once")
        assert [entry["id"] for entry in lines(file)] == ids


def test_new_file_gets_all_tasks_again(run: Run, valkey: Server, tmp_path: Path) -> None:
    """The archive was moved away: the next one begins at the beginning, though Redis remembers the first."""
    ids = finish(TaskQueue(valkey.client()), 2)
    file = tmp_path / "archive.jsonl"
    run(ARCHIVE, str(file), "--once")
    file.rename(tmp_path / "old.jsonl")

    run(ARCHIVE, str(file), "--once")

    assert [entry["id"] for entry in lines(file)] == ids


def test_file_of_something_else_is_left_alone(run: Run, valkey: Server, tmp_path: Path) -> None:
    """If the last line is not one of an archive, nothing is written, and the error says so."""
    finish(TaskQueue(valkey.client()), 1)
    file = tmp_path / "notes.txt"
    file.write_text("hello\n")

    code, _, err = run(ARCHIVE, str(file), "--once")

    assert code == 1
    assert "this program did not write its last line" in err
    assert file.read_text() == "hello\n"


def test_archiver_goes_on_where_the_server_has_lost_its_data(valkey: Server, script: Start, tmp_path: Path) -> None:
    """Stream and group are gone: it says so, and archives what finishes from then on."""
    queue = TaskQueue(valkey.client())
    file = tmp_path / "archive.jsonl"
    archiver = script(valkey.url, ARCHIVE, str(file))
    finish(queue, 2)
    wait_until(lambda: len(lines(file)) == 2, "the first are archived")

    queue.redis.flushall()
    finish(queue, 1)
    wait_until(lambda: len(lines(file)) == 3, "the next is archived")
    archiver.terminate()

    assert archiver.wait(timeout=60) == 0


def test_second_archiver_of_a_file_is_refused(valkey: Server, script: Start, run: Run, tmp_path: Path) -> None:
    """Two writers would write twice."""
    file = tmp_path / "archive.jsonl"
    queue = TaskQueue(valkey.client())
    finish(queue, 1)
    first = script(valkey.url, ARCHIVE, str(file))
    wait_until(lambda: lines(file), "the first one writes")

    code, _, err = run(ARCHIVE, str(file), "--once")
    first.terminate()

    assert (code, err) == (1, f"archive_tasks.py: another process writes {file}\n")
    assert first.wait(timeout=60) == 0


@pytest.mark.parametrize("kills", [4, pytest.param(15, marks=pytest.mark.chaos)])
def test_archive_that_is_killed_again_and_again_has_every_task_once(
    server: Server, script: Start, tmp_path: Path, kills: int
) -> None:
    """Tasks finish while the archiver is killed with kill -9 every 0.3 s; the server restarts once, too."""
    queue = TaskQueue(server.client())
    file = tmp_path / "archive.jsonl"
    archiver = script(server.url, ARCHIVE, str(file), stderr=subprocess.DEVNULL)
    chance = random.Random(1)

    ids: list[str] = []
    for kill in range(kills):
        ids += finish(queue, 20)
        if kill == kills // 2:
            server.stop()
            server.start()
        time.sleep(KILL_EVERY_SECONDS * chance.uniform(0.5, 1.5))
        archiver.kill()
        archiver.wait(timeout=60)
        archiver = script(server.url, ARCHIVE, str(file), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(lines(file)) >= len(ids), "all are archived")
    archiver.terminate()
    archiver.wait(timeout=60)

    assert [entry["id"] for entry in lines(file)] == ids


def test_archiver_waits_for_a_server_that_restarts(valkey: Server, script: Start, tmp_path: Path) -> None:
    """It says that Redis is away, and goes on when it is back."""
    queue = TaskQueue(valkey.client())
    file = tmp_path / "archive.jsonl"
    archiver = script(valkey.url, ARCHIVE, str(file))
    finish(queue, 1)
    wait_until(lambda: len(lines(file)) == 1, "the first is archived")

    valkey.stop()
    assert archiver.stderr is not None
    said = archiver.stderr.readline()
    valkey.start()
    finish(queue, 1)
    wait_until(lambda: len(lines(file)) == 2, "the second is archived")
    archiver.terminate()

    assert "waiting for it" in said
    assert archiver.wait(timeout=60) == 0
