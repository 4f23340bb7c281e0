"""The dashboard while everything around it breaks: each watcher has every event once, in order, and the only end.

The watchers are plain HTTP clients that read server-sent events and, where a connection breaks, come again with
Last-Event-ID, as a browser does: some of one task each, two of all tasks, over the same dashboard, from first to last.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos import LEASE_SECONDS, SECONDS, Load, full_memory, nonsense, replica, seconds_left
from chaos_proxy import ChaosProxy
from conftest import DEADLINE_SECONDS, ROOT, Server, free_port, wait_until
from history import History, Loss, Seen, Violation, check
from redis.exceptions import RedisError

from task_streams import keys
from task_streams.reader import order
from tutorial.topologies import HOST, Cluster, Node, Sentinels
from web.sse import MAX_CURSOR_TASKS, split_cursors

pytestmark = pytest.mark.chaos

LAG_SECONDS = 1.0  # what a master acknowledged this long before its end has reached the replica
LONG_LEASE_SECONDS = 2.0  # where a failover takes its time
DOWN_SECONDS = 0.5
MALFORMED = 50  # elements that are no tasks, each time
RETRY_SECONDS = 0.05  # before a watcher comes again; a browser waits a second
SILENCE_SECONDS = 30  # twice what is between two comments of a stream that has nothing to say
SETTLE_SECONDS = 60.0  # for the watchers to have what the tasks' ends have brought
MOST_WATCHERS = 20  # of single tasks, at the same time
MOST_MORE_FILES = 40  # that a dashboard may keep open: its pools of connections to Redis, on six nodes
MOST_MORE_BYTES = 30_000_000  # that it may have kept, some hundred watchers later


class Dashboard:
    """dashboard.py on a port of its own, to be killed and started again."""

    def __init__(self, redis_url: str, directory: Path) -> None:
        self.redis_url, self.port = redis_url, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "dashboard.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "dashboard.py", "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "REDIS_URL": self.redis_url},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self.is_well, f"the dashboard answers: {self.log}")
        self.files, self.bytes = self.open_files(), self.memory_bytes()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)

    def is_well(self) -> bool:
        assert self.process.poll() is None, self.said()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz", timeout=10).status_code == 200
        return False

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])

    def is_unwatched(self) -> bool:
        """Say whether it holds nothing of any watcher."""
        return self.metric("dashboard_watchers") == 0 == self.metric("dashboard_streams")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Watcher:
    """One client of server-sent events. It reads as the WHATWG says: a frame counts when its empty line is there."""

    def __init__(self, path: str, task_id: str | None = None) -> None:
        self.path, self.task_id = path, task_id
        self.seen: dict[str, list[Seen]] = {} if task_id is None else {task_id: []}  # since its last `reset`
        self.told: Counter[str] = Counter()  # how often `gap`, `reset` and `redis` came
        self.last_id: str | None = None
        self.opened = 0  # streams: more than one where a connection broke
        self.may_repeat = False
        self.behind: set[str] = set()  # tasks that come again, and have not yet come to where they were
        self.is_over = False

    async def watch(self, client: httpx.AsyncClient) -> None:
        while not self.is_over:
            with contextlib.suppress(httpx.TransportError):  # cut, or nobody listens: again
                await self._read(client)
            await asyncio.sleep(RETRY_SECONDS)

    async def _read(self, client: httpx.AsyncClient) -> None:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with client.stream("GET", self.path, headers=headers) as response:
            if response.status_code == 404 and self.task_id is not None:  # a failover took the task
                self.seen[self.task_id], self.last_id = [], None
            self.is_over = response.status_code == 204
            if response.status_code != 200:
                assert response.status_code in (204, 404, 503), response.status_code
                return
            self.opened += 1
            self._note_what_may_repeat()
            fields: dict[str, str] = {}
            async for line in response.aiter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                else:
                    self._take(fields)
                    fields = {}

    def _note_what_may_repeat(self) -> None:
        """An id cannot hold a cursor for each of many tasks; the others come again, and may be cut off on the way."""
        cursors, _ = split_cursors(self.last_id or "") if self.task_id is None else ({}, None)
        if self.may_repeat:
            seen = {task_id: self.seen[task_id] for task_id in cursors if self.seen.get(task_id)}
            self.behind |= {one for one, those in seen.items() if order(cursors[one]) < order(those[-1].entry)}
        self.may_repeat = len(cursors) >= MAX_CURSOR_TASKS

    def _take(self, fields: dict[str, str]) -> None:
        self.last_id = fields.get("id", self.last_id)
        event, data = fields.get("event"), json.loads(fields.get("data", "{}"))
        if event is None:
            return
        if event in ("gap", "reset", "redis"):
            self.told[event] += 1
            if event == "reset":  # what was seen is no more; all comes again
                self.seen[data["task"]] = []
            return
        seen, is_last = self.seen.setdefault(data["task"], []), event in keys.TERMINAL
        came_before = seen and order(data["id"]) <= order(seen[-1].entry)
        if came_before and (self.may_repeat or data["task"] in self.behind):
            if data["id"] == seen[-1].entry:
                self.behind.discard(data["task"])
            return
        seen.append(Seen(data["id"], time.monotonic(), is_last))
        self.is_over = is_last and self.task_id is not None


class Scene:
    """A dashboard with its watchers, and the load that they watch."""

    def __init__(self, dashboard: Dashboard, url: str, load: Load) -> None:
        self.dashboard, self.url, self.load = dashboard, url, load
        self.everything = [Watcher("/api/events") for _ in range(2)]
        self.singles: list[Watcher] = []
        self.stop = threading.Event()
        self.trouble: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._watch())
        except BaseException as error:  # pytest only warns of what ends a thread
            self.trouble.append(error)
            raise

    async def _watch(self) -> None:
        """Watch all tasks, and one task after the other of those that were put just now."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(base_url=self.url, limits=limits, timeout=SILENCE_SECONDS) as client,
            asyncio.TaskGroup() as group,
        ):
            tasks = [group.create_task(watcher.watch(client)) for watcher in self.everything]
            while not self.stop.is_set():
                await asyncio.sleep(0.02)
                puts = self.load.history.puts
                known = {watcher.task_id for watcher in self.singles}
                busy = sum(not watcher.is_over for watcher in self.singles) >= MOST_WATCHERS
                if puts and not busy and not self.load.stop_putting.is_set() and puts[-1].id not in known:
                    watcher = Watcher(f"/api/tasks/{puts[-1].id}/events", puts[-1].id)
                    self.singles.append(watcher)
                    tasks.append(group.create_task(watcher.watch(client)))
            for task in tasks:
                task.cancel()

    def events(self) -> int:
        """Return how many events the watcher of all tasks has that has the fewest."""
        return min(sum(map(len, list(watcher.seen.values()))) for watcher in self.everything)

    def wait_for_events(self) -> None:
        """Wait until the watchers of all tasks have some more."""
        events = self.events()
        wait_until(lambda: self.trouble or self.events() > events + 40, "events come")

    def finish(self, losses: Sequence[Loss] = ()) -> tuple[History, list[Violation]]:
        """Let all tasks end; return what came out, and the broken promises, those to the watchers too."""
        history = self.load.finish()
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.misread(history, losses) and time.monotonic() < deadline:
            time.sleep(0.1)
        misread = self.misread(history, losses)
        self.stop.set()
        self.thread.join(timeout=60)
        assert self.trouble == [], "a watcher failed"
        assert len(self.singles) > 5, "there were no watchers"
        return history, [*check(history, losses), *misread]

    def misread(self, history: History, losses: Sequence[Loss]) -> list[Violation]:
        """Compare what each watcher has with what the streams hold; who watches all tasks must have all of them."""
        found = []
        for watcher in (*self.everything, *self.singles):
            watched = dict(watcher.seen)
            if watcher.task_id is None:
                watched = {task_id: watched.get(task_id, []) for task_id in watched.keys() | history.streams.keys()}
            streams = {task_id: history.streams[task_id] for task_id in watched if task_id in history.streams}
            those = check(History(streams=streams, watched=watched), losses)
            found += [Violation(kind, f"{watcher.path}: {text}") for kind, text in those if kind == "misread"]
            if watcher.told["gap"]:
                found.append(Violation("misread", f"{watcher.path}: a gap, where nothing was trimmed"))
        return found

    def streams_opened(self) -> int:
        """Return the most connections that one watcher has needed."""
        return max(watcher.opened for watcher in (*self.everything, *self.singles))


