"""What the queue does now: read it from Redis, and show it live, as plain lines or as JSON.

Keys:    LLEN and LINDEX task_queue, ZRANGE {task_queue}:leases, HMGET the records of the tasks that run or rest
See:     admin.py, whose `status` command this is
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from redis import RedisCluster
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ailf.messaging.redis import REDIS_ERRORS, Client, is_transient, reason_of, url_of

from . import keys
from .claims import Malformed, parse_element
from .cli import printable
from .consuming import WORKER_NAME

REFRESH_SECONDS = 1.0  # of the live table
MOST_LEASES = 10_000  # tasks that run or rest whose records one look reads; the rest is counted
MOST_SHOWN = 20  # running tasks; the rest is counted
MOST_NAMED = 3  # workers on a terminal
OTHER_ROWS = 14  # rows on a terminal beside the running tasks
OUTCOMES = ("completed", "failed", "cancelled")


def look(client: Client) -> dict[str, Any]:
    """Return the state of the queue. The cost depends on how many tasks run or rest, not on how many wait."""
    node = {"target_nodes": client.get_node_from_key(keys.QUEUE)} if isinstance(client, RedisCluster) else {}
    now_seconds: int = client.time(**node)[0]  # by the server's clock, as the times in the records
    names = {connection["name"] for connection in client.client_list(**node)}
    workers = sorted(name.removeprefix(WORKER_NAME) for name in names if name.startswith(WORKER_NAME))
    with client.pipeline(transaction=False) as pipe:
        pipe.llen(keys.QUEUE)
        pipe.lindex(keys.QUEUE, -1)
        pipe.zcard(keys.LEASES)
        pipe.zrange(keys.LEASES, 0, MOST_LEASES - 1)
        pipe.llen(keys.DEAD)
        pipe.hmget(keys.TOTALS, *OUTCOMES)
        waiting, next_element, leased, ids, dead, totals = pipe.execute()
    with client.pipeline(transaction=False) as pipe:
        pipe.hget(keys.record(_id_in(next_element)), "put_at")
        for task_id in ids:
            pipe.hmget(keys.record(task_id), "status", "worker", "started_at", "attempts", "cancel")
        put_at, *records = pipe.execute()

    def age(ms: str) -> int:
        return max(0, now_seconds - int(ms) // 1000)

    running, resting = [], 0
    for task_id, (status, worker, started_at, attempt, cancel) in zip(ids, records, strict=True):
        if status == "running":
            note = "its worker is gone" if worker not in workers else "asked to stop" if cancel else ""
            running.append(
                {"id": task_id, "worker": worker, "seconds": age(started_at), "attempt": int(attempt), "note": note}
            )
        elif status not in (None, "waiting", *keys.TERMINAL):  # those were popped, or have ended, a moment ago
            resting += 1
    return {
        "waiting": waiting,
        "oldest_waiting_seconds": None if put_at is None else age(put_at),  # pushed by hand, it has no record yet
        "running": len(running),
        "resting": resting,
        "not_looked_at": leased - len(ids),
        "dead": dead,
        **{outcome: int(total or 0) for outcome, total in zip(OUTCOMES, totals, strict=True)},
        "workers": workers,
        "tasks": sorted(running, key=lambda task: (-task["seconds"], len(task["id"]), task["id"]))[:MOST_SHOWN],
    }


def _id_in(element: str | None) -> str:
    try:
        return parse_element((element or "").encode()).id
    except Malformed:
        return ""  # no record has this id


def lines_of(state: dict[str, Any]) -> Iterator[str]:
    """Yield the state as plain lines: a name and a value, then a line for each running task."""
    for name, value in state.items():
        if isinstance(value, int):
            yield f"{name} {value}"
    yield f"workers {len(state['workers'])}"
    for task in state["tasks"]:
        yield printable(f"task {task['id']} {task['worker']} {task['seconds']} s {task['note']}".rstrip())
    if more := state["running"] - len(state["tasks"]):
        yield f"more_tasks {more}"


def duration(seconds: int) -> str:
    """Return a duration for a person. duration(200) -> '3 min'"""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def tables_of(state: dict[str, Any], most: int, footer: str) -> Group:
    """Return the state as tables for a terminal, with `most` of the running tasks."""
    oldest, workers = state["oldest_waiting_seconds"], state["workers"]
    named = ", ".join(workers[:MOST_NAMED]) + (", …" if workers[MOST_NAMED:] else "")
    rows = [
        ("waiting", state["waiting"], "" if oldest is None else f"the oldest for {duration(oldest)}"),
        ("running", state["running"], ""),
        ("resting", state["resting"], "until they are due" if state["resting"] else ""),
        *((outcome, state[outcome], "") for outcome in OUTCOMES),
        ("dead letters", state["dead"], "python -m task_streams dead" if state["dead"] else ""),
        ("workers", len(workers), named or "python agent_consumer.py starts one"),
    ]
    if state["not_looked_at"]:
        rows.insert(3, ("others", state["not_looked_at"], "that run or rest"))
    counts = Table.grid(padding=(0, 2, 0, 0))
    for name, count, note in rows:
        counts.add_row(name, Text(f"{count:,}", "bold", justify="right"), Text(printable(note), "dim"))
    tasks = Table("task", "runs for", "attempt", "worker", "", box=None, padding=(0, 2, 0, 0))
    for task in state["tasks"][:most]:
        cells = (task["id"], duration(task["seconds"]), str(task["attempt"]), task["worker"], task["note"])
        tasks.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))  # subtle: Text obeys no markup
    more = state["running"] - tasks.row_count
    parts: list[RenderableType] = [counts]
    if state["tasks"]:
        parts += ["", tasks]
    if more:
        parts += [f"… and {more:,} more"]
    return Group(*parts, "", Text(footer, "dim"))


def show(client: Client, once: bool, as_json: bool) -> None:
    """Print the state of the queue. On a terminal, unless `once`, show it again every second until Ctrl-C."""
    state, where = look(client), url_of(client)
    if as_json or not sys.stdout.isatty():
        print(json.dumps(state) if as_json else "\n".join(lines_of(state)))
        return
    console = Console(highlight=False)
    if once or console.is_dumb_terminal:  # Rich does not redraw a dumb terminal
        console.print(tables_of(state, MOST_SHOWN, where))
        return
    with Live(console=console, auto_refresh=False) as live:
        footer = usual = f"{where}, every second until Ctrl-C"
        while True:
            live.update(tables_of(state, max(1, console.height - OTHER_ROWS), footer), refresh=True)
            time.sleep(REFRESH_SECONDS)
            try:
                state, footer = look(client), usual
            except REDIS_ERRORS as error:
                if not is_transient(error):
                    raise
                footer = f"{where} does not serve ({reason_of(error)}); trying again"
