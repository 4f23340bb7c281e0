"""What it costs that many people watch: one reader for all of them, and one blocking connection each, side by side.

Usage:   python benchmarks/watchers.py [--watchers N] [--tasks N] [--seconds S] [--json] [--write]
Needs:   nothing that runs: it starts a server and dashboards of its own, on loopback, and ends them
See:     dashboard/hub.py; docs/performance.md, whose table --write fills in

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
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import uvicorn
from messaging import server
from redis import Redis
from speed import PAGE as PERFORMANCE_PAGE
from speed import machine, replace_between
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ailf.messaging.redis import blocking_client, connect, connect_async
from dashboard.hub import BLOCK_MS, PAGE, Item
from dashboard.sse import frame_of
from task_streams import Event, TaskLog, TaskQueue, keys

ROOT = Path(__file__).parents[1]
EVENT_SECONDS = 1.0  # between two events of one task
IDLE_SECONDS = 3.0  # how long nothing is written, to see what idle watchers cost
CONNECT_AT_ONCE = 100
PATIENCE_SECONDS = 60.0  # for all to be connected, and for all to have everything
ENTRY_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)
WRITTEN_AT = re.compile(rb'"written_at": (\d+)')


# -- one blocking connection per watcher: what the hub is compared with -----------------------------------------


def serve_naively(port: int) -> None:
    """Serve the same endpoint, with a connection of its own and an XREAD BLOCK for each watcher."""

    async def follow(task_id: str) -> AsyncIterator[bytes]:
        redis = blocking_client(await clients[0], BLOCK_MS / 1000)
        cursor = "0"
        try:
            while True:
                reply = await redis.xread({keys.stream(task_id): cursor}, count=PAGE, block=BLOCK_MS)
                for _, entries in reply:
                    for cursor, fields in entries:
                        event = Event.from_entry(cursor, fields)
                        yield frame_of(Item(task_id, event))
                        if event.is_terminal:
                            return
        finally:
            await redis.aclose()

    clients: list[asyncio.Task[Any]] = []

    async def events(request: Request) -> Response:
        if not clients:
            clients.append(asyncio.create_task(connect_async()))
        return EventSourceResponse(follow(request.path_params["task_id"]))

    async def health(_request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/api/tasks/{task_id}/events", events), Route("/healthz", health)]
    uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="warning")).run()


@contextmanager
def program(url: str, *command: str) -> Iterator[tuple[int, int]]:
    """Start a server of events in a process of its own; yield its process id and port."""
    port = free_port()
    log = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)],
        cwd=ROOT, env={**os.environ, "REDIS_URL": url}, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    return False


# -- watchers ---------------------------------------------------------------------------------------------------


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


async def wait_for(what: str, predicate: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not predicate():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {PATIENCE_SECONDS:g} s in vain: {what}")
        await asyncio.sleep(0.05)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


class Costs:
    """What two processes have used up to now: to subtract from each other."""

    def __init__(self, redis: "Redis", pid: int) -> None:
        info = redis.info()
        self.at = time.monotonic()
        self.dashboard, self.redis = cpu_seconds(pid), cpu_seconds(info["process_id"])
        self.commands = info["total_commands_processed"]
        self.connections = info["connected_clients"] - 1
        self.kib, self.redis_kib = memory_kib(pid), info["used_memory"] // 1024


def write_events(redis: "Redis", tasks: list[str], seconds: float) -> None:
    """Write an event a second to each task, and then its end, evenly spread."""
    logs = [TaskLog(task_id, redis) for task_id in tasks]
    began = time.monotonic()
    rounds = max(1, int(seconds / EVENT_SECONDS))
    for n in range(rounds + 1):
        for i, log in enumerate(logs):
            due = began + (n + i / len(logs)) * EVENT_SECONDS
            time.sleep(max(0.0, due - time.monotonic()))
            if n < rounds:
                log.add("progress", percent=n, step="step", written_at=time.monotonic_ns())
            else:
                log.add("completed", result="done", written_at=time.monotonic_ns())


async def measure(url: str, pid: int, port: int, watchers: int, tasks: list[str], seconds: float) -> dict[str, float]:
    """Let so many watch while the tasks run; return the figures."""
    redis = connect(url)
    queue = TaskQueue(redis)
    for task_id in tasks:
        queue.put({}, id=task_id)
        redis.delete(keys.QUEUE)
    loop = asyncio.get_running_loop()
    idle_seconds, settle_seconds = min(IDLE_SECONDS, seconds), min(1.0, seconds / 4)
    await asyncio.sleep(settle_seconds)  # so that what starting cost is over
    empty = Costs(redis, pid)
    await asyncio.sleep(idle_seconds)
    alone = Costs(redis, pid)

    sockets = [Socket(tasks[n % len(tasks)]) for n in range(watchers)]
    for at in range(0, watchers, CONNECT_AT_ONCE):
        some = sockets[at : at + CONNECT_AT_ONCE]
        await asyncio.gather(*(loop.create_connection(lambda one=one: one, "127.0.0.1", port) for one in some))
        await wait_for("the watchers are connected", lambda some=some: all(one.is_open for one in some))
    await asyncio.sleep(settle_seconds)
    joined = Costs(redis, pid)
    await asyncio.sleep(idle_seconds)
    idle = Costs(redis, pid)

    writer = threading.Thread(target=write_events, args=(redis, tasks, seconds))
    writer.start()
    await asyncio.to_thread(writer.join)
    await wait_for("all have all", lambda: all(one.is_over for one in sockets))
    busy = Costs(redis, pid)

    expected = {task_id: [i.encode() for i, _ in redis.xrange(keys.stream(task_id))] for task_id in tasks}
    complete = sum(one.ids == expected[one.task_id] for one in sockets)
    late = sorted(ms for one in sockets for ms in one.late_ms)
    idle_ms = [(b.dashboard - a.dashboard) * 1000 / (b.at - a.at) for a, b in ((empty, alone), (joined, idle))]
    commands = [(b.commands - a.commands) / (b.at - a.at) for a, b in ((empty, alone), (joined, idle))]
    return {
        "watchers": watchers,
        "complete": complete,
        "deliveries": len(late),
        "p50_ms": round(late[len(late) // 2], 2),
        "p99_ms": round(late[int(len(late) * 0.99)], 2),
        "max_ms": round(late[-1], 2),
        "redis_connections": idle.connections,
        "connections_per_watcher": round((idle.connections - alone.connections) / watchers, 4),
        "kib_per_watcher": round((idle.kib - alone.kib) / watchers, 1),
        "redis_kib_per_watcher": round((idle.redis_kib - alone.redis_kib) / watchers, 1),
        "cpu_percent": round((busy.dashboard - idle.dashboard) / (busy.at - idle.at) * 100, 1),
        "redis_cpu_percent": round((busy.redis - idle.redis) / (busy.at - idle.at) * 100, 1),
        "idle_us_per_watcher_second": round((idle_ms[1] - idle_ms[0]) * 1000 / watchers, 1),
        "idle_commands_per_watcher_second": round((commands[1] - commands[0]) / watchers, 4),
    }


ROWS = (
    ("watchers that got every event", "complete"),
    ("deliveries", "deliveries"),
    ("XADD to socket, median (ms)", "p50_ms"),
    ("XADD to socket, p99 (ms)", "p99_ms"),
    ("XADD to socket, latest (ms)", "max_ms"),
    ("Redis connections", "redis_connections"),
    ("Redis connections a watcher", "connections_per_watcher"),
    ("memory a watcher (KiB)", "kib_per_watcher"),
    ("memory of Redis a watcher (KiB)", "redis_kib_per_watcher"),
    ("CPU of the dashboard (%)", "cpu_percent"),
    ("CPU of Redis (%)", "redis_cpu_percent"),
    ("one more idle watcher: CPU (us/s)", "idle_us_per_watcher_second"),
    ("one more idle watcher: commands/s", "idle_commands_per_watcher_second"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what many watchers cost, with the hub and without.")
    parser.add_argument("--watchers", type=int, default=2000, help="connections that watch (2000)")
    parser.add_argument("--tasks", type=int, default=200, help="tasks that run (200)")
    parser.add_argument("--seconds", type=float, default=15, help="how long each side writes (15)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help=f"write {PERFORMANCE_PAGE.relative_to(ROOT)}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_naively(args.port)
        return 0
    if min(args.watchers, args.tasks) < 1 or not 0 < args.seconds <= 600:
        parser.error("--watchers and --tasks are 1 at least, --seconds 600 at most")
    needed = 2 * args.watchers + 500  # the naive server has two for each watcher
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        parser.error(
            f"{args.watchers} watchers need {needed} open files, and this process may have {hard} (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))

    sides = {"hub": ["dashboard.py"], "naive": ["benchmarks/watchers.py", "--serve"]}
    tasks = [f"t{n}" for n in range(args.tasks)]
    results: dict[str, dict[str, float]] = {}
    load = os.getloadavg()[0]
    for side, command in sides.items():
        with server() as url, program(url, *command) as (pid, port):
            results[side] = asyncio.run(measure(url, pid, port, args.watchers, tasks, args.seconds))
    hub, naive = results["hub"], results["naive"]
    ratios = {name: round(naive[name] / hub[name], 2) if hub[name] > 0 else None for _, name in ROWS}
    where = f"{machine()}; load {load:.1f} before"
    if args.json:
        print(json.dumps({"machine": where, **results, "ratios": ratios}))
        return 0
    lines = [
        f"{args.watchers:,} watchers of {args.tasks:,} tasks, an event a second each, {args.seconds:g} s; {where}.",
        "",
        "| | the hub: one reader | a connection each | ratio |",
        "|---|---|---|---|",
    ]
    for title, name in ROWS:
        ratio = "" if ratios[name] is None else f"{ratios[name]:,.2f}"
        lines.append(f"| {title} | {hub[name]:,} | {naive[name]:,} | {ratio} |")
    text = "\n".join(lines)
    print(text)
    if args.write:
        PERFORMANCE_PAGE.write_text(replace_between(PERFORMANCE_PAGE.read_text(), "watchers", text))
    return 0 if hub["complete"] == args.watchers else 1


if __name__ == "__main__":
    raise SystemExit(main())
