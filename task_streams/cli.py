"""What the scripts share around their main(): exit codes, options, printing ids, parsing JSON, text safe to print."""

import argparse
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS, RedisMessagingError, embedded, explain, from_json

from .claims import LEASE_SECONDS, Task
from .queue import TaskQueue
from .worker import GRACE_SECONDS, TIME_LIMIT_SECONDS

BATCH = 1_000  # tasks put at a time
NAMED = 10  # tasks that print_ids names one by one on a terminal


class Stderr:
    """Write to the current sys.stderr: Rich replaces it while it draws bars, and prints above them."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)


def run(main: Callable[[], int]) -> int:
    """Call main() and return an exit code: its own, 1 if Redis cannot serve, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=Stderr())
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # the reader of our output has enough of it (`… | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except RedisMessagingError as error:
        print(error, file=sys.stderr)
    except REDIS_ERRORS as error:
        print(explain(error, os.environ.get("REDIS_URL") or f"redis://localhost:{embedded.PORT}"), file=sys.stderr)
    return 1


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError with a reason that a person understands."""
    try:
        return from_json(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def printable(text: str) -> str:
    """Return text with control characters as escapes: they could steer a terminal. printable("\\a") -> '\\\\x07'"""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def answer_command(task_id: str, options: Sequence[str] | None, number: object) -> str:
    """Return what a person types to answer a question; with its number, since another one may be open by then."""
    answer = shlex.quote(options[0]) if options else "TEXT"
    dashes = "-- " if answer.startswith("-") else ""  # else it would be taken for an option
    return f"python -m task_streams answer {task_id} --number {number} {dashes}{answer}"


def put_all(queue: TaskQueue, tasks: Sequence[Any], delay_seconds: float = 0) -> Iterator[Task]:
    """Put tasks in batches, and yield them as they are put: if Redis goes away, the ids so far are known."""
    from rich.console import Console  # late: workers use this module too, and need no Rich
    from rich.progress import track

    batches, console = range(0, len(tasks), BATCH), Console(stderr=True)
    is_short = len(batches) < 2 or not console.is_terminal
    for start in track(batches, "queueing", console=console, transient=True, disable=is_short):
        yield from queue.put_many(tasks[start : start + BATCH], delay_seconds)


def print_ids(tasks: Iterable[Task]) -> None:
    """Print the ids: one a line in a pipe; on a terminal with a hint what to do next."""
    count, on_terminal = 0, sys.stdout.isatty()
    for count, task in enumerate(tasks, start=1):
        kind = task.data.get("type") if isinstance(task.data, dict) else None
        if not on_terminal:
            print(task.id)
        elif count <= NAMED:
            print(f"task {task.id}: {printable(str(kind or 'queued'))}")
    if on_terminal and count > NAMED:
        print(f"… task {task.id}: {count:,} tasks in all")
    if on_terminal and count:
        print(f"watch it: python stream_reader.py {task.id}")


def number(least: float, most: float = math.inf, kind: type[float] = float) -> Callable[[str], float]:
    """Return an argparse type: a number between two others. It refuses all else in one line."""

    def parse(text: str) -> float:
        value = kind(text)  # subtle: nan fails the comparison
        if not least <= value <= most or math.isinf(value):
            limits = f"at least {least:g}" if math.isinf(most) else f"between {least:g} and {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    parse.__name__ = "number"
    return parse


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every worker takes: --concurrency, --lease, --burst, --grace, --time-limit."""
    for option, dest, kind, default, text in (
        ("--concurrency", "concurrency", number(1, kind=int), 1, "tasks at one time"),
        ("--lease", "lease_seconds", number(1), LEASE_SECONDS, "seconds until a killed worker's task runs again"),
        ("--grace", "grace_seconds", number(0), GRACE_SECONDS, "seconds that tasks may take to finish after Ctrl-C"),
        ("--time-limit", "time_limit_seconds", number(0.001), TIME_LIMIT_SECONDS, "seconds that one task may take"),
    ):
        text += f" (default {default:g})"
        parser.add_argument(option, dest=dest, type=kind, default=default, metavar="N", help=text)
    parser.add_argument("--burst", action="store_true", help="work until nothing waits or runs, then exit")


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed options as keyword arguments for run_worker."""
    names = ("concurrency", "lease_seconds", "burst", "grace_seconds", "time_limit_seconds")
    return {name: getattr(args, name) for name in names}
