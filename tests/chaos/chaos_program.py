"""A worker for the chaos: its handler adds events and writes down which were acknowledged.

Usage:   python tests/chaos/chaos_program.py JOURNAL [options of a consumer] [--clock-offset S]

The journal's lines are history.Step: `begin`, `added` (with the entry id that log.add returned) and `end`.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from programs import with_faults

from task_streams import PermanentFailure, Task, TaskLog, run_worker
from task_streams.cli import add_worker_arguments, run, worker_options


def make_handler(journal: int) -> Any:
    def write(what: str, task: Task, **fields: object) -> None:
        step = {"what": what, "id": task.id, "attempt": task.attempt, "epoch": task.epoch, "run": task.token}
        step |= {"task": task.data["mark"], "at": time.monotonic(), **fields}
        os.write(journal, f"{json.dumps(step)}\n".encode())  # one write: lines of several processes do not mix

    async def handle(task: Task, log: TaskLog) -> str:
        write("begin", task)
        try:
            for number in range(task.data["steps"]):
                mark = f"{task.data['mark']}.{task.token[:8]}.{number}"
                asked = time.monotonic()
                entry = await log.add("progress", percent=number, mark=mark)
                write("added", task, asked=asked, entry=entry, mark=mark)
                await asyncio.sleep(task.data["seconds"])
            match task.data["then"]:
                case "raise once" if task.failures == 0:
                    raise RuntimeError("once, as told")
                case "give up":
                    raise PermanentFailure("it cannot work")
            return task.data["mark"]
        finally:
            write("end", task)

    return handle


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal")
    parser.add_argument("--clock-offset", type=float, default=0.0, metavar="S", help="how wrong time.time() is here")
    add_worker_arguments(parser)
    args = parser.parse_args()
    right = time.time
    time.time = lambda: right() + args.clock_offset
    journal = os.open(args.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    options = {"max_attempts": 1000, "backoff_seconds": 0.1, **worker_options(args)}
    return run_worker(with_faults(make_handler(journal)), **options)


if __name__ == "__main__":
    raise SystemExit(run(main))
