"""Leases: the thread that keeps them, so that a handler which blocks the event loop does not cost the others theirs.

renew     three times a lease, for all tasks that this worker holds; it hears of cancellations with the reply
recover   once a second, by one worker of all: push tasks again that others lost, and those that are due
watch     the event loop must answer; if it is silent for a minute, the process ends and hands its tasks back
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.asyncio import RedisCluster

from ailf.messaging.redis import (
    REDIS_ERRORS,
    RedisMessagingError,
    RedisPubSub,
    blocking_client,
    connect,
    connect_async,
    is_transient,
    url_of,
)

from . import keys
from .claims import LEASE_SECONDS, Claims, End, Malformed, Task, new_token, parse_element, release_call
from .log import Lease, LeaseLost, LogReader, StreamEnded, TaskCancelled, TaskLog
from .pipeline import AnyPipeline, ClusterPipeline, Pipeline, run
from .queue import BLOCK_SECONDS, TaskQueue, ending_of
from .retrying import Outage, delays

logger = logging.getLogger(__name__)

RECOVER_SECONDS = 1.0  # between two looks for lost tasks
SILENT_LOOP_SECONDS = 60.0  # how long the event loop may not answer
STOPPED_SECONDS = 15.0  # if the heartbeat itself was silent for so long, the whole process was stopped
PATIENCE_SECONDS = 2.0  # how long to keep trying to hand tasks back while Redis is away
STUBBORN_SECONDS = 3.0  # how long a handler may take to end after it was cancelled
SILENCE_SECONDS = 4.0  # how long a reply may take
MARGIN_SECONDS = 5.0  # how much later than its block time BRPOP's reply may come
MAX_LOSSES = 5  # attempts that may end because their worker was gone: a task that kills its process must end, too
WORKER_NAME = "worker:"  # then host:pid: its connection's name in CLIENT LIST, which shows the workers that are alive

T = TypeVar("T")


class OutOfTime(Exception):
    """The handler took longer than the time limit."""


@dataclass(eq=False)
class Job:
    """A task that this process holds, and the log of this attempt."""

    task: Task
    log: TaskLog
    lease: Lease
    began: float = field(default_factory=time.monotonic)
    runs: "asyncio.Task[None] | None" = None  # the coroutine that works on it
    phase: str = "claimed"  # then "handled", while the handler runs, and "ending"
    why: Exception | None = None  # why its handler is stopped
    is_left_behind: bool = False  # the handler ignores that it is stopped; the task goes on without it

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

    def start(self) -> None:
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
                if one.lease.is_over:  # also while Redis is away: this worker trusts its own clock
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
        except RedisMessagingError as error:
            self.outage.failed(kind, error)
        except REDIS_ERRORS as error:
            if is_transient(error):
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
        held = [one for one in list(self.held.values()) if sent < one.began + longest]
        for at in range(0, len(held), 500):
            some = held[at : at + 500]
            replies = self.queue.heartbeat([(one.task, one.log.seq) for one in some], self.lease_seconds)
            for one, reply in zip(some, replies, strict=True):
                if isinstance(reply, Exception):
                    logger.error("cannot renew the lease of task %s: %s", one.task, reply)
                elif reply == 0:
                    one.lease.is_lost = True
                else:
                    one.lease.deadline = sent + self.lease_seconds
                    if reply != 1:
                        self._tell(self.on_stop, one, TaskCancelled(str(reply)))

    def _recover(self) -> None:
        if not self._is_listening:
            self._listen()
        if count := self.queue.recover(at_most_every_ms=int(RECOVER_SECONDS * 900)):
            logger.info("queued %d task(s) again: they are due, or their worker was lost", count)

    def _listen(self) -> None:
        """Hear at once that a running task is to be cancelled; without it, the next heartbeat tells."""
        logging.getLogger("ailf.messaging.redis.pubsub").setLevel(logging.ERROR)  # the outage is said here
        self._is_listening = True
        try:
            self._cancelled.subscribe(keys.CANCEL_CHANNEL, self._on_cancel)
            self._cancelled.run_in_thread()
        except RedisMessagingError as error:
            if is_transient(error):
                self._is_listening = False
                raise
            logger.warning("cancellations arrive with the next heartbeat only: %s", error)

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
        culprits = [one for one in held if running is not None and one.runs is running] or held
        for one in held:
            try:
                run(self.queue.redis, release_call(one.task, is_lost=one in culprits))
            except REDIS_ERRORS:  # then the leases run out
                break
        os._exit(1)

    def _hear(self) -> None:
        self._heard_at = time.monotonic()


class Consumer:
    """What a process needs to work on tasks: connections, claims, a heartbeat, signals. Use it with `async with`.

    `redis` is a redis.asyncio client for BRPOP, on a connection of its own. SIGTERM and Ctrl-C count in `signals`.
    Raises RedisUnavailable on entry if Redis cannot be reached.
    """

    def __init__(self, lease_seconds: float = LEASE_SECONDS, url: str | None = None) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.lease_seconds, self._url = lease_seconds, url
        self.outage = Outage()
        self.signals = 0
        self._handlers: dict[int, Any] = {}  # of signals, as they were before
        self.on_signal = self._leave_at_second

    async def __aenter__(self) -> "Consumer":
        loop = asyncio.get_running_loop()
        client = await asyncio.to_thread(connect, self._url)
        # the heartbeat's; subtle: like this, bytes in a record that are not UTF-8 cost no task its lease
        self.queue = TaskQueue(blocking_client(client, 0), patience_seconds=0)
        client.close()
        client = await connect_async(self._url)
        self.redis = blocking_client(client, BLOCK_SECONDS, decode_responses=False, client_name=WORKER_NAME + self.name)
        self.pipe: AnyPipeline
        if isinstance(client, RedisCluster):
            self.pipe = ClusterPipeline(client)
        else:
            await client.connection_pool.disconnect()  # it has served: the server was reached
            self.pipe = Pipeline(client, SILENCE_SECONDS)
        await self.pipe.connect()
        self.claims = Claims(self.pipe, self.name, self.lease_seconds)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.getsignal(number)
                loop.add_signal_handler(number, self._count_signal)
        self.heartbeat = Heartbeat(self.queue, self.lease_seconds, self.outage)
        self.held = self.heartbeat.held
        self.heartbeat.start()
        logger.info("worker %s waits for tasks on %s at %s", self.name, keys.QUEUE, url_of(self.queue.redis))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.heartbeat.stop()
        while self.heartbeat.is_alive():  # subtle: not in a thread, since handlers may have taken all of the pool's
            await asyncio.sleep(0.01)
        for number, handler in self._handlers.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)
        await self.pipe.close()
        await self.redis.aclose()
        self.queue.close()
        logger.info("worker %s stopped", self.name)

    def _count_signal(self) -> None:
        self.signals += 1
        self.on_signal()

    def _leave_at_second(self) -> None:
        if self.signals > 1:
            raise KeyboardInterrupt

    async def pipeline_for_pops(self) -> AnyPipeline:
        """Return a second pipeline, for commands that block."""
        pops: AnyPipeline
        if isinstance(self.redis, RedisCluster):
            pops = ClusterPipeline(self.redis)
        else:
            pops = Pipeline(self.redis, BLOCK_SECONDS + MARGIN_SECONDS, decode=False)
        await pops.connect()
        return pops

    async def claim(self, element: bytes) -> Job | None:
        """Claim the task of a popped element; None if there is nothing to do for it. While Redis is away it waits."""
        jobs = await self.claim_all([element])
        return jobs[0] if jobs else None

    async def claim_all(self, elements: Sequence[bytes]) -> list[Job]:
        """Claim the tasks of popped elements; return those that a handler is to work on. While Redis is away it waits.

        A task that must not run is ended here: its end was asked for, or it was lost too often, or it has ended already
        and only its record is open.
        """
        named = [(element, new_token()) for element in elements]
        believed_until = 0.0

        async def claim() -> list[Task]:
            nonlocal believed_until
            believed_until = time.monotonic() + self.lease_seconds  # counted from before the server counts
            return await self.claims.claim(named)

        tasks, jobs = await self.insist("claim", claim), []
        if tasks is None:
            await self.put_back(named)
        for task in tasks or []:
            lease = Lease(believed_until)
            log = TaskLog(task.id, task.epoch, task.seq, lease, self.pipe, functools.partial(self._finish, task))
            self.held[task.token] = job = Job(task, log, lease)
            if await self._must_not_run(job):
                self.held.pop(task.token, None)
            else:
                logger.info("task %s started%s", task, f" (attempt {task.attempt})" if task.attempt > 1 else "")
                jobs.append(job)
        return jobs

    async def put_back(self, elements: Sequence[tuple[bytes, str]]) -> None:
        """Put popped elements back, as the next to be popped. A claim whose reply was lost is given up by its token."""
        for element, token in reversed(elements):  # the last one that is pushed is the first to be popped
            if not await self.insist("write", functools.partial(self._put_back, element, token), PATIENCE_SECONDS):
                logger.warning("a task was not put back: other workers find it")

    async def _put_back(self, element: bytes, token: str) -> bool:
        with contextlib.suppress(Malformed):
            if token and await self.claims.release(parse_element(element, token)):
                return True
        await self.pipe.call("RPUSH", keys.QUEUE, element)
        return True

    async def _finish(self, task: Task, event: str, result: Any, entry_id: str, fields: list[str]) -> bool:
        return await self.claims.finish(End(task, event, result, entry_id, fields))

    async def _must_not_run(self, job: Job) -> bool:
        task, log = job.task, job.log
        problem = task.problem
        if task.losses >= MAX_LOSSES:
            problem = f"its worker was lost, {task.losses} times in all"
        try:
            if task.ended:
                ending = await asyncio.to_thread(ending_of, LogReader(task.id, self.queue.redis))
                if ending is not None:
                    await self.insist("write", functools.partial(self.claims.finish, End(task, *ending)))
            elif problem:
                logger.error("task %s failed: %s", task, problem)
                await log.end("failed", problem, error=problem, attempts=task.attempt)
            elif task.cancel_reason:
                await log.end("cancelled", task.cancel_reason, reason=task.cancel_reason)
            else:
                return False
        except (LeaseLost, *REDIS_ERRORS) as error:
            logger.warning("task %s is left to its lease: %s", task, error)
        except Exception:  # the task boundary: what this task contains must not cost the others theirs
            logger.exception("task %s cannot be ended; it is left to its lease", task)
        return True

    async def release(self, job: Job, delay_seconds: float | None = None) -> bool:
        """Hand a task back, to be popped next; or with a delay count a failure and let it rest. False: lease lost.

        While Redis is away it waits, unless this process is told to stop.
        """
        job.log.stop(StreamEnded("this attempt has ended"))
        call = functools.partial(self.claims.release, job.task, delay_seconds)
        is_released = await self.insist("write", call)
        self.held.pop(job.task.token, None)
        return bool(is_released)

    async def leave(self, job: Job, why: Exception) -> None:
        """Stop working on a task after LeaseLost or an error of Redis; if it is still ours, let others have it now."""
        logger.warning("task %s is left to others: %s", job.task, why)
        if isinstance(why, LeaseLost):
            with contextlib.suppress(*REDIS_ERRORS):  # then its lease runs out
                await self.claims.release(job.task, is_lost=True)

    async def has_work(self) -> bool:
        """Say whether a task waits, runs or rests until its next attempt."""
        try:
            return await asyncio.to_thread(self.queue.has_work)
        except REDIS_ERRORS as error:
            if not is_transient(error):
                raise
            return True

    async def insist(self, kind: str, call: Callable[[], Awaitable[T]], patience_seconds: float = 0) -> T | None:
        """Call an idempotent operation until it succeeds; None if told to stop while Redis is away.

        After that it is called for patience_seconds more. Raises redis-py's error if it will not go away by itself.
        """
        began = time.monotonic()
        for delay in delays():
            try:
                result = await call()
            except REDIS_ERRORS as error:
                if not is_transient(error):
                    raise
                self.outage.failed(kind, error)
                if self.signals and time.monotonic() >= began + patience_seconds:
                    return None
                await asyncio.sleep(delay)
            else:
                self.outage.worked(kind)
                return result
        raise AssertionError("delays() never ends")
