"""How much memory a finished task takes until its time is over, and what it costs that a million tasks wait.

Usage:   python benchmarks/memory.py [--finished N] [--waiting N] [--quick] [--json] [--write]
Needs:   nothing that runs: it starts servers of its own, on loopback; a million waiting tasks take about 0.4 GB
See:     docs/performance.md, whose table --write fills in

A finished task has five events: started, three of progress, completed. Its bytes are what used_memory of the server has
grown by, divided by the tasks. A long stream is measured too, since smaller nodes save memory in short streams and cost
some in long ones.
"""

import argparse
import json
import statistics
import time

from common import PATIENCE_SECONDS, apart, machine, run, server, write_page
from redis import Redis

from ailf.messaging.redis import connect, embedded
from task_streams import Task, TaskLog, TaskQueue, keys, run_worker
from task_streams.leases import RECOVER_SECONDS

NODE_BYTES = (4096, 1024, 512, 256)  # of stream-node-max-bytes; the first is the server's default
FINISHED, WAITING = 5_000, 1_000_000  # tasks
SLICE = 10_000  # tasks put by one put_many
LONG = 1_000  # events of a long stream
DATA = {"kind": "summarise", "path": "sample_data/sales.csv"}

Numbers = dict[str, float]


def used(client: Redis) -> int:
    return int(client.info("memory")["used_memory"])


async def handle(task: Task, log: TaskLog) -> dict[str, str]:
    """Be a short agent: three events of progress, and a small result; or one with many events."""
    for percent in range(task.data.get("events", 3)):
        await log.add("progress", percent=percent, step="read")
    return {"summary": f"{task.data.get('path')}: 12 rows"}


def work(url: str) -> None:
    run_worker(handle, concurrency=10, burst=True, url=url)


def finished_task(node_bytes: int, count: int) -> Numbers:
    """Return the bytes of a finished task with this setting: in all, and of its two keys."""
    with server() as url:
        client = connect(url)
        client.config_set("stream-node-max-bytes", node_bytes)
        queue = TaskQueue(client)
        queue.put({"events": LONG}, id="long")
        apart(work, url)  # after it the server has the scripts, too
        before = used(client)
        tasks = queue.put_many([DATA] * count)
        apart(work, url)
        numbers = {"task": (used(client) - before) / count}
        for name, key in (("stream", keys.stream), ("record", keys.record)):
            numbers[name] = statistics.mean(client.memory_usage(key(task.id), samples=0) for task in tasks[::10])
        numbers["long"] = client.memory_usage(keys.stream("long"), samples=0) / LONG
        return numbers


def long_queue(count: int) -> Numbers:
    """Return what it costs that so many tasks wait, and how long a lost one is looked for among them."""
    with server() as url:
        client = connect(url)
        queue = TaskQueue(client)
        before, began = used(client), time.monotonic()
        for start in range(0, count, SLICE):
            queue.put_many([DATA] * min(SLICE, count - start))
        numbers = {"put": time.monotonic() - began, "task": (used(client) - before) / count}
        numbers["element"] = len(client.lindex(keys.QUEUE, 0))
        client.rpop(keys.QUEUE)  # as a worker that dies at once
        began, calls = time.monotonic(), list[float]()
        while client.llen(keys.QUEUE) < count:
            assert len(calls) < PATIENCE_SECONDS, "the lost task is not found"
            called = time.monotonic()
            queue.recover()
            calls.append(time.monotonic() - called)
            time.sleep(RECOVER_SECONDS)  # as a worker does
        return {**numbers, "recovered": time.monotonic() - began, "call": max(calls), "calls": len(calls)}


def table_of_finished(results: dict[int, Numbers]) -> str:
    lines = [
        f"| `stream-node-max-bytes` | a finished task | its stream | its record | an event of a stream of {LONG:,} |",
        "|---|---|---|---|---|",
    ]
    for node_bytes, found in results.items():
        name = f"{node_bytes:,}"
        if node_bytes == NODE_BYTES[0]:
            name += " (the server's default)"
        if str(node_bytes) in embedded.SETTINGS:
            name = f"**{name}** (the embedded server)"
        lines.append(f"| {name} | {' | '.join(f'{number:,.0f}' for number in found.values())} |")
    return "\n".join(lines)


def table_of_waiting(count: int, found: Numbers) -> str:
    rows = {
        "put_many": f"{found['put']:,.0f} s, {count / found['put']:,.0f} a second",
        "memory of the server": f"{found['task'] * count / 2**20:,.0f} MB: {found['task']:,.0f} bytes a task, whose "
        f"element in the list has {found['element']:,.0f}",
        "a task that was popped and never claimed": f"pushed again after {found['recovered']:.1f} s, by "
        f"{found['calls']:.0f} calls of `recover()`, {found['call'] * 1000:.1f} ms at most",
    }
    return "\n".join([f"| {count:,} waiting tasks | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of finished and of waiting tasks.")
    parser.add_argument("--finished", type=int, default=FINISHED, metavar="N", help=f"finished tasks ({FINISHED})")
    parser.add_argument("--waiting", type=int, default=WAITING, metavar="N", help=f"tasks in the queue ({WAITING})")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the tasks, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help="fill in the table of docs/performance.md")
    args = parser.parse_args()
    less = 100 if args.quick else 1
    with server() as url:
        where = machine(connect(url))
    finished = {node_bytes: finished_task(node_bytes, args.finished // less) for node_bytes in NODE_BYTES}
    waiting = long_queue(args.waiting // less)
    if args.json:
        print(json.dumps({"machine": where, "finished": finished, "waiting": waiting}))
        return 0
    tables = [table_of_finished(finished), table_of_waiting(args.waiting // less, waiting)]
    text = "\n\n".join([f"In bytes; {where}.", *tables])
    print(text)
    if args.write:
        write_page("memory", text)
    return 0


if __name__ == "__main__":
    run(main)
