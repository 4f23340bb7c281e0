"""Leases: the thread that keeps them, so that a handler which blocks the event loop does not cost the others theirs.

renew     three times a lease, for all tasks that this worker holds; it hears of cancellations with the reply
recover   once a second, by one worker of all: push tasks again that others lost, and those that are due
watch     the event loop must answer; if it is silent for a minute, the process ends and hands its tasks back
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from ailf.messaging.redis import REDIS_ERRORS, RedisMessagingError, RedisPubSub, is_transient

from . import keys
from .claims import Task, release_call
from .errors import LeaseLost, TaskCancelled
from .log import TaskLog
from .pipeline import run
from .queue import TaskQueue
from .retrying import Outage

logger = logging.getLogger(__name__)

RECOVER_SECONDS = 1.0  # between two looks for lost tasks
SILENT_LOOP_SECONDS = 60.0  # how long the event loop may not answer
STOPPED_SECONDS = 15.0  # if the heartbeat itself was silent for so long, the whole process was stopped
STUBBORN_SECONDS = 3.0  # how long a handler may take to end after it was cancelled


class OutOfTime(Exception):
    """The handler took longer than the time limit."""


@dataclass(eq=False)
class Job:
    """A task that this process holds, and the log of this attempt."""

    task: Task
    log: TaskLog
    began: float = field(default_factory=time.monotonic)
    why: Exception | None = None  # why its handler is stopped
    handler: "asyncio.Future[tuple[object, BaseException | None]] | None" = None  # what it returned, what it raised
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def wake(self) -> None:
        """Resolve `turn`: the handler is done, or it is to be stopped."""
        if not self.turn.done():
            self.turn.set_result(None)

    @property
    def duration_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


class Heartbeat:
    """Keeps the leases of the tasks in `held`, which only the event loop changes."""

    def __init__(self, queue: TaskQueue, lease_seconds: float, outage: Outage) -> None:
        self.queue, self.lease_seconds, self.outage = queue, lease_seconds, outage
        self.held: dict[str, Job] = {}  # by their tokens
        self.time_limit_seconds = math.inf
        # called in the event loop if a lease is over (LeaseLost), a task's end was asked for (TaskCancelled), or its
        # time is up (OutOfTime); the last perhaps a second late, and more than once
        self.on_stop: Callable[[Job, Exception], None] = lambda job, why: job.log.stop(why)
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._heard_at = self._looked_at = time.monotonic()  # when the event loop has answered, and was asked, last
        self._wake, self._stop = threading.Event(), threading.Event()
        self._cancelled = RedisPubSub(queue.redis)
        self._is_listening = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end: in a few seconds if Redis is silent."""
        self._stop.set()
        self._wake.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        renew_at = recover_at = 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            self._watch_loop(now)
            for one in list(self.held.values()):
                if one.log.is_over:  # also while Redis is away: this worker trusts its own clock
                    one.log.is_lost = True
                    self._tell(self.on_stop, one, LeaseLost(f"the lease of task {one.task} is over"))
                elif now > one.began + self.time_limit_seconds:
                    self._tell(self.on_stop, one, OutOfTime(f"did not finish within {self.time_limit_seconds:g} s"))
            if now >= recover_at:
                recover_at = now + RECOVER_SECONDS
                self._survive("recover", self._recover)
            if self._wake.is_set() or now >= renew_at:
                self._wake.clear()
                is_done = self._survive("heartbeat", self._renew)
                renew_at = now + (self.lease_seconds / 3 if is_done else min(1.0, self.lease_seconds / 10))
            self._wake.wait(max(0.0, min(renew_at, recover_at) - time.monotonic()))
        self._cancelled.close()

    def _survive(self, kind: str, step: Callable[[], None]) -> bool:
        """Take a step; say whether it was done. Whatever happens, the thread goes on."""
        try:
            step()
        except (RedisMessagingError, *REDIS_ERRORS) as error:
            if isinstance(error, RedisMessagingError) or is_transient(error):
                self.outage.failed(kind, error)
            else:
                logger.error("%s: %s", kind, error)
        except Exception:
            logger.exception("%s failed; trying again", kind)
        else:
            self.outage.worked(kind)
            return True
        return False

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(call, *args)

    def _renew(self) -> None:
        sent = time.monotonic()
        longest = self.time_limit_seconds + 2 * STUBBORN_SECONDS
        held = [one for one in list(self.held.values()) if sent < one.began + longest and not one.log.is_lost]
        for at in range(0, len(held), 500):
            some = held[at : at + 500]
            replies = self.queue.heartbeat([(one.task, one.log.seq) for one in some], self.lease_seconds)
            for one, reply in zip(some, replies, strict=True):
                if isinstance(reply, Exception):
                    logger.error("cannot renew the lease of task %s: %s", one.task, reply)
                elif reply == 0:
                    one.log.is_lost = True
                else:
                    one.log.deadline = sent + self.lease_seconds
                    if reply != 1:
                        self._tell(self.on_stop, one, TaskCancelled(str(reply)))

    def _recover(self) -> None:
        if not self._is_listening:
            self._listen()
        if count := self.queue.recover(at_most_every_ms=int(RECOVER_SECONDS * 900)):
            logger.info("queued %d task(s): their delay is over, or their worker was lost", count)

    def _listen(self) -> None:
        """Hear at once that a running task is to be cancelled; without it, the next heartbeat tells."""
        logging.getLogger("ailf.messaging.redis.pubsub").setLevel(logging.ERROR)  # the outage is said here
        try:
            self._cancelled.subscribe(keys.CANCEL_CHANNEL, self._on_cancel)
            self._cancelled.run_in_thread()
        except RedisMessagingError as error:
            if is_transient(error):
                raise
            logger.warning("cancellations arrive with the next heartbeat only: %s", error)
        self._is_listening = True

    def _on_cancel(self, task_id: object) -> None:
        if any(one.task.id == str(task_id) for one in list(self.held.values())):
            self._wake.set()

    def _watch_loop(self, now: float) -> None:
        """End the process if the event loop doesn't answer: a worker that is stuck must not hold its tasks for ever."""
        self._tell(self._hear)
        if now - self._looked_at > STOPPED_SECONDS:  # subtle: this process was stopped, not its loop
            self._heard_at = now
        self._looked_at = now
        if now - self._heard_at < SILENT_LOOP_SECONDS:
            return
        frame = sys._current_frames().get(self._loop_thread)
        where = "".join(traceback.format_stack(frame)) if frame else "?"
        logger.critical("the event loop is blocked; this worker ends. A handler hangs here:\n%s", where)
        running, held = asyncio.current_task(self._loop), list(self.held.values())
        # a handler's own task, or a callback: nobody knows whose, so each of them may be the one
        culprits = [one for one in held if running is not None and one.handler is running] or held
        for one in held:
            try:
                run(self.queue.redis, release_call(one.task, is_lost=one in culprits))
            except REDIS_ERRORS:  # then the leases run out
                break
        os._exit(1)

    def _hear(self) -> None:
        self._heard_at = time.monotonic()
