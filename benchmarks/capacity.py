"""What 10, 1,000 and 100,000 running agents need: workers, nodes, memory and connections, from measured costs.

Usage:   python benchmarks/capacity.py [--quick] [--json] [--write]
Needs:   nothing that runs: it starts a server of its own, on loopback
See:     docs/performance.md, whose table --write fills in

It measures what a task and an event cost the server and a worker, in CPU time and memory. CPU time depends little on
what else the machine does, unlike the speeds on that page. The rest is arithmetic, in sizes().
"""

import argparse
import json
import math
import time
from typing import Any

from common import apart, machine, memory_mb, run, server, write_page
from redis import Redis

from ailf.messaging.redis import connect
from task_streams import Task, TaskLog, TaskQueue, keys, run_worker
from task_streams.log import TTL_SECONDS

AGENTS = (10, 1_000, 100_000)  # that run at the same time
TASK_SECONDS = 60  # how long an agent works on a task
EVENTS_PER_SECOND = 20  # of one agent, most of them words of its LLM
BUSY = 0.6  # of a core that is planned for: the rest is for bursts, and for what else the machine does
NODE_GB = 16  # of memory of a Redis node
AGENTS_PER_WORKER = 1_000  # coroutines in one process, whatever its CPU allows
WORDS = "so the revenue of the north "  # of one llm_delta

Numbers = dict[str, float]


async def speak(task: Task, log: TaskLog) -> None:
    for _ in range(task.data):
        await log.add("llm_delta", text=WORDS)


def work(url: str, concurrency: int) -> Numbers:
    """Work until the queue is empty; return this process's CPU seconds and its memory."""
    empty_mb, began = memory_mb(), time.process_time()
    run_worker(speak, concurrency=concurrency, burst=True, url=url)
    return {"seconds": time.process_time() - began, "empty_mb": empty_mb, "peak_mb": memory_mb(what="VmHWM")}


def cpu_seconds(client: Redis) -> float:
    info = client.info("cpu")
    return float(info["used_cpu_sys"] + info["used_cpu_user"])


def measure(tasks: int, events: int) -> Numbers:
    """Return what one task and one event cost, in microseconds of CPU and in bytes."""
    with server() as url:
        client = connect(url)
        queue = TaskQueue(client)
        queue.put_many([0] * 100)
        apart(work, url, 100)  # warm: the server has the scripts
        began = cpu_seconds(client)
        queue.put_many([0] * tasks)
        empty = apart(work, url, 100)
        server_task = (cpu_seconds(client) - began) / tasks

        began, before = cpu_seconds(client), client.info("memory")["used_memory"]
        ids = [task.id for task in queue.put_many([events] * 100)]
        spoken = apart(work, url, 100)
        server_event = (cpu_seconds(client) - began - 100 * server_task) / (100 * events)
        bytes_event = (client.info("memory")["used_memory"] - before) / (100 * events)
        worker_task = empty["seconds"] / tasks

        began = cpu_seconds(client)
        for task_id in ids:  # as the dashboard does: in batches, every entry once
            cursor = "0"
            while batch := client.xread({keys.stream(task_id): cursor}, count=100):
                cursor = dict(batch)[keys.stream(task_id)][-1][0]
        server_read = (cpu_seconds(client) - began) / (100 * events)
        return {
            "server_us_task": 1e6 * server_task,
            "server_us_event": 1e6 * server_event,
            "server_us_read": 1e6 * server_read,
            "worker_us_task": 1e6 * worker_task,
            "worker_us_event": 1e6 * (spoken["seconds"] - 100 * worker_task) / (100 * events),
            "bytes_event": bytes_event,
            "worker_mb": empty["peak_mb"],
        }


def sizes(cost: Numbers, agents: int) -> dict[str, Any]:
    """Return what so many running agents need, with one watcher each. The arithmetic of the page."""
    tasks, events = agents / TASK_SECONDS, agents * EVENTS_PER_SECOND  # a second
    queue_core = tasks * cost["server_us_task"] / 1e6  # of the node that has the list
    streams_core = events * (cost["server_us_event"] + cost["server_us_read"]) / 1e6  # spread over all nodes
    log_gb = TASK_SECONDS * EVENTS_PER_SECOND * cost["bytes_event"] / 1e9
    memory_gb = {hours: (agents + tasks * 3600 * hours) * log_gb for hours in (1, TTL_SECONDS // 3600)}
    worker_core = (tasks * cost["worker_us_task"] + events * cost["worker_us_event"]) / 1e6
    workers = max(math.ceil(worker_core / BUSY), math.ceil(agents / AGENTS_PER_WORKER))
    by_cpu = math.ceil((queue_core + streams_core) / BUSY)
    return {
        "tasks": tasks,
        "events": events,
        "queue": queue_core,
        "workers": workers,
        "nodes_cpu": by_cpu,
        "memory": memory_gb,
        "nodes": {hours: max(by_cpu, math.ceil(gb / NODE_GB)) for hours, gb in memory_gb.items()},
        "connections": 4 * workers,  # BRPOP, the pipeline, the heartbeat, and its PubSub
    }


def as_page(cost: Numbers, where: str) -> str:
    found = {agents: sizes(cost, agents) for agents in AGENTS}
    ceiling = BUSY / cost["server_us_task"] * 1e6
    lines = [
        f"{where}. CPU time, in microseconds: a task {cost['server_us_task']:.0f} of the server and"
        f" {cost['worker_us_task']:.0f} of the worker; an event {cost['server_us_event']:.1f} and"
        f" {cost['worker_us_event']:.0f}; reading an event {cost['server_us_read']:.1f} of the server. An event takes"
        f" {cost['bytes_event']:.0f} bytes.",
        "",
        "| running agents | " + " | ".join(f"{agents:,}" for agents in AGENTS) + " |",
        "|---" * (len(AGENTS) + 1) + "|",
    ]

    def row(name: str, texts: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(texts) + " |")

    kept = list(next(iter(found.values()))["memory"])
    row("tasks a second", [f"{one['tasks']:,.1f}" for one in found.values()])
    row("events a second", [f"{one['events']:,}" for one in found.values()])
    row("worker processes", [f"{one['workers']:,}" for one in found.values()])
    row("their connections to Redis", [f"{one['connections']:,}" for one in found.values()])
    row("of a core, for the queue's node", [f"{100 * one['queue']:.2g} %" for one in found.values()])
    row("Redis nodes that the CPU needs", [f"{one['nodes_cpu']:,}" for one in found.values()])
    for hours in kept:
        row(f"GB of logs, kept {hours} h", [f"{one['memory'][hours]:,.1f}" for one in found.values()])
    for hours in kept:
        row(f"nodes of {NODE_GB} GB, kept {hours} h", [f"{one['nodes'][hours]:,}" for one in found.values()])
    lines += [
        "",
        f"One list is on one node, which takes {ceiling:,.0f} tasks a second: {ceiling * TASK_SECONDS:,.0f} agents.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compute what many running agents need, from measured costs.")
    parser.add_argument("--quick", action="store_true", help="few tasks: for a look, not for the page")
    parser.add_argument("--json", action="store_true", help="print the measured costs as JSON")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    cost = measure(1_000, 50) if args.quick else measure(20_000, 1_000)
    with server() as url:
        page = as_page(cost, machine(connect(url)))
    print(json.dumps(cost) if args.json else page)
    if args.write:
        write_page("capacity", page)
    return 0


if __name__ == "__main__":
    run(main)
