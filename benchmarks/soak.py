"""Minutes of steady work, to see that memory stays flat: of the workers, of the dashboard, and of the server.

Usage:   python benchmarks/soak.py [--seconds N] [--rate N] [--watchers N] [--json]
Needs:   nothing that runs: it starts a server, two workers and a dashboard of its own, on loopback, and ends them
See:     docs/guarantees.md

A producer puts tasks at a steady rate, agents add six events to each, and watchers come and go at the dashboard. Every
few seconds the memory of each process is written down. The first part is not counted: until caches are warm, and what
is kept of ended tasks has reached its limits. Those limits are shorter here than by default, or it would take two
days: streams and records live for seconds, and the lists of recent, ended and given-up tasks keep a thousand.

The exit code is 1 where the median of the last quarter is more than 10 % and 5 MB above that of the first.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from messaging import server
from redis import Redis
from watchers import memory_kib, program

from ailf.messaging.redis import connect
from task_streams import PermanentFailure, Task, TaskLog, TaskQueue, keys, queue, run_worker

SECONDS, LEAST_SECONDS, MOST_SECONDS = 600, 6, 3600
RATE = 20.0  # tasks a second
WATCHERS = 50
WORKERS, CONCURRENCY = 2, 10
SAMPLES = 120  # in all
WARM_SHARE = 0.2  # of the time is not counted
KEPT_SECONDS = 20  # a stream after its end, less in a short run; a record twice as long, as by default
LEAST_KEPT_SECONDS = 3
KEPT_TASKS = 1_000  # recent, ended, given up
EVENT_SECONDS = 0.04  # an agent's pause before each of its events
WATCH_SECONDS = 5.0  # the longest that a watcher stays
STOP_SECONDS = 30.0
GROWTH_SHARE, GROWTH_BYTES = 0.1, 5_000_000  # more than both is too much
SPAWN = get_context("spawn")  # a process that shares nothing with this one, as one that was started by hand


# -- the work ---------------------------------------------------------------------------------------------------


def shorten(kept_seconds: float) -> None:
    """Let the queue of this process keep less of ended tasks."""
    queue.RECORD_TTL_SECONDS = int(2 * kept_seconds)
    queue.RECENT_TASKS = queue.FINISHED_TASKS = queue.DEAD_LETTERS = KEPT_TASKS


def work(url: str, kept_seconds: float) -> None:
    """Be a worker whose agents do nothing but report, and now and then fail."""
    shorten(kept_seconds)

    def handle(task: Task, log: TaskLog) -> dict[str, Any]:
        log.ttl_seconds = kept_seconds
        call = {"call_id": f"call-{task.attempt}", "tool": "data_processor", "action": "describe"}
        events: list[tuple[str, dict[str, Any]]] = [
            ("chain_of_thought", {"step": "choosing_tool", "prompt": task.data["text"], "thought": "so " * 40}),
            ("tool_usage", {**call, "status": "started", "arguments": {"file": "sales.csv"}}),
            ("tool_usage", {**call, "status": "completed", "result": {"rows": 12, "text": "x" * 200}}),
            ("llm_delta", {"text": "word " * 20}),
            ("llm_response", {"model": "soak", "response": "word " * 60}),
            ("progress", {"percent": 100, "step": "done"}),
        ]
        for name, fields in events:
            time.sleep(EVENT_SECONDS)
            log.add(name, **fields)
        if task.data["number"] % 50 == 0 and task.failures == 0:
            raise RuntimeError("once, so that errors are a part of it")
        if task.data["number"] % 70 == 0:
            raise PermanentFailure("for good, so that there are dead letters")
        return {"summary": "y" * 100}

    logging.getLogger("task_streams.worker").setLevel(logging.CRITICAL)  # no traceback of what is meant to fail
    run_worker(handle, concurrency=CONCURRENCY, client=connect(url))


class Producer(threading.Thread):
    """Puts tasks at a steady rate until it is stopped."""

    def __init__(self, url: str, rate: float) -> None:
        super().__init__(daemon=True)
        self.queue, self.rate = TaskQueue(connect(url)), rate
        self.ids: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        while not self.stop.is_set():
            number = len(self.ids) + 1
            self.ids.append(self.queue.put({"type": "soak", "number": number, "text": "z" * 100}).id)
            self.stop.wait(max(0.0, began + number / self.rate - time.monotonic()))


class Watchers(threading.Thread):
    """People who look at one task, or at all, for a while, close the page, and open another one."""

    def __init__(self, port: int, count: int, producer: Producer) -> None:
        super().__init__(daemon=True)
        self.port, self.count, self.producer = port, count, producer
        self.stop = threading.Event()
        self.connections = self.events = self.refused = 0

    def run(self) -> None:
        asyncio.run(self._watch_all())

    async def _watch_all(self) -> None:
        watchers = [asyncio.create_task(self._come_and_go(number)) for number in range(self.count)]
        while not self.stop.is_set():
            await asyncio.sleep(0.1)
        for watcher in watchers:
            watcher.cancel()

    async def _come_and_go(self, number: int) -> None:
        chance = random.Random(number)
        while True:
            path = "/api/events"
            if number % 10 and self.producer.ids:
                path = f"/api/tasks/{chance.choice(self.producer.ids[-40:])}/events"
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


# -- measuring --------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One figure over time."""

    title: str
    read: Callable[[], int]
    is_memory: bool = True
    values: list[int] = field(default_factory=list)

    def result(self) -> dict[str, float | bool]:
        """Compare the last quarter with the first, without the part that is not counted."""
        counted = self.values[int(len(self.values) * WARM_SHARE) :]
        quarter = max(1, len(counted) // 4)
        first, last = statistics.median(counted[:quarter]), statistics.median(counted[-quarter:])
        has_grown = self.is_memory and last - first > max(GROWTH_BYTES, GROWTH_SHARE * first)
        return {"first": first, "last": last, "greatest": max(self.values), "has_grown": has_grown}


def measure(seconds: float, rate: float, watchers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Let them work for so long; return the figures."""
    kept_seconds = min(KEPT_SECONDS, max(LEAST_KEPT_SECONDS, seconds / 20))
    shorten(kept_seconds)
    with ExitStack() as stack:
        url = stack.enter_context(server())
        redis: Redis = connect(url)
        workers = [SPAWN.Process(target=work, args=(url, kept_seconds), daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
            stack.callback(worker.kill)
        pid, port = stack.enter_context(program(url, "dashboard.py"))
        producer = Producer(url, rate)
        people = Watchers(port, watchers, producer)
        series = [Series(f"worker {n}", lambda w=w: memory_kib(w.pid) * 1024) for n, w in enumerate(workers, 1)]
        series += [
            Series("dashboard", lambda: memory_kib(pid) * 1024),
            Series("server (used_memory)", lambda: redis.info("memory")["used_memory"]),
            Series("keys in the server", redis.dbsize, is_memory=False),
            Series("connections to the server", lambda: redis.info("clients")["connected_clients"], is_memory=False),
        ]
        producer.start()
        people.start()
        began = time.monotonic()
        for number in range(1, SAMPLES + 1):
            time.sleep(max(0.0, began + number * seconds / SAMPLES - time.monotonic()))
            for one in series:
                one.values.append(one.read())
            if number % (SAMPLES // 20) == 0:
                memory = ", ".join(f"{one.title} {one.values[-1] / 1e6:.1f}" for one in series if one.is_memory)
                say(f"{time.monotonic() - began:4.0f} s  {len(producer.ids):,} tasks; MB: {memory}")
        for thread in (producer, people):
            thread.stop.set()
            thread.join(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while producer.queue.owed() and time.monotonic() < deadline:
            time.sleep(0.1)
        owed = producer.queue.owed()
        for worker in workers:
            worker.terminate()
            worker.join(STOP_SECONDS)
        return {
            "seconds": seconds,
            "tasks": len(producer.ids),
            "owed": owed,
            "ended": {status: int(count) for status, count in redis.hgetall(keys.TOTALS).items()},
            "connections_of_watchers": people.connections,
            "refused": people.refused,
            "events_to_watchers": people.events,
            "memory": {one.title: one.result() for one in series if one.is_memory},
            "counts": {one.title: one.result() for one in series if not one.is_memory},
            "is_flat": not any(one.result()["has_grown"] for one in series),
        }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':28} {'first quarter':>14} {'last quarter':>14} {'greatest':>14}"]
    for title, one in results["memory"].items():
        cells = " ".join(f"{one[name] / 1e6:11.1f} MB" for name in ("first", "last", "greatest"))
        change = f"{one['last'] / one['first'] - 1:+8.1%}"
        lines.append(f"{title:28} {cells} {change}{'   has grown' if one['has_grown'] else ''}")
    for title, one in results["counts"].items():
        lines.append(f"{title:28} " + " ".join(f"{one[name]:14,.0f}" for name in ("first", "last", "greatest")))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Work for minutes, and see that memory stays flat.")
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help=f"how long, {LEAST_SECONDS} to {MOST_SECONDS} ({SECONDS})")
    add("--rate", type=float, default=RATE, help=f"tasks a second ({RATE:g})")
    add("--watchers", type=int, default=WATCHERS, help=f"who come and go ({WATCHERS})")
    add("--json", action="store_true", help="one JSON object; progress goes to stderr")
    args = parser.parse_args()
    if not LEAST_SECONDS <= args.seconds <= MOST_SECONDS or not 0 < args.rate <= 200 or not 0 <= args.watchers <= 500:
        parser.error(f"--seconds is {LEAST_SECONDS} to {MOST_SECONDS}, --rate up to 200, --watchers up to 500")

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    results = measure(args.seconds, args.rate, args.watchers, say)
    if args.json:
        print(json.dumps(results))
    else:
        print(f"\n{table(results)}\n")
        ended = ", ".join(f"{count:,} {status}" for status, count in sorted(results["ended"].items()))
        print(f"{results['tasks']:,} tasks put: {ended} (some fail as intended), {results['owed']} not ended")
        print(f"{results['connections_of_watchers']:,} watchers came and went, and saw ", end="")
        print(f"{results['events_to_watchers']:,} events; {results['refused']} were refused")
        print("memory is flat" if results["is_flat"] else "memory has grown")
    return 0 if results["is_flat"] and not results["owed"] else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
