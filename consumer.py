"""Take tasks from the queue one at a time, and log each step to the task's own stream.

Usage:   python consumer.py [--burst] [--lease S]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    BRPOPs task_queue, XADDs to task_logs:<id>
See:     tutorial/part3.md

This is the whole loop. run_worker() does it for many tasks at once, with time limits, and cancels running tasks.
"""

import argparse
import asyncio
import hashlib
import logging
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS, to_json
from task_streams import LeaseLost, Parked, PermanentFailure, Task, TaskCancelled, TaskLog, keys
from task_streams.cli import number, run
from task_streams.consuming import Consumer
from task_streams.errors import message_of
from task_streams.leases import Job
from task_streams.worker import MAX_ATTEMPTS

KNOWN_TYPES = ("process_data", "send_email")
BLOCK_SECONDS = 1  # short, so that Ctrl-C is noticed within a second
BACKOFF_SECONDS = 1  # before the second attempt; doubles with each

logger = logging.getLogger("consumer")


async def handle(task: Task, log: TaskLog) -> dict[str, Any]:
    """Do one task. Each log.add() is one XADD to task_logs:<id>."""
    await log.add("processing", step="check the task")
    kind = task.data.get("type") if isinstance(task.data, dict) else None
    if kind not in KNOWN_TYPES:
        raise PermanentFailure(f"unknown task type {kind!r}; known: {', '.join(KNOWN_TYPES)}")
    payload = task.data.get("payload")
    if not isinstance(payload, dict):
        raise PermanentFailure(f"the payload of a {kind} task must be an object, not {type(payload).__name__}")

    await log.add("processing", step=f"read {len(payload)} fields: {', '.join(payload)}")
    text = to_json(payload)
    await log.add("processing", step="compute the digest")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"type": kind, "fields": len(payload), "characters": len(text), "sha256": digest}


async def consume(lease_seconds: float, burst: bool) -> int:
    async with Consumer(lease_seconds) as consumer:
        while not consumer.signals:
            popped = await consumer.insist("pop", lambda: consumer.redis.brpop(keys.QUEUE, timeout=BLOCK_SECONDS))
            if popped:
                _, element = popped
                job = await consumer.claim(element)  # a lease, a token, and `started` in the stream
                if job is not None:  # else somebody else has it, or it has ended, or it is not a task
                    await work_on(job, consumer)
            elif burst and not await consumer.has_work():
                break
    return 0


async def work_on(job: Job, consumer: Consumer) -> None:
    """Handle a task, and bring it to its end: completed, cancelled, failed, or tried again."""
    task, log = job.task, job.log
    try:
        try:
            result = await handle(task, log)
            if log.refusal is not None:  # it asks a person, and has caught what ends it
                raise log.refusal
            await log.end("completed", result, result=result, duration_ms=job.duration_ms)  # XADD, and it is closed
            logger.info("task %s completed", task)
        except TaskCancelled as cancelled:
            await log.end("cancelled", str(cancelled), reason=str(cancelled))
            logger.info("task %s cancelled: %s", task, cancelled)
        except (LeaseLost, *REDIS_ERRORS):
            raise
        except BaseException as error:  # the task boundary: whatever a task does, the consumer goes on
            if consumer.signals > 1:  # Ctrl-C, twice
                raise
            if isinstance(error := log.refusal or error, Parked):  # log.ask(): until somebody has answered
                await consumer.release(job, until_answered=True)
                return
            failures, message = task.failures + 1, message_of(error)
            will_retry = failures < MAX_ATTEMPTS and not isinstance(error, PermanentFailure)
            logger.error("task %s: %s%s", task, message, "; it will be tried again" if will_retry else "")
            await log.add_always("error", error=message, error_type=type(error).__name__, will_retry=will_retry)
            if will_retry:
                await consumer.release(job, delay_seconds=BACKOFF_SECONDS * 2**task.failures)
            else:
                await log.end("failed", message, error=message, attempts=task.attempt)
    except (LeaseLost, *REDIS_ERRORS) as lost:
        await consumer.leave(job, lost)
    finally:
        consumer.held.pop(task.token, None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take tasks from the queue one at a time, and log each step.")
    parser.add_argument("--burst", action="store_true", help="work until nothing waits or runs, then exit")
    parser.add_argument("--lease", type=number(1), default=10, metavar="S", help="seconds until a lost task runs again")
    args = parser.parse_args()
    return asyncio.run(consume(args.lease, args.burst))


if __name__ == "__main__":
    raise SystemExit(run(main))
