"""This queue beside others that keep their tasks in Redis: same machine, same server, same run.

Usage:   python benchmarks/peers.py [--rounds N] [--tasks N] [--only ours,rq] [--no-kill] [--json] [--write]
Needs:   nothing that runs: it starts a server of its own, on loopback; Linux. Others run where they are installed:
         pip install rq 'celery[redis]' 'dramatiq[redis]' huey taskiq taskiq-redis uvloop; pip install --no-deps arq
See:     docs/performance.md, whose table --write fills in

Each side puts tasks from one process and runs them in another, with its documented settings for many short tasks, 10 at
a time, results off. The sides take turns in rounds; a bare BRPOP loop runs before each, and a ratio is to the median of
those in the round. A task does nothing but write down when it ran, to a file, so that all are measured alike: from the
first task to the last.

kill -9: 20 tasks of one second, default settings but for 10 at a time; all processes of the worker are killed when ten
tasks have begun, and a new worker starts. Counted is what is not done 15 s later.
"""

import argparse
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from messaging import server
from speed import CONCURRENCY, PAGE, PATIENCE_SECONDS, ROOT, machine, replace_between

from ailf.messaging.redis import blocking_client, connect, embedded
from task_streams import Task, TaskLog, TaskQueue, run_worker

HERE = Path(__file__).parent
STAMP = struct.Struct("=cid")  # began or ended, number of the task, when
STAMPS = "PEERS_STAMPS"  # the environment variable that names the file
KILLED = 20  # tasks
KILLED_SECONDS = 15.0  # after which they are counted
BARE_TASKS = 5  # times as many for the bare loop, which is that much faster: else it is over in a moment
LATENCIES = 20  # a round
WARM_UP = 5  # more, not counted: they connect
QUEUE = "peers"


@cache
def stamps_file() -> int:
    return os.open(os.environ[STAMPS], os.O_WRONLY | os.O_APPEND)


def stamp(kind: bytes, number: int) -> None:
    os.write(stamps_file(), STAMP.pack(kind, number, time.monotonic()))


def task(number: int, seconds: float) -> None:
    """Be the task of every side."""
    stamp(b"b", number)
    if seconds:
        time.sleep(seconds)
        stamp(b"e", number)


async def async_task(number: int, seconds: float) -> None:
    """Be the same for those that want coroutines."""
    stamp(b"b", number)
    if seconds:
        await asyncio.sleep(seconds)
        stamp(b"e", number)


# -- the sides: how each puts a task, and how it works, until killed ----------------------------------------------


class Side:
    """One way to have tasks done. `best`: with its settings for speed, else with its defaults."""

    packages: tuple[str, ...] = ()  # the first one's version is shown
    settings = ""

    def __init__(self, url: str, best: bool) -> None:
        self.url, self.best = url, best

    def put(self, number: int, seconds: float) -> Awaitable[Any] | Any:
        raise NotImplementedError

    def work(self) -> Awaitable[Any] | Any:
        raise NotImplementedError


class Bare(Side):
    """LPUSH, and a BRPOP loop."""

    settings = "LPUSH, BRPOP, nothing else; one at a time"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        self.client = connect(url)

    def put(self, number: int, seconds: float) -> None:
        self.client.lpush(QUEUE, f'{{"id": {number}, "data": {seconds}}}')

    def work(self) -> None:
        client = blocking_client(self.client, 1)
        while True:
            if found := client.brpop([QUEUE], timeout=1):
                content = json.loads(found[1])
                task(content["id"], content["data"])


class Ours(Side):
    """This repository."""

    settings = "defaults, concurrency 10"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        self.client = connect(url)
        self.queue = TaskQueue(self.client)

    def put(self, number: int, seconds: float) -> None:
        self.queue.put([number, seconds])

    def work(self) -> None:
        def handle(one: Task, _log: TaskLog) -> None:
            task(*one.data)

        run_worker(handle, concurrency=CONCURRENCY, client=self.client)


class Rq(Side):
    packages = ("rq",)
    settings = "worker pool of 10, SimpleWorker (no fork a job), result_ttl 0"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        from redis import Redis
        from rq import Queue

        self.client = Redis.from_url(url)
        self.queue = Queue(QUEUE, connection=self.client)

    def put(self, number: int, seconds: float) -> None:
        self.queue.enqueue("peers.task", number, seconds, result_ttl=0 if self.best else None)

    def work(self) -> None:
        from rq import SimpleWorker, Worker
        from rq.worker_pool import WorkerPool

        kind = SimpleWorker if self.best else Worker
        pool = WorkerPool([self.queue], connection=self.client, num_workers=CONCURRENCY, worker_class=kind)
        pool.start(logging_level="ERROR")


