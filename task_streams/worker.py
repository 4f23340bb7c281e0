"""The loop around a handler: take tasks, run many of them at once, report their ends, stop cleanly.

    take     BRPOP for the slots that are free, claim; `started` is written before a handler begins
    run      two coroutines a task: the handler, and process(), which owns the task and writes its end
    stop     cancelled, out of time, lease lost, shutting down: cancel the handler; if it doesn't end, do without it

Words: an element that was popped and not claimed is *put back*. A running task is *handed back* when the worker stops.
A task that was lost to somebody else is *left*. A handler that cannot be stopped is *left behind*.

consumer.py is the same for one task at a time, written to be read first.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ailf.messaging.redis import REDIS_ERRORS

from . import keys
from .claims import LEASE_SECONDS, MOST_TOGETHER, Task
from .consuming import PATIENCE_SECONDS, SILENCE_SECONDS, Consumer
from .errors import LeaseLost, Parked, PermanentFailure, TaskCancelled, message_of
from .leases import STUBBORN_SECONDS, Job, OutOfTime
from .log import BlockingLog
from .queue import BLOCK_SECONDS
from .threads import Outcome, in_thread

MAX_ATTEMPTS = 3  # attempts that may end with an error
GRACE_SECONDS = 10.0  # how long running tasks may take to finish after Ctrl-C
TIME_LIMIT_SECONDS = 3600.0
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each
LONGEST_BACKOFF_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 3600.0  # an exception may ask for more time, by an attribute: retry_after_seconds

logger = logging.getLogger(__name__)
Handler = Callable[[Task, Any], Any]  # async def handle(task, log: TaskLog), or def handle(task, log: BlockingLog)


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
) -> int:
    """Run tasks with handler(task, log), `concurrency` at a time, until a signal comes; return the exit code.

    The handler is `async def`, or a plain function, which runs in a thread of its own. What it returns (JSON) becomes
    the result of `completed`. An exception is logged as `error`, and the task is tried again after a backoff, up to
    max_attempts times; PermanentFailure fails it at once. An exception may ask for a longer rest, by its attribute
    retry_after_seconds. The handler of a task that is cancelled, or takes longer than the time limit, is cancelled; one
    that ignores that is left behind, and its slot counts as taken.

    SIGTERM or Ctrl-C stops taking, lets running tasks finish for grace_seconds, then hands the rest back; a second one
    hands them back at once (exit code 130). With `burst` it returns when no task waits, runs or rests. It returns 1 if
    all slots are taken by handlers that cannot be stopped. Raises RedisUnavailable if Redis cannot be reached at the
    start.
    """
    async with Consumer(lease_seconds, url) as consumer:
        consumer.heartbeat.time_limit_seconds = time_limit_seconds
        worker = _Worker(handler, consumer, concurrency, grace_seconds, max_attempts, backoff_seconds)
        return await worker.run(burst)


class _Worker:
    """The state of one worker; everything but the heartbeat happens in its event loop."""

    def __init__(
        self,
        handler: Handler,
        consumer: Consumer,
        concurrency: int,
        grace_seconds: float,
        max_attempts: int,
        backoff_seconds: float,
    ) -> None:
        self.handler, self.consumer, self.concurrency = handler, consumer, concurrency
        self.grace_seconds, self.max_attempts, self.backoff_seconds = grace_seconds, max_attempts, backoff_seconds
        self.is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
        self.free = concurrency
        self.left_behind = 0  # slots whose handlers cannot be stopped
        self.slot_freed = asyncio.Event()  # or something else for which the loop should look again
        self.broken: Exception | None = None  # why no task can be claimed
        self.is_leaving = False
        self.stranded: list[Job] = []  # jobs whose process() was cancelled, as when the event loop shuts down
        self.not_handed_back = 0
        self.popping: asyncio.Task[list[bytes]] | None = None
        self.steps: set[asyncio.Task[None]] = set()  # claims and tasks that are under way

    # -- the loop -----------------------------------------------------------------------------------------------

    async def run(self, burst: bool) -> int:
        self.consumer.on_signal = self.on_signal
        self.consumer.heartbeat.on_stop = self.stop
        self.pops = await self.consumer.pipeline_for_pops()
        try:
            return await self.take_until_stopped(burst) or await self.finish_or_hand_back()
        except BaseException:  # Redis refused something, or the caller cancelled work()
            self.consumer.signals = self.consumer.signals or 1  # then nothing waits long for Redis
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
            elements = await self.consumer.insist("pop", self.pop_safely)
            if elements is None:  # a signal came while Redis was away
                break
            if elements and self.consumer.signals:
                await self.consumer.put_back([(element, "") for element in elements])
                break
            if elements:
                self.free -= len(elements)
                self.spawn(self.take_in(elements))
            elif burst and self.is_idle and not await self.consumer.has_work():
                break
        return 0

    def on_signal(self) -> None:
        running = self.concurrency - self.free - self.left_behind
        if self.consumer.signals == 1 and running:
            message = "stopping: %d task(s) have %g s to finish (Ctrl-C again: hand them back now)"
            logger.info(message, running, self.grace_seconds)
        self.slot_freed.set()

    @property
    def is_idle(self) -> bool:
        return self.free + self.left_behind == self.concurrency

    def spawn(self, step: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(step)
        self.steps.add(task)
        task.add_done_callback(self.steps.discard)

    def release_slots(self, count: int) -> None:
        self.free += count
        self.slot_freed.set()

    async def pop_safely(self) -> list[bytes]:
        """Pop in a task of its own: a pop that is cancelled would lose what it brings."""
        self.popping = asyncio.create_task(self.pop())
        self.popping.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio may complain
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
        for job in jobs:
            if self.is_leaving:
                self.stop(job, HandedBack("the worker shuts down"))
            self.spawn(self.process(job))

    # -- one task -----------------------------------------------------------------------------------------------

    async def process(self, job: Job) -> None:
        """Do one task from `started` to its end. Whatever happens to it, the worker goes on."""
        is_left_behind = False
        try:
            if job.why is None:
                job.log.check()  # subtle: the claim's reply may have come late, or this process been frozen
                job.handler = self.call_handler(job) if self.is_async else self.call_in_thread(job)
                job.handler.add_done_callback(lambda _: job.wake())
                await job.turn
            if job.why is not None and job.handler is not None:
                is_left_behind = await self.stop_handler(job, job.handler)
            await self.end(job)
        except asyncio.CancelledError:
            self.stranded.append(job)
            raise
        except (LeaseLost, *REDIS_ERRORS) as error:
            await self.consumer.leave(job, error)
        except Exception as error:
            message = "the worker itself failed; task %s runs again when its lease is over"
            logger.error(message, job.task, exc_info=error)
        finally:
            self.consumer.held.pop(job.task.token, None)
            if not is_left_behind:
                self.release_slots(1)

    def call_handler(self, job: Job) -> "asyncio.Future[Outcome]":
        async def call() -> Outcome:
            try:
                return await self.handler(job.task, job.log), None
            except (
                BaseException
            ) as error:  # the task boundary: whatever a task does, sys.exit() too, the worker goes on
                return None, error

        return asyncio.create_task(call())

    def call_in_thread(self, job: Job) -> "asyncio.Future[Outcome]":
        loop = asyncio.get_running_loop()
        return in_thread(lambda: self.handler(job.task, BlockingLog(job.log, loop)), f"task {job.task}")

    async def end(self, job: Job) -> None:
        """Write the end of a task whose handler is done, or was told to stop."""
        why, result, error = job.why, None, None
        if why is None and job.handler is not None:
            result, error = job.handler.result()
            error = job.log.refusal or error
            why = error if isinstance(error, TaskCancelled) else None
        if isinstance(why, HandedBack):
            await self.give_back(job)
        elif isinstance(why, TaskCancelled):
            await job.log.end("cancelled", str(why), reason=str(why))
            logger.info("task %s cancelled: %s", job.task, why)
        elif isinstance(error, Parked) and why is None:
            logger.info("task %s is parked until somebody answers its question", job.task)
            await self.consumer.release(job, until_answered=True)
        elif why is not None or error is not None:
            await self.failed(job, why or error)
        else:
            duration_ms = job.duration_ms
            try:
                await job.log.end("completed", result, result=result, duration_ms=duration_ms)
            except (ValueError, TypeError) as unfit:  # what it returned is not JSON, or too large
                await self.failed(job, unfit)
            else:
                logger.info("task %s completed in %.2f s", job.task, duration_ms / 1000)

    async def failed(self, job: Job, error: BaseException | None) -> None:
        """Log an exception of the handler; then let the task rest for its next attempt, or give it up."""
        assert error is not None
        if isinstance(error, LeaseLost):
            raise error
        message = message_of(error)
        traced = None if isinstance(error, PermanentFailure | OutOfTime) else error
        failures = job.task.failures + 1
        is_final = isinstance(error, PermanentFailure) or failures >= self.max_attempts
        await job.log.add_always("error", error=message, error_type=type(error).__name__, will_retry=not is_final)
        if is_final:
            logger.error("task %s failed: %s", job.task, message, exc_info=traced)
            await job.log.end("failed", message, error=message, attempts=job.task.attempt)
            return
        asked = min(getattr(error, "retry_after_seconds", None) or 0, LONGEST_RETRY_AFTER_SECONDS)
        delay = max(min(self.backoff_seconds * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS), asked)
        logger.warning("task %s: %s; will be tried again in %g s", job.task, message, delay, exc_info=traced)
        await self.consumer.release(job, delay)

    # -- stopping -----------------------------------------------------------------------------------------------

    def stop(self, job: Job, why: Exception) -> None:
        """Stop a task, for TaskCancelled, OutOfTime, LeaseLost or HandedBack, unless its handler is done."""
        if job.why is None and not (job.handler and job.handler.done()):
            job.why = why
            job.log.stop(why if isinstance(why, TaskCancelled | LeaseLost) else TaskCancelled(str(why)))
            job.wake()

    async def stop_handler(self, job: Job, handler: "asyncio.Future[Outcome]") -> bool:
        """Cancel the handler; if it doesn't end within a few seconds, go on without it. True: it still has the slot."""
        patience = STUBBORN_SECONDS
        if isinstance(job.why, HandedBack):
            patience = 0.2 if self.consumer.signals > 1 else STUBBORN_SECONDS / 2
        if self.is_async:
            handler.cancel()
        elif isinstance(job.why, LeaseLost):  # its log tells the thread, and nobody waits for what it does
            handler.add_done_callback(lambda _: self.release_slots(1))
            return True
        await asyncio.wait([handler], timeout=patience)
        if handler.done():
            return False
        self.left_behind += 1
        self.slot_freed.set()
        handler.add_done_callback(lambda _: self.come_back(job))
        logger.error("the handler of task %s ignores its cancellation; its slot stays taken until it ends", job.task)
        return True

    def come_back(self, job: Job) -> None:
        logger.info("the handler of task %s has ended after all", job.task)
        self.left_behind -= 1
        self.release_slots(1)

    async def finish_or_hand_back(self) -> int:
        """Wait for the running tasks; hand back those that take longer than the grace."""
        deadline = time.monotonic() + self.grace_seconds
        while not self.is_idle and self.consumer.signals < 2 and time.monotonic() < deadline:
            self.slot_freed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.slot_freed.wait(), deadline - time.monotonic())
        await self.hand_back()
        return 130 if self.consumer.signals > 1 else 0  # 128 + SIGINT, as shells count

    async def hand_back(self) -> None:
        """Stop all handlers, and give their tasks back to the queue."""
        self.is_leaving = True
        for job in list(self.consumer.held.values()):
            self.stop(job, HandedBack("the worker shuts down"))
        deadline = time.monotonic() + STUBBORN_SECONDS + PATIENCE_SECONDS + SILENCE_SECONDS
        while self.steps and time.monotonic() < deadline:
            await asyncio.wait(self.steps, timeout=deadline - time.monotonic())
        await asyncio.gather(*map(self.give_back, self.stranded))
        if missing := self.not_handed_back + len(self.consumer.held):
            logger.warning("%d task(s) not handed back: they run again when their leases are over", missing)

    async def give_back(self, job: Job) -> None:
        is_released = await self.consumer.release(job)
        if is_released:
            logger.info("task %s handed back", job.task)
        self.not_handed_back += is_released is None
