"""A worker for the tests to start, stop and kill: its handler does what the task's data says.

Usage:   python tests/programs.py JOURNAL [options of a consumer] [--max-attempts N] [--backoff S]

Each call of the handler writes two lines to the file JOURNAL: `begin` and `end`, with id, attempt and a clock that all
processes of a machine share. So a test can see who worked when, whatever the streams say.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from task_streams import BlockingLog, PermanentFailure, Task, TaskLog, leases, run_worker
from task_streams.cli import add_worker_arguments, run, worker_options
from task_streams.consuming import Consumer


class Journal:
    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, what: str, task: Task) -> None:
        entry = {"what": what, "id": task.id, "attempt": task.attempt, "at": time.monotonic(), "pid": os.getpid()}
        os.write(self.file, f"{json.dumps(entry)}\n".encode())  # one write: lines of several processes do not mix


async def hang(seconds: float) -> None:
    time.sleep(seconds)


def make_handler(journal: Journal) -> Any:
    async def handle(task: Task, log: TaskLog) -> Any:
        data = task.data if isinstance(task.data, dict) else {}
        journal.write("begin", task)
        try:
            for step in range(data.get("steps", 1)):
                await log.add("progress", percent=step, step=f"step {step}")
                await asyncio.sleep(data.get("seconds", 0))
                if data.get("in") == "a coroutine of its own":
                    await asyncio.gather(hang(data["hang"]))
                time.sleep(data.get("hang", 0))
            match data.get("then"):
                case "raise":
                    raise RuntimeError("as told")
                case "raise once" if task.attempt == 1:
                    raise RuntimeError("once, as told")
                case "give up":
                    raise PermanentFailure("it cannot work")
                case "exit":
                    sys.exit(3)
                case "be cancelled":  # as a handler that runs an event loop of its own may be
                    raise asyncio.CancelledError("as told")
                case "return nonsense":
                    return {"a": object()}
            return {"attempt": task.attempt}
        finally:
            journal.write("end", task)

    return handle


def make_blocking_handler(journal: Journal) -> Any:
    """Return the same as a plain function, which runs in a thread."""

    def handle(task: Task, log: BlockingLog) -> Any:
        data = task.data if isinstance(task.data, dict) else {}
        journal.write("begin", task)
        try:
            for step in range(data.get("steps", 1)):
                log.add("progress", percent=step, step=f"step {step}")
                time.sleep(data.get("seconds", 0))
            return {"attempt": task.attempt}
        finally:
            journal.write("end", task)

    return handle


def with_faults(handler: Any) -> Any:
    """Return the handler, and see to it that the worker dies at the step that $TASK_STREAMS_FAULT names, as by kill -9.

    Steps: popped, claimed, started, handled, error, and the terminal events.
    """
    point = os.environ.get("TASK_STREAMS_FAULT")
    if point is None:
        return handler
    claim_all, add_always, end = Consumer.claim_all, TaskLog.add_always, TaskLog.end

    def reached(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    async def claim_or_die(self: Consumer, elements: Any) -> Any:
        reached("popped")
        jobs = await claim_all(self, elements)
        if jobs:
            reached("claimed")
        return jobs

    async def add_and_die(self: TaskLog, event: str, /, **fields: Any) -> str:
        entry_id = await add_always(self, event, **fields)
        reached(event)
        return entry_id

    async def end_and_die(self: TaskLog, event: str, result: Any, /, **fields: Any) -> None:
        await end(self, event, result, **fields)
        reached(event)

    async def handle(task: Task, log: TaskLog) -> Any:
        reached("started")
        try:
            return await handler(task, log)
        finally:
            reached("handled")

    for owner, name, method in (
        (Consumer, "claim_all", claim_or_die),
        (TaskLog, "add_always", add_and_die),
        (TaskLog, "end", end_and_die),
    ):
        setattr(owner, name, method)
    return handle


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal")
    parser.add_argument("--max-attempts", type=int, default=3)
    parser.add_argument("--backoff", type=float, default=1.0)
    parser.add_argument("--silent-loop", type=float, default=leases.SILENT_LOOP_SECONDS)
    parser.add_argument("--blocking", action="store_true")
    add_worker_arguments(parser)
    args = parser.parse_args()
    leases.SILENT_LOOP_SECONDS = args.silent_loop
    handler = (make_blocking_handler if args.blocking else make_handler)(Journal(args.journal))
    options = {"max_attempts": args.max_attempts, "backoff_seconds": args.backoff, **worker_options(args)}
    return run_worker(with_faults(handler), **options)


if __name__ == "__main__":
    raise SystemExit(run(main))
