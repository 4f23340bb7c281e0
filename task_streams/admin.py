"""Look after the queue: see what it does, answer its questions, cancel tasks, put dead ones again, import many.

Usage:   python -m task_streams status [--once | --json]     what waits and runs; live on a terminal, until Ctrl-C
         python -m task_streams cancel ID… [--reason TEXT]   end tasks, waiting or running
         python -m task_streams questions [--json]           what tasks ask, and wait for
         python -m task_streams answer ID TEXT [--by NAME]   answer; the task goes on
         python -m task_streams tell ID TEXT [--by NAME]     put a message into a task's inbox
         python -m task_streams dead [--limit N] [--json]    the tasks that were given up on, newest first
         python -m task_streams requeue [ID…]                put all or some of those again: 7 becomes 7.r2
         python -m task_streams import FILE [--skip-bad]     one {"type": …, "payload": …} a line; - is standard input
         python -m task_streams stop                         stop the embedded server; its data stay in .redis/
Prints:  ids, one a line, if stdout is a pipe; problems go to stderr
Exits:   0 done, 1 something could not be done, 2 wrong usage, 130 after Ctrl-C
Needs:   Redis at $REDIS_URL, else localhost:6379, else the embedded server, which only import starts
Keys:    reads task_queue, {task_queue}:leases, :dead, :totals and the records, in which answers and messages go
See:     tutorial/part6.md, tutorial/part7.md
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from redis import RedisCluster
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, connect, is_transient, reason_of, url_of
from ailf.messaging.redis.__main__ import main as embedded_server

from . import keys
from .claims import Malformed, parse_element
from .cli import answer_command, number, parse_json, print_ids, printable, put_all
from .consuming import WORKER_NAME
from .queue import NoSuchTask, TaskQueue

MOST_LEASES = 10_000  # tasks that run or rest whose records `status` reads; it counts more as resting
MOST_SHOWN = 20  # running tasks; the rest is counted
MAX_REASON_CHARS = 300  # of a dead letter's reason; --json shows all of it
OUTCOMES = ("completed", "failed", "cancelled")


def complain(text: object) -> None:
    print(f"task_streams: {printable(str(text))}", file=sys.stderr)


# -- status -----------------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    client = blocking_client(connect(start=False), 0)  # it shows bytes that are not UTF-8 as escapes
    state, where, console = look(client), url_of(client), Console(highlight=False)
    if args.json:
        print(json.dumps(state))
    elif not sys.stdout.isatty():
        print_state(state)
    elif args.once or console.is_dumb_terminal:  # Rich does not redraw a dumb terminal
        console.print(draw(state, where))
    else:
        with Live(console=console, auto_refresh=False) as live:
            header = usual = f"{where}, every second until Ctrl-C"
            while True:
                live.update(draw(state, header), refresh=True)
                time.sleep(1)
                try:
                    state, header = look(client), usual
                except REDIS_ERRORS as error:
                    if not is_transient(error):
                        raise
                    header = f"{where} does not serve ({reason_of(error)}); trying again"
    return 0


def look(client: Client) -> dict[str, Any]:
    """Return the state of the queue. The cost depends on how many tasks run or rest, not on how many wait."""
    node = {"target_nodes": client.get_node_from_key(keys.QUEUE)} if isinstance(client, RedisCluster) else {}
    now_seconds: int = client.time(**node)[0]  # by the server's clock, as the times in the records

    def age(ms: str) -> int:
        return max(0, now_seconds - int(ms) // 1000)

    names = {connection["name"] for connection in client.client_list(**node)}
    workers = sorted(name.removeprefix(WORKER_NAME) for name in names if name.startswith(WORKER_NAME))
    next_element, totals = client.lindex(keys.QUEUE, -1), client.hmget(keys.TOTALS, *OUTCOMES)
    try:
        put_ms = client.hget(keys.record(parse_element((next_element or "").encode()).id), "put_at")
    except Malformed:
        put_ms = None  # as of a task that was pushed by hand: it has no record yet
    ids, running = client.zrange(keys.LEASES, 0, MOST_LEASES - 1), []
    resting, parked = client.zcard(keys.LEASES) - len(ids), 0  # resting: also those that are not looked at
    with client.pipeline(transaction=False) as pipe:
        for task_id in ids:
            pipe.hmget(keys.record(task_id), "status", "worker", "started_at", "attempts", "cancel")
        for task_id, (state, worker, started_ms, attempt, cancel) in zip(ids, pipe.execute(), strict=True):
            if state == "running":
                note = "its worker is gone" if worker not in workers else "asked to stop" if cancel else ""
                task = {"id": task_id, "worker": worker, "seconds": age(started_ms)}
                running.append({**task, "attempt": int(attempt), "note": note})
            elif state == "parked":
                parked += 1
            elif state not in (None, "waiting", *OUTCOMES):  # those were popped, or suspected, or ended a moment ago
                resting += 1
    return {
        "waiting": client.llen(keys.QUEUE),
        "oldest_waiting_seconds": put_ms and age(put_ms),
        "running": len(running),
        "parked": parked,  # until their questions are answered
        "resting": max(0, resting),  # until they are due: delayed, or between two attempts
        "dead": client.llen(keys.DEAD),
        **{outcome: int(total or 0) for outcome, total in zip(OUTCOMES, totals, strict=True)},
        "workers": workers,
        "tasks": sorted(running, key=lambda task: (-task["seconds"], len(task["id"]), task["id"]))[:MOST_SHOWN],
    }


def print_state(state: dict[str, Any]) -> None:
    """Print plain lines, for pipes: a name and a number each, then a line for each running task."""
    for name, value in state.items():
        if name != "tasks" and value is not None:
            print(name, len(value) if isinstance(value, list) else value)
    for task in state["tasks"]:
        print(printable(f"task {task['id']} {task['worker']} {task['seconds']} s {task['note']}".rstrip()))


def draw(state: dict[str, Any], header: str) -> Group:
    """Return the state as tables for a terminal."""
    counts, tasks = Table.grid(padding=(0, 2, 0, 0)), Table("task", "runs for", "attempt", "worker", "", box=None)
    oldest, workers = state["oldest_waiting_seconds"], state["workers"]
    notes = {
        "waiting": "" if oldest is None else f"the oldest for {timedelta(seconds=oldest)}",
        "running": f"{MOST_SHOWN} of them shown" if state["running"] > MOST_SHOWN else "",
        "parked": "python -m task_streams questions" if state["parked"] else "",
        "dead": "python -m task_streams dead" if state["dead"] else "",
        "workers": ", ".join(workers[:3]) or "python agent_consumer.py starts one",
    }
    for name in ("waiting", "running", "parked", "resting", "dead", *OUTCOMES, "workers"):
        count = f"{len(workers) if name == 'workers' else state[name]:,}"
        counts.add_row(name, Text(count, "bold", justify="right"), Text(printable(notes.get(name, "")), "dim"))
    for task in state["tasks"]:
        cells = (task["id"], timedelta(seconds=task["seconds"]), task["attempt"], task["worker"], task["note"])
        tasks.add_row(*(Text(printable(str(cell)), overflow="fold") for cell in cells))  # subtle: Text obeys no markup
    return Group(Text(header, "dim"), "", counts, "", tasks if state["tasks"] else "")


# -- questions, answer, tell ------------------------------------------------------------------------------------


def questions(args: argparse.Namespace) -> int:
    found = TaskQueue(blocking_client(connect(start=False), 0)).questions()
    for question in found:
        until = f"{datetime.fromtimestamp(question['expires_at'] / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
        if args.json:
            print(json.dumps({**question, "expires_at": until}))
            continue
        options = question["options"]
        choice = f" ({' / '.join(options)})" if options else ""
        print(printable(f"task {question['task']}, until {until}: {question['question']}{choice}"))
        if sys.stdout.isatty():
            print(printable(f"    {answer_command(question['task'], options, question['number'])}"))
    if not found:
        complain("no open questions")
    return 0


def answer(args: argparse.Namespace) -> int:
    taken = TaskQueue(connect(start=False)).answer(args.id, args.text, args.by, args.number)
    print(printable(f"task {args.id}: answered {taken!r}") if sys.stdout.isatty() else args.id)
    return 0


def tell(args: argparse.Namespace) -> int:
    TaskQueue(connect(start=False)).tell(args.id, args.text, args.by)
    print(f"task {args.id}: told" if sys.stdout.isatty() else args.id)
    return 0


# -- cancel, dead, requeue --------------------------------------------------------------------------------------


def cancel(args: argparse.Namespace) -> int:
    queue, code = TaskQueue(connect(start=False)), 0
    for task_id in dict.fromkeys(args.ids):
        try:
            said = "asked to stop" if queue.cancel(task_id, args.reason) == "requested" else "cancelled"
            print(f"task {task_id}: {said}" if sys.stdout.isatty() else task_id, flush=True)
        except (NoSuchTask, ValueError) as error:  # the others can be cancelled all the same
            complain(error)
            code = 1
    return code


def dead(args: argparse.Namespace) -> int:
    client = blocking_client(connect(start=False), 0)  # as for status
    for text in client.lrange(keys.DEAD, 0, args.limit - 1):
        letter = read_letter(text)
        ended_ms = client.hget(keys.record(str(letter["id"])), "finished_at") or ""
        if ended_ms.isdigit():
            letter["failed_at"] = f"{datetime.fromtimestamp(int(ended_ms) / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
        if args.json:
            print(json.dumps(letter))
        else:
            said = [str(letter[name] or "-") for name in ("id", "failed_at", "attempts", "reason")]
            print(*(printable(text[:MAX_REASON_CHARS]) for text in said))
    count = client.llen(keys.DEAD)
    if count > args.limit:
        complain(f"{count - args.limit:,} more dead letters; --limit {count} shows them all")
    elif not count:
        complain("no dead letters")
    return 0


def read_letter(text: str) -> dict[str, Any]:
    """Return what a dead letter says, with None for what it does not say: anybody can push one."""
    try:
        letter = parse_json(text)
        if not isinstance(letter, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        letter = {"reason": f"a malformed letter: {error}", "element": text}
    return {name: letter.get(name) for name in ("id", "failed_at", "attempts", "reason", "element")}


def requeue(args: argparse.Namespace) -> int:
    pairs, others = TaskQueue(connect(start=False)).requeue_dead(args.ids or None)
    for old, task in pairs:
        print(f"task {old} is queued again as {task.id}" if sys.stdout.isatty() else task.id)
    missing = set(args.ids) - {old for old, _ in pairs}
    for task_id in sorted(missing):
        complain(f"task {task_id} is not among the dead letters")
    if others and not args.ids:
        complain(f"{others} dead letter(s) hold no task that can be put again: python -m task_streams dead")
    if not (pairs or others or args.ids):
        complain("no dead letters")
    return 1 if missing else 0


# -- import -----------------------------------------------------------------------------------------------------


def import_tasks(args: argparse.Namespace) -> int:
    name = "standard input" if args.file == "-" else args.file
    tasks, bad = [], 0
    if args.file == "-" and sys.stdin is None:
        complain("standard input is closed")
        return 1
    try:
        # in bytes, so that only a line feed ends a line, and one that is not UTF-8 can be named
        with open(sys.stdin.fileno() if args.file == "-" else args.file, "rb") as file:  # noqa: PTH123
            for count, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        tasks.append(task_in(line))
                except ValueError as error:
                    bad += 1
                    complain(f"{name}, line {count}: {error}")
    except OSError as error:
        complain(f"cannot read {name}: {error.strerror}")
        return 1
    if bad and not args.skip_bad:
        complain(f"{bad} bad line(s), so nothing was queued; --skip-bad queues the other {len(tasks)}")
        return 1
    if not tasks:
        complain(f"{name}: no tasks in it")
    print_ids(put_all(TaskQueue(), tasks))
    return 0


def task_in(line: bytes) -> Any:
    """Return the task in a line of JSON. Raises ValueError with a reason that a person understands."""
    task = parse_json(line.decode("utf-8-sig"))  # a file may begin with a byte order mark
    if not isinstance(task, dict) or not isinstance(task.get("type"), str):
        raise ValueError('not a task: expected {"type": "…", "payload": {…}}')
    TaskQueue.check(task)
    return task


# -- the commands -----------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    description, _, epilog = str(__doc__).partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m task_streams", None, description, epilog, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Callable[..., Any]:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(
        "status",
        status,
        "Show how many tasks are waiting, running, parked on a question or resting, and which workers are alive.",
    )
    option("--once", action="store_true", help="on a terminal: one look, instead of one every second")
    option("--json", action="store_true", help="one JSON object, with up to 20 of the running tasks")
    option = add("cancel", cancel, "End tasks, whether they wait or run.")
    option("ids", nargs="+", metavar="ID")
    option("--reason", default="cancelled by hand", metavar="TEXT", help="why, for its log")
    option = add("questions", questions, "List what tasks ask people; the next one to expire first.")
    option("--json", action="store_true", help="one JSON object a line")
    user = os.environ.get("USER", "")
    option = add("answer", answer, "Answer the question of a task. The first answer counts, and the task goes on.")
    option("id", metavar="ID")
    option("text", metavar="TEXT", help="one of the options; any text if the question has none")
    option("--by", default=user, metavar="NAME", help=f"who says it, for the log (default: {user or 'nobody'})")
    option("--number", type=number(1, kind=int), metavar="N", help="only if the task still asks its question N")
    option = add(
        "tell", tell, "Put a message into the inbox of a task that has not ended. An agent reads it at its next step."
    )
    option("id", metavar="ID")
    option("text", metavar="TEXT")
    option("--by", default=user, metavar="NAME", help=f"who says it, for the log (default: {user or 'nobody'})")
    option = add("dead", dead, "List the tasks that were given up on, and why; the newest first.")
    option("--limit", type=number(1, kind=int), default=20, metavar="N", help="at most N of them (default 20)")
    option("--json", action="store_true", help="one JSON object a line")
    option = add("requeue", requeue, "Put dead tasks again, as new tasks, and print their ids. 7 becomes 7.r2.")
    option("ids", nargs="*", metavar="ID", help="only these (default: all)")
    option = add("import", import_tasks, "Put the tasks of a JSON Lines file, and print their ids.")
    option("file", metavar="FILE", help='one {"type": …, "payload": …} a line; - is standard input')
    option("--skip-bad", action="store_true", help="queue the good lines even if others are bad")
    add("stop", lambda _: embedded_server(["stop"]), "Stop the embedded server. Its data stay in .redis/.")
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (NoSuchTask, ValueError) as error:
        complain(error)
        return 1
