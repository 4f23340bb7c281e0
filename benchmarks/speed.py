"""How fast the queue and its streams are, as ratios to loops of bare Redis commands in the same round.

Usage:   python benchmarks/speed.py [--rounds N] [--only put agents] [--quick] [--json] [--write]
Needs:   Linux. It starts a server of its own, on loopback, with the embedded server's settings
See:     benchmarks/bare.py for the loops; docs/performance.md, whose table --write fills in

Each round runs every measure once: first a bare loop, then ours, so that whatever else the machine does hits both. The
table shows the medians of both sides, and the least, the median and the greatest ratio. Nothing is pinned to a core.
Each worker is a process of its own, and so is each loop that it is compared with.
"""

import argparse
import asyncio
import itertools
import json
import operator
import signal
import statistics
import sys
import time
from functools import partial, partialmethod
from typing import Any, NamedTuple

import bare
from common import apart, machine, run, server, started, wait_until, write_page

from ailf.messaging.redis import connect
from task_streams import Task, TaskLog, TaskQueue, keys, run_worker

PIPELINE = 100  # LPUSHes in a pipeline
EVENTS_A_SECOND = 20  # of each of 1,000 agents
STREAM_SECONDS = 5
QUICK = 0.01  # of the work
HEAD = "| what | beside it | bare | ours | ratio: least · median · greatest | to reach |\n|---|---|---|---|---|---|"

Sides = tuple[float, float]  # bare, ours


class Row(NamedTuple):
    what: str
    beside: str
    unit: str  # of "/s" more is better, of all others less
    target: float | None = None  # of the ratio ours / bare


MEASURES = {
    "drain_10": [
        Row("no-op tasks, concurrency 10", "BRPOP loop", "/s", 0.55),
        Row("… the server's CPU for a task", "for a BRPOP", " µs"),
    ],
    "drain_100": [
        Row("no-op tasks, concurrency 100", "BRPOP loop", "/s", 0.8),
        Row("… the server's CPU for a task, concurrency 100", "for a BRPOP", " µs", 3.33),  # 100 where BRPOP costs 30
    ],
    "start": [Row("put until the handler begins, p50", "LPUSH until BRPOP has it", " ms", 2.1)],
    "put": [Row("put, one by one", "LPUSH", "/s", 0.55)],
    "put_many": [Row("put_many", f"LPUSH in pipelines of {PIPELINE}", "/s", 0.35)],
    "add": [Row("events of one agent", "XADD, redis.asyncio", "/s", 0.9)],
    "add_50": [Row("events of 50 agents in one worker", "XADD in pipelines of 50", "/s", 0.5)],
    "sleep": [Row("1,000 tasks that sleep 100 ms, concurrency 1,000", "1 s", " s", 1.3)],
    "agents": [
        Row(f"1,000 agents in one worker, {EVENTS_A_SECOND} events a second each", "bare pipe", "/s", 0.7),
        Row("… until an event is stored, p99", "bare pipe", " ms"),
        Row("… peak memory of the worker", "bare pipe", " MB"),
        Row("… CPU of the worker", "bare pipe", " %"),
    ],
}


# -- workers, each in a process of its own ------------------------------------------------------------------------


BEGAN: list[float] = []  # when the handler began with each task that asks "when", by the clock of all processes


async def do(task: Task, _log: TaskLog) -> None:
    """Do nothing; or sleep as long as the task says; or note the time; or stop the worker."""
    if task.data == "stop":
        signal.raise_signal(signal.SIGTERM)
    elif task.data == "when":
        BEGAN.append(time.monotonic())
    elif task.data:
        await asyncio.sleep(task.data)


def work(url: str, concurrency: int, burst: bool = True) -> list[float]:
    run_worker(do, concurrency=concurrency, burst=burst, url=url)
    return BEGAN


def stream(url: str, agents: int, events: int, pace: int = 0) -> list[float]:
    """Be a worker whose tasks are agents that append events; return their figures."""
    crowd, numbers = bare.Agents(agents, events, pace), itertools.count()

    async def handle(_task: Task, log: TaskLog) -> None:
        await crowd.run(next(numbers), partial(log.add, "llm_delta", text=bare.TEXT))

    run_worker(handle, concurrency=agents, burst=True, url=url)
    return crowd.figures()


# -- the measures -------------------------------------------------------------------------------------------------