@contextlib.contextmanager
def scene(
    redis_url: str,
    directory: Path,
    *,
    lease_seconds: float = LEASE_SECONDS,
    load_url: str = "",
    through: Callable[[int], contextlib.AbstractContextManager[ChaosProxy]] | None = None,
) -> Iterator[Scene]:
    """Let a dashboard be watched while tasks are worked on; in the end it must be as it was, without a restart."""
    directory = directory / "load"
    directory.mkdir()
    dashboard = Dashboard(redis_url, directory)
    try:
        with contextlib.ExitStack() as stack:
            url = dashboard.url
            if through is not None:
                url = stack.enter_context(through(dashboard.port)).url.replace("redis:", "http:")
            load = Load(load_url or redis_url, directory, lease_seconds=lease_seconds)
            one = Scene(dashboard, url, load)
            one.thread.start()
            stack.callback(one.stop.set)
            wait_until(lambda: all(watcher.opened for watcher in one.everything), "they watch before anything is put")
            stack.enter_context(load)
            one.wait_for_events()
            yield one
        wait_until(dashboard.is_well, "the dashboard is well")
        wait_until(dashboard.is_unwatched, "the dashboard has forgotten its watchers")
        assert dashboard.open_files() - dashboard.files < MOST_MORE_FILES
        assert dashboard.memory_bytes() - dashboard.bytes < MOST_MORE_BYTES
        assert "Traceback" not in dashboard.said()
        print(
            f"{len(one.singles)} watchers of one task, {one.events()} events to each of all tasks; the dashboard: "
            f"{dashboard.open_files() - dashboard.files} files, "
            f"{(dashboard.memory_bytes() - dashboard.bytes) / 1e6:.1f} MB more"
        )
    finally:
        dashboard.kill()


