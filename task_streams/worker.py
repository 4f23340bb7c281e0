"""The loop around a handler: take tasks, keep their leases, report their ends, stop cleanly.

    main thread   BRPOP for the slots that are free, claim, `started`; in one worker of all, once a second, it recovers
                  what others lost
    slots         one thread per task at a time: the handler
    ends          one thread: `completed`, finish
    heartbeat     one thread renews the leases of all running tasks, three times a lease, and hears of cancellations
    PubSub        one thread wakes the heartbeat when a running task is to be cancelled

The main thread and `ends` take all tasks that wait for them in one round trip, so that many short tasks cost few.
While Redis is away everything waits and tries again; leases that run out meanwhile are lost, and their tasks run again.
"""

import argparse
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from redis import RedisCluster

from ailf.messaging.redis import (
    REDIS_ERRORS,
    Client,
    LockNotOwned,
    RedisLock,
    RedisMessagingError,
    RedisPubSub,
    connect,
    is_transient,
    reason_of,
    url_of,
)

from . import keys
from .batching import Call, SharedScript, run_many
from .log import Lease, LeaseLost, StreamEnded, TaskCancelled, TaskLog
from .lua import load
from .queue import LEASE_SECONDS, Outcome, Task, TaskQueue
from .retrying import delays

MAX_ATTEMPTS = 3  # attempts that may end with an error or a lost worker; one more is not made
GRACE_SECONDS = 10.0  # how long running tasks may take to finish after Ctrl-C
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each
LONGEST_BACKOFF_SECONDS = 60.0
RECOVER_SECONDS = 1.0  # between two looks for lost tasks
ELECTION_SECONDS = 3.0  # how long after its last look a worker that has gone still counts as the one that looks
POLL_SECONDS = 0.1  # how soon a signal is noticed where nothing else wakes the main thread
MOST_AT_ONCE = 16  # tasks claimed in one round trip: more would save little, and let the first of them wait
MAX_ERROR_CHARS = 2_000  # of an exception's message in an event

WORKER_NAME = "worker:"  # then host:pid: the name of its connection in CLIENT LIST, for whoever asks who is alive

logger = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[Task, TaskLog], Any]


class PermanentFailure(Exception):
    """Raised by a handler whose task can never succeed: it fails without another attempt."""


def fault_point(name: str) -> None:
    """Kill this process here if a test asked for it by $TASK_STREAMS_FAULT, as kill -9 would."""
    if os.environ.get("TASK_STREAMS_FAULT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def run_worker(
    handler: Handler,
    *,
    concurrency: int = 1,
    burst: bool = False,
    lease_seconds: float = LEASE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
    max_attempts: int = MAX_ATTEMPTS,
    backoff_seconds: float = BACKOFF_SECONDS,
    client: Client | None = None,
) -> int:
    """Run tasks with handler(task, log) until a signal comes; return the exit code. Blocks; call it in the main thread.

    The handler's return value (JSON) becomes the `completed` event's result. An exception is logged as `error` and the
    task is tried again after a backoff, max_attempts times in all; PermanentFailure fails it at once. The handler must
    let LeaseLost and TaskCancelled, which log.add raises, pass.

    SIGTERM or Ctrl-C stops taking, lets running tasks finish for grace_seconds, then hands the rest back; a second one
    hands them back at once (exit code 130). With `burst` it returns when no task is owed: none waits, runs or rests.
    Raises ailf's RedisUnavailable where Redis cannot be reached at the start.
    """
    client = connect() if client is None else client
    worker = _Worker(client, handler, concurrency, lease_seconds, max_attempts, backoff_seconds)
    return worker.run(burst, grace_seconds)


def cancel_task(queue: TaskQueue, task_id: str, reason: str) -> str:
    """Cancel a task and return "cancelled" (it waited, and has ended) or "requested" (its worker will end it).

    A running task stops at its next log.add. Its record asks for that; the message only lets its worker look at once,
    since a message reaches nobody who is not listening. Raises NoSuchTask, or ValueError where the task has ended.
    """
    task = queue.request_cancel(task_id, reason)
    if task is None:
        with contextlib.suppress(RedisMessagingError):  # the record asks for it already
            RedisPubSub(queue.redis).publish(keys.CANCEL_CHANNEL, task_id)
        return "requested"
    log = TaskLog(task.id, queue.redis, attempt=task.attempt, token=task.token)
    try:
        log.add("cancelled", reason=reason)
    except StreamEnded as ended:  # its worker died between the terminal event and finish
        finish_as_ended(queue, task, log)
        raise ValueError(f"task {task_id} has ended already: {ended}") from None
    queue.finish(task, "cancelled", reason)
    queue.unlist(task_id)
    return "cancelled"


