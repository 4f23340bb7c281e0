"""How fast the queue with its streams is, as ratios against bare redis-py loops in the same run.

Usage:   python benchmarks/speed.py [--rounds N] [--only drain,put] [--quick] [--json] [--write]
Needs:   nothing that runs: it starts a server of its own, on loopback, with the embedded server's settings
See:     docs/performance.md, which --write fills in, with docs/performance.svg

Each measure is taken in rounds, in which the bare loop and ours take turns, so that whatever else the machine does hits
both. A ratio is the quotient of the two in one round; shown are the least, the median and the greatest of all rounds.
Workers are processes of their own; times across processes are of one clock (CLOCK_MONOTONIC).
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from messaging import server
from redis import Redis

from ailf.messaging.redis import blocking_client, connect, embedded
from task_streams import Task, TaskLog, TaskQueue, keys, run_worker
from task_streams.batching import SharedScript
from task_streams.lua import load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.svg"
ELEMENT = '{"id": 1, "data": null}'  # as long as the element of a no-op task
FIELDS = {"event": "progress", "timestamp": "2026-01-01T00:00:00.000Z", "attempt": "1", "seq": "1", "step": "read"}
PIPELINE = 100  # commands in a pipeline of the bare loops
CONCURRENCY = 10
AGENTS = 50
LATEST_MS = 5.0  # until the last of their events is there
SHARE = 0.3  # of a core, for each of two workers, so that they and the server have room on two cores
PERIOD_US = 10_000  # in which a worker may use its share
PATIENCE_SECONDS = 120.0  # for a process to do its part
SPAWN = multiprocessing.get_context("spawn")

ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
SIDES = ("bare", "ours")
Sides = tuple[float, float]  # bare, ours


def pin(client: Any, apart: bool = True) -> None:
    """Give the server a core of its own, and this process and its children the others; or all cores to all.

    Else the scheduler puts the server and a bare loop on one core in some rounds, where they are three times as fast
    as on two, and in others not. Two machines, or two busy cores, are the usual case.
    """
    cores = sorted(ALL_CORES)
    if len(cores) > 1:
        os.sched_setaffinity(client.info("server")["process_id"], cores[:1] if apart else cores)
        os.sched_setaffinity(0, cores[1:] if apart else cores)


# -- processes --------------------------------------------------------------------------------------------------


def without_traceback(target: Callable[..., None], *args: Any) -> None:
    """Call target in a process that Ctrl-C ends without a word, where target has no way of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    target(*args)


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Run target(pipe, *args) in a process of its own; yield the other end of its pipe."""
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=without_traceback, args=(target, theirs, *args), daemon=True)
    child.start()
    try:
        yield ours
        child.join(timeout=10)
    finally:
        child.kill()


def answer(pipe: Connection) -> Any:
    """Return what a process says, and fail where it says nothing."""
    if not pipe.poll(PATIENCE_SECONDS):
        raise TimeoutError("a process did not answer")
    return pipe.recv()


def pop_all(pipe: Connection, url: str) -> None:
    """BRPOP until nothing comes for a second; say how many a second."""
    client = blocking_client(connect(url), 1, decode_responses=False)
    client.ping()
    pipe.send("ready")
    began = last = time.monotonic()
    count = 0
    while client.brpop(["bare"], timeout=1):
        count, last = count + 1, time.monotonic()
    pipe.send(count / (last - began))


def pop_one_by_one(pipe: Connection, url: str) -> None:
    """BRPOP, and tell when: what start latency is compared with."""
    client = blocking_client(connect(url), 1, decode_responses=False)
    pipe.send("ready")
    while True:
        if (found := client.brpop(["bare"], timeout=1)) is not None:
            pipe.send(time.monotonic())
            if found[1] == b"stop":
                return


def pop_and_log(pipe: Connection, url: str) -> None:
    """BRPOP, and XADD one entry to a stream named by the element: what the first thought is compared with."""
    client = connect(url)
    blocking = blocking_client(client, 1)
    pipe.send("ready")
    while True:
        if (found := blocking.brpop(["bare"], timeout=1)) is not None:
            if found[1] == "stop":
                return
            client.xadd(found[1], FIELDS)


@contextmanager
def held_to(share: float) -> Iterator[None]:
    """Hold this process to a share of a core, by a control group of its own. Needs Linux, and root."""
    second = Path("/sys/fs/cgroup/cgroup.controllers").exists()  # version 2
    top = Path("/sys/fs/cgroup") if second else Path("/sys/fs/cgroup/cpu")
    group = top / f"speed-{os.getpid()}"
    limits = {"cpu.max": f"{round(PERIOD_US * share)} {PERIOD_US}"}
    if not second:
        limits = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(round(PERIOD_US * share))}
    group.mkdir()
    try:
        for name, limit in limits.items():
            (group / name).write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
        (top / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def peak_kb() -> int:
    """Return the most memory that this process has taken, in kB."""
    status = Path("/proc/self/status")
    if status.exists():  # subtle: ru_maxrss begins with what the process that started this one took
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # macOS: in bytes


def work(
    pipe: Connection, url: str, concurrency: int, seconds: float = 0.0, tell: bool = False, share: float = 0.0
) -> None:
    """Be a worker until no task is owed; its tasks take some seconds each. Say how much memory it took (kB)."""
    if share:
        with held_to(share):
            work(pipe, url, concurrency, seconds, tell)
        return

    def handle(task: Task, _log: TaskLog) -> None:
        if tell:
            pipe.send(time.monotonic())
        if seconds:
            time.sleep(seconds)

    logging.getLogger("task_streams").setLevel(logging.ERROR)
    client = connect(url)
    pipe.send("ready")
    while pipe.recv() != "stop":
        before = peak_kb()
        run_worker(handle, concurrency=concurrency, burst=not tell, client=client)
        pipe.send((before, peak_kb()))


@contextmanager
def worker(
    url: str, concurrency: int, seconds: float = 0.0, share: float = 0.0
) -> Iterator[Callable[[], tuple[int, int]]]:
    """Start a worker's process; yield a function that lets it work until no task is owed."""
    with process(work, url, concurrency, seconds, False, share) as pipe:
        answer(pipe)

        def go() -> tuple[int, int]:
            pipe.send("go")
            return answer(pipe)  # type: ignore[no-any-return]

        yield go
        pipe.send("stop")


