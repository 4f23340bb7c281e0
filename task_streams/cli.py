"""What the scripts share around their main(): exit codes, options, printing ids, parsing JSON, text safe to print."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS, RedisMessagingError, embedded, explain, from_json

from .claims import LEASE_SECONDS, Task
from .queue import TaskQueue
from .worker import GRACE_SECONDS, TIME_LIMIT_SECONDS

BATCH = 1_000  # tasks between two moves of the progress bar
NAMED = 10  # tasks that print_ids names one by one on a terminal


def run(main: Callable[[], int]) -> int:
    """Call main() and return an exit code: its own, 1 if Redis cannot serve, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
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


def put_all(queue: TaskQueue, tasks: Sequence[Any], delay_seconds: float = 0) -> Iterator[Task]:
    """Put tasks in batches, and yield them as they are put. On a terminal, a progress bar shows long work."""
    from rich.console import Console  # late: workers use this module too, and need no Rich
    from rich.progress import track

    batches = [tasks[start : start + BATCH] for start in range(0, len(tasks), BATCH)]
    console = Console(stderr=True)
    shown: Iterable[Sequence[Any]] = batches
    if len(batches) > 1 and console.is_terminal:
        shown = track(batches, description="queueing", console=console, transient=True)
    for batch in shown:
        yield from queue.put_many(batch, delay_seconds)


def print_ids(tasks: Iterable[Task]) -> None:
    """Print the ids: one a line in a pipe; on a terminal with a hint what to do next."""
    last = None
    for count, task in enumerate(tasks, start=1):
        last = task
        if not sys.stdout.isatty():
            print(task.id)
        elif count <= NAMED:
            kind = task.data.get("type") if isinstance(task.data, dict) else None
            print(f"task {task.id}: {printable(str(kind or 'queued'))}")
    if last is not None and sys.stdout.isatty():
        if count > NAMED:
            print(f"… task {last.id}: {count:,} tasks in all")
        print(f"watch it: python stream_reader.py {last.id}")


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
    at_once = "tasks at one time (default 1)"
    lease = "seconds after which a task whose worker was killed runs again (default 10)"
    grace = "seconds that running tasks may take to finish after Ctrl-C (default 10)"
    limit = "seconds that one task may take (default 3600)"
    parser.add_argument("--concurrency", type=number(1, kind=int), default=1, metavar="N", help=at_once)
    parser.add_argument("--lease", type=number(1), default=LEASE_SECONDS, metavar="S", help=lease)
    parser.add_argument("--grace", type=number(0), default=GRACE_SECONDS, metavar="S", help=grace)
    parser.add_argument("--time-limit", type=number(0.001), default=TIME_LIMIT_SECONDS, metavar="S", help=limit)
    parser.add_argument("--burst", action="store_true", help="work until nothing waits or runs, then exit")


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed options as keyword arguments for run_worker."""
    return {
        "concurrency": args.concurrency,
        "lease_seconds": args.lease,
        "burst": args.burst,
        "grace_seconds": args.grace,
        "time_limit_seconds": args.time_limit,
    }
