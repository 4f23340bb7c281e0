"""The loop around a handler: take tasks, run many of them at once, report their ends, stop cleanly.

    take     BRPOP for the slots that are free, claim; `started` is written before a handler begins
    run      one coroutine a task: the handler, then the terminal event and the record's end in one call
    stop     cancelled, out of time, lease lost, shutting down: cancel the handler; if it doesn't end, do without it

Words: an element that was popped and not claimed is *put back*. A running task is *handed back* when the worker stops.
A task that was lost to somebody else is *left*. A handler that cannot be stopped is *left behind*.

consumer.py is the same for one task at a time, written to be read first.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS

from . import keys
from .claims import LEASE_SECONDS, Task
from .leases import PATIENCE_SECONDS, STUBBORN_SECONDS, Consumer, Job, OutOfTime
from .log import BlockingLog, LeaseLost, StreamEnded, TaskCancelled, message_of
from .pipeline import MOST_TOGETHER
from .queue import BLOCK_SECONDS

MAX_ATTEMPTS = 3  # attempts that may end with an error
GRACE_SECONDS = 10.0  # how long running tasks may take to finish after Ctrl-C
TIME_LIMIT_SECONDS = 3600.0
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each
LONGEST_BACKOFF_SECONDS = 60.0

logger = logging.getLogger(__name__)
Handler = Callable[[Task, Any], Any]  # async def handle(task, log: TaskLog), or def handle(task, log: BlockingLog)


class PermanentFailure(Exception):
    """Raised by a handler whose task can never succeed: it fails without another attempt."""


class HandedBack(Exception):
    """This worker shuts down: somebody else does the task."""


def run_worker(handler: Handler, **options: Any) -> int:
    """Run tasks until a signal comes; return the exit code. See work() for the options. Call it in the main thread."""
    loop = asyncio.new_event_loop()  # not asyncio.run(), which waits for handlers that cannot be stopped
    try:
        return loop.run_until_complete(work(handler, **options))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def work(
    handler: Handler,
    *,
    concurrency: int = 1,
    burst: bool = False,
    lease_seconds: float = LEASE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    max_attempts: int = MAX_ATTEMPTS,
    backoff_seconds: float = BACKOFF_SECONDS,
    url: str | None = None,
    fault: Callable[[str], None] = lambda name: None,
) -> int:
    """Run tasks with handler(task, log), `concurrency` at a time, until a signal comes; return the exit code.

    The handler is `async def`, or a plain function, which runs in a thread of its own. What it returns (JSON) becomes
    the result of `completed`. An exception is logged as `error`, and the task is tried again after a backoff, up to
    max_attempts times; PermanentFailure fails it at once. The handler of a task that is cancelled, or takes longer than
    the time limit, is cancelled; one that ignores that is left behind, and its slot counts as taken.

    SIGTERM or Ctrl-C stops taking, lets running tasks finish for grace_seconds, then hands the rest back; a second one
    hands them back at once (exit code 130). With `burst` it returns when no task waits, runs or rests. It returns 1 if
    all slots are taken by handlers that cannot be stopped. Raises RedisUnavailable if Redis cannot be reached at the
    start. `fault` is called with the name of each step, for tests.
    """
    limits = _Limits(grace_seconds, max_attempts, backoff_seconds)
    async with Consumer(lease_seconds, url) as consumer:
        consumer.heartbeat.time_limit_seconds = time_limit_seconds
        return await _Worker(handler, consumer, concurrency, limits, fault).run(burst)


@dataclass(frozen=True)
class _Limits:
    grace_seconds: float
    max_attempts: int
    backoff_seconds: float


class _Worker:
    """The state of one worker; everything but the heartbeat happens in its event loop."""

    def __init__(
        self,
        handler: Handler,
        consumer: Consumer,
        concurrency: int,
        limits: _Limits,
        fault: Callable[[str], None],
    ) -> None:
        self.handler, self.consumer, self.concurrency = handler, consumer, concurrency
        self.limits, self.fault = limits, fault
        self.is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
        self.held, self.insist = consumer.held, consumer.insist
        self.free = concurrency
        self.left_behind = 0  # slots whose handlers cannot be stopped
        self.slot_freed = asyncio.Event()  # or something else for which the loop should look again
        self.broken: Exception | None = None  # why no task can be claimed
        self.is_leaving = False
        self.popping: asyncio.Task[list[bytes]] | None = None
        self.steps: set[asyncio.Task[None]] = set()  # jobs that run, and what is on its way beside

    # -- the loop -----------------------------------------------------------------------------------------------

    async def run(self, burst: bool) -> int:
        self.loop = asyncio.get_running_loop()
        self.consumer.on_signal = self.on_signal
        self.consumer.heartbeat.on_stop = self.stop
        self.pops = await self.consumer.pipeline_for_pops()
        try:
            return await self.take_until_stopped(burst) or await self.finish_or_hand_back()
        except BaseException:  # Redis refused something, or the caller cancelled work()
            await self.return_popped()
            await self.hand_back()
            raise
        finally:
            await self.pops.close()

    async def take_until_stopped(self, burst: bool) -> int:
        while not self.consumer.signals:
            if self.broken is not None:
                raise self.broken
            if self.left_behind == self.concurrency:
                logger.critical("all %d slots are taken by handlers that cannot be stopped; leaving", self.concurrency)
                await self.hand_back()
                return 1
            if not self.free:
                self.slot_freed.clear()
                await self.slot_freed.wait()
                continue
            elements = await self.insist("pop", self.pop_safely)
            if elements is None:  # a signal came while Redis was away
                break
            if elements and self.consumer.signals:
                await self.consumer.put_back([(element, "") for element in elements])
                break
            if elements:
                self.fault("popped")
                self.free -= len(elements)
                self.spawn(self.take_in(elements))
            elif burst and self.is_idle and not await self.consumer.has_work():
                break
        return 0

    def on_signal(self) -> None:
        running = self.concurrency - self.free - self.left_behind
        if self.consumer.signals == 1 and running:
            seconds = self.limits.grace_seconds
            logger.info("stopping: %d task(s) have %g s to finish (Ctrl-C again: hand them back now)", running, seconds)
        self.slot_freed.set()

    @property
    def is_idle(self) -> bool:
        return self.free + self.left_behind == self.concurrency

    def spawn(self, steps: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(steps)
        self.steps.add(task)
        task.add_done_callback(self.steps.discard)
        return task

    async def pop_safely(self) -> list[bytes]:
        """Pop in a task of its own: a pop that is cancelled would lose what it brings."""
        self.popping = asyncio.create_task(self.pop())
        elements = await asyncio.shield(self.popping)
        self.popping = None
        return elements

    async def return_popped(self) -> None:
        """Put back what a pop brings after this worker was cancelled."""
        if self.popping is not None:
            await asyncio.wait([self.popping], timeout=2 * BLOCK_SECONDS)
            if self.popping.done() and not self.popping.cancelled() and self.popping.exception() is None:
                await self.consumer.put_back([(element, "") for element in self.popping.result()])

    async def pop(self) -> list[bytes]:
        """BRPOP one element, and RPOP others for which there is room, in one round trip. Never cancelled.

        If the connection is cut meanwhile, they are lost until the audit finds their tasks.
        """
        more = min(self.free, MOST_TOGETHER) - 1
        first = self.pops.call("BRPOP", keys.QUEUE, BLOCK_SECONDS)
        if not self.pops.is_one_server:  # there the two would not come in order
            await asyncio.wait([first])
        others = self.pops.call("RPOP", keys.QUEUE, more) if more else None
        elements: list[bytes] = []
        error = None
        for reply in [first, others] if others else [first]:
            # subtle: if only one is refused, as in the moment when memory is full, what the other popped counts
            try:
                popped = await reply
                elements += (popped[1:] if reply is first else popped) if popped else []
            except REDIS_ERRORS as refused:
                error = refused
        if error is not None and not elements:
            raise error
        return elements

    async def take_in(self, elements: list[bytes]) -> None:
        """Claim what was popped, and begin. On one server all in one call; in a Cluster each on its own."""
        if not self.pops.is_one_server and len(elements) > 1:
            for one in elements:
                self.spawn(self.take_in([one]))
            return
        jobs: list[Job] = []
        try:
            jobs = await self.consumer.claim_all(elements)
        except REDIS_ERRORS as error:  # it refuses to claim, as without the right to: then this worker ends
            self.broken = error
            await self.consumer.put_back([(element, "") for element in elements])
        finally:
            self.release_slots(len(elements) - len(jobs))
        if jobs:
            self.fault("claimed")
        for job in jobs:
            if self.is_leaving:  # hand_back() gives it back
                self.release_slots(1)
            else:
                job.runs = self.spawn(self.process(job))

    def release_slots(self, count: int) -> None:
        self.free += count
        self.slot_freed.set()

    # -- one task -----------------------------------------------------------------------------------------------

    async def process(self, job: Job) -> None:
        """Do one task from `started` to its end. Whatever happens to it, the worker goes on."""
        try:
            await self.attempt(job)
        except asyncio.CancelledError:
            if job.why is None:
                raise
        except Exception as error:
            await self.leave(job, error)
        finally:
            if job.is_left_behind:
                logger.info("the handler of task %s has ended after all", job.task)
                self.left_behind -= 1
            elif not isinstance(job.why, HandedBack):  # hand_back() does that for all of them
                self.held.pop(job.task.token, None)
            self.release_slots(1)

    async def leave(self, job: Job, error: Exception) -> None:
        if isinstance(error, (LeaseLost, *REDIS_ERRORS)):
            await self.consumer.leave(job, error)
        else:
            logger.error(
                "the worker itself failed; task %s runs again when its lease is over", job.task, exc_info=error
            )

    async def attempt(self, job: Job) -> None:
        log = job.log
        self.fault("started")
        result = outcome = None
        try:
            log.check()  # subtle: last of all, since the claim's reply may have come late, or this process been frozen
            job.phase = "handled"
            result = await self.call_handler(job)
        except BaseException as error:  # the task boundary: whatever a task does, sys.exit() too, the worker goes on
            outcome = error
        job.phase = "ending"
        if job.is_left_behind:  # its end was written without it
            return
        self.fault("handled")
        if isinstance(outcome, asyncio.CancelledError) and job.why is None and job.runs and job.runs.cancelling():
            job.why = HandedBack("the event loop shuts down")  # subtle: it is 0 if the handler has raised it itself
        if isinstance(outcome, TaskCancelled):
            job.why = job.why or outcome
        if job.why is not None:
            await self.end_stopped(job)
        elif outcome is not None:
            await self.failed(job, outcome)
        else:
            await self.completed(job, result)

    async def call_handler(self, job: Job) -> Any:
        if self.is_async:
            return await self.handler(job.task, job.log)
        done: asyncio.Future[tuple[Any, BaseException | None]] = self.loop.create_future()

        def run() -> None:
            result, error = None, None
            try:
                result = self.handler(job.task, BlockingLog(job.log, self.loop))
            except BaseException as raised:  # the thread's boundary: it is raised again below
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has left without this thread
                self.loop.call_soon_threadsafe(done.set_result, (result, error))

        # a thread for each, not asyncio's few, which handlers that never end would take for ever
        threading.Thread(target=run, name=f"task {job.task}", daemon=True).start()
        while True:
            try:
                result, error = await asyncio.shield(done)
                break
            except asyncio.CancelledError:
                if job.why is None or isinstance(job.why, HandedBack):
                    raise
                # a thread cannot be stopped: its log tells it, at its next step
        if error is not None:
            raise error
        return result

    async def completed(self, job: Job, result: Any) -> None:
        duration_ms = job.duration_ms
        try:
            await job.log.end("completed", result, result=result, duration_ms=duration_ms)
        except (ValueError, TypeError) as error:  # what it returned is not JSON, or too large
            await self.failed(job, error)
            return
        self.fault("completed")
        logger.info("task %s completed in %.2f s", job.task, duration_ms / 1000)

    async def failed(self, job: Job, error: BaseException) -> None:
        """Log an exception of the handler; then let the task rest for its next attempt, or give it up."""
        if isinstance(error, LeaseLost | StreamEnded):
            raise error
        message = message_of(error)
        traced = None if isinstance(error, PermanentFailure | OutOfTime) else error
        failures = job.task.failures + 1
        is_final = isinstance(error, PermanentFailure) or failures >= self.limits.max_attempts
        await job.log.add_always("error", error=message, error_type=type(error).__name__, will_retry=not is_final)
        self.fault("error")
        if is_final:
            logger.error("task %s failed: %s", job.task, message, exc_info=traced)
            await self.finish(job, "failed", message, error=message, attempts=job.task.attempt)
            return
        delay = min(self.limits.backoff_seconds * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS)
        logger.warning("task %s: %s; tried again in %g s", job.task, message, delay, exc_info=traced)
        await self.consumer.release(job, delay)

    async def finish(self, job: Job, event: str, result: Any, **fields: Any) -> None:
        await job.log.end(event, result, **fields)
        self.fault(event)

    # -- stopping -----------------------------------------------------------------------------------------------

    def stop(self, job: Job, why: Exception) -> None:
        """Stop a task, for TaskCancelled, OutOfTime, LeaseLost or HandedBack: cancel its handler, or do without it."""
        if job.phase == "ending" or job.why is not None:
            return
        job.why = why
        job.log.stop(why if isinstance(why, TaskCancelled | LeaseLost) else TaskCancelled(str(why)))
        if job.phase == "handled" and job.runs is not None:
            job.runs.cancel()
            self.spawn(self.wait_for_end(job))

    async def wait_for_end(self, job: Job) -> None:
        assert job.runs is not None
        patience = STUBBORN_SECONDS
        if (
            isinstance(job.why, LeaseLost) and not self.is_async
        ):  # nobody waits for its end, and threads take their time
            patience += self.consumer.heartbeat.time_limit_seconds
        await asyncio.wait([job.runs], timeout=patience)
        if job.phase == "ending" or job.runs.done():
            return
        job.is_left_behind = True
        self.left_behind += 1
        logger.error("the handler of task %s ignores that it is stopped; its slot counts as taken", job.task)
        self.slot_freed.set()
        try:
            await self.end_stopped(job)
        except Exception as error:
            await self.leave(job, error)
        finally:
            self.held.pop(job.task.token, None)

    async def end_stopped(self, job: Job) -> None:
        why = job.why
        if isinstance(why, TaskCancelled):
            await self.finish(job, "cancelled", str(why), reason=str(why))
            logger.info("task %s cancelled: %s", job.task, why)
        elif isinstance(why, OutOfTime):
            await self.failed(job, why)
        elif isinstance(why, LeaseLost):
            raise why

    async def finish_or_hand_back(self) -> int:
        """Wait for the running tasks; hand back those that take longer than the grace."""
        deadline = time.monotonic() + self.limits.grace_seconds
        while not self.is_idle and self.consumer.signals < 2 and time.monotonic() < deadline:
            self.slot_freed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.slot_freed.wait(), deadline - time.monotonic())
        await self.hand_back()
        return 130 if self.consumer.signals > 1 else 0  # 128 + SIGINT, as shells count

    async def hand_back(self) -> None:
        """Stop all handlers, and give their tasks back to the queue; with a second signal, without waiting for them."""
        held, self.is_leaving = self.held, True
        for job in list(held.values()):
            self.stop(job, HandedBack("the worker shuts down"))
        if self.steps:
            await asyncio.wait(self.steps, timeout=0.2 if self.consumer.signals > 1 else STUBBORN_SECONDS / 2)
        await asyncio.gather(*[self.give_back(job) for job in held.values()], return_exceptions=True)
        if held:
            logger.warning("%d task(s) not handed back: they run again when their leases are over", len(held))

    async def give_back(self, job: Job) -> None:
        release = functools.partial(self.consumer.claims.release, job.task)
        is_released = await self.insist("write", release, PATIENCE_SECONDS)
        if is_released:
            logger.info("task %s handed back", job.task)
        if is_released is not None:
            self.held.pop(job.task.token, None)
