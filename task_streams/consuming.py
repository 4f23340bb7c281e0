"""What consumer.py and worker.py need to work on tasks: connections, claims, a heartbeat, signals."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis.asyncio import RedisCluster

from ailf.messaging.redis import REDIS_ERRORS, blocking_client, connect, connect_async, is_transient, url_of

from . import keys
from .claims import LEASE_SECONDS, Claims, Malformed, Task, new_token, parse_element
from .errors import LeaseLost, StreamEnded
from .leases import Heartbeat, Job
from .log import TaskLog
from .pipeline import AnyPipeline, ClusterPipeline, Pipeline
from .queue import BLOCK_SECONDS, TaskQueue, ending_of
from .reader import LogReader
from .retrying import Outage, delays

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0  # how long to keep trying to hand tasks back while Redis is away
SILENCE_SECONDS = 4.0  # how long a reply may take
MARGIN_SECONDS = 5.0  # how much later than its block time BRPOP's reply may come
MAX_LOSSES = 5  # attempts that may end because their worker was gone: a task that kills its process must end, too
WORKER_NAME = "worker:"  # then host:pid: its connection's name in CLIENT LIST, which shows the workers that are alive

T = TypeVar("T")


class Consumer:
    """What a process needs to work on tasks. Use it with `async with`.

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
        client = await asyncio.to_thread(connect, self._url)
        # the heartbeat's. subtle: it takes bytes that aren't UTF-8, so a record that has some costs no task its lease
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
                asyncio.get_running_loop().add_signal_handler(number, self._count_signal)
        self.heartbeat = Heartbeat(self.queue, self.lease_seconds, self.outage)
        self.held = self.heartbeat.held
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
        return next(iter(await self.claim_all([element])), None)

    async def claim_all(self, elements: Sequence[bytes]) -> list[Job]:
        """Claim the tasks of popped elements; return those that a handler is to work on. While Redis is away it waits.

        A task that must not run is ended here: its end was asked for, or it was lost too often, or it has ended already
        and only its record is open.
        """
        named = [(element, new_token()) for element in elements]
        deadline = 0.0

        async def claim() -> list[Task]:
            nonlocal deadline
            deadline = time.monotonic() + self.lease_seconds  # counted from before the server counts
            return await self.claims.claim(named)

        tasks, jobs = await self.insist("claim", claim), []
        if tasks is None:
            await self.put_back(named)
        for task in tasks or []:
            self.held[task.token] = job = Job(task, TaskLog(task, self.claims, deadline))
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

    async def _must_not_run(self, job: Job) -> bool:
        task, log = job.task, job.log
        problem = task.problem
        if task.losses >= MAX_LOSSES:
            problem = f"its worker was lost, {task.losses} times in all"
        try:
            if task.ended:
                ending = await asyncio.to_thread(ending_of, LogReader(task.id, self.queue.redis))
                if ending is not None:
                    await self.insist("write", functools.partial(self.claims.finish, task, *ending))
            elif problem:
                logger.error("task %s failed: %s", task, problem)
                await log.say_doubts()
                await log.end("failed", problem, error=problem, attempts=task.attempt)
            elif task.cancel_reason:
                await log.say_doubts()
                await log.end("cancelled", task.cancel_reason, reason=task.cancel_reason)
            else:
                return False
        except (LeaseLost, *REDIS_ERRORS) as error:
            logger.warning("task %s is left to its lease: %s", task, error)
        except Exception:  # the task boundary: what this task contains must not cost the others theirs
            logger.exception("task %s cannot be ended; it is left to its lease", task)
        return True

    async def release(self, job: Job, delay_seconds: float | None = None, until_answered: bool = False) -> bool | None:
        """Hand a task back, to be popped next; or with a delay count a failure and let it rest; or park it until its
        question is answered. False: lease lost.

        While Redis is away it waits; if this process is told to stop, PATIENCE_SECONDS at most: then None.
        """
        job.log.stop(StreamEnded("this attempt has ended"))
        release = functools.partial(self.claims.release, job.task, delay_seconds, until_answered=until_answered)
        try:
            return await self.insist("write", release, PATIENCE_SECONDS)
        finally:
            self.held.pop(job.task.token, None)

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
