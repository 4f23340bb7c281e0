"""What it costs that many people watch: one reader for all of them, and one blocking connection each, side by side.

Usage:   python benchmarks/watchers.py [--watchers N] [--tasks N] [--seconds S] [--quick] [--json] [--write]
Needs:   Linux. It starts servers and dashboards of its own, on loopback, and ends them
See:     web/hub.py; docs/performance.md, whose table --write fills in

Each task gets an event a second; each watcher is a TCP connection of its own to GET /api/tasks/<id>/events. The same is
done with a server that reads for each watcher with an XREAD BLOCK on a connection of its own. Latency is from before
the XADD until the bytes are read from the watcher's socket, in this process, by the one clock of the machine. When the
tasks have ended, what each watcher got is compared with XRANGE.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from common import machine, memory_mb, program, run, server, wait_until, write_page
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ailf.messaging.redis import connect
from task_streams import Event, TaskQueue, keys
from web.hub import BLOCK_MS, PAGE
from web.sse import frame_of
from web.watcher import Item

EVENT_SECONDS = 1.0  # between two events of one task
IDLE_SECONDS = 3.0  # how long nothing is written, to see what idle watchers cost
CONNECT_AT_ONCE = 100
EPOCH = 10**12  # of the entries
ENTRY_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)
WRITTEN_AT = re.compile(rb'"written_at": (\d+)')
ROWS = (
    ("watchers that got every event", "complete"),
    ("XADD to socket, median (ms)", "p50_ms"),
    ("XADD to socket, p99 (ms)", "p99_ms"),
    ("connections to Redis", "connections"),
    ("memory of the dashboard a watcher (KiB)", "kib_per_watcher"),
    ("CPU of the dashboard while all watch and nothing happens (%)", "idle_cpu_percent"),
    ("CPU of the dashboard while the tasks run (%)", "cpu_percent"),
)


def serve_naively(port: int) -> None:
    """Serve the same events, with a connection of its own and an XREAD BLOCK for each watcher."""

    async def follow(task_id: str) -> AsyncIterator[bytes]:
        redis = AsyncRedis.from_url(os.environ["REDIS_URL"], decode_responses=True, socket_timeout=BLOCK_MS)
        cursor: Any = "0"
        try:
            while True:
                reply: Any = await redis.xread({keys.stream(task_id): cursor}, count=PAGE, block=BLOCK_MS)
                for _, entries in reply:
                    for cursor, fields in entries:
                        event = Event.from_entry(cursor, fields)
                        yield frame_of(Item(task_id, event))
                        if event.is_terminal:
                            return
        finally:
            await redis.aclose()

    async def events(request: Request) -> Response:
        return EventSourceResponse(follow(request.path_params["task_id"]))

    app = Starlette(routes=[Route("/api/tasks/{task_id}/events", events)])
    uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning")).run()


class Socket(asyncio.Protocol):
    """One watcher's connection: the ids it got, and how late each was."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.ids: list[bytes] = []
        self.late_ms: list[float] = []
        self.is_open = self.is_over = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(f"GET /api/tasks/{self.task_id}/events HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.is_open = True
        frames, mark, self._rest = (self._rest + data).rpartition(b"\n\n")
        self.ids += ENTRY_ID.findall(frames)
        if mark:
            self.late_ms += [(now - int(at)) / 1e6 for at in WRITTEN_AT.findall(frames)]

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CpuPercent:
    """How much of a core a process takes from now on."""

    def __init__(self, pid: int) -> None:
        self.pid, self.began, self.before = pid, time.monotonic(), cpu_seconds(pid)

    def now(self) -> float:
        return round(100 * (cpu_seconds(self.pid) - self.before) / (time.monotonic() - self.began), 1)


def write_events(redis: Redis, tasks: list[str], seconds: float) -> None:
    """Write an event a second to each task, and then its end, evenly spread."""
    began = time.monotonic()
    last = max(1, int(seconds / EVENT_SECONDS)) + 1
    for seq in range(1, last + 1):
        for i, task_id in enumerate(tasks):
            due = began + (seq - 1 + i / len(tasks)) * EVENT_SECONDS
            time.sleep(max(0.0, due - time.monotonic()))
            event = "progress" if seq < last else "completed"
            redis.xadd(keys.stream(task_id), {"event": event, "written_at": time.monotonic_ns()}, id=f"{EPOCH}-{seq}")


async def measure(url: str, pid: int, port: int, watchers: int, tasks: list[str], seconds: float) -> dict[str, float]:
    """Let so many watch while the tasks run; return the figures."""
    redis = connect(url)
    queue = TaskQueue(redis)
    for task_id in tasks:
        queue.put({}, id=task_id)
    redis.delete(keys.QUEUE)
    loop = asyncio.get_running_loop()
    before_mb = memory_mb(pid)

    async def open_socket(number: int) -> Socket:
        _, one = await loop.create_connection(lambda: Socket(tasks[number % len(tasks)]), "127.0.0.1", port)
        return one

    def all_are_open() -> bool:
        return all(one.is_open for one in sockets)

    sockets: list[Socket] = []
    while len(sockets) < watchers:
        numbers = range(len(sockets), min(watchers, len(sockets) + CONNECT_AT_ONCE))
        sockets += await asyncio.gather(*map(open_socket, numbers))
        await asyncio.to_thread(wait_until, all_are_open, "all are connected")
    await asyncio.sleep(min(1.0, seconds))  # so that what joining cost is over
    cpu = CpuPercent(pid)
    await asyncio.sleep(min(IDLE_SECONDS, seconds))
    idle_cpu_percent = cpu.now()
    connections = redis.info("clients")["connected_clients"] - 1
    kib = 1024 * (memory_mb(pid) - before_mb)

    cpu = CpuPercent(pid)
    await asyncio.to_thread(write_events, redis, tasks, seconds)
    cpu_percent = cpu.now()
    await asyncio.to_thread(wait_until, lambda: all(one.is_over for one in sockets), "all have all")

    expected = {task_id: [i.encode() for i, _ in redis.xrange(keys.stream(task_id))] for task_id in tasks}
    percentiles = statistics.quantiles([ms for one in sockets for ms in one.late_ms], n=100)
    return {
        "complete": sum(one.ids == expected[one.task_id] for one in sockets),
        "p50_ms": round(percentiles[49], 2),
        "p99_ms": round(percentiles[98], 2),
        "connections": connections,
        "kib_per_watcher": round(kib / watchers, 1),
        "idle_cpu_percent": idle_cpu_percent,
        "cpu_percent": cpu_percent,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what many watchers cost, with the hub and without.")
    parser.add_argument("--watchers", type=int, default=2000, help="connections that watch (2000)")
    parser.add_argument("--tasks", type=int, default=200, help="tasks that run (200)")
    parser.add_argument("--seconds", type=float, default=15, help="how long each side writes (15)")
    parser.add_argument("--quick", action="store_true", help="100 watchers, one second, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help="fill in the table of docs/performance.md")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # be the server of one connection each
    args = parser.parse_args()
    if args.port:
        serve_naively(args.port)
        return 0
    if args.quick:
        args.watchers, args.tasks, args.seconds = 100, 10, 1.0
    needed = 2 * args.watchers + 500  # the naive server has two for each watcher
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        parser.error(f"{args.watchers} watchers need {needed} open files; this process may have {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))

    tasks = [f"t{n}" for n in range(args.tasks)]
    results: dict[str, dict[str, float]] = {}
    for side, command in {"hub": "dashboard.py", "naive": "benchmarks/watchers.py"}.items():
        with server() as url, program(url, command) as (pid, port):
            results[side] = asyncio.run(measure(url, pid, port, args.watchers, tasks, args.seconds))
            where = machine(connect(url))
    hub, naive = results["hub"], results["naive"]
    if args.json:
        print(json.dumps({"machine": where, **results}))
        return 0
    lines = [
        f"{args.watchers:,} watchers of {args.tasks:,} tasks, an event a second each, {args.seconds:g} s; {where}.",
        "",
        "| | the hub: one reader | a connection each |",
        "|---|---|---|",
        *(f"| {title} | {hub[name]:,} | {naive[name]:,} |" for title, name in ROWS),
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        write_page("watchers", text)
    return 0 if hub["complete"] == args.watchers else 1


if __name__ == "__main__":
    run(main)
