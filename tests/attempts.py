"""Attempts for the tests to drive by hand: claims and logs as a worker has them, without its loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from redis import Redis
from redis.asyncio import RedisCluster

from ailf.messaging.redis import connect, connect_async
from task_streams import BlockingLog, LogReader, Parked, Task, TaskLog, TaskQueue, keys
from task_streams.claims import Claims, new_token
from task_streams.pipeline import ClusterPipeline, Pipeline

T = TypeVar("T")


class Attempts:
    """A worker without a loop. `pipe` may be replaced, to lose replies."""

    def __init__(self, pipe: Any, name: str, lease_seconds: float) -> None:
        self.pipe, self.claims = pipe, Claims(pipe, name, lease_seconds)

    async def claim(self, element: bytes, token: str = "") -> tuple[Task, TaskLog]:
        """Claim the task of an element; `started` is written."""
        [task] = await self.claims.claim([(element, token or new_token())])
        return task, self.log_of(task)

    def log_of(self, task: Task) -> TaskLog:
        return TaskLog(task, self.claims, time.monotonic() + self.claims.lease_seconds)


@asynccontextmanager
async def attempts(url: str, name: str = "w", lease_seconds: float = 60) -> AsyncIterator[Attempts]:
    client = await connect_async(url)
    pipe = ClusterPipeline(client) if isinstance(client, RedisCluster) else Pipeline(client, silence_seconds=30)
    await pipe.connect()
    try:
        yield Attempts(pipe, name, lease_seconds)
    finally:
        await pipe.close()
        await client.aclose()


def attempt(url: str, redis: Redis, handler: Callable[[Task, TaskLog], Awaitable[Any]]) -> None:
    """Make one attempt of the next task, whatever else the server has: it completes, or is parked on its question."""

    async def make() -> None:
        async with attempts(url) as worker:
            task, log = await worker.claim(popped(redis))
            try:
                result = await handler(task, log)
            except Parked:
                await worker.claims.release(task, until_answered=True)
            else:
                await log.end("completed", result, result=result)

    asyncio.run(make())


class Hand:
    """A worker for tests that are not asyncio themselves: each call is one step of an attempt."""

    def __init__(self, url: str) -> None:
        self._raw = Redis.from_url(url)
        self._loop = asyncio.new_event_loop()
        self._context = attempts(url)
        self._claims = self._do(self._context.__aenter__()).claims

    def close(self) -> None:
        self._do(self._context.__aexit__(None, None, None))
        self._loop.close()
        self._raw.close()

    def _do(self, step: Awaitable[T]) -> T:
        return self._loop.run_until_complete(step)

    def pop(self) -> bytes | None:
        element: Any = self._raw.rpop(keys.QUEUE)
        return bytes(element) if element is not None else None

    def claim(self, element: bytes, token: str = "") -> Task | None:
        return next(iter(self._do(self._claims.claim([(element, token or new_token())]))), None)

    def take(self) -> Task:
        """Pop the next element and claim its task."""
        task = self.try_to_take()
        assert task is not None
        return task

    def try_to_take(self) -> Task | None:
        """The same; None if there is no element, or nothing to do for it."""
        element = self.pop()
        return None if element is None else self.claim(element)

    def finish(self, task: Task, outcome: str, result: Any) -> bool:
        """Close a task's record, whatever its stream says."""
        return self._do(self._claims.finish(task, outcome, result))

    def release(self, task: Task, delay_seconds: float | None = None) -> bool:
        return self._do(self._claims.release(task, delay_seconds))


class Writer:
    """Writes the stream of a task that nobody has put, from a test that is not asyncio itself: add() blocks."""

    def __init__(self, url: str, task_id: str = "t") -> None:
        self.reader = LogReader(task_id, connect(url))
        self.reader.redis.xgroup_create(keys.stream(task_id), "none", mkstream=True)  # a log makes no stream
        self.reader.redis.xgroup_destroy(keys.stream(task_id), "none")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._context = attempts(url)
        self._worker = self._do(self._context.__aenter__())
        self._worker.claims.finish = self._end  # type: ignore[method-assign]
        task = Task(task_id, None, epoch=str(int(time.time() * 1000)))
        self._log = TaskLog(task, self._worker.claims, time.monotonic() + 3600)

    def add(self, event: str, /, **fields: Any) -> str:
        """Append an event of any name."""
        if event in keys.TERMINAL:
            self._do(self._log.end(event, None, **fields))
            return f"{self._log.epoch}-{self._log.seq}"
        return BlockingLog(self._log, self._loop).add(event, **fields)

    def _do(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(60)

    async def _end(self, task: Task, event: str, result: Any, entry_id: str = "", fields: Sequence[str] = ()) -> bool:
        return bool(await self._worker.pipe.call("XADD", keys.stream(self.reader.task_id), entry_id, *fields))

    def close(self) -> None:
        self._do(self._context.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.reader.redis.close()


def run(test: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(test())  # type: ignore[arg-type]


def popped(redis: Redis) -> bytes:
    """Take the next element of the queue, as BRPOP does."""
    element = redis.rpop(keys.QUEUE)
    assert isinstance(element, str)
    return element.encode()


def end_lease(queue: TaskQueue, task_id: str) -> None:
    queue.redis.zadd(keys.LEASES, {task_id: 1})


def names(redis: Redis, task_id: str = "1") -> list[str]:
    return [event.name for event in LogReader(task_id, redis).read()]


def seqs(redis: Redis, task_id: str = "1") -> list[int]:
    return [int(event.id.partition("-")[2]) for event in LogReader(task_id, redis).read()]
