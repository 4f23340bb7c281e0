"""Workers killed at every line, killed at random, stopped past their leases, with wrong clocks, fed with nonsense."""

import contextlib
import random
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from chaos import SECONDS, Load, nonsense, seconds_left
from conftest import Server, wait_until
from history import check

from task_streams import NoSuchTask, keys

pytestmark = pytest.mark.chaos

KILL_EVERY_SECONDS = 0.3
FAULT_POINTS = ["popped", "claimed", "started", "handled", "error", "completed", "failed", "cancelled"]


def has_died_of_cancellations(load: Load, victim: subprocess.Popen[bytes]) -> bool:
    """Cancel all that runs, since the load's own cancellations mostly hit what waits; say whether the worker died."""
    for task_id in load.queue.redis.zrange(keys.LEASES, 0, -1):
        with contextlib.suppress(ValueError, NoSuchTask):  # it has ended
            load.queue.cancel(task_id, "as told")
    return victim.poll() is not None


@pytest.mark.smoke
def test_workers_killed_at_every_fault_point_in_turn_break_no_promise(valkey: Server, tmp_path: Path) -> None:
    """Under load, worker after worker dies at a line between BRPOP and finish, each line in turn."""
    with Load(valkey.url, tmp_path, workers=1) as load:
        deadline, rounds = time.monotonic() + SECONDS, 0
        while seconds_left(deadline) or rounds == 0:
            victims = [load.start_worker(env={"TASK_STREAMS_FAULT": point}) for point in FAULT_POINTS]
            for victim, point in zip(victims, FAULT_POINTS, strict=True):
                if point == "cancelled":
                    wait_until(partial(has_died_of_cancellations, load, victim), f"a worker died at {point}")
                wait_until(lambda victim=victim: victim.poll() is not None, f"a worker died at {point}")  # type: ignore[misc]
                load.kill(victim)
            rounds += 1
        history = load.finish()

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
            load.freeze(2)
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


def test_ten_thousand_malformed_elements_among_good_ones_break_no_promise(server: Server, tmp_path: Path) -> None:
    """Each goes to `dead` once with its reason, and none of the tasks between them is hurt."""
    chance = random.Random(1)
    malformed = 10_000
    with Load(server.url, tmp_path, concurrency=8, all_complete=True) as load, server.client() as client:
        for start in range(0, malformed, 250):
            client.lpush("task_queue", *(nonsense(chance, start + n) for n in range(250)))
        load.history.malformed = malformed
        wait_until(lambda: client.llen("{task_queue}:dead") == malformed, "all are put aside")
        history = load.finish()

    assert check(history) == []
    assert all(letter["reason"] for letter in history.dead)
