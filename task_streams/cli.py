"""What the scripts share around their main(): exit codes, printing ids, parsing JSON, text that is safe to print."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS, RedisMessagingError, embedded, explain, from_json

from .queue import Task, TaskQueue

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


def put_all(queue: TaskQueue, tasks: Sequence[Any]) -> Iterator[Task]:
    """Put tasks in batches, and yield them as they are put. On a terminal, a progress bar shows long work."""
    from rich.console import Console  # late: workers use this module too, and need no Rich
    from rich.progress import track

    batches = [tasks[start : start + BATCH] for start in range(0, len(tasks), BATCH)]
    console = Console(stderr=True)
    shown: Iterable[Sequence[Any]] = batches
    if len(batches) > 1 and console.is_terminal:
        shown = track(batches, description="queueing", console=console, transient=True)
    for batch in shown:
        yield from queue.put_many(batch)


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
