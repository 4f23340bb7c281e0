"""The server killed, its power cut, its connections bad, its memory and its disk full, its role changed."""

import contextlib
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from attempts import attempts, popped, run
from chaos import LEASE_SECONDS, SECONDS, Load, full_memory, replica, seconds_left
from chaos_proxy import ChaosProxy
from conftest import DEADLINE_SECONDS, Server, wait_until
from history import History, Loss, check
from redis.exceptions import RedisError

from task_streams import LeaseLost, LogReader, TaskQueue

Spoil = Callable[[Server], contextlib.AbstractContextManager[None]]

pytestmark = pytest.mark.chaos

DOWN_SECONDS = 0.3
KILL_EVERY_SECONDS = 0.3
UP_SECONDS = 1.5
SETTLING_SECONDS = 2 * LEASE_SECONDS  # after a restart: until every lease of before is over, or renewed


def aof(server: Server) -> Path:
    """Return the append-only file that is written now."""
    return max((server.directory / "appendonlydir").glob("*.incr.aof"))


def restart_with(server: Server, *options: str) -> None:
    server.stop()
    server.options = options
    server.start()


# -- killed, and its power cut ----------------------------------------------------------------------------------


@pytest.mark.smoke
def test_killed_server_that_always_syncs_loses_nothing(valkey: Server, tmp_path: Path) -> None:
    """appendfsync always: kill -9 under load, again and again; not one acknowledged task or event is missing."""
    restart_with(valkey, "--appendfsync", "always")
    with Load(valkey.url, tmp_path) as load:
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            begun = load.begun()
            wait_until(lambda begun=begun: load.begun() > begun + 20, "work goes on")  # type: ignore[misc]
            valkey.stop(signal.SIGKILL)
            time.sleep(DOWN_SECONDS)
            valkey.start()
        history = load.finish()

    assert check(history) == []


