"""Look after the queue: see what it does, cancel tasks, put dead ones again, import many.

Usage:   python -m task_streams status [--once | --json]     what waits and runs; live on a terminal, until Ctrl-C
         python -m task_streams cancel ID… [--reason TEXT]   end tasks, waiting or running
         python -m task_streams dead [--limit N] [--json]    the tasks that were given up on, newest first
         python -m task_streams requeue [ID…]                put all or some of those again: 7 becomes 7.r2
         python -m task_streams import FILE [--skip-bad]     one {"type": …, "payload": …} a line; - is standard input
         python -m task_streams stop                         stop the embedded server; its data stay in .redis/
Prints:  ids, one a line, if stdout is a pipe; problems go to stderr
Exits:   0 done, 1 something could not be done, 2 wrong usage, 130 after Ctrl-C
Needs:   Redis at $REDIS_URL, else localhost:6379, else the embedded server
         (only import starts it, since looking at a queue must not leave a server behind; stop ends only that one)
Keys:    reads task_queue, {task_queue}:leases, :dead, :totals and the records
See:     tutorial/part6.md, tutorial/part7.md
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ailf.messaging.redis import Client, blocking_client, connect, encode
from ailf.messaging.redis.__main__ import main as embedded_server

from . import keys, status
from .claims import check_id
from .cli import parse_json, print_ids, printable, put_all
from .queue import NoSuchTask, TaskQueue

LETTERS_PAGE = 100  # dead letters read at one time, since each may hold a megabyte
MAX_CELL_CHARS = 300  # of a reason on a terminal or in a line; --json shows all of it
MAX_LINE_CHARS = 2_000_000  # of a tasks file: twice what a task may hold


def complain(text: object) -> None:
    print(f"task_streams: {printable(str(text))}", file=sys.stderr)


def reader() -> Client:
    """Return a client that shows bytes that are not UTF-8 as escapes, instead of failing."""
    return blocking_client(connect(start=False), 0)


def show_status(args: argparse.Namespace) -> int:
    status.show(reader(), args.once, args.json)
    return 0


# -- cancel, dead, requeue --------------------------------------------------------------------------------------


def cancel(args: argparse.Namespace) -> int:
    queue, code = TaskQueue(connect(start=False)), 0
    for task_id in dict.fromkeys(args.ids):
        try:
            outcome = queue.cancel(check_id(task_id), args.reason)
        except (NoSuchTask, ValueError) as error:  # the others can be cancelled all the same
            # subtle: a task that was pushed by hand has no record before its first claim
            unclaimed = isinstance(error, NoSuchTask) and queue.is_listed(task_id)
            complain(
                f"task {task_id} was pushed by hand; it can be cancelled once a worker has it" if unclaimed else error
            )
            code = 1
            continue
        said = "cancelled" if outcome == "cancelled" else "asked to stop"
        print(f"task {task_id}: {said}" if sys.stdout.isatty() else task_id, flush=True)
    return code


def letters(client: Client, most: int) -> Iterator[dict[str, Any]]:
    """Yield the newest dead letters: id, attempts, reason and failed_at, each None if it is not known."""
    for start in range(0, most, LETTERS_PAGE):
        found = []
        for letter in client.lrange(keys.DEAD, start, min(start + LETTERS_PAGE, most) - 1):
            try:
                content = parse_json(letter)
            except ValueError as error:
                content = {"reason": f"a malformed letter: {error}", "element": letter}
            if not isinstance(content, dict):
                content = {"reason": "a malformed letter: not a JSON object", "element": letter}
            found.append({name: content.get(name) for name in ("id", "attempts", "reason", "element")})
        with client.pipeline(transaction=False) as pipe:
            for content in found:
                pipe.hget(keys.record(str(content["id"])), "finished_at")
            for content, ms in zip(found, pipe.execute(), strict=True):
                at = ms and ms.isdigit() and f"{datetime.fromtimestamp(int(ms) / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
                yield {**content, "failed_at": at or None}


def dead(args: argparse.Namespace) -> int:
    client = reader()
    count = client.llen(keys.DEAD)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("task", "failed at", "attempts", "reason"):
        table.add_column(title, overflow="fold")
    for letter in letters(client, min(args.limit, count)):
        names = ("id", "failed_at", "attempts", "reason")
        texts = [text if isinstance(text := letter[name], str) else encode(text) for name in names]
        cells = ["-" if text == "null" else printable(text)[:MAX_CELL_CHARS] for text in texts]
        if args.json:
            print(json.dumps(letter))
        elif not sys.stdout.isatty():
            print(*cells)
        else:
            table.add_row(*map(Text, cells))
    if table.row_count:
        Console(highlight=False).print(table)
    if count > args.limit:
        complain(f"{count - args.limit:,} more dead letters; --limit {count} shows them all")
    elif not count:
        complain("no dead letters")
    return 0


def requeue(args: argparse.Namespace) -> int:
    queue = TaskQueue(connect(start=False))
    pairs, others = queue.requeue_dead(args.ids or None)
    for old, task in pairs:
        print(f"task {old} is queued again as {task.id}" if sys.stdout.isatty() else task.id)
    missing = set(args.ids) - {old for old, _ in pairs}
    for task_id in sorted(missing):
        complain(f"no dead letter of a task {task_id}")
    if others and not args.ids:
        complain(f"{others} dead letter(s) hold no task that can be put again: python -m task_streams dead")
    if not (pairs or others or args.ids):
        print("no dead letters", file=sys.stderr)
    return 1 if missing else 0


# -- import -----------------------------------------------------------------------------------------------------


def lines_in(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file, cut after MAX_LINE_CHARS: one that long is bad, and need not fill the memory."""
    while line := file.readline(MAX_LINE_CHARS):
        yield line
        while line and not line.endswith("\n") and len(line) == MAX_LINE_CHARS:
            line = file.readline(MAX_LINE_CHARS)


