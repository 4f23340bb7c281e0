"""Pop tasks from the queue and log each step to the task's own stream.

Usage:   python consumer.py [--concurrency N] [--lease S] [--grace S] [--burst]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    BRPOPs task_queue, XADDs to task_logs:<id>
See:     tutorial/part3.md
"""

import argparse
import hashlib
from typing import Any

from ailf.messaging.redis import to_json
from task_streams import PermanentFailure, Task, TaskLog, run_worker
from task_streams.cli import run
from task_streams.worker import add_worker_arguments, worker_options

KNOWN_TYPES = ("process_data", "send_email")


def handle(task: Task, log: TaskLog) -> dict[str, Any]:
    """Do one task. Each log.add is one XADD to task_logs:<id>; `started` and `completed` are added around it."""
    log.add("processing", step="check the task")
    kind = task.data.get("type") if isinstance(task.data, dict) else None
    if kind not in KNOWN_TYPES:
        raise PermanentFailure(f"unknown task type {kind!r}; known: {', '.join(KNOWN_TYPES)}")
    payload = task.data.get("payload")
    if not isinstance(payload, dict):
        raise PermanentFailure(f"the payload of a {kind} task must be an object, not {type(payload).__name__}")

    log.add("processing", step=f"read {len(payload)} fields: {', '.join(payload)}")
    text = to_json(payload)

    log.add("processing", step="compute the digest")
    return {"type": kind, "fields": len(payload), "characters": len(text), "sha256": _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Work on tasks from the queue; each logs its steps to its own stream.")
    add_worker_arguments(parser)
    args = parser.parse_args()
    # run_worker: BRPOP a task, claim it, XADD started, handle it, XADD completed or error, and again
    return run_worker(handle, **worker_options(args))


if __name__ == "__main__":
    raise SystemExit(run(main))
