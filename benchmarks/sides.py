"""The queues that peers.py compares: how each puts tasks, and how it works on them until it is killed.

peers.py starts it as a process for each, perhaps with another Python, so each side imports what it needs. A task does
nothing but write down when it ran, to a file, so that all sides are measured alike.
"""

import asyncio
import inspect
import json
import logging
import os
import random
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

STAMP = struct.Struct("=cid")  # began or ended, number of the task, when
STAMPS = "PEERS_STAMPS"  # the environment variable that names the file
WARM_UP = 5  # latencies that are not counted: they connect
QUEUE = "peers"


@cache
def stamps_file() -> int:
    return os.open(os.environ[STAMPS], os.O_WRONLY | os.O_APPEND)


def stamp(kind: bytes, number: int) -> None:
    os.write(stamps_file(), STAMP.pack(kind, number, time.monotonic()))


def read_stamps() -> list[tuple[bytes, int, float]]:
    return list(STAMP.iter_unpack(Path(os.environ[STAMPS]).read_bytes()))


def task(number: int, seconds: float) -> None:
    """Be the task of every side."""
    stamp(b"b", number)
    if seconds:
        time.sleep(seconds)
        stamp(b"e", number)


async def async_task(number: int, seconds: float) -> None:
    """Be the same for those that want coroutines."""
    stamp(b"b", number)
    if seconds:
        await asyncio.sleep(seconds)
        stamp(b"e", number)


Made = tuple[Callable[[int, float], Any], Callable[[], Any]]  # put(number, seconds), work(): may return awaitables


@dataclass(frozen=True)
class Side:
    """One way to have tasks done."""

    title: str
    settings: str  # for speed
    make: Callable[[str, int, bool], Made]  # from URL, tasks at one time, and whether for speed or with the defaults
    packages: tuple[str, ...] = ()  # the first one's version is shown
    most: int = 100  # tasks at one time


SIDES: dict[str, Side] = {}


def side(title: str, settings: str, *packages: str, **options: Any) -> Callable[[Any], Any]:
    def register(make: Callable[[str, int, bool], Made]) -> None:
        SIDES[make.__name__] = Side(title, settings, make, packages, **options)

    return register


def use_uvloop() -> None:
    with suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


@side("BRPOP loop", "LPUSH, BRPOP, nothing else; one at a time")
def bare(url: str, _concurrency: int, _best: bool) -> Made:
    from redis import Redis

    client = Redis.from_url(url)

    def work() -> None:
        while True:
            if found := client.brpop([QUEUE], timeout=1):
                task(**json.loads(found[1]))

    return lambda number, seconds: client.lpush(QUEUE, f'{{"number": {number}, "seconds": {seconds}}}'), work


@side("**this queue**", "defaults, async handler")
def ours(url: str, concurrency: int, _best: bool) -> Made:
    from ailf.messaging.redis import connect
    from task_streams import TaskQueue, run_worker

    queue = TaskQueue(connect(url))

    async def handle(one: Any, _log: Any) -> None:
        await async_task(*one.data)

    work = partial(run_worker, handle, concurrency=concurrency, url=url)
    return lambda number, seconds: queue.put([number, seconds]), work


@side("ardiq", "async task, result_ttl_ms 0", "ardiq")
def ardiq(url: str, concurrency: int, best: bool) -> Made:
    import ardiq

    app = ardiq.Ardiq(url, QUEUE, concurrency=concurrency, **({"result_ttl_ms": 0} if best else {}))
    return app.task(async_task).enqueue, app.run


@side("RQ", "worker pool, SimpleWorker (no fork a job), result_ttl 0", "rq", most=10)  # each is a process
def rq(url: str, concurrency: int, best: bool) -> Made:
    from redis import Redis
    from rq import Queue, SimpleWorker, Worker
    from rq.worker_pool import WorkerPool

    client = Redis.from_url(url)
    queue = Queue(QUEUE, connection=client)
    kind, options = (SimpleWorker, {"result_ttl": 0}) if best else (Worker, {})
    pool = WorkerPool([queue], connection=client, num_workers=concurrency, worker_class=kind)
    return partial(queue.enqueue, "sides.task", **options), partial(pool.start, logging_level="ERROR")


