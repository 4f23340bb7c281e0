"""A worker for the tests to kill: its handler takes four tool steps and five LLM steps, two of the tools unsafe. It
asks a question before the last tool.

Usage:   python tests/step_programs.py CALLS [options of a consumer] [--blocking]

Each call appends one line to the file CALLS: `<task id> <step> <idempotency key>`. So a test can count what really
happened, outside of Redis. $TASK_STREAMS_DIE_AFTER=N kills the process as by kill -9 right after it has appended the
Nth event, or, with "call N", in the middle of call N, when the line is written.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from task_streams import BlockingLog, Task, TaskLog, run_worker
from task_streams.cli import add_worker_arguments, run, worker_options

QUESTION = "Refund it?"
UNSAFE = ("mail", "refund")
STEPS = ("llm", "data.load", "llm", "mail", "llm", "data.query", "llm", "refund", "llm")
DIE_AFTER = os.environ.get("TASK_STREAMS_DIE_AFTER", "")

written = calls = 0


def die(reached: str) -> None:
    if reached == DIE_AFTER:
        os.kill(os.getpid(), signal.SIGKILL)


class Calls:
    """The file that says what was really called."""

    def __init__(self, path: str | Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def make(self, task: Task, name: str, idempotency_key: str) -> dict[str, Any]:
        """Make a call."""
        global calls
        calls += 1
        # one write: lines of several processes do not mix
        os.write(self.file, f"{task.id} {name} {idempotency_key}\n".encode())
        die(f"call {calls}")
        time.sleep(task.data.get("seconds", 0))
        return {"step": name}


def make_handler(calls: Calls) -> Any:
    async def handle(task: Task, log: TaskLog) -> Any:
        for number, name in enumerate(STEPS):

            async def ask(question: int, idempotency_key: str) -> Any:
                for word in ("one ", "two "):
                    await log.add("llm_delta", text=word)
                answer = await asyncio.to_thread(calls.make, task, f"llm{question}", idempotency_key)
                return {"response": "one two ", "calls": [answer], "usage": None}

            def use(question: int, idempotency_key: str, name: str = name) -> Any:
                return calls.make(task, name, idempotency_key)

            if name == "refund":
                assert await log.ask(QUESTION, ["yes", "no"]) == "yes"
            await log.step(name, ask if name == "llm" else use, number, safe_to_repeat=name not in UNSAFE)
            await log.add("progress", percent=number)
        return len(STEPS)

    return handle


def make_blocking_handler(calls: Calls) -> Any:
    """Return the same as a plain function, which runs in a thread."""

    def handle(task: Task, log: BlockingLog) -> Any:
        for number, name in enumerate(STEPS):

            def use(question: int, idempotency_key: str, name: str = name) -> Any:
                step = f"llm{question}" if name == "llm" else name
                return calls.make(task, step, idempotency_key)

            if name == "refund":
                assert log.ask(QUESTION, ["yes", "no"]) == "yes"
            log.step(name, use, number, safe_to_repeat=name not in UNSAFE)
            log.add("progress", percent=number)
        return len(STEPS)

    return handle


def count_events() -> None:
    """Die after the Nth event that this process has appended."""
    write = TaskLog._write

    async def write_and_die(self: TaskLog, *args: Any) -> str:
        global written
        entry_id = await write(self, *args)
        written += 1
        die(str(written))
        return entry_id

    TaskLog._write = write_and_die  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("calls")
    parser.add_argument("--blocking", action="store_true")
    add_worker_arguments(parser)
    args = parser.parse_args()
    count_events()
    handler = (make_blocking_handler if args.blocking else make_handler)(Calls(args.calls))
    return run_worker(handler, backoff_seconds=0.05, **worker_options(args))


if __name__ == "__main__":
    raise SystemExit(run(main))