def finish_as_ended(queue: TaskQueue, task: Task, log: TaskLog) -> None:
    """Close the record of a task whose stream has its terminal event already: that counts."""
    if (last := log.last()) is not None and last.is_terminal:
        outcome = [last.fields[name] for name in ("result", "error", "reason") if name in last.fields]
        queue.finish(task, last.name, next(iter(outcome), None))  # type: ignore[arg-type]


@dataclass
class _Job:
    """A task that this worker holds."""

    task: Task
    log: TaskLog
    lease: Lease
    started: str | Exception | None = None  # the entry id of `started`, or why there is none; None: not tried yet
    duration_ms: int = 0
    end: list[Call] = field(default_factory=list)  # `completed` and finish, once they are on their way


class _Worker:
    """The state that the threads of one worker share."""

    def __init__(
        self,
        client: Client,
        handler: Handler,
        concurrency: int,
        lease_seconds: float,
        max_attempts: int,
        backoff_seconds: float,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        # without patience: waiting is done here, in insist()
        self.queue = TaskQueue(client, patience_seconds=0, name=f"{WORKER_NAME}{self.name}")
        self.is_cluster = isinstance(client, RedisCluster)  # where each command takes a round trip of its own
        self.append = SharedScript(client, load(client, "append"))  # the events of all handlers
        self.handler, self.concurrency, self.lease_seconds = handler, concurrency, lease_seconds
        self.max_attempts, self.backoff_seconds = max_attempts, backoff_seconds
        self.signals = 0  # how many came; the signal handler's only business
        self.leaving = threading.Event()  # set when the running tasks are given up
        self.beat_now = threading.Event()  # set when the next heartbeat must not wait
        self.election = RedisLock(keys.RECOVERY_LOCK, ELECTION_SECONDS, client)
        self.elected = False
        self.cancellations = RedisPubSub(client)
        self.listening = False
        self.running: dict[str, _Job] = {}  # by their tokens: claimed, and not finished
        self.slots = threading.Semaphore(concurrency)  # those that are free
        self.unwritten = threading.Semaphore(concurrency)  # how many ends more may wait to be written
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()  # for the slots; None: stop
        self.ends: SimpleQueue[_Job | None] = SimpleQueue()  # for the thread that writes them; None: stop
        self.unclaimed: list[tuple[bytes, str]] = []  # popped, with tokens for their claims; not known to be claimed
        self.trouble: set[str] = set()  # kinds of operations that fail
        self.trouble_since = 0.0  # time.monotonic() when the first of them began to
        self.trouble_lock = threading.Lock()

    # -- the main thread ----------------------------------------------------------------------------------------

    def run(self, burst: bool, grace_seconds: float) -> int:
        previous = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        for loop in (*[self.slot] * self.concurrency, self.write_ends, self.heartbeat):
            threading.Thread(target=loop, daemon=True).start()
        logger.info("worker %s waits for tasks on %s at %s", self.name, keys.QUEUE, url_of(self.queue.redis))
        try:
            try:
                self.take_until_stopped(burst)
            except REDIS_ERRORS:
                self.finish_or_hand_back(0)
                raise
            return self.finish_or_hand_back(grace_seconds)
        finally:
            self.leaving.set()
            self.beat_now.set()
            for _ in range(self.concurrency):
                self.jobs.put(None)
            self.ends.put(None)
            self.cancellations.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.queue.close()

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.signals += 1

    def take_until_stopped(self, burst: bool) -> None:
        recover_at = 0.0
        wait = delays()
        while not self.signals:
            try:
                if time.monotonic() >= recover_at:
                    recover_at = time.monotonic() + RECOVER_SECONDS
                    if not self.listening:
                        self.listen_for_cancellations()
                    if self.attempt("elect", self.is_elected) and (
                        recovered := self.attempt("recover", self.queue.recover)
                    ):
                        logger.info("pushed %d task(s) again: a retry is due, or a worker was lost", recovered)
                if not self.slots.acquire(timeout=POLL_SECONDS):
                    continue
                free, used = 1, 0
                while free < MOST_AT_ONCE and self.slots.acquire(blocking=False):
                    free += 1
                try:
                    elements = self.attempt("pop", partial(self.queue.pop_many, free))
                    self.unclaimed = [(element, secrets.token_hex(16)) for element in elements]
                    if self.unclaimed:
                        fault_point("popped")
                    if self.signals:  # one came while we were told to stop: put back below
                        return
                    used = self.take_in()
                finally:
                    if free > used:
                        self.slots.release(free - used)
                if burst and used == 0 and not self.running and self.attempt("count", self.queue.owed) == 0:
                    return
                wait = delays()
            except REDIS_ERRORS as error:
                if not is_transient(error):
                    raise
                time.sleep(next(wait))

    def take_in(self) -> int:
        """Claim what was popped, and give the tasks to the slots; return how many.

        In the same round trip `started` follows each claim: it is written where that is the first of its task.
        """
        elements = self.unclaimed
        first_logs: dict[str, TaskLog] = {}
        believed_until = 0.0

        def start(task: Task) -> list[Call]:
            if self.is_cluster:
                return []
            first_logs[task.token] = log = self.make_log(task.id, 1, task.token)
            return [log.call("started", keys.record(task.id), worker=self.name)]

        def claim() -> list[tuple[Task | Exception | None, Any]]:
            nonlocal believed_until
            believed_until = time.monotonic() + self.lease_seconds  # counted from before the server counts
            return self.queue.claim_many(elements, worker=self.name, lease_seconds=self.lease_seconds, then=start)

        claimed = self.insist("claim", claim)
        self.unclaimed = []
        jobs = []
        for task, reply in claimed:
            if isinstance(task, Exception):
                logger.error("a task was left to its lease: %s", task)
            if not isinstance(task, Task):
                continue
            if isinstance(reply, list) and reply[0] != "unclaimed":
                log = first_logs[task.token]
                started = log.outcome(reply)
            else:
                log, started = self.make_log(task.id, task.attempt, task.token), None
            log.lease = Lease(believed_until, cancel_reason=task.cancel_reason or None)
            jobs.append(_Job(task, log, log.lease, started))
            self.running[task.token] = jobs[-1]
        if jobs:
            fault_point("claimed")
        if any(job.started for job in jobs):
            fault_point("started")
        for job in jobs:
            self.jobs.put(job)
        time.sleep(0)  # subtle: gives way, so that the handlers begin before the next BRPOP is prepared
        return len(jobs)

    def make_log(self, task_id: str, attempt: int, token: str) -> TaskLog:
        return TaskLog(task_id, self.queue.redis, attempt=attempt, token=token, script=self.append)

    def is_spent(self, task: Task) -> bool:
        return task.failures >= self.max_attempts

    def finish_or_hand_back(self, grace_seconds: float) -> int:
        """Wait for the running tasks; hand back those that take longer than the grace."""
        if self.running:
            logger.info("stopping: %d task(s) may finish within %g s", len(self.running), grace_seconds)
        deadline = time.monotonic() + grace_seconds
        for free in (self.slots, self.unwritten):  # first all handlers are done, then all ends are written
            found = 0
            while found < self.concurrency and time.monotonic() < deadline and self.signals < 2:
                found += free.acquire(timeout=POLL_SECONDS)
        self.leaving.set()
        held = list(self.running.values())
        for job in held:
            job.lease.lost.set()
        try:
            if self.unclaimed:
                self.queue.put_back(self.unclaimed)
            for job, released in zip(held, self.queue.release([job.task for job in held]), strict=True):
                if released:
                    logger.info("task %s handed back", job.task)
        except REDIS_ERRORS:
            logger.warning("%d task(s) not handed back: they run again when their leases are over", len(held))
        if self.elected:
            with contextlib.suppress(RedisMessagingError):  # then it expires by itself
                self.election.release()
        logger.info("worker %s stopped", self.name)
        return 130 if self.signals > 1 else 0  # 128 + SIGINT, as shells count

    def is_elected(self) -> bool:
        """Say whether it is this worker that looks for lost tasks; the next one takes over where it does no more."""
        try:
            if self.elected:
                with contextlib.suppress(LockNotOwned):
                    self.election.extend()
                    return True
            self.elected = self.election.acquire(retry=0)
            return self.elected
        except RedisMessagingError as error:
            raise (error.__cause__ or error) from None  # redis-py's own, which this loop knows how to wait out

    # -- the slots ----------------------------------------------------------------------------------------------

    def slot(self) -> None:
        while (job := self.jobs.get()) is not None:
            with self.survived():
                self.process(job)
            if not job.end:
                del self.running[job.task.token]
            self.slots.release()

    @contextlib.contextmanager
    def survived(self) -> Iterator[None]:
        """Let a thread of this worker go on, whatever happened to one task."""
        try:
            yield
        except LeaseLost as error:
            logger.warning("%s; leaving it", error)
        except REDIS_ERRORS as error:
            logger.error("a task was left to its lease: %s", error)
        except BaseException:  # without this thread its worker would hang
            logger.exception("the worker itself failed; the task runs again when its lease is over")

    def process(self, job: _Job) -> None:
        try:
            self.work(job)
        except StreamEnded:  # a worker died between the terminal event and finish
            self.insist("write", lambda: finish_as_ended(self.queue, job.task, job.log))

    def work(self, job: _Job) -> None:
        task, log = job.task, job.log
        began = time.monotonic()
        try:
            if task.lost_worker:
                log.add_always("worker_lost", worker=task.lost_worker)
                fault_point("worker_lost")
            if self.is_spent(task):
                logger.error("task %s failed: its worker was lost, %d times in all", task, task.failures)
                self.give_up(task, log, f"its worker was lost ({task.lost_worker})", task.failures)
                return
            if job.started is None:
                log.add("started", worker=self.name)
                fault_point("started")
            elif isinstance(job.started, Exception):
                raise job.started
            logger.info("task %s started%s", task, f" (attempt {task.attempt})" if task.attempt > 1 else "")
            log.check()  # subtle: last of all, since the claim's reply may have come late, or this process been frozen
            result = self.handler(task, log)
            fault_point("handled")
            log.check()
            job.duration_ms = round((time.monotonic() - began) * 1000)
            if self.is_cluster:
                log.add("completed", result=result, duration_ms=job.duration_ms)
                fault_point("completed")
                self.finish(task, "completed", result)
                logger.info("task %s completed in %.2f s", task, job.duration_ms / 1000)
            else:
                finish = self.queue.finish_call(task, "completed", result, keys.writer(task.id))
                job.end = [log.call("completed", result=result, duration_ms=job.duration_ms), finish]
        except (LeaseLost, StreamEnded):
            raise
        except TaskCancelled as cancelled:
            log.add_always("cancelled", reason=str(cancelled))
            fault_point("cancelled")
            self.finish(task, "cancelled", str(cancelled))
            logger.info("task %s cancelled: %s", task, cancelled)
        except BaseException as error:  # the task boundary: whatever a task does, sys.exit() too, the worker goes on
            self.failed(task, log, error)
        if job.end:
            self.unwritten.acquire()
            self.ends.put(job)

    def write_ends(self) -> None:
        job = self.ends.get()
        while job is not None:
            jobs = [job]
            while not self.ends.empty() and (job := self.ends.get()) is not None:
                jobs.append(job)
            with self.survived():
                self.end(jobs)
            for written in jobs:
                del self.running[written.task.token]
            self.unwritten.release(len(jobs))
            job = job and self.ends.get()

    def end(self, jobs: list[_Job]) -> None:
        """Write `completed` for each and close their records, in one round trip."""

        def write() -> dict[str, tuple[Any, Any]]:
            held = [job for job in jobs if not job.lease.is_over]
            replies = iter(run_many(self.queue.redis, [call for job in held for call in job.end]))
            return {job.task.token: (next(replies), next(replies)) for job in held}

        replies = self.insist("write", write)
        fault_point("completed")
        for job in jobs:
            with self.survived():
                if job.task.token not in replies:
                    raise LeaseLost(f"the lease of task {job.task} (attempt {job.task.attempt}) is over")
                ended, finished = replies[job.task.token]
                outcome = job.log.outcome(ended)
                if isinstance(outcome, StreamEnded):
                    self.insist("write", partial(finish_as_ended, self.queue, job.task, job.log))
                    continue
                for error in (outcome, finished):
                    if isinstance(error, Exception):
                        raise error
                if finished != 1:
                    raise LeaseLost(f"the record of task {job.task} (attempt {job.task.attempt}) is closed by another")
                logger.info("task %s completed in %.2f s", job.task, job.duration_ms / 1000)

    def failed(self, task: Task, log: TaskLog, error: BaseException) -> None:
        """Log an exception of the handler; then let the task rest for its next attempt, or give it up."""
        message = str(error)[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode() or repr(error)
        failures = task.failures + 1
        permanent = isinstance(error, PermanentFailure)
        will_retry = not permanent and failures < self.max_attempts
        log.add_always("error", error=message, error_type=type(error).__name__, will_retry=will_retry)
        fault_point("error")
        if not will_retry:
            logger.error("task %s failed: %s", task, message, exc_info=None if permanent else error)
            self.give_up(task, log, message, failures)
            return
        delay = min(self.backoff_seconds * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS)
        logger.warning("task %s: %s; tried again in %g s", task, message, delay, exc_info=error)
        self.insist("write", lambda: self.queue.retry(task, delay))

    def give_up(self, task: Task, log: TaskLog, reason: str, failures: int) -> None:
        """Write `failed`, and let the task go to the dead letters."""
        log.add_always("failed", error=reason, attempts=failures)
        fault_point("failed")
        self.finish(task, "failed", reason)

    def finish(self, task: Task, outcome: Outcome, result: Any) -> None:
        self.insist("write", lambda: self.queue.finish(task, outcome, result))

    # -- the heartbeat ------------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        pause = self.lease_seconds / 3
        while not self.leaving.is_set():
            self.beat_now.wait(pause)
            self.beat_now.clear()
            if held := list(self.running.values()):
                is_renewed = False
                with self.survived():
                    is_renewed = self.renew(held)
                pause = self.lease_seconds / 3 if is_renewed else min(1.0, self.lease_seconds / 10)

    def renew(self, held: list[_Job]) -> bool:
        """Renew the leases of these tasks, and see which are to be cancelled; say whether Redis answered."""
        sent = time.monotonic()
        try:
            beat = partial(self.queue.heartbeat, [job.task for job in held], self.lease_seconds)
            replies = self.attempt("heartbeat", beat)
        except REDIS_ERRORS as error:
            if not is_transient(error):
                logger.error("cannot renew leases: %s", error)
            return False
        for job, reply in zip(held, replies, strict=True):
            if isinstance(reply, Exception):
                logger.error("cannot renew the lease of task %s: %s", job.task, reply)
            elif reply == 0:
                job.lease.lost.set()
            else:
                job.lease.deadline = sent + self.lease_seconds
        for job, reply in zip(held, replies, strict=True):
            if reply == 2 and job.lease.cancel_reason is None:
                record = self.insist("heartbeat", partial(self.queue.get, job.task.id))
                job.lease.cancel_reason = (record or {}).get("cancel", "cancelled")
        return True

    def listen_for_cancellations(self) -> None:
        # This worker itself says when Redis goes away and comes back; its subscription need not say it, too.
        logging.getLogger("ailf.messaging.redis.pubsub").setLevel(logging.ERROR)
        try:
            self.cancellations.subscribe(keys.CANCEL_CHANNEL, self.on_cancel)
            self.cancellations.run_in_thread()
            self.listening = True
        except RedisMessagingError as error:
            if not is_transient(error):
                self.listening = True  # as well as it will ever do
                logger.warning("cancellations arrive with the next heartbeat only: %s", error)

    def on_cancel(self, task_id: Any) -> None:
        if any(job.task.id == str(task_id) for job in list(self.running.values())):
            self.beat_now.set()

    # -- Redis away ---------------------------------------------------------------------------------------------

    def attempt(self, kind: str, call: Callable[[], T]) -> T:
        """Call once; log when this kind of operation begins to fail and when all work again, not in between."""
        try:
            result = call()
        except REDIS_ERRORS as error:
            with self.trouble_lock:
                if not self.trouble and is_transient(error):
                    logger.warning("Redis does not serve (%s); waiting for it", reason_of(error))
                    self.trouble_since = time.monotonic()
                self.trouble.add(kind)
            raise
        if kind in self.trouble:
            with self.trouble_lock:
                self.trouble.discard(kind)
                if not self.trouble:
                    logger.warning("Redis serves again, after %.1f s", time.monotonic() - self.trouble_since)
        return result

    def insist(self, kind: str, call: Callable[[], T]) -> T:
        """Call an idempotent operation until it succeeds or this worker leaves; the main thread leaves at a signal."""
        for delay in delays():
            try:
                return self.attempt(kind, call)
            except REDIS_ERRORS as error:
                if not is_transient(error) or self.leaving.wait(delay):
                    raise
                if self.signals and threading.current_thread() is threading.main_thread():
                    raise
        raise AssertionError("delays() never ends")


def _number(least: float, kind: type[float] = float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not math.isfinite(number) or number < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least:g}")
        return number

    parse.__name__ = "number"
    return parse


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every consumer takes: --concurrency, --lease, --burst, --grace."""
    at_once = "tasks at one time (default 1)"
    lease = "seconds after which a task whose worker was killed runs again (default 10)"
    grace = "seconds that running tasks may take to finish after Ctrl-C (default 10)"
    parser.add_argument("--concurrency", type=_number(1, int), default=1, metavar="N", help=at_once)
    parser.add_argument("--lease", type=_number(1), default=LEASE_SECONDS, metavar="S", help=lease)
    parser.add_argument("--grace", type=_number(0), default=GRACE_SECONDS, metavar="S", help=grace)
    parser.add_argument("--burst", action="store_true", help="work until no task is owed, then exit")


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed options as keyword arguments for run_worker."""
    return {
        "concurrency": args.concurrency,
        "lease_seconds": args.lease,
        "burst": args.burst,
        "grace_seconds": args.grace,
    }