class Disk:
    """Remembers how long the append-only file was when, so that a power cut can be played: what was not yet synced,
    at worst all that was written in the last second, is cut off."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.sizes: list[tuple[float, int]] = []  # (when, size): what was acknowledged by then is in that many bytes
        self.longest_loss = 0.0  # seconds; printed, not judged: a busy disk and a busy machine have their say in it
        self.over = threading.Event()

    def __enter__(self) -> "Disk":
        self.watch()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=60)

    def watch(self) -> None:
        self.sizes.clear()
        self.over.clear()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        client = self.server.client()
        with contextlib.suppress(RedisError):  # the server is killed
            while not self.over.wait(0.01):
                at = time.monotonic()
                # subtle: while an fsync is slow, the server answers and holds back what it should write
                if client.info("persistence")["aof_buffer_length"] == 0:
                    self.sizes.append((at, aof(self.server).stat().st_size))

    def cut_power(self, unsynced_seconds: float) -> Loss:
        """Kill the server, and cut off what it wrote in the last seconds; say which promises that may break."""
        wait_until(lambda: self.sizes, "the file was seen")
        killed_at = time.monotonic()
        self.server.stop(signal.SIGKILL)
        self.__exit__()
        before = [sample for sample in self.sizes if sample[0] <= killed_at - unsynced_seconds]
        kept_until, size = (before or self.sizes)[-1 if before else 0]
        if unsynced_seconds:
            os.truncate(aof(self.server), size)
        self.longest_loss = max(self.longest_loss, killed_at - kept_until)
        time.sleep(DOWN_SECONDS)
        until = time.monotonic()
        self.server.start()
        self.watch()
        return Loss(since=kept_until, until=until, settled=time.monotonic() + SETTLING_SECONDS)


def lose(server: Server, directory: Path, unsynced_seconds: float) -> tuple[History, list[Loss]]:
    """Under load, kill the server again and again, and cut off what it had not synced."""
    restart_with(server, "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0")
    losses = []
    with Disk(server) as disk, Load(server.url, directory) as load:
        wait_until(load.is_under_way, "work is under way")
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            time.sleep(UP_SECONDS)
            losses.append(disk.cut_power(unsynced_seconds))
        history = load.finish()
    lost = sum(kind == "lost" for kind, _ in check(history))
    promised = len(history.puts) + sum(step.what == "added" for step in history.steps)
    print(f"\n{len(losses)} kills: {lost} of {promised} promises broken, {disk.longest_loss:.2f} s at most in doubt")
    return history, losses


def test_killed_server_that_syncs_every_second_has_all_it_had_written(server: Server, tmp_path: Path) -> None:
    """appendfsync everysec: kill -9 takes nothing that the server had handed to the kernel."""
    history, losses = lose(server, tmp_path, unsynced_seconds=0)

    assert check(history, losses) == []


def test_power_cut_takes_only_what_was_not_synced_from_a_server_that_syncs_every_second(
    server: Server, tmp_path: Path
) -> None:
    """appendfsync everysec: what was acknowledged a second before the cut, and was then in the file, is there."""
    history, losses = lose(server, tmp_path, unsynced_seconds=1)

    assert check(history, losses) == []


# -- connections ------------------------------------------------------------------------------------------------


def test_cut_and_slow_connections_break_no_promise(server: Server, tmp_path: Path) -> None:
    """Requests that never arrive, replies of which nothing or a half arrives, delays: for putter, workers, watcher."""
    with ChaosProxy(server.port) as proxy, Load(proxy.url, tmp_path) as load:
        wait_until(load.is_under_way, "work is under way")
        proxy.at_work.set()
        deadline = time.monotonic() + SECONDS
        wait_until(
            lambda: not seconds_left(deadline) and min(proxy.cut_requests, proxy.cut_replies, proxy.half_replies) > 2,
            "every kind of cut was made",
            SECONDS + DEADLINE_SECONDS,
        )
        proxy.at_work.clear()
        history = load.finish()

    assert check(history) == []


# -- full, read-only --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", [full_memory, replica])
def test_server_that_refuses_writes_breaks_no_promise(server: Server, tmp_path: Path, spoilt: Spoil) -> None:
    """Memory full (noeviction), or a read-only replica, under load, then mended; again and again."""
    with Load(server.url, tmp_path) as load:
        wait_until(load.is_under_way, "work is under way")
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            with spoilt(server):
                time.sleep(1.0)
            begun = load.begun()
            wait_until(lambda begun=begun: load.begun() > begun + 10, "work goes on")  # type: ignore[misc]
        history = load.finish()

    assert "Redis does not serve" in load.said(), "no worker was refused"
    assert check(history) == []


# -- disk full --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(server: Server, tmp_path: Path) -> Server:
    """The server with a limit on its file's size still to come: as on a full disk, a write beyond it is an error.

    subtle: SIGXFSZ, which kills, must be ignored, and that a child inherits only over a shell's exec.
    """
    wrapper = tmp_path / "server"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {server.binary} \"$@\"\n")
    wrapper.chmod(0o755)
    server.stop()
    server.binary = str(wrapper)
    server.start()
    return server


def fill_disk(server: Server) -> None:
    size = aof(server).stat().st_size
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size + 2_000, resource.RLIM_INFINITY))


def free_disk(server: Server) -> None:
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_full_disk_of_a_server_that_syncs_every_second_breaks_no_promise(small_disk: Server, tmp_path: Path) -> None:
    """appendfsync everysec: it answers MISCONF to every write until there is room; the workers wait, then go on."""
    restart_with(small_disk, "--appendfsync", "everysec")
    with Load(small_disk.url, tmp_path) as load:
        wait_until(load.is_under_way, "work is under way")
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            fill_disk(small_disk)
            time.sleep(1.0)
            free_disk(small_disk)
            begun = load.begun()
            wait_until(lambda begun=begun: load.begun() > begun + 10, "work goes on")  # type: ignore[misc]
        history = load.finish()

    assert "MISCONF" in load.said()
    assert check(history) == []


def test_full_disk_of_a_server_that_always_syncs_breaks_no_promise(small_disk: Server, tmp_path: Path) -> None:
    """appendfsync always: it exits rather than promise what it cannot keep; restarted with room, it has everything."""
    restart_with(small_disk, "--appendfsync", "always")
    with Load(small_disk.url, tmp_path) as load:
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            begun = load.begun()
            wait_until(lambda begun=begun: load.begun() > begun + 20, "work goes on")  # type: ignore[misc]
            fill_disk(small_disk)
            small_disk.process.wait(timeout=60)
            small_disk.start()
        history = load.finish()

    assert check(history) == []


# -- all of it --------------------------------------------------------------------------------------------------


def test_everything_at_once_breaks_no_promise(valkey: Server, tmp_path: Path) -> None:
    """Bad connections throughout; meanwhile workers and server are killed and stopped, and writes refused, in turn."""
    restart_with(valkey, "--appendfsync", "always")

    def kill_server() -> None:
        valkey.stop(signal.SIGKILL)
        time.sleep(DOWN_SECONDS)
        valkey.start()

    def stop_server() -> None:
        valkey.send(signal.SIGSTOP)
        time.sleep(2 * LEASE_SECONDS)
        valkey.send(signal.SIGCONT)

    def refuse(spoilt: Spoil) -> None:
        with spoilt(valkey):
            time.sleep(DOWN_SECONDS)

    chance = random.Random(1)
    with ChaosProxy(valkey.port, cut_chance=0.003) as proxy, Load(proxy.url, tmp_path, workers=3) as load:

        def kill_worker() -> None:
            load.kill(load.workers[0])
            load.start_worker()

        faults: list[Callable[[], None]] = [kill_worker, partial(load.freeze, 1), kill_server, stop_server]
        faults += [partial(refuse, full_memory), partial(refuse, replica)]
        wait_until(load.is_under_way, "work is under way")
        proxy.at_work.set()
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            chance.choice(faults)()
            time.sleep(KILL_EVERY_SECONDS)
            load.revive()
        proxy.at_work.clear()
        history = load.finish()

    assert check(history) == []


# -- what the server has forgotten ------------------------------------------------------------------------------


@pytest.mark.smoke
def test_worker_of_a_forgotten_task_cannot_write_into_the_next_of_its_id(valkey: Server) -> None:
    """The server forgot a task, its claim and the counter: another gets its id, and its worker is refused."""
    queue = TaskQueue(valkey.client())
    queue.put({"mark": "old"})

    async def test() -> str:
        async with attempts(valkey.url) as worker:
            old, log = await worker.claim(popped(queue.redis))
            queue.redis.flushall()  # as a power cut does to the last second
            new = queue.put({"mark": "new"})
            for add in (log.add("progress", percent=1), log.end("completed", "of the old one")):
                with pytest.raises(LeaseLost):
                    await add
            assert new.id == old.id
            return new.id

    assert LogReader(run(test), queue.redis).read() == []
