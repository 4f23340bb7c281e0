"""Load for the scenarios: a thread that puts, workers that can be killed and stopped, and a watcher.

$CHAOS_SECONDS says for how long each scenario breaks things. `make chaos` sets it and runs them all, on both engines;
`make test` runs one of each kind (marked smoke) for a second.
(No conftest.py of its own: tests import names from the one above by `from conftest import …`.)
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from conftest import ROOT, Server, wait_until
from history import History, Put, Seen, Step

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, connect
from task_streams import NoSuchTask, TaskQueue
from task_streams.reader import BLOCK_SECONDS, follow

SECONDS = float(os.environ.get("CHAOS_SECONDS", "1"))
PROGRAM = "tests/chaos/chaos_program.py"
LEASE_SECONDS = 1.0
MOST_WAITING = 60  # tasks put and not yet ended, beyond which the putter waits: the end must come soon
DRAIN_SECONDS = 180.0


def seconds_left(deadline: float) -> bool:
    """Say whether a scenario goes on breaking things: while seconds_left(deadline)."""
    return time.monotonic() < deadline


@contextlib.contextmanager
def full_memory(server: Server) -> Iterator[None]:
    """Refuse every write (noeviction)."""
    client = server.client()
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 10_000)
    yield
    client.config_set("maxmemory", 0)


@contextlib.contextmanager
def replica(server: Server) -> Iterator[None]:
    """Make it a replica, read-only, whose master is away."""
    client = server.client()
    client.replicaof("127.0.0.1", "1")
    yield
    client.replicaof("NO", "ONE")


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


class Load:
    """Puts tasks, lets workers do them and watches some, until `finish` says what it all came to.

    with Load(server.url, tmp_path) as load:
        ...break things...
        history = load.finish()
    assert check(history) == []
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        *,
        workers: int = 2,
        concurrency: int = 4,
        lease_seconds: float = LEASE_SECONDS,
        steps: int = 3,
        step_seconds: float = 0.02,
        all_complete: bool = False,
        client: Client | None = None,
    ) -> None:
        """Of the tasks some fail once, some for good, and some are cancelled, unless `all_complete`.

        `client`: of the putter, the watcher and the final look, where a URL does not say it (a cluster).
        """
        self.url, self.directory = url, directory
        self.options = ["--concurrency", str(concurrency), "--lease", str(lease_seconds)]
        self.data = {"steps": steps, "seconds": step_seconds}
        self.all_complete = all_complete
        self.client = client or connect(url)
        self.queue = TaskQueue(self.client)
        self.history = History()
        self.refused = 0  # puts that raised: nothing was promised
        self.trouble: list[BaseException] = []  # that ended the putter or the watcher
        self.stop_putting = threading.Event()
        self.stop_watching = threading.Event()
        self.to_watch: SimpleQueue[str] = SimpleQueue()
        self.watching: dict[str, str] = {}  # cursors, of the watcher's thread only
        self.workers: list[subprocess.Popen[bytes]] = []
        self.logs: dict[int, Path] = {}  # process id -> what it wrote to stderr
        self.started = 0
        self.putter = threading.Thread(target=self._guard, args=(self._put,), daemon=True)
        self.watcher = threading.Thread(target=self._guard, args=(self._watch,), daemon=True)
        self.wanted_workers = workers

    def __enter__(self) -> "Load":
        for _ in range(self.wanted_workers):
            self.start_worker()
        self.putter.start()
        self.watcher.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop_putting.set()
        self.stop_watching.set()
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait(timeout=60)

    # -- workers ------------------------------------------------------------------------------------------------

    def start_worker(self, *options: str, url: str = "", env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one more worker, with a journal and a log of its own in the directory."""
        self.started += 1
        journal, said = self.directory / f"journal-{self.started}", self.directory / f"said-{self.started}"
        journal.touch()
        with said.open("wb") as stderr:
            worker = subprocess.Popen(
                [sys.executable, PROGRAM, str(journal), *self.options, *options],
                cwd=ROOT,
                env={**os.environ, "REDIS_URL": url or self.url, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        self.workers.append(worker)
        self.logs[worker.pid] = said
        return worker

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill -9 a worker; where it had gone by itself, that is the code's fault."""
        never_began = worker.poll() == 1 and "cannot reach Redis" in self.last_words(worker)
        assert worker.poll() in (None, -signal.SIGKILL) or never_began, self.last_words(worker)
        worker.kill()
        worker.wait(timeout=60)
        self.workers.remove(worker)

    def revive(self) -> None:
        """Start again, as a service manager does, the workers that could not reach the server when they started."""
        for worker in [worker for worker in self.workers if worker.poll() is not None]:
            assert "cannot reach Redis" in self.last_words(worker), self.last_words(worker)
            self.workers.remove(worker)
            self.start_worker()

    def freeze(self, count: int) -> None:
        """Stop some workers (SIGSTOP) past their leases, then let them go on; the next time others."""
        stopped, self.workers = self.workers[:count], self.workers[::-1]
        for worker in stopped:
            worker.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * LEASE_SECONDS)
        for worker in stopped:
            worker.send_signal(signal.SIGCONT)

    def last_words(self, worker: subprocess.Popen[bytes]) -> str:
        return f"a worker left with {worker.returncode}: {self.logs[worker.pid].read_text(errors='replace')[-1000:]}"

    def said(self) -> str:
        """Return what all workers wrote to stderr."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("said-*")))

    def steps(self) -> list[Step]:
        """Return what the journals say so far."""
        return History().read_journals(self._journals()).steps

    def begun(self) -> int:
        """Return how many runs have begun."""
        return sum(step.what == "begin" for step in self.steps())

    def is_under_way(self) -> bool:
        """Say whether all workers have begun something."""
        return len(self.working()) >= self.wanted_workers and self.begun() > 20

    def working(self) -> list[Path]:
        """Return the journals of the workers that have begun something."""
        return [path for path in self._journals() if path.stat().st_size]

    def _journals(self) -> list[Path]:
        return sorted(self.directory.glob("journal-*"))

    # -- putting and watching -----------------------------------------------------------------------------------

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # pytest only warns of what ends a thread
            self.trouble.append(error)
            raise

    def _put(self) -> None:
        chance = random.Random(1)
        number = 0
        while not self.stop_putting.is_set():
            number += 1
            mark = f"t{number}"
            try:
                data = {"mark": mark, **self.data, "then": self._end_of(number)}
                task = self.queue.put(data, id=f"own-{number}" if number % 7 == 0 else None)
                self.history.puts.append(Put(task.id, mark, time.monotonic()))
                if chance.random() < 0.2:
                    self.to_watch.put(task.id)
                if data["then"] == "be cancelled":
                    with contextlib.suppress(ValueError, NoSuchTask):  # it has ended, or a power cut took it
                        self.queue.cancel(task.id, "as told")
                if number % 20 == 0 and self.queue.owed() > MOST_WAITING:
                    self.stop_putting.wait(0.3)
            except REDIS_ERRORS:
                self.refused += 1
            self.stop_putting.wait(0.003)

    def _end_of(self, number: int) -> str:
        if self.all_complete:
            return "complete"
        every = {5: "raise once", 9: "give up", 13: "be cancelled"}
        return next((end for n, end in every.items() if number % n == 0), "complete")

    def _watch(self) -> None:
        """Follow a part of the tasks over one connection, from the start to their ends, whatever breaks."""
        blocking = blocking_client(self.client, BLOCK_SECONDS)
        while not self.stop_watching.is_set():
            self._watch_new()
            for task_id, event in follow(self.watching, blocking):
                if self.stop_watching.is_set():
                    break
                if event is not None and event.name == "reset":
                    self.history.watched[task_id] = []  # what was seen is no more; all comes again
                elif event is not None and event.name != "gap":  # after a loss an attempt may go on behind a hole
                    self.history.watched.setdefault(task_id, []).append(
                        Seen(event.id, time.monotonic(), event.is_terminal)
                    )
                self._watch_new()
            self.stop_watching.wait(0.02)

    def _watch_new(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                task_id = self.to_watch.get_nowait()
                if task_id not in self.watching:  # after a power cut another task may have the id
                    self.watching[task_id], self.history.watched[task_id] = "0", []

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self) -> History:
        """Stop putting, wait until nothing is owed, stop the workers, and return what came out."""
        self.stop_putting.set()
        self.putter.join(timeout=60)
        assert not self.putter.is_alive(), "put() hangs"
        wait_until(self._is_drained, "all tasks ended", DRAIN_SECONDS)
        wait_until(lambda: self.trouble or self._has_watched(), "the watcher saw every end")
        self.stop_watching.set()
        self.watcher.join(timeout=60)
        assert self.trouble == [], "the putter or the watcher failed"
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
        for worker in self.workers:
            # -SIGTERM: it had only just been started
            assert worker.wait(timeout=60) in (0, -signal.SIGTERM), self.last_words(worker)
        tracebacks = re.findall(r"Traceback .*\n(?: .*\n)+.+", self.said())
        unexpected = [text for text in tracebacks if not text.endswith("RuntimeError: once, as told")]
        assert unexpected == [], "\n".join(unexpected)
        assert len(self.history.puts) > 10, "there was no load"
        return self.history.read_server(self.client).read_journals(self._journals())

    def _has_watched(self) -> bool:
        return self.to_watch.empty() and not any(self.queue.get(task_id) for task_id in list(self.watching))

    def _is_drained(self) -> bool:
        self.revive()
        with contextlib.suppress(*REDIS_ERRORS):
            return self.queue.owed() == 0
        return False
