"""Minutes of steady work, to see that memory stays flat: of the workers, of the dashboard, and of the server.

Usage:   python benchmarks/soak.py [--seconds N] [--rate N] [--watchers N] [--quick] [--json]
Needs:   Linux. It starts a server, two workers and a dashboard of its own, on loopback, and ends them
See:     docs/guarantees.md

A producer puts tasks at a steady rate, agents add six events to each, and watchers come and go at the dashboard. Every
few seconds the memory of each process is written down. The first part is not counted: until caches are warm, and what
is kept of ended tasks has reached its limits. Those limits are shorter here than by default, or it would take two
days: streams and records live for seconds, and the lists of recent, ended and given-up tasks keep a thousand.

The exit code is 1 if the median of the last quarter is more than 10 % and 5 MB above that of the first.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from common import SPAWN, memory_mb, program, run, server

from ailf.messaging.redis import connect
from task_streams import PermanentFailure, Task, TaskLog, TaskQueue, claims, keys, queue, run_worker

WORKERS, CONCURRENCY = 2, 10
SAMPLES = 120  # in all
WARM_SHARE = 0.2  # of the time is not counted
KEPT_SECONDS = 20  # a stream after its end; a record twice as long, as by default
KEPT_TASKS = 1_000  # recent, ended, given up
EVENT_SECONDS = 0.04  # an agent's pause before each of its events
WATCH_SECONDS = 5.0  # the longest that a watcher stays
STOP_SECONDS = 30.0
GROWTH_SHARE, GROWTH_MB = 0.1, 5.0  # more than both is too much
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("chain_of_thought", {"step": "choosing_tool", "prompt": "z" * 100, "thought": "so " * 40}),
    ("tool_usage", {"call_id": "1", "tool": "data", "status": "started", "arguments": {"file": "sales.csv"}}),
    ("tool_usage", {"call_id": "1", "tool": "data", "status": "completed", "result": {"text": "x" * 200}}),
    ("llm_delta", {"text": "word " * 20}),
    ("llm_response", {"model": "soak", "response": "word " * 60}),
    ("progress", {"percent": 100, "step": "done"}),
]


async def handle(task: Task, log: TaskLog) -> dict[str, Any]:
    """Be an agent that does nothing but report, and now and then fails."""
    for name, fields in EVENTS:
        await asyncio.sleep(EVENT_SECONDS)
        await log.add(name, **fields)
    if task.data["number"] % 50 == 0 and task.failures == 0:
        raise RuntimeError("once, so that errors are a part of it")
    if task.data["number"] % 70 == 0:
        raise PermanentFailure("for good, so that there are dead letters")
    return {"summary": "y" * 100}


def keep_less(kept_seconds: int) -> None:
    """Let this process keep less of ended tasks."""
    limits = dict.fromkeys(("RECENT_TASKS", "FINISHED_TASKS", "DEAD_LETTERS"), KEPT_TASKS)
    limits |= {"TTL_SECONDS": kept_seconds, "RECORD_TTL_SECONDS": 2 * kept_seconds}
    assert limits.keys() <= vars(claims).keys()
    for module in (claims, queue):
        vars(module).update(limits)


def work(url: str, kept_seconds: int) -> None:
    keep_less(kept_seconds)
    logging.getLogger("task_streams.worker").setLevel(logging.CRITICAL)  # no traceback of what is meant to fail
    run_worker(handle, concurrency=CONCURRENCY, url=url)


class Watchers:
    """People who look at one task, or at all, for a while, close the page, and open another one."""

    def __init__(self, port: int, ids: list[str]) -> None:
        self.port, self.ids = port, ids
        self.connections = self.events = self.refused = 0

    async def come_and_go(self, number: int) -> None:
        chance = random.Random(number)
        while True:
            path = "/api/events"
            if number % 10 and self.ids:
                path = f"/api/tasks/{chance.choice(self.ids[-40:])}/events"
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0.2, WATCH_SECONDS)):
                    await self._watch(path)
            await asyncio.sleep(chance.uniform(0.0, 0.5))

    async def _watch(self, path: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
            status = await reader.readline()
            self.connections += 1
            self.refused += status.split()[1:2] not in ([b"200"], [b"204"])
            while line := await reader.readline():
                self.events += line.startswith(b"data: ")
        finally:
            writer.transport.abort()  # as a closed page does: it says no goodbye


async def put_steadily(tasks: TaskQueue, ids: list[str], rate: float) -> None:
    began = time.monotonic()
    while True:
        number = len(ids) + 1
        ids.append((await asyncio.to_thread(tasks.put, {"number": number})).id)
        await asyncio.sleep(began + number / rate - time.monotonic())


async def take_samples(reads: dict[str, Callable[[], float]], seconds: float, ids: list[str]) -> dict[str, list[float]]:
    """Read each figure every few seconds; return all of them. They are shown on the way."""
    began = time.monotonic()
    samples: dict[str, list[float]] = {title: [] for title in reads}
    for number in range(1, SAMPLES + 1):
        await asyncio.sleep(began + number * seconds / SAMPLES - time.monotonic())
        for title, read in reads.items():
            samples[title].append(await asyncio.to_thread(read))
        if number % (SAMPLES // 20) == 0:
            now = ", ".join(f"{title} {values[-1]:,.1f}" for title, values in samples.items())
            print(f"{time.monotonic() - began:4.0f} s  {len(ids):,} tasks; {now}", file=sys.stderr)
    return samples


def compare(title: str, values: list[float]) -> dict[str, Any]:
    """Compare the last quarter with the first, without the part that is not counted."""
    counted = values[int(len(values) * WARM_SHARE) :]
    quarter = len(counted) // 4
    first, last = statistics.median(counted[:quarter]), statistics.median(counted[-quarter:])
    has_grown = title.endswith("MB") and last - first > max(GROWTH_MB, GROWTH_SHARE * first)
    return {"first": first, "last": last, "greatest": max(values), "has_grown": has_grown}


async def measure(url: str, workers: list[Any], dashboard: tuple[int, int], options: argparse.Namespace) -> Any:
    """Let them work for so long; return the figures."""
    redis, ids = connect(url), list[str]()
    tasks, (pid, port) = TaskQueue(redis), dashboard
    watchers = Watchers(port, ids)
    memory_of = {f"worker {n}, MB": worker.pid for n, worker in enumerate(workers, 1)} | {"dashboard, MB": pid}
    reads: dict[str, Callable[[], float]] = {
        **{title: partial(memory_mb, one) for title, one in memory_of.items()},
        "server, MB": lambda: redis.info("memory")["used_memory"] / 2**20,
        "keys in the server": redis.dbsize,
        "connections to the server": lambda: redis.info("clients")["connected_clients"],
    }
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(watchers.come_and_go(number)) for number in range(options.watchers)]
        runs.append(group.create_task(put_steadily(tasks, ids, options.rate)))
        samples = await take_samples(reads, options.seconds, ids)
        for run in runs:
            run.cancel()
    deadline = time.monotonic() + STOP_SECONDS
    while tasks.owed() and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    figures = {title: compare(title, values) for title, values in samples.items()}
    return {
        "seconds": options.seconds,
        "tasks": len(ids),
        "owed": tasks.owed(),
        "ended": {status: int(count) for status, count in redis.hgetall(keys.TOTALS).items()},
        "watchers": watchers.connections,
        "refused": watchers.refused,
        "events_to_watchers": watchers.events,
        "figures": figures,
        "is_flat": not any(one["has_grown"] for one in figures.values()),
    }


def text_of(results: dict[str, Any]) -> str:
    lines = [f"{'':28} {'first quarter':>14} {'last quarter':>14} {'greatest':>14}"]
    for title, one in results["figures"].items():
        cells = " ".join(f"{one[name]:14,.1f}" for name in ("first", "last", "greatest"))
        lines.append(f"{title:28} {cells}{'   has grown' if one['has_grown'] else ''}")
    ended = ", ".join(f"{count:,} {status}" for status, count in sorted(results["ended"].items()))
    lines += [
        "",
        f"{results['tasks']:,} tasks: {ended} (some fail as intended), {results['owed']} have not ended",
        f"{results['watchers']:,} watchers came and went; {results['refused']} were refused; they saw "
        f"{results['events_to_watchers']:,} events",
        "memory is flat" if results["is_flat"] else "memory has grown",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Work for minutes, and see that memory stays flat.")
    parser.add_argument("--seconds", type=float, default=600, help="how long (600)")
    parser.add_argument("--rate", type=float, default=20, help="tasks a second (20)")
    parser.add_argument("--watchers", type=int, default=50, help="people who come and go (50)")
    parser.add_argument("--quick", action="store_true", help="six seconds and ten watchers, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.watchers = 6.0, 10
    kept_seconds = min(KEPT_SECONDS, 1 + int(args.seconds / 20))
    keep_less(kept_seconds)
    with ExitStack() as stack:
        url = stack.enter_context(server())
        workers = [SPAWN.Process(target=work, args=(url, kept_seconds), daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
            stack.callback(worker.kill)
        dashboard = stack.enter_context(program(url, "dashboard.py"))
        results = asyncio.run(measure(url, workers, dashboard, args))
        for worker in workers:
            worker.terminate()
            worker.join(STOP_SECONDS)
    print(json.dumps(results) if args.json else text_of(results))
    return 0 if results["is_flat"] and not results["owed"] else 1


if __name__ == "__main__":
    run(main)
