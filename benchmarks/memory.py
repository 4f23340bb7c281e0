"""How much memory a finished task takes until its time is over, and what a very long queue costs.

Usage:   python benchmarks/memory.py [--waiting N] [--full] [--json] [--write]
Needs:   nothing that runs: it starts servers of its own, on loopback; a million waiting tasks take about 1 GB
See:     docs/performance.md, whose table --write fills in

A finished task has five events: started, three of progress, completed. Its bytes are what used_memory of the server
grew by, divided by the tasks, after 1,000 and after 5,000 of them; "raw" are the bytes in its stream: names, values and
ids. A long stream is measured too, since smaller nodes save memory in short streams and cost some in long ones.
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from messaging import server
from redis import Redis
from speed import CONCURRENCY, PAGE, PATIENCE_SECONDS, ROOT, answer, machine, process, replace_between, work

from ailf.messaging.redis import connect, embedded
from task_streams import Task, TaskLog, TaskQueue, keys, run_worker
from task_streams.worker import RECOVER_SECONDS

NODE_BYTES = (4096, 1024, 512, 256)  # of stream-node-max-bytes; the first is the server's default
COUNTS = "1000,5000"  # finished tasks after which the memory is measured
LONG = 1_000  # events of a long stream
DATA = {"kind": "summarise", "path": "sample_data/sales.csv"}
SLICE = 10_000  # tasks put by one put_many
SAMPLE = 20_000  # tasks drained to know the rate
LONGEST_SECONDS = 3600.0  # for a drain of all

Numbers = dict[str, float]


def used(client: Redis) -> int:
    return int(client.info("memory")["used_memory"])


def do(task: Task, log: TaskLog) -> dict[str, str]:
    """Be a short agent: three events of progress, and a small result."""
    for percent, step in ((30, "read"), (60, "think"), (90, "write")):
        log.add("progress", percent=percent, step=step)
    return {"summary": f"{task.data['path']}: 12 rows"}


def raw_bytes(client: Redis, stream: str) -> int:
    """Return the bytes of names and values in a stream, and 16 for each id."""
    return sum(
        16 + sum(len(k.encode()) + len(v.encode()) for k, v in fields.items()) for _, fields in client.xrange(stream)
    )


def finished_task(node_bytes: int, counts: list[int]) -> Numbers:
    """Return the bytes of a finished task with this setting: in all after so many, and of its three keys."""
    with server(*embedded.SETTINGS) as url:
        client = connect(url)
        client.config_set("stream-node-max-bytes", node_bytes)
        queue = TaskQueue(client)

        def finish(count: int) -> list[Task]:
            tasks = queue.put_many([DATA] * count)
            run_worker(do, concurrency=CONCURRENCY, burst=True, client=connect(url))
            if queue.owed():  # Ctrl-C, which a worker takes for its own
                raise KeyboardInterrupt
            return tasks

        finish(10)  # so that scripts and connections are there
        before, done = used(client), 0
        numbers: Numbers = {}
        for count in counts:
            tasks = finish(count - done)
            done = count
            numbers[f"after {count}"] = (used(client) - before) / count
        some = [task.id for task in tasks[::10]]
        for name, key in (("stream", keys.stream), ("writer", keys.writer), ("record", keys.record)):
            numbers[name] = statistics.mean(client.memory_usage(key(one), samples=0) for one in some)
        numbers["raw"] = statistics.mean(raw_bytes(client, keys.stream(one)) for one in some)
        log = TaskLog("long", client)
        for percent in range(LONG):
            log.add("progress", percent=percent, step="read")
        numbers["event of a long stream"] = client.memory_usage(keys.stream("long"), samples=0) / LONG
        return numbers


def drain(url: str, client: Redis, count: int, seconds: float = PATIENCE_SECONDS) -> float:
    """Let a worker in a process of its own finish so many tasks; return how many it did a second."""

    def done() -> int:
        return int(client.hget(keys.TOTALS, "completed") or 0)

    before = done()
    with process(work, url, CONCURRENCY) as pipe:
        answer(pipe)
        pipe.send("go")
        deadline = time.monotonic() + seconds
        while (first := done()) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        while (now := done()) < before + count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{now - before:,} of {count:,} tasks were done")
            time.sleep(0.01)
        rate = (now - first) / (time.monotonic() - began)
        if client.llen(keys.QUEUE):  # else it ends by itself, and a signal would end it otherwise
            for child in multiprocessing.active_children():
                child.terminate()  # it finishes what runs
        answer(pipe)
        pipe.send("stop")
    return rate


def recover_one(queue: TaskQueue, client: Redis) -> Numbers:
    """Pop the next task by hand, as a worker that dies at once; return how long until recover() has pushed it again."""
    length = client.llen(keys.QUEUE)
    client.rpop(keys.QUEUE)
    began = time.monotonic()
    calls = []
    while client.llen(keys.QUEUE) < length:
        if time.monotonic() - began > PATIENCE_SECONDS:
            raise TimeoutError("it was not found")
        called = time.monotonic()
        queue.recover()
        calls.append(time.monotonic() - called)
        time.sleep(max(0.0, RECOVER_SECONDS - calls[-1]))  # as a worker does
    return {"recovered after": time.monotonic() - began, "recover a call": max(calls), "recover calls": len(calls)}


def long_queue(waiting: int, full: bool) -> Numbers:
    """Return what it costs that so many tasks wait."""
    sample = min(SAMPLE, waiting // 2)
    with server(*embedded.SETTINGS) as url:
        client = connect(url)
        TaskQueue(client).put_many([DATA] * sample)
        numbers = {"drain short": drain(url, client, sample)}
    with server(*embedded.SETTINGS) as url:
        client = connect(url)
        queue = TaskQueue(client)
        before = used(client)
        queue.put(DATA)  # the one to be lost
        began = time.monotonic()
        for start in range(1, waiting, SLICE):
            queue.put_many([DATA] * min(SLICE, waiting - start))
        numbers["put seconds"] = time.monotonic() - began
        numbers["used bytes"] = used(client) - before
        numbers["element bytes"] = len(client.lindex(keys.QUEUE, 0))
        numbers.update(recover_one(queue, client))
        numbers["drain"] = drain(url, client, waiting if full else sample, LONGEST_SECONDS)
        return {"waiting": waiting, **numbers}


def table_of_finished(results: dict[int, Numbers], counts: list[int]) -> str:
    after = " · ".join(f"{count:,}" for count in counts)
    lines = [
        f"| `stream-node-max-bytes` | a finished task, after {after} | its stream | its writer | its record "
        f"| raw | an event of a stream of {LONG:,} |",
        "|---|---|---|---|---|---|---|",
    ]
    for node_bytes, found in results.items():
        name = f"{node_bytes:,}"
        if node_bytes == NODE_BYTES[0]:
            name += " (the server's default)"
        if str(node_bytes) in embedded.SETTINGS:
            name = f"**{name}** (the embedded server)"
        both = " · ".join(f"{found[f'after {count}']:,.0f}" for count in counts)
        rest = [f"{found[key]:,.0f}" for key in ("stream", "writer", "record", "raw", "event of a long stream")]
        lines.append(f"| {name} | {both} | {' | '.join(rest)} |")
    return "\n".join(lines)


def table_of_waiting(found: Numbers, full: bool) -> str:
    waiting = found["waiting"]
    all_of_them = f"{waiting / found['drain']:,.0f} s {'measured' if full else 'at this rate'}"
    rows = {
        "put_many": f"{found['put seconds']:,.0f} s, {waiting / found['put seconds']:,.0f} a second",
        "memory of the server": f"{found['used bytes'] / 2**20:,.0f} MB: {found['used bytes'] / waiting:,.0f} bytes a "
        f"task, whose element in the list has {found['element bytes']:,.0f}",
        "a task that was popped and never claimed": f"pushed again after {found['recovered after']:.1f} s, by "
        f"{found['recover calls']:.0f} calls of `recover()`, {found['recover a call'] * 1000:.1f} ms at most",
        f"drain, one worker, concurrency {CONCURRENCY}": f"{found['drain']:,.0f} a second, all in {all_of_them} "
        f"({found['drain short']:,.0f} a second where few wait)",
    }
    return "\n".join([f"| {waiting:,.0f} waiting tasks | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of finished and of waiting tasks.")
    parser.add_argument("--waiting", type=int, default=1_000_000, metavar="N", help="tasks in the queue (1000000)")
    parser.add_argument("--finished", default=COUNTS, metavar="N,N", help=f"finished tasks ({COUNTS})")
    parser.add_argument("--full", action="store_true", help="drain all of them, not a sample (needs some GB)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    logging.getLogger("task_streams").setLevel(logging.ERROR)
    counts = [int(count) for count in args.finished.split(",")]
    finished = {node_bytes: finished_task(node_bytes, counts) for node_bytes in NODE_BYTES}
    waiting = long_queue(args.waiting, args.full)
    if args.json:
        print(json.dumps({"machine": machine(), "finished": finished, "waiting": waiting}))
        return 0
    text = f"In bytes; {machine()}.\n\n{table_of_finished(finished, counts)}\n\n{table_of_waiting(waiting, args.full)}"
    print(text)
    if args.write:
        PAGE.write_text(replace_between(PAGE.read_text(), "memory", text))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