class Bench:
    """A server, and a share of the work to do on it. Each measure takes one round and returns the sides of its rows."""

    def __init__(self, url: str, share: float) -> None:
        self.url, self.share = url, share
        self.client = connect(url)
        self.queue = TaskQueue(self.client)

    def many(self, count: int) -> int:
        return max(20, int(count * self.share))

    def drain(self, concurrency: int) -> list[Sides]:
        count = self.many(10_000)
        tasks = self.queue.put_many([None] * count)
        self.client.copy(keys.QUEUE, bare.LIST)  # the same elements
        before = self.server_cpu_us()
        popped = apart(bare.pop, self.url, count)
        between = self.server_cpu_us()
        apart(work, self.url, concurrency)
        after = self.server_cpu_us()
        done = count / self.seconds_of(tasks)
        return [(popped, done), ((between - before) / count, (after - between) / count)]

    def server_cpu_us(self) -> float:
        cpu = self.client.info("cpu")
        return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"]) * 1e6

    def seconds_of(self, tasks: list[Task]) -> float:
        """Return the seconds from the first claim to the last end, by the server's clock."""
        assert int(self.client.hget(keys.TOTALS, "completed")) == len(tasks)
        first_ms = int(self.client.hget(keys.record(tasks[0].id), "started_at"))
        last_ms = int(self.client.xrevrange(keys.FINISHED, count=1)[0][0].split("-")[0])
        return max(1, last_ms - first_ms) / 1000

    drain_10, drain_100 = partialmethod(drain, 10), partialmethod(drain, 100)

    def start(self) -> list[Sides]:
        pushed, put = [], []
        with started(bare.pop_until_stop, self.url) as popper, started(work, self.url, 10, False) as worker:
            for _ in range(self.many(300)):
                self.wait_until_both_wait()
                pushed.append(time.monotonic())
                self.client.lpush(bare.LIST, bare.ELEMENT)
                self.wait_until_both_wait()
                put.append(time.monotonic())
                self.queue.put("when")
            self.client.lpush(bare.LIST, "stop")
            self.queue.put("stop")
            waits = [map(operator.sub, popper(), pushed), map(operator.sub, worker(), put)]
        bare_ms, ours_ms = (1000 * statistics.median(side) for side in waits)
        return [(bare_ms, ours_ms)]

    def wait_until_both_wait(self) -> None:
        wait_until(lambda: self.client.info("clients")["blocked_clients"] == 2, "both sides wait for an element")

    def put(self) -> list[Sides]:
        count = self.many(3000)
        pushed = bare.per_second(count, lambda: self.client.lpush(bare.LIST, bare.ELEMENT))
        return [(pushed, bare.per_second(count, lambda: self.queue.put(None)))]

    def put_many(self) -> list[Sides]:
        data = [None] * self.many(20_000)
        pushed = bare.push_in_pipelines(self.client, len(data), PIPELINE)
        return [(pushed, bare.per_second(1, lambda: self.queue.put_many(data)) * len(data))]

    def add(self) -> list[Sides]:
        count = self.many(10_000)
        self.queue.put(None)
        return [(apart(bare.add_one_by_one, self.url, count)[0], apart(stream, self.url, 1, count)[0])]

    def add_50(self) -> list[Sides]:
        agents, events = 50, self.many(1000)
        self.queue.put_many([None] * agents)
        added = apart(bare.add_in_pipelines, self.url, agents, events)
        return [(added, apart(stream, self.url, agents, events)[0])]

    def sleep(self) -> list[Sides]:
        tasks = self.queue.put_many([0.1] * self.many(1000))
        apart(work, self.url, len(tasks))
        return [(1.0, self.seconds_of(tasks))]

    def agents(self) -> list[Sides]:
        agents, events = self.many(1000), self.many(STREAM_SECONDS * EVENTS_A_SECOND)
        self.queue.put_many([None] * agents)
        added = apart(bare.add_through_pipe, self.url, agents, events, EVENTS_A_SECOND)
        return list(zip(added, apart(stream, self.url, agents, events, EVENTS_A_SECOND), strict=True))


# -- showing ------------------------------------------------------------------------------------------------------


def summary(row: Row, rounds: list[Sides]) -> dict[str, Any]:
    """Return what the rounds of a row say."""
    bare_side, ours = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratios = [ours / bare_side for bare_side, ours in rounds]
    middle, reached = round(statistics.median(ratios), 2), None
    if row.target is not None:
        reached = middle >= row.target if row.unit == "/s" else middle <= row.target
    return {
        **row._asdict(),
        "bare": bare_side,
        "ours": ours,
        "ratios": [min(ratios), middle, max(ratios)],
        "reached": reached,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the page's table."""
    sides = [f"{row[side]:,.{0 if row[side] >= 100 else 2}f}{row['unit']}" for side in ("bare", "ours")]
    ratios, target = " · ".join(f"{ratio:.2f}" for ratio in row["ratios"]), ""
    if row["target"] is not None:
        target = f"at {'least' if row['unit'] == '/s' else 'most'} {row['target']:g}"
    missed = " **missed**" if row["reached"] is False else ""
    return f"| {' | '.join([row['what'], row['beside'], *sides, ratios, target + missed])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the queue and its streams with bare Redis commands.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measure (7)")
    only = f"some of: {', '.join(MEASURES)}"
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MEASURES, default=list(MEASURES), help=only)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the work, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help="fill in the table of docs/performance.md")
    args = parser.parse_args()
    found: dict[Row, list[Sides]] = {row: [] for name in args.only for row in MEASURES[name]}
    with server() as url:
        bench = Bench(url, QUICK if args.quick else 1.0)
        where = f"{machine(bench.client)}; {args.rounds} rounds"
        for turn, name in itertools.product(range(1, args.rounds + 1), args.only):
            for row, (bare_side, ours) in zip(MEASURES[name], getattr(bench, name)(), strict=True):
                found[row].append((bare_side, ours))
                print(f"{turn} {name:10} {ours / bare_side:6.2f}  {row.what}", file=sys.stderr)
            bench.client.flushall()
    rows = [summary(row, rounds) for row, rounds in found.items()]
    text = "\n".join([f"{where}.", "", HEAD, *map(line, rows)])
    print(json.dumps({"machine": where, "rows": rows}) if args.json else text)
    if args.write:
        write_page("speed", text)
    return 0


if __name__ == "__main__":
    run(main)