class Celery(Side):
    packages = ("celery",)
    settings = (
        "pool threads, concurrency 10, prefetch multiplier 64, ignore_result, without gossip, mingle and heartbeat"
    )

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        import celery

        self.app = celery.Celery("peers", broker=url)
        self.app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)
        if best:
            self.app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=64)
        self.task = self.app.task(task, name="task")

    def put(self, number: int, seconds: float) -> None:
        self.task.delay(number, seconds)

    def work(self) -> None:
        options = ["--pool=threads", "--without-gossip", "--without-mingle", "--without-heartbeat"] if self.best else []
        self.app.worker_main(["worker", f"--concurrency={CONCURRENCY}", "--loglevel=ERROR", *options])


class Dramatiq(Side):
    packages = ("dramatiq",)
    settings = "10 threads, dramatiq_queue_prefetch 1,000, no results"

    def __init__(self, url: str, best: bool) -> None:
        if best:
            os.environ["dramatiq_queue_prefetch"] = "1000"  # noqa: SIM112 (its name; read at the import)
        super().__init__(url, best)
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        self.broker = RedisBroker(url=url)
        dramatiq.set_broker(self.broker)
        self.actor = dramatiq.actor(task, queue_name=QUEUE)

    def put(self, number: int, seconds: float) -> None:
        self.actor.send(number, seconds)

    def work(self) -> None:
        import dramatiq

        dramatiq.Worker(self.broker, worker_threads=CONCURRENCY).start()
        while True:
            time.sleep(1)


class Arq(Side):
    packages = ("arq",)
    settings = "max_jobs 10, keep_result 0, poll_delay 0.01 s, queue_read_limit 100, uvloop"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        from arq.connections import RedisSettings

        self.redis_settings = RedisSettings.from_dsn(url)
        self.pool: Any = None

    async def put(self, number: int, seconds: float) -> None:
        from arq import create_pool

        self.pool = self.pool or await create_pool(self.redis_settings)
        await self.pool.enqueue_job("task", number, seconds)

    async def work(self) -> None:
        from arq import Worker, func

        async def run(_context: Any, number: int, seconds: float) -> None:
            await async_task(number, seconds)

        options = {"keep_result": 0, "poll_delay": 0.01, "queue_read_limit": 100} if self.best else {}
        worker = Worker([func(run, name="task")], redis_settings=self.redis_settings, max_jobs=CONCURRENCY, **options)
        await worker.async_run()


class Huey(Side):
    packages = ("huey",)
    settings = "10 threads, blocking, results off"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        import huey

        self.huey = huey.RedisHuey(QUEUE, url=url, **({"results": False} if best else {}))
        self.task = self.huey.task()(task)

    def put(self, number: int, seconds: float) -> None:
        self.task(number, seconds)

    def work(self) -> None:
        self.huey.create_consumer(workers=CONCURRENCY, worker_type="thread").run()


class TaskiqList(Side):
    packages = ("taskiq", "taskiq_redis")
    settings = "ListQueueBroker (no acknowledgement), max_async_tasks 10, max_prefetch 100, uvloop"

    def __init__(self, url: str, best: bool) -> None:
        super().__init__(url, best)
        self.broker = self.make_broker()
        self.task = self.broker.task("task")(async_task)
        self.started = False

    def make_broker(self) -> Any:
        from taskiq_redis import ListQueueBroker

        return ListQueueBroker(self.url)

    async def put(self, number: int, seconds: float) -> None:
        if not self.started:
            await self.broker.startup()
            self.started = True
        await self.task.kiq(number, seconds)

    async def work(self) -> None:
        from taskiq.api import run_receiver_task

        options = {"max_prefetch": 100, "validate_params": False} if self.best else {}
        await run_receiver_task(self.broker, max_async_tasks=CONCURRENCY, run_startup=True, **options)


class TaskiqStream(TaskiqList):
    settings = "RedisStreamBroker (acknowledges), max_async_tasks 10, max_prefetch 100, uvloop"

    def make_broker(self) -> Any:
        from taskiq_redis import RedisStreamBroker

        return RedisStreamBroker(self.url, consumer_id="0")  # tasks put before the worker was there count, too


