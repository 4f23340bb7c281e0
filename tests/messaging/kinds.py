"""The blocking and the asyncio kind of each class, driven by the same tests."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest

from ailf.messaging import redis as package
from ailf.messaging.redis import AsyncRedisClient, RedisClient, RedisConfig, connect, connect_async


class Plain:
    """An asyncio object that is called like a blocking one: what it returns is awaited on an event loop in a thread."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.target, self.loop = target, loop

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.target, name.replace("in_thread", "in_task"))
        if not inspect.ismethod(attribute):
            return attribute

        def call(*args: Any, **options: Any) -> Any:
            return self.result_of(lambda: attribute(*args, **options))

        return call

    def result_of(self, start: Callable[[], Any]) -> Any:
        """Call start() on the event loop, and wait for what it returns, if that can be awaited."""

        if asyncio._get_running_loop() is self.loop:
            return start()  # a handler calls stop()

        async def main() -> Any:
            result = start()
            return await result if inspect.iscoroutine(result) else result

        result = asyncio.run_coroutine_threadsafe(main(), self.loop).result(120)
        if isinstance(result, asyncio.Task):
            return Ended(result)
        return self._block(result) if isinstance(result, contextlib.AsyncContextDecorator) else result

    @contextlib.contextmanager
    def _block(self, context: Any) -> Iterator[Any]:
        exit_ = contextlib.AsyncExitStack()
        got = self.result_of(lambda: exit_.enter_async_context(context))
        try:
            yield got
        except BaseException as error:
            kind, raised, trace = type(error), error, error.__traceback__
            if not self.result_of(lambda: exit_.__aexit__(kind, raised, trace)):
                raise
        else:
            self.result_of(exit_.aclose)


class Ended:
    """A task, asked as a thread is."""

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.task = task

    def is_alive(self) -> bool:
        return not self.task.done()


Make = Callable[..., Any]  # make("RedisLock", server, "name") -> a RedisLock, or an AsyncRedisLock as plain calls


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


@pytest.fixture
def plain(kind: str, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[[Any], Any]]:
    """Take an object of this kind, and return it to be called like a blocking one. It is closed after the test."""
    taken: list[Any] = []

    def take(target: Any) -> Any:
        taken.append(target if kind == "sync" else Plain(target, loop))
        return taken[-1]

    yield take
    for each in reversed(taken):
        each.close()


@pytest.fixture
def make(plain: Callable[[Any], Any], kind: str, loop: asyncio.AbstractEventLoop) -> Make:
    """Make objects of either kind, on a server (or whatever has a URL) or on fakeredis.

    make("RedisLock", server, "name", 30): the arguments of the class follow the server; `config` is the client's.
    """

    def client_for(server: Any, config: dict[str, Any]) -> Any:
        if isinstance(server, fakeredis.FakeServer):
            return (fakeredis.FakeRedis if kind == "sync" else fakeredis.FakeAsyncRedis)(
                server=server, decode_responses=True
            )
        if isinstance(server, str):  # a cluster's URL
            if kind == "sync":
                return plain(connect(server))
            client = Plain(None, loop).result_of(lambda: connect_async(server))
            plain(SimpleNamespace(close=client.aclose))
            return client
        settings = RedisConfig(host="127.0.0.1", port=int(server.url.rpartition(":")[2]), **config)
        either = plain(RedisClient(settings) if kind == "sync" else AsyncRedisClient(settings))
        return either if kind == "sync" else either.target

    def new(name: str, server: Any, *args: Any, config: dict[str, Any] | None = None, **options: Any) -> Any:
        client = client_for(server, config or {})
        of_kind = getattr(package, name if kind == "sync" else f"Async{name}")
        return plain(of_kind(*args, redis_client=client, **options))

    return new


@pytest.fixture
def fake() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()
