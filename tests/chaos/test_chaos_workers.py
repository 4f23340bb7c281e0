"""Workers killed at every line, killed at random, stopped past their leases, with wrong clocks, fed with nonsense."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
from chaos import ENGINES, SECONDS, Load, seconds_left
from conftest import ROOT, Server, wait_until
from history import check

KILL_EVERY_SECONDS = 0.3
FAULT_POINTS = sorted(
    {
        name
        for path in (ROOT / "task_streams").glob("*.py")
        for name in re.findall(r'^ *fault_point\("(\w+)"\)', path.read_text(), re.MULTILINE)
    }
)


def test_workers_killed_at_every_fault_point_in_turn_break_no_promise(valkey: Server, tmp_path: Path) -> None:
    """Under load, worker after worker dies at a line between BRPOP and finish, each line in turn."""
    with Load(valkey.url, tmp_path, workers=1) as load:
        deadline, rounds = time.monotonic() + SECONDS, 0
        while seconds_left(deadline) or rounds == 0:
            victims = [load.start_worker(env={"TASK_STREAMS_FAULT": point}) for point in FAULT_POINTS]
            for victim, point in zip(victims, FAULT_POINTS, strict=True):
                wait_until(lambda victim=victim: victim.poll() is not None, f"a worker died at {point}")  # type: ignore[misc]
                load.kill(victim)
            rounds += 1
        history = load.finish()

    assert len(FAULT_POINTS) >= 5
    assert check(history) == []


def test_workers_killed_at_random_break_no_promise(valkey: Server, tmp_path: Path) -> None:
    """Under load, one worker of four is killed every 0.3 s."""
    chance = random.Random(1)
    with Load(valkey.url, tmp_path, workers=4) as load:
        wait_until(load.is_under_way, "work is under way")
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            load.kill(chance.choice(load.workers))
            load.start_worker()
            time.sleep(KILL_EVERY_SECONDS)
        history = load.finish()

    assert check(history) == []
    assert any(step.attempt > 1 for step in history.steps), "no kill hit a task"


def test_workers_stopped_past_their_leases_break_no_promise(valkey: Server, tmp_path: Path) -> None:
    """Under load, two workers of three are stopped (SIGSTOP) until others took over, then go on; again and again."""
    with Load(valkey.url, tmp_path, workers=3) as load:
        wait_until(load.is_under_way, "work is under way")
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            stopped, load.workers = load.workers[:2], load.workers[::-1]  # the next time two others
            for worker in stopped:
                worker.send_signal(signal.SIGSTOP)
            time.sleep(1.5)  # longer than the lease
            for worker in stopped:
                worker.send_signal(signal.SIGCONT)
            begun = load.begun()
            wait_until(lambda begun=begun: load.begun() > begun + 10, "work goes on")  # type: ignore[misc]
        history = load.finish()

    assert check(history) == []
    assert any(step.attempt > 1 for step in history.steps), "no stop hit a task"


def test_workers_with_wrong_clocks_break_no_promise(valkey: Server, tmp_path: Path) -> None:
    """One worker's clock is an hour fast, one's an hour slow, one is right; each is killed in its turn."""
    with Load(valkey.url, tmp_path, workers=1) as load:
        offsets = ("3600", "-3600")
        wrong = [load.start_worker("--clock-offset", offset) for offset in offsets]
        wait_until(lambda: len(load.working()) == 3, "all three work")
        deadline, kills = time.monotonic() + SECONDS, 0
        while seconds_left(deadline) or kills < 2:
            place = kills % 2
            load.kill(wrong[place])
            wrong[place] = load.start_worker("--clock-offset", offsets[place])
            kills += 1
            time.sleep(KILL_EVERY_SECONDS)
        history = load.finish()

    assert check(history) == []
    times = [int(entry_id.split("-")[0]) for entries in history.streams.values() for entry_id, _ in entries]
    assert max(times) - min(times) < 3_000_000, "an entry id carries a client's clock"


def nonsense(chance: random.Random, number: int) -> bytes:
    """Return an element that is no task: binary, huge, deep, of a wrong type; each different."""
    kind = number % 10
    if number % 1000 == 0:
        return b'{"id": 1, "data": "%s"}' % (b"x" * 1_100_000)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 200)) + b"\xff"
    if kind == 1:
        return (b"[" if number % 2 else b'{"a":') * chance.randrange(1, 5_000)
    wrong = [
        "null",
        "1e999",
        '"text"',
        '{"id": 1}',
        '{"data": 1}',
        '{"id": [%d], "data": 1}',
        '{"id": 2.5, "data": %d}',
    ]
    return (wrong[number % len(wrong)].replace("%d", str(number)) + " " * (number % 3)).encode()


@pytest.mark.parametrize("server", ENGINES, indirect=True)
def test_ten_thousand_malformed_elements_among_good_ones_break_no_promise(server: Server, tmp_path: Path) -> None:
    """Each goes to `dead` once with its reason, and none of the tasks between them is hurt."""
    chance = random.Random(1)
    malformed = 10_000
    with Load(server.url, tmp_path, concurrency=8, all_complete=True) as load, server.client() as client:
        for start in range(0, malformed, 250):
            client.lpush("task_queue", *(nonsense(chance, start + n) for n in range(250)))
        load.history.malformed = malformed
        wait_until(lambda: client.llen("{task_queue}:dead") == malformed, "all are put aside", 60)
        history = load.finish()

    assert check(history) == []
    assert all(letter["reason"] for letter in history.dead)