# -- measures ---------------------------------------------------------------------------------------------------


class Bench:
    """A server, and how much to do on it. Each measure yields (bare, ours), once a round."""

    def __init__(self, url: str, rounds: int, share: float) -> None:
        self.url, self.rounds, self.share = url, rounds, share
        self.client = connect(url)
        self.queue = TaskQueue(self.client)

    def many(self, count: int) -> int:
        return max(20, int(count * self.share))

    def drained(self, tasks: list[Task]) -> float:
        """Return how many of these tasks were done a second, by the server's clock: first claim to last finish."""
        records = [int(self.client.hget(keys.record(task.id), "started_at")) for task in tasks[:CONCURRENCY]]
        last = int(self.client.xrevrange(keys.FINISHED, count=1)[0][0].split("-")[0])
        assert all(self.client.hget(keys.record(task.id), "status") == "completed" for task in tasks)
        return len(tasks) / ((last - min(records)) / 1000)

    def pop_bare(self, count: int) -> float:
        """Return how many elements a bare BRPOP loop in a process of its own pops a second."""
        self.push_in_pipelines(count)
        with process(pop_all, self.url) as pipe:
            answer(pipe)
            return float(answer(pipe))

    def drain(self, concurrency: int = CONCURRENCY) -> Iterator[Sides]:
        """No-op tasks a second of one worker, against BRPOPs a second."""
        count = self.many(6000)
        for _ in range(self.rounds):
            with worker(self.url, concurrency) as go:
                tasks = self.queue.put_many([None] * count)
                bare = self.pop_bare(count)
                go()
                yield bare, self.drained(tasks)

    def drain_by_two(self, share: float = 0.0) -> Iterator[Sides]:
        """No-op tasks a second of two workers, against one (the mean of both, one by one).

        On all cores; or, each held to a share of a core, beside the server's.
        """
        count = self.many(12_000)  # so that it counts little that one of two begins later
        pin(self.client, apart=bool(share))

        def drained_by(*workers: Callable[[], Any]) -> float:
            tasks = self.queue.put_many([None] * count)
            threads = [threading.Thread(target=one) for one in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return self.drained(tasks)

        with worker(self.url, CONCURRENCY, share=share) as one, worker(self.url, CONCURRENCY, share=share) as other:
            drained_by(one, other)  # once for nothing: they connect
            for _ in range(self.rounds):
                yield statistics.mean([drained_by(one), drained_by(other)]), drained_by(one, other)
        pin(self.client)

    def drain_by_two_held(self) -> Iterator[Sides]:
        """The same where there is room: each worker has a share of a core only. Nothing where that cannot be."""
        if os.access("/sys/fs/cgroup", os.W_OK):
            yield from self.drain_by_two(SHARE)
        else:
            print("drain_by_two_held: only root may hold a process to a share of a core", file=sys.stderr)

    def put(self) -> Iterator[Sides]:
        """Tasks put one by one, against LPUSH."""
        count = self.many(3000)
        for _ in range(self.rounds):
            yield (
                per_second(count, lambda: self.client.lpush("bare", ELEMENT)),
                per_second(count, lambda: self.queue.put(None)),
            )
            self.client.flushall()

    def put_many(self) -> Iterator[Sides]:
        """Tasks put by put_many, against LPUSH in pipelines of 100."""
        count = self.many(20_000)
        for _ in range(self.rounds):
            began = time.monotonic()
            self.push_in_pipelines(count)
            bare = count / (time.monotonic() - began)
            began = time.monotonic()
            self.queue.put_many([None] * count)
            yield bare, count / (time.monotonic() - began)
            self.client.flushall()

    def push_in_pipelines(self, count: int) -> None:
        for _ in range(count // PIPELINE + 1):
            with self.client.pipeline(transaction=False) as pipe:
                for _ in range(PIPELINE):
                    pipe.lpush("bare", ELEMENT)
                pipe.execute()

    def start_latency(self, quantile: int = 50) -> Iterator[Sides]:
        """Seconds from put() to the handler's first line, against LPUSH to BRPOP between two processes."""
        for _ in range(self.rounds):
            bare, ours = [], []
            with process(pop_one_by_one, self.url) as popper, process(work, self.url, CONCURRENCY, 0.0, True) as pipe:
                for one in (popper, pipe):
                    answer(one)
                pipe.send("go")
                for _ in range(self.many(300)):
                    self.wait_until_blocked(2)
                    began = time.monotonic()
                    self.client.lpush("bare", ELEMENT)
                    bare.append(answer(popper) - began)
                    self.wait_until_blocked(2)
                    began = time.monotonic()
                    self.queue.put(None)
                    ours.append(answer(pipe) - began)
                self.client.lpush("bare", "stop")
            yield (
                statistics.quantiles(bare, n=100)[quantile - 1],
                statistics.quantiles(ours, n=100)[quantile - 1],
            )

    def wait_until_blocked(self, count: int) -> None:
        """Wait until so many clients block, so that nobody is measured who has not begun to wait."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.client.info("clients")["blocked_clients"] < count:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody waits")

    def first_thought(self) -> Iterator[Sides]:
        """Seconds from put() to `started` in the hands of a watcher, against LPUSH, BRPOP, XADD, XREAD (p50)."""
        for turn in range(self.rounds):
            bare, ours = [], []
            reader = blocking_client(self.client, 5)
            with process(pop_and_log, self.url) as popper, process(work, self.url, CONCURRENCY, 0.0, True) as pipe:
                for one in (popper, pipe):
                    answer(one)
                pipe.send("go")
                for number in range(self.many(150)):
                    name = f"t{turn}-{number}"
                    found = [0.0]
                    watcher = threading.Thread(target=self.watch_bare, args=(reader, name, found))
                    bare.append(self.timed(watcher, found, lambda name=name: self.client.lpush("bare", name)))  # type: ignore[misc]
                    watcher = threading.Thread(target=self.watch_ours, args=(name, found))
                    ours.append(self.timed(watcher, found, lambda name=name: self.queue.put(None, id=name)))  # type: ignore[misc]
                    answer(pipe)
                self.client.lpush("bare", "stop")
            yield statistics.median(bare), statistics.median(ours)

    def timed(self, watcher: threading.Thread, found: list[float], put: Callable[[], Any]) -> float:
        watcher.start()
        self.wait_until_blocked(3)
        began = time.monotonic()
        put()
        watcher.join()
        return found[0] - began

    @staticmethod
    def watch_bare(reader: Redis, name: str, found: list[float]) -> None:
        reader.xread({name: "0"}, block=5000)
        found[0] = time.monotonic()

    def watch_ours(self, name: str, found: list[float]) -> None:
        log = TaskLog(name, self.client)
        assert next(log.follow(timeout_seconds=PATIENCE_SECONDS)).name == "started"
        found[0] = time.monotonic()

    def add(self) -> Iterator[Sides]:
        """Events a second of one agent, against one XADD a call."""
        count = self.many(10_000)
        for turn in range(self.rounds):
            log = TaskLog(f"lone-{turn}", self.client)
            yield (
                per_second(count, lambda: self.client.xadd("bare-stream", FIELDS, maxlen=10_000)),
                per_second(count, partial(log.add, "progress", percent=50, step="read")),
            )

    def add_together(self) -> Iterator[Sides]:
        """Events a second of 50 agents in one process, against XADD in pipelines of 100."""
        count = self.many(200)
        self.late: list[tuple[float, float]] = []
        for turn in range(self.rounds):
            began = time.monotonic()
            for _ in range(AGENTS * count // PIPELINE):
                with self.client.pipeline(transaction=False) as pipe:
                    for _ in range(PIPELINE):
                        pipe.xadd("bare-stream", FIELDS, maxlen=10_000)
                    pipe.execute()
            bare = AGENTS * count / (time.monotonic() - began)
            script = SharedScript(self.client, load(self.client, "append"))
            latencies: list[float] = []
            threads = [
                threading.Thread(target=self.add_many, args=(f"agent-{turn}-{n}", count, script, latencies))
                for n in range(AGENTS)
            ]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.late = [*self.late, (statistics.quantiles(latencies, n=1000)[-1], max(latencies))]
            yield bare, AGENTS * count / (time.monotonic() - began)

    def add_many(self, name: str, count: int, script: SharedScript, latencies: list[float]) -> None:
        log = TaskLog(name, self.client, script=script)
        for _ in range(count):
            began = time.monotonic()
            log.add("progress", percent=50, step="read")
            latencies.append(time.monotonic() - began)

    def sleepers(self) -> Iterator[Sides]:
        """Seconds for 1,000 tasks of 100 ms at concurrency 100, against the least possible, 1.0 s."""
        count = self.many(1000)
        for _ in range(self.rounds):
            with worker(self.url, 100, 0.1) as go:
                tasks = self.queue.put_many([None] * count)
                self.memory_kb = go()
                yield -(-count // 100) * 0.1, count / self.drained(tasks)


def per_second(count: int, call: Callable[[], Any]) -> float:
    began = time.monotonic()
    for _ in range(count):
        call()
    return count / (time.monotonic() - began)


# Name, what it is, what it is compared with, the ratio to reach; "at least" of speeds, "at most" of times.
MEASURES: dict[str, tuple[str, str, float, str]] = {
    "drain": ("no-op tasks, one worker, concurrency 10", "BRPOP loop", 0.5, "at least"),
    "drain_by_two": ("the same, two workers, on the cores of the server", "one worker", 1.8, "at least"),
    "drain_by_two_held": (f"two workers, each held to {SHARE} of a core", "one, held too", 1.8, "at least"),
    "put": ("put, one by one", "LPUSH", 0.7, "at least"),
    "put_many": ("put_many", "LPUSH in pipelines of 100", 0.3, "at least"),
    "start_latency": ("put to the handler's first line, p50", "LPUSH to BRPOP", 2.0, "at most"),
    "start_latency_p99": ("the same, p99", "LPUSH to BRPOP, p99", 2.0, "at most"),
    "first_thought": ("put to `started` at a watcher, p50", "LPUSH, BRPOP, XADD, XREAD", 2.0, "at most"),
    "add": ("events of one agent", "XADD", 0.8, "at least"),
    "add_together": ("events of 50 agents in one worker", "XADD in pipelines of 100", 0.3, "at least"),
    "sleepers": ("1,000 tasks of 100 ms, concurrency 100", "1.0 s", 1.05, "at most"),
}


def measure(bench: Bench, name: str) -> dict[str, Any] | None:
    """Take one measure in all rounds; None where this machine cannot."""
    steps = bench.start_latency(99) if name == "start_latency_p99" else getattr(bench, name)()
    sides = list(steps)
    if not sides:
        return None
    ratios = sorted(ours / bare for bare, ours in sides)
    _, _, target, sense = MEASURES[name]
    middle = round(statistics.median(ratios), 2)
    return {
        "bare": statistics.median(bare for bare, _ in sides),
        "ours": statistics.median(ours for _, ours in sides),
        "ratios": [ratios[0], middle, ratios[-1]],
        "reached": middle >= target if sense == "at least" else middle <= target,
    }


def against_concurrency(bench: Bench) -> list[dict[str, float]]:
    """Return, by concurrency, no-op tasks a second, and how long each was in hand (mean, ms)."""
    rows = []
    for concurrency in (1, 2, 5, 10, 20, 50, 100):
        count = bench.many(4000)
        with worker(bench.url, concurrency) as go:
            tasks = bench.queue.put_many([None] * count)
            go()
        spans = []
        for task in tasks[:: max(1, count // 500)]:
            first, last = (TaskLog(task.id, bench.client).read()[place].id for place in (0, -1))
            spans.append(int(last.split("-")[0]) - int(first.split("-")[0]))
        rows.append(
            {
                "concurrency": concurrency,
                "per_second": round(bench.drained(tasks)),
                "in_hand_ms": statistics.mean(spans),
            }
        )
        bench.client.flushall()
    return rows


# -- showing ----------------------------------------------------------------------------------------------------


def machine() -> str:
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}, Python {platform.python_version()}"


def table(results: dict[str, dict[str, Any] | None]) -> str:
    """Return the rows of the page's table."""
    lines = [
        "| what | beside it | bare | ours | ratio: least · median · greatest | to reach |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        what, beside, target, sense = MEASURES[name]
        if result is None:
            lines.append(f"| {what} | {beside} | | | | not measured |")
            continue
        sides = [
            f"{result[side]:,.0f}/s" if sense == "at least" else f"{result[side] * 1000:,.2f} ms" for side in SIDES
        ]
        ratios = " · ".join(f"{ratio:.2f}" for ratio in result["ratios"])
        goal = f"{sense} {target:g}" + ("" if result["reached"] else " **missed**")
        lines.append(f"| {' | '.join([what, beside, *sides, ratios, goal])} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, float]], caption: str) -> None:
    """Draw throughput and latency against concurrency into PLOT."""
    import matplotlib  # late: only who writes the page needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    at = [row["concurrency"] for row in rows]
    left.plot(at, [row["per_second"] for row in rows], marker="o")
    left.set(xscale="log", xlabel="concurrency", ylabel="no-op tasks a second", ylim=(0, None))
    right.plot(at, [row["in_hand_ms"] for row in rows], marker="o", color="tab:orange")
    right.set(xscale="log", xlabel="concurrency", ylabel="ms in hand (mean)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(at, [str(int(one)) for one in at])
        axes.grid(alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def replace_between(text: str, name: str, new: str) -> str:
    """Return a page with new text between its markers <!-- name --> and <!-- /name -->."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    assert re.search(pattern, text, re.DOTALL), f"the page has no marker {name}"
    return re.sub(pattern, lambda found: f"{found[1]}{new}\n{found[2]}", text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the queue and its streams with bare redis-py loops.")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    parser.add_argument("--only", help=f"some of: {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the work, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and its plot")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(MEASURES)
    if args.rounds < 1:
        parser.error("--rounds is 1 at least")
    if unknown := set(names) - set(MEASURES):
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, Any] | None] = {}
    with server(*embedded.SETTINGS) as url:
        bench = Bench(url, args.rounds, 0.01 if args.quick else 1.0)
        pin(bench.client)
        info = bench.client.info("server")
        where = f"{machine()}; the server has one of them; server {info.get('valkey_version', info['redis_version'])}"
        for name in names:
            began = time.monotonic()
            result = measure(bench, name)
            bench.client.flushall()
            results[name] = result
            if result is None:
                continue
            ratios = "".join(f"{ratio:7.2f}" for ratio in results[name]["ratios"])
            goal = f"{'' if results[name]['reached'] else 'missed: '}{MEASURES[name][3]} {MEASURES[name][2]:g}"
            print(f"{name:18} {ratios}   {goal}   ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        rows = against_concurrency(bench) if (args.write or args.json) and not args.quick else []
    notes = []
    if "add_together" in results:
        most, latest = (1000 * statistics.median(of_rounds) for of_rounds in zip(*bench.late, strict=True))
        goal = f"(at most {LATEST_MS:g}{'' if latest <= LATEST_MS else ' **missed**'})"
        notes.append(
            f"of the events of 50 agents 99.9 % were there within {most:.1f} ms, all within {latest:.1f} ms {goal}: "
            f"medians of the rounds; in the worst, {max(late for _, late in bench.late) * 1000:.1f} ms"
        )
    if "sleepers" in results:
        before, after = (kilobytes / 1024 for kilobytes in bench.memory_kb)
        notes.append(
            f"100 tasks at one time took {after - before:.0f} MB more than none; the worker had {after:.0f} MB"
        )
    if args.json:
        print(
            json.dumps(
                {"machine": where, "rounds": args.rounds, "results": results, "concurrency": rows, "notes": notes}
            )
        )
        return 0
    text = (
        f"{where}; {args.rounds} rounds.\n\n{table(results)}\n\nBesides: {'; '.join(notes)}."
        if notes
        else table(results)
    )
    print(text)
    if args.write:
        plot(rows, where)
        PAGE.write_text(replace_between(PAGE.read_text(), "speed", text))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