# -- one server -------------------------------------------------------------------------------------------------


def kill_worker(scene: Scene, _server: Server) -> None:
    scene.load.kill(scene.load.workers[0])
    scene.load.start_worker()


def kill_server(_scene: Scene, server: Server) -> None:
    server.stop(signal.SIGKILL)
    time.sleep(DOWN_SECONDS)
    server.start()


def freeze_server(_scene: Scene, server: Server) -> None:
    server.send(signal.SIGSTOP)
    time.sleep(2 * LEASE_SECONDS)
    server.send(signal.SIGCONT)


def fill_memory(_scene: Scene, server: Server) -> None:
    with full_memory(server):
        time.sleep(DOWN_SECONDS)


def demote_server(_scene: Scene, server: Server) -> None:
    with replica(server):
        time.sleep(DOWN_SECONDS)


def stop_worker(scene: Scene, _server: Server) -> None:
    scene.load.freeze(1)


def push_nonsense(scene: Scene, server: Server) -> None:
    """Malformed elements among the good ones, one by one."""
    history, chance = scene.load.history, random.Random(1)
    for _ in range(MALFORMED):
        server.client().lpush(keys.QUEUE, nonsense(chance, history.malformed))
        history.malformed += 1
    dead = partial(server.client().lrange, keys.DEAD, 0, -1)
    wait_until(lambda: sum('"element"' in letter for letter in dead()) >= history.malformed, "all are put aside")


FAULTS = (kill_worker, stop_worker, kill_server, freeze_server, fill_memory, demote_server, push_nonsense)


def test_watchers_keep_their_streams_through_faults_of_workers_and_server(valkey: Server, tmp_path: Path) -> None:
    """Each fault of FAULTS in its turn, at least once: no watcher even loses its connection."""
    valkey.stop()
    valkey.options = ("--appendfsync", "always")
    valkey.start()
    with scene(valkey.url, tmp_path) as watched:
        deadline, rounds = time.monotonic() + SECONDS, 0
        while seconds_left(deadline) or rounds == 0:
            for fault in FAULTS:
                fault(watched, valkey)
                watched.wait_for_events()
            rounds += 1
        _, violations = watched.finish()

    assert violations == []
    assert watched.streams_opened() == 1


@pytest.mark.smoke
def test_watchers_resume_after_kills_of_the_dashboard(valkey: Server, tmp_path: Path) -> None:
    """kill -9 of the dashboard, again and again: each watcher goes on at the next one where it was."""
    with scene(valkey.url, tmp_path) as watched:
        deadline = time.monotonic() + SECONDS
        while seconds_left(deadline):
            watched.dashboard.kill()
            watched.dashboard.start()
            watched.wait_for_events()
        _, violations = watched.finish()

    assert violations == []
    assert watched.streams_opened() > 1


def test_bad_connections_on_both_sides_of_the_dashboard_lose_and_repeat_nothing(valkey: Server, tmp_path: Path) -> None:
    """Cut, half answered and slow: those between watchers and dashboard, and between it and Redis."""
    outer: list[ChaosProxy] = []

    def through(port: int) -> ChaosProxy:
        outer.append(ChaosProxy(port))
        return outer[0]

    with (
        ChaosProxy(valkey.port) as inner,
        scene(inner.url, tmp_path, load_url=valkey.url, through=through) as watched,
    ):
        proxies = (inner, outer[0])
        for proxy in proxies:
            proxy.at_work.set()
        deadline = time.monotonic() + SECONDS
        wait_until(
            lambda: not seconds_left(deadline) and all(one.cut_replies and one.half_replies for one in proxies),
            "replies were cut on both sides",
            SECONDS + DEADLINE_SECONDS,
        )
        for proxy in proxies:
            proxy.at_work.clear()
        _, violations = watched.finish()

    assert violations == []
    assert watched.streams_opened() > 1


