"""Put tasks on the queue, and print their ids.

Usage:   python producer.py                                   the tutorial's two tasks: process_data and send_email
         python producer.py summarise sample_data/sales.csv
         python producer.py send-email --to ann@example.org --subject Hello --body "It works."
         python producer.py --type process_data --payload '{"file": "sample_data/sales.csv"}' [--count N] [--id ID]
         python producer.py --from-file tasks.jsonl           one {"type": …, "payload": …} a line; - is standard input
         python producer.py --cancel ID | --requeue-dead
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    INCRs task_id_counter, LPUSHes task_queue
See:     tutorial/part3.md
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track

from ailf.messaging.redis import from_json
from task_streams import NoSuchTask, Task, TaskQueue
from task_streams.cli import run
from task_streams.worker import cancel_task

BATCH = 1_000  # tasks between two moves of the progress bar
MAX_LINE_CHARS = 2_000_000  # of a tasks file: twice what a task may hold

TUTORIAL_TASKS = [
    {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}},
    {
        "type": "send_email",
        "payload": {"to": "you@example.org", "subject": "Your report", "body": "The sales report is ready."},
    },
]


class UsageError(Exception):
    """What was typed or read is wrong; the message is one line."""


# -- the tasks that the arguments ask for -----------------------------------------------------------------------


def tasks_from_arguments(args: argparse.Namespace) -> list[Any]:
    if args.command == "summarise":
        return [{"type": "process_data", "payload": {"file": file}} for file in args.files]
    if args.command == "send-email":
        return [{"type": "send_email", "payload": {"to": args.to, "subject": args.subject, "body": args.body}}]
    if args.type is None:
        return TUTORIAL_TASKS
    try:
        return [{"type": args.type, "payload": parse(args.payload)}]
    except ValueError as error:
        raise UsageError(f"--payload: {error}") from error


def parse(text: str) -> Any:
    """Parse JSON; ValueError, in words for a person, where it is none."""
    try:
        return from_json(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def read_tasks(lines: TextIO, name: str, skip_bad: bool) -> list[Any]:
    """Return the tasks of a JSON Lines file; blank lines are skipped. A bad line is reported with its number."""
    tasks, bad = [], 0
    for number, line in enumerate(_lines(lines), start=1):
        if not line.strip():
            continue
        try:
            tasks.append(_checked_task(line))
        except ValueError as error:
            bad += 1
            print(f"{name}, line {number}: {error}", file=sys.stderr)
    if not tasks and not bad:
        print(f"{name}: no tasks in it", file=sys.stderr)
    if bad and not skip_bad:
        raise UsageError(f"{bad} bad line(s), so nothing was queued; --skip-bad queues the other {len(tasks)}")
    return tasks


def _lines(lines: TextIO) -> Iterator[str]:
    """Yield the lines, those that are far too long cut: they are bad, and need not fill the memory."""
    while line := lines.readline(MAX_LINE_CHARS):
        yield line
        while line and not line.endswith("\n") and len(line) == MAX_LINE_CHARS:
            line = lines.readline(MAX_LINE_CHARS)


def _checked_task(line: str) -> Any:
    if len(line) >= MAX_LINE_CHARS:
        raise ValueError(f"longer than {MAX_LINE_CHARS:,} characters")
    try:
        line.encode()
    except UnicodeEncodeError:  # what could not be decoded was escaped as lone surrogates
        raise ValueError("not UTF-8") from None
    task = parse(line)
    if not isinstance(task, dict) or not isinstance(task.get("type"), str):
        raise ValueError('not a task: expected {"type": "…", "payload": {…}}')
    TaskQueue.check(task)
    return task


# -- what is done -----------------------------------------------------------------------------------------------


def put_all(queue: TaskQueue, tasks: list[Any]) -> Iterator[Task]:
    """LPUSH all tasks, in pipelines; a progress bar shows long work on a terminal."""
    batches = [tasks[start : start + BATCH] for start in range(0, len(tasks), BATCH)]
    console = Console(stderr=True)
    shown: Iterable[list[Any]] = batches
    if len(batches) > 1 and console.is_terminal:
        shown = track(batches, description="queueing", console=console, transient=True)
    for batch in shown:
        yield from queue.put_many(batch)


def print_ids(tasks: Iterable[Task]) -> None:
    """Print the ids: one a line in a pipe, and with a hint what to do next on a terminal."""
    last = None
    for count, task in enumerate(tasks, start=1):
        last = task
        if not sys.stdout.isatty():
            print(task.id)
        elif count <= 10:
            kind = task.data.get("type") if isinstance(task.data, dict) else None
            print(f"task {task.id}: {kind or 'queued'}")
    if last is not None and sys.stdout.isatty():
        if count > 10:
            print(f"… task {last.id}: {count:,} tasks in all")
        print(f"watch it: python stream_reader.py {last.id}")


def cancel_all(queue: TaskQueue, task_ids: list[str]) -> None:
    """Cancel tasks; where one cannot be, do the others all the same, then raise what was wrong."""
    problems = []
    for task_id in task_ids:
        try:
            outcome = cancel_task(queue, task_id, "cancelled by producer.py --cancel")
        except (NoSuchTask, ValueError) as error:
            problems.append(str(error))
            continue
        print(f"task {task_id}: " + ("cancelled" if outcome == "cancelled" else "asked to stop"))
    if problems:
        raise UsageError("; ".join(problems))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="producer.py",
        description="Put tasks on the queue, and print their ids. With no arguments: the tutorial's two tasks.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--type", metavar="T", help="put a task of this type")
    parser.add_argument("--payload", metavar="JSON", help="its payload (default {})")
    parser.add_argument("--id", help="an id of your own: putting it twice queues it once")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="put each task N times (default 1)")
    parser.add_argument("--from-file", metavar="FILE", help="put the tasks of a JSON Lines file; - is standard input")
    parser.add_argument("--skip-bad", action="store_true", help="with --from-file: queue the good lines all the same")
    parser.add_argument("--requeue-dead", action="store_true", help="put every task again that was given up on")
    parser.add_argument(
        "--cancel", metavar="ID", nargs="+", action="extend", help="end tasks, whether they wait or run"
    )
    commands = parser.add_subparsers(dest="command", metavar="summarise | send-email")
    summarise = commands.add_parser("summarise", help="have an agent look at data files")
    summarise.add_argument("files", nargs="+", metavar="FILE", help="CSV, TSV, JSON, JSON Lines or text; gzip too")
    email = commands.add_parser("send-email", help="have an agent send a message")
    for name in ("--to", "--subject", "--body"):
        email.add_argument(name, required=True)

    args = parser.parse_args(argv)
    chosen = [args.command, args.type, args.from_file, args.cancel, args.requeue_dead or None]
    if sum(choice is not None for choice in chosen) > 1:
        parser.error("choose one of: a command, --type, --from-file, --cancel, --requeue-dead")
    if args.payload is not None and args.type is None:
        parser.error("--payload goes with --type")
    if args.id is not None and (args.type is None or args.count != 1):
        parser.error("--id goes with --type, without --count")
    if args.skip_bad and args.from_file is None:
        parser.error("--skip-bad goes with --from-file")
    if args.count < 1:
        parser.error("--count must be at least 1")
    args.payload = "{}" if args.payload is None else args.payload
    return args


def produce(args: argparse.Namespace) -> None:
    if args.from_file is not None:
        try:
            if args.from_file == "-" and sys.stdin is None:
                raise UsageError("standard input is closed")
            source = sys.stdin.fileno() if args.from_file == "-" else args.from_file
            # newline="\n": only a line feed ends a JSON line. surrogateescape: a line that is not UTF-8 is named
            with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:  # noqa: PTH123
                tasks = read_tasks(lines, "standard input" if args.from_file == "-" else args.from_file, args.skip_bad)
        except OSError as error:
            raise UsageError(f"cannot read {args.from_file}: {error.strerror}") from error
    elif args.cancel is None and not args.requeue_dead:
        tasks = tasks_from_arguments(args)
        for task in tasks:
            TaskQueue.check(task)

    queue = TaskQueue()
    try:
        if args.cancel is not None:
            cancel_all(queue, args.cancel)
        elif args.requeue_dead:
            pairs, others = queue.requeue_dead()
            for old, task in pairs:
                print(f"task {old} is queued again as {task.id}" if sys.stdout.isatty() else task.id)
            if others:
                print(
                    f"{others} dead letter(s) hold no task: redis-cli LRANGE {{task_queue}}:dead 0 -1", file=sys.stderr
                )
        elif args.id is not None:
            print_ids([queue.put(tasks[0], id=args.id)])
        else:
            print_ids(put_all(queue, tasks * args.count))
    finally:
        queue.close()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        produce(args)
    except (UsageError, NoSuchTask, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"producer.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