SIDES: dict[str, tuple[str, type[Side]]] = {
    "bare": ("BRPOP loop", Bare),
    "ours": ("**this queue**", Ours),
    "rq": ("RQ", Rq),
    "celery": ("Celery", Celery),
    "dramatiq": ("Dramatiq", Dramatiq),
    "arq": ("arq", Arq),
    "huey": ("Huey", Huey),
    "taskiq": ("taskiq, list", TaskiqList),
    "taskiq-stream": ("taskiq, stream", TaskiqStream),
}


# -- a side's processes -------------------------------------------------------------------------------------------


def child(name: str, role: str, url: str, best: str, *args: str) -> None:
    """Be a process of a side: `work`, or `put` tasks, or put one after the other to know their `latency`."""
    logging.disable(logging.WARNING)
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    side = SIDES[name][1](url, best == "best")
    if role == "put":
        print(asyncio.run(put_all(side, int(args[0]), float(args[1]))))
    elif role == "latency":
        print(asyncio.run(put_each(side, int(args[0]))))
    elif inspect.iscoroutinefunction(side.work):
        asyncio.run(side.work())
    else:
        side.work()


async def put_one(side: Side, number: int, seconds: float = 0.0) -> None:
    result = side.put(number, seconds)
    if inspect.isawaitable(result):
        await result


async def put_all(side: Side, count: int, seconds: float) -> float:
    """Put tasks; return how many a second, but for the first, which connects."""
    await put_one(side, 0, seconds)
    began = time.monotonic()
    for number in range(1, count):
        await put_one(side, number, seconds)
    return (count - 1) / (time.monotonic() - began)


async def put_each(side: Side, count: int) -> float:
    """Put tasks, each when the last has begun; return the median of the seconds that they waited."""
    began_at = []
    for number in range(count):
        await asyncio.sleep(random.uniform(0.02, 0.06))  # not in step with who polls
        began_at.append(time.monotonic())
        await put_one(side, number)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(read_stamps()) <= number:
            if time.monotonic() > deadline:
                raise TimeoutError("the task did not begin")
            await asyncio.sleep(0.001)
    spans = [when - began_at[number] for _, number, when in read_stamps()]
    return statistics.median(spans[WARM_UP:])


def read_stamps() -> list[tuple[bytes, int, float]]:
    return list(STAMP.iter_unpack(Path(os.environ[STAMPS]).read_bytes()))


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has gone
            for one in path.read_text().split():
                found += family(int(one))
    return found


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9 a side's process and all that it started."""
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=10)


