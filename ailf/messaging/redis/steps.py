"""One algorithm for threads and for asyncio: a generator that yields whatever it waits for.

    class _Counter(Waits):
        @both
        def count(self, key: str) -> Steps[int]:
            return int((yield self.redis.incr(key)))

    class Counter(_Counter, Blocking): ...          Counter(client).count("a") -> 1
    class AsyncCounter(_Counter, Awaiting): ...     await AsyncCounter(client).count("a") -> 1

With a redis-py client, the call is already done when it is yielded, and run() hands its answer straight back. With a
redis.asyncio client, the call is a coroutine, and run_async() awaits it. So the delicate parts are written once.
"""

import asyncio
import contextlib
import inspect
import operator
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, get_args, overload

from .errors import REDIS_ERRORS, translate

P = ParamSpec("P")
T = TypeVar("T")
Steps = Generator[Any, Any, T]


def run(steps: Steps[T]) -> T:
    """Run steps that yield answers; return what they return."""
    answer = None
    try:
        while True:
            answer = steps.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def run_async(steps: Steps[T]) -> T:
    """Run steps that yield awaitables, or plain answers; return what they return."""
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            awaited = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer, error = None, None
        try:
            answer = await awaited if hasattr(awaited, "__await__") else awaited
        except BaseException as raised:  # a cancellation too: the steps hear of it and can clean up
            error = raised


class both(Generic[P, T]):  # a decorator
    """Turn steps into a plain method of every Blocking class and a coroutine method of every Awaiting class.

    Either one raises this package's errors in place of redis-py's, which they chain.
    """

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self.steps = steps

    @overload
    def __get__(self, owner: "Blocking", kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, owner: "Awaiting", kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, owner: object, kind: type) -> Callable[P, Any]: ...
    def __get__(self, owner: object, kind: type) -> Any:
        return self  # for type checkers: the classes below put a function in its place


class Waits:
    """What steps may ask for, whichever way they wait; `redis` is their client."""

    redis: Any = None
    method: Any = None  # (steps) -> the method made of them
    new_event: Any  # () -> threading.Event or asyncio.Event
    new_condition: Any
    wait_for: Any  # (event or condition, seconds) -> whether it came in that time
    sleep: Any  # (seconds)
    call: Any  # (the user's function, *args): on asyncio it may be a coroutine function
    close_one: Any  # (client)
    begin: Any  # (steps, name): run them in a daemon thread or a task, and return that
    current: Any  # () -> the thread or task that calls this

    def __init_subclass__(cls) -> None:
        for name in dir(cls) if cls.method else ():
            if isinstance(found := inspect.getattr_static(cls, name), both):
                method = cls.method(found.steps)
                signature = inspect.signature(found.steps)
                answer = get_args(signature.return_annotation)[-1]  # of Steps[answer]
                method.__signature__ = signature.replace(return_annotation=answer)
                setattr(cls, name, method)


class Blocking(Waits):
    """Waits in the thread that calls."""

    new_event, new_condition = threading.Event, threading.Condition
    sleep, current = staticmethod(time.sleep), staticmethod(threading.current_thread)
    call, close_one = operator.call, operator.methodcaller("close")

    @staticmethod
    def method(steps: Callable[..., Steps[T]]) -> Callable[..., T]:
        @wraps(steps)
        def method(self: Waits, *args: Any, **options: Any) -> T:
            try:
                return run(steps(self, *args, **options))
            except REDIS_ERRORS as error:
                raise translate(error, self.redis) from error

        return method

    def wait_for(self, what: Any, seconds: float) -> bool:
        return bool(what.wait(seconds))

    def begin(self, steps: Steps[None], name: str) -> threading.Thread:
        thread = threading.Thread(target=run, args=(steps,), name=name, daemon=True)
        thread.start()
        return thread


class Closing:
    """Ends with a `with` block."""

    close: Any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClosing:
    """Ends with an `async with` block."""

    close: Any

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Awaiting(Waits):
    """Waits without blocking the event loop."""

    new_event, new_condition = asyncio.Event, asyncio.Condition
    sleep, current = staticmethod(asyncio.sleep), staticmethod(asyncio.current_task)
    close_one = operator.methodcaller("aclose")

    @staticmethod
    def method(steps: Callable[..., Steps[T]]) -> Callable[..., Coroutine[Any, Any, T]]:
        @wraps(steps)
        async def method(self: Waits, *args: Any, **options: Any) -> T:
            try:
                return await run_async(steps(self, *args, **options))
            except REDIS_ERRORS as error:
                raise translate(error, self.redis) from error

        return method

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        result = function(*args)
        return await result if inspect.isawaitable(result) else result

    async def wait_for(self, what: Any, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return bool(await what.wait())
        return False

    def begin(self, steps: Steps[None], name: str) -> "asyncio.Task[None]":
        return asyncio.create_task(run_async(steps), name=name)


@contextmanager
def block(enter: Callable[[], T], leave: Callable[[T, bool], None]) -> Iterator[T]:
    """Call enter() before a `with` block, and leave(what that returned, whether the block raised) after it."""
    got = enter()
    try:
        yield got
    except BaseException:
        leave(got, True)
        raise
    leave(got, False)


@asynccontextmanager
async def async_block(enter: Callable[[], Any], leave: Callable[[T, bool], Any]) -> AsyncIterator[T]:
    """Do the same for an `async with` block."""
    got = await enter()
    try:
        yield got
    except BaseException:
        await leave(got, True)
        raise
    await leave(got, False)