# -- several servers --------------------------------------------------------------------------------------------


def test_watchers_follow_a_failover_by_sentinel(tmp_path: Path) -> None:
    """kill -9 of the master: the watchers' streams go on at the new one; what it has lost is taken back by `reset`."""
    first = random.randrange(10_000, 20_000)
    with (
        Sentinels(tmp_path / "servers", first, first + 10) as sentinels,
        scene(sentinels.url, tmp_path, lease_seconds=LONG_LEASE_SECONDS) as watched,
    ):
        losses, deadline = list[Loss](), time.monotonic() + SECONDS
        while seconds_left(deadline) or not losses:
            old, killed = sentinels.master(), time.monotonic()
            old.stop(signal.SIGKILL)
            wait_until(lambda old=old: sentinels.master() is not old, "the replica is the master")  # type: ignore[misc]
            losses.append(Loss(killed - LAG_SECONDS, killed, time.monotonic() + LONG_LEASE_SECONDS))
            watched.wait_for_events()
            old.start()
            demote(sentinels, old)
        _, violations = watched.finish(losses)

    assert violations == []
    assert watched.streams_opened() == 1


def demote(sentinels: Sentinels, old: Node) -> None:
    """Do at once what the sentinels do some ten seconds after a former master is back: make it a replica."""
    client = old.client()
    client.replicaof(HOST, sentinels.master().port)  # type: ignore[no-untyped-call]
    client.client_kill_filter(_type="normal")

    def is_replica() -> bool:
        replication = old.client().info("replication")
        if replication["role"] == "master":  # a sentinel that had not heard of the failover has made it one again
            old.client().replicaof(HOST, sentinels.master().port)  # type: ignore[no-untyped-call]
        return bool(replication.get("master_link_status") == "up")

    wait_until(is_replica, "it is a replica")


def test_watchers_follow_moving_slots_and_a_failover_in_a_cluster(tmp_path: Path) -> None:
    """The slots of the queue and of watched streams go to other masters; then the queue's master is killed."""
    with (
        Cluster(tmp_path / "nodes", random.randrange(10_000, 20_000)) as cluster,
        scene(cluster.url, tmp_path, lease_seconds=LONG_LEASE_SECONDS) as watched,
    ):
        losses, deadline = list[Loss](), time.monotonic() + SECONDS
        while seconds_left(deadline) or not losses:
            for key in (keys.QUEUE, *(keys.stream(watcher.task_id or "") for watcher in watched.singles[-5:])):
                masters = [cluster.master_of(of) for of in ("a", "b", "c")]  # which are in the slots of three masters
                cluster.move_slot(key, next(node for node in masters if node is not cluster.master_of(key)))
            watched.wait_for_events()
            old, killed = cluster.master_of(keys.QUEUE), time.monotonic()
            replica = cluster.replica_of(old)
            old.stop(signal.SIGKILL)
            wait_until(lambda replica=replica: is_master(replica), "the replica is the master")  # type: ignore[misc]
            cluster.wait_until_healthy()
            losses.append(Loss(killed - LAG_SECONDS, killed, time.monotonic() + LONG_LEASE_SECONDS))
            watched.wait_for_events()
            old.start()
            cluster.wait_until_healthy()
        _, violations = watched.finish(losses)

    assert violations == []
    assert watched.streams_opened() == 1


def is_master(node: Node) -> bool:
    with contextlib.suppress(RedisError):
        return bool(node.client().info("replication")["role"] == "master")
    return False


# -- rights -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_dashboard_whose_user_lacks_rights_says_so_once(valkey: Server, script: Callable[..., Any]) -> None:
    """NOPERM: one line, however often it tries again, and no traceback; once it has the rights it needs no restart."""
    admin, port = valkey.client(), free_port()
    admin.execute_command("ACL", "SETUSER", "nobody", "reset", "on", ">p", "+ping")
    process = script(valkey.url.replace("//", "//nobody:p@"), "dashboard.py", "--port", str(port))
    wait_until(
        lambda: admin.info("commandstats").get("cmdstat_time", {}).get("rejected_calls", 0) >= 4, "it was refused often"
    )
    admin.execute_command("ACL", "SETUSER", "nobody", "allkeys", "allchannels", "+@all")
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200, "it works")
    process.terminate()
    _, said = process.communicate(timeout=60)

    address, *refusal = said.splitlines()
    assert address.startswith("http://")
    assert len(refusal) == 1 and "no permissions to run the 'time' command). Check the user" in refusal[0]