@side("Celery", "pool threads, prefetch multiplier 64, ignore_result, without gossip, mingle and heartbeat", "celery")
def celery(url: str, concurrency: int, best: bool) -> Made:
    import celery

    app = celery.Celery("peers", broker=url)
    app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)
    options = ["worker", f"--concurrency={concurrency}", "--loglevel=ERROR"]
    if best:
        app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=64)
        options += ["--pool=threads", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return app.task(task, name="task").delay, partial(app.worker_main, options)


@side("Dramatiq", "threads, dramatiq_queue_prefetch 1,000, no results", "dramatiq")
def dramatiq(url: str, concurrency: int, best: bool) -> Made:
    if best:
        os.environ["dramatiq_queue_prefetch"] = "1000"  # noqa: SIM112 (its name; read at the import)
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=url)
    dramatiq.set_broker(broker)

    def work() -> None:
        dramatiq.Worker(broker, worker_threads=concurrency).start()
        threading.Event().wait()

    return dramatiq.actor(task, queue_name=QUEUE).send, work


@side("arq", "keep_result 0, poll_delay 0.01 s, queue_read_limit 100, uvloop", "arq")
def arq(url: str, concurrency: int, best: bool) -> Made:
    from arq import ArqRedis, Worker, func
    from arq.connections import RedisSettings

    use_uvloop()
    options = {"keep_result": 0, "poll_delay": 0.01, "queue_read_limit": 100} if best else {}

    async def run(_context: Any, number: int, seconds: float) -> None:
        await async_task(number, seconds)

    async def work() -> None:
        settings = RedisSettings.from_dsn(url)
        await Worker([func(run, name="task")], redis_settings=settings, max_jobs=concurrency, **options).async_run()

    return partial(ArqRedis.from_url(url).enqueue_job, "task"), work


@side("Huey", "threads, blocking, results off", "huey")
def huey(url: str, concurrency: int, best: bool) -> Made:
    import huey

    app = huey.RedisHuey(QUEUE, url=url, **({"results": False} if best else {}))
    return app.task()(task), app.create_consumer(workers=concurrency, worker_type="thread").run


@side("taskiq, list", "ListQueueBroker (no acknowledgement), max_prefetch 100, uvloop", "taskiq", "taskiq-redis")
def taskiq(url: str, concurrency: int, best: bool) -> Made:
    from taskiq_redis import ListQueueBroker

    return with_broker(ListQueueBroker(url), concurrency, best)


@side("taskiq, stream", "RedisStreamBroker (acknowledges), max_prefetch 100, uvloop", "taskiq", "taskiq-redis")
def taskiq_stream(url: str, concurrency: int, best: bool) -> Made:
    from taskiq_redis import RedisStreamBroker

    # with consumer_id, tasks that were put before the worker was there count, too
    return with_broker(RedisStreamBroker(url, consumer_id="0"), concurrency, best)


def with_broker(broker: Any, concurrency: int, best: bool) -> Made:
    from taskiq.api import run_receiver_task

    use_uvloop()
    options = {"max_prefetch": 100, "validate_params": False} if best else {}
    work = partial(run_receiver_task, broker, max_async_tasks=concurrency, run_startup=True, **options)
    return broker.task("task")(async_task).kiq, work


# -- a process of a side ------------------------------------------------------------------------------------------


async def awaited(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


async def put_all(put: Callable[[int, float], Any], count: int, seconds: float) -> float:
    """Put tasks; return how many a second, but for the first, which connects."""
    await awaited(put(0, seconds))
    began = time.monotonic()
    for number in range(1, count):
        await awaited(put(number, seconds))
    return (count - 1) / (time.monotonic() - began)


async def put_each(put: Callable[[int, float], Any], count: int) -> float:
    """Put tasks, each when the last has begun; return the median of the seconds that they waited."""
    began_at = []
    for number in range(count + WARM_UP):
        await asyncio.sleep(random.uniform(0.02, 0.06))  # not in step with who polls
        began_at.append(time.monotonic())
        await awaited(put(number, 0.0))
        while len(read_stamps()) <= number:
            await asyncio.sleep(0.001)
    return statistics.median([when - began_at[number] for _, number, when in read_stamps()][WARM_UP:])


def main(name: str, role: str, url: str, concurrency: str, best: str, *args: str) -> None:
    """Be a process of a side: `work`; or `put` tasks; or put one after the other, to know their `latency`."""
    sys.path.append(str(Path(__file__).parents[1]))
    logging.disable(logging.WARNING)
    put, work = SIDES[name].make(url, int(concurrency), best == "best")
    if role == "put":
        print(asyncio.run(put_all(put, int(args[0]), float(args[1]))))
    elif role == "latency":
        print(asyncio.run(put_each(put, int(args[0]))))
    elif inspect.isawaitable(running := work()):
        asyncio.run(awaited(running))


if __name__ == "__main__":
    main(*sys.argv[1:])