@contextmanager
def running(name: str, role: str, url: str, best: bool, *args: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a process of a side; kill it at the end."""
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import peers; peers.child(*sys.argv[1:])",
    ]
    command += [name, role, url, "best" if best else "default", *map(str, args)]
    with Path(os.environ[STAMPS] + ".log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=tempfile.gettempdir())
    try:
        yield process
    finally:
        kill(process)


def result_of(name: str, role: str, url: str, best: bool, *args: Any) -> float:
    with running(name, role, url, best, *args) as process:
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return float(out.splitlines()[-1])


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# -- measures -----------------------------------------------------------------------------------------------------


def clean(url: str) -> None:
    connect(url).flushall()
    Path(os.environ[STAMPS]).write_bytes(b"")


def drain_and_put(name: str, url: str, count: int) -> tuple[float, float]:
    """Return (tasks a second of a worker, puts a second)."""
    clean(url)
    put = result_of(name, "put", url, True, count, 0.0)
    size = STAMP.size * count
    with running(name, "work", url, True):
        if not wait_for(lambda: Path(os.environ[STAMPS]).stat().st_size >= size, PATIENCE_SECONDS):
            raise TimeoutError(f"{name} did {len(read_stamps())} of {count} tasks")
    stamps = read_stamps()
    assert {number for _, number, _ in stamps} == set(range(count))
    when = [moment for _, _, moment in stamps]
    return count / (max(when) - min(when)), put


def start_latency(name: str, url: str, count: int) -> float:
    """Return the seconds from before put to the task's first line, worker idle (median)."""
    clean(url)
    with running(name, "work", url, True):
        return result_of(name, "latency", url, True, count + WARM_UP)


def not_done_after_kill(name: str, url: str) -> int:
    """Return how many of KILLED tasks are not done KILLED_SECONDS after all processes of their worker were killed."""
    clean(url)
    result_of(name, "put", url, False, KILLED, 1.0)
    with running(name, "work", url, False) as worker:
        if not wait_for(lambda: len(read_stamps()) >= CONCURRENCY, PATIENCE_SECONDS):
            raise TimeoutError(f"{name} did not begin {CONCURRENCY} tasks")
        kill(worker)
    with running(name, "work", url, False):
        wait_for(lambda: done() == KILLED, KILLED_SECONDS)
    return KILLED - done()


def done() -> int:
    return len({number for kind, number, _ in read_stamps() if kind == b"e"})


def version(side: type[Side]) -> str | None:
    """Return the version of what a side needs, '' where it needs nothing, None where it is not installed."""
    if any(importlib.util.find_spec(package) is None for package in side.packages):
        return None
    return importlib.metadata.version(side.packages[0]) if side.packages else ""


def measure(names: list[str], url: str, rounds: int, count: int, with_kill: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in ("drain", "put", "start")} for name in names}
    ratios: dict[str, dict[str, list[float]]] = {name: {key: [] for key in ("drain", "put")} for name in names}
    for turn in range(rounds):
        bare: dict[str, list[float]] = {"drain": [], "put": []}
        for name in names:
            for key, value in zip(bare, drain_and_put("bare", url, BARE_TASKS * count), strict=True):  # next to each
                bare[key].append(value)
            drain, put = (bare["drain"][-1], bare["put"][-1]) if name == "bare" else drain_and_put(name, url, count)
            for key, value in (("drain", drain), ("put", put), ("start", start_latency(name, url, LATENCIES))):
                found[name][key].append(value)
            print(f"{turn + 1} {name:14} {drain:8.0f}/s, bare {bare['drain'][-1]:8.0f}/s", file=sys.stderr)
        for name in names:
            for key, values in bare.items():
                ratios[name][key].append(found[name][key][-1] / statistics.median(values))
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = {key: statistics.median(values) for key, values in found[name].items()}
        for key, values in ratios[name].items():
            results[name][f"{key}_ratios"] = [min(values), statistics.median(values), max(values)]
        results[name]["not_done"] = not_done_after_kill(name, url) if with_kill and name != "bare" else None
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | version | drained a second | to the BRPOP loop: least · median · greatest | put a second | to LPUSH "
        f"| start, p50 | of {KILLED} not done {KILLED_SECONDS:.0f} s after kill -9 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, side) in SIDES.items():
        if name not in results:
            lines.append(f"| {title} | {'not installed' if version(side) is None else 'not run'} |{' |' * 6}")
            continue
        found = results[name]
        ratios = " · ".join(f"{ratio:.2f}" for ratio in found["drain_ratios"])
        lost = "" if found["not_done"] is None else str(found["not_done"])
        cells = [title, version(side), f"{found['drain']:,.0f}", ratios, f"{found['put']:,.0f}"]
        cells += [f"{found['put_ratios'][1]:.2f}", f"{found['start'] * 1000:.1f} ms", lost]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    settings = [f"- {SIDES[name][0].strip('*')}: {SIDES[name][1].settings}" for name in results]
    return "\n".join([*lines, "", "Settings of the speeds (kill -9: defaults, 10 at a time):", "", *settings])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this queue with others that are installed.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--tasks", type=int, default=5000, help="tasks a turn (5000)")
    parser.add_argument("--only", help=f"some of: {', '.join(SIDES)} (the BRPOP loop always runs)")
    parser.add_argument("--no-kill", action="store_true", help="do not kill workers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    asked = ["bare", *args.only.split(",")] if args.only else list(SIDES)
    if unknown := set(asked) - set(SIDES):
        parser.error(f"no such side: {', '.join(sorted(unknown))}")
    names = [name for name in SIDES if name in asked and version(SIDES[name][1]) is not None]
    with tempfile.TemporaryDirectory() as folder, server(*embedded.SETTINGS) as url:
        os.environ[STAMPS] = str(Path(folder) / "stamps")
        info = connect(url).info("server")
        where = f"{machine()}; server {info.get('valkey_version', info['redis_version'])}; redis-py "
        where += importlib.metadata.version("redis")
        try:
            results = measure(names, url, args.rounds, args.tasks, not args.no_kill)
        except (TimeoutError, ValueError, IndexError, subprocess.TimeoutExpired):
            print(Path(os.environ[STAMPS] + ".log").read_text()[-5000:], file=sys.stderr)
            raise
    if args.json:
        versions = {name: version(side) for name, (_, side) in SIDES.items()}
        print(json.dumps({"machine": where, "rounds": args.rounds, "versions": versions, "results": results}))
        return 0
    text = f"{where}; {args.rounds} rounds of {args.tasks:,} tasks.\n\n{table(results)}"
    print(text)
    if args.write:
        PAGE.write_text(replace_between(PAGE.read_text(), "peers", text))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