def task_in(line: str) -> Any:
    """Return the task in a line of JSON. Raises ValueError with a reason that a person understands."""
    if len(line) >= MAX_LINE_CHARS:
        raise ValueError(f"longer than {MAX_LINE_CHARS:,} characters")
    try:
        line.encode()
    except UnicodeEncodeError:  # bytes that cannot be decoded were read as lone surrogates
        raise ValueError("not UTF-8") from None
    task = parse_json(line)
    if not isinstance(task, dict) or not isinstance(task.get("type"), str):
        raise ValueError('not a task: expected {"type": "…", "payload": {…}}')
    TaskQueue.check(task)
    return task


def import_tasks(args: argparse.Namespace) -> int:
    name = "standard input" if args.file == "-" else args.file
    tasks, bad = [], 0
    try:
        if args.file == "-" and sys.stdin is None:
            raise OSError(0, "it is closed")
        source = sys.stdin.fileno() if args.file == "-" else args.file
        # newline="\n": only a line feed ends a JSON line. surrogateescape: a line that is not UTF-8 can be named
        with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:  # noqa: PTH123
            for count, line in enumerate(lines_in(file), start=1):
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
        return 0
    print_ids(put_all(TaskQueue(), tasks))
    return 0


# -- the commands -----------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError("must be one line of text")
    return text


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m task_streams",
        description=description,
        epilog=rest[rest.index("Prints:") :],  # argparse itself lists the commands
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    command = add("status", show_status, "Show what waits, runs and rests, and which workers are alive.")
    command.add_argument("--once", action="store_true", help="on a terminal: one look, instead of one every second")
    command.add_argument("--json", action="store_true", help="one JSON object, with up to 20 of the running tasks")
    command = add("cancel", cancel, "End tasks, whether they wait or run.")
    command.add_argument("ids", nargs="+", metavar="ID")
    command.add_argument(
        "--reason", type=one_line, default="cancelled by hand", metavar="TEXT", help="why, for its log"
    )
    command = add("dead", dead, "List the tasks that were given up on, and why; the newest first.")
    command.add_argument("--limit", type=positive, default=20, metavar="N", help="at most N of them (default 20)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command = add("requeue", requeue, "Put dead tasks again, as new tasks, and print their ids. 7 becomes 7.r2.")
    command.add_argument("ids", nargs="*", metavar="ID", help="only these (default: all)")
    command = add("import", import_tasks, "Put the tasks of a JSON Lines file, and print their ids.")
    command.add_argument("file", metavar="FILE", help='one {"type": …, "payload": …} a line; - is standard input')
    command.add_argument("--skip-bad", action="store_true", help="queue the good lines even if others are bad")
    add("stop", lambda _: embedded_server(["stop"]), "Stop the embedded server. Its data stay in .redis/.")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    code: int = args.run(args)
    return code
