"""One algorithm for threads and for asyncio: a generator that yields what it must wait for.

    def _add(self, data):
        return str((yield self.redis.xadd(...)))

With a redis-py client the call inside has been made when it is yielded, and run() hands the answer straight back. With
a redis.asyncio client it yields a coroutine, which run_async() awaits. What is delicate is written, and mended, once.
"""

import inspect
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Any, Any, T]


def run(steps: Steps[T]) -> T:
    """Run steps that yield answers; return what they return."""
    try:
        answer = next(steps)
        while True:
            answer = steps.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def run_async(steps: Steps[T]) -> T:
    """Run steps that yield awaitables; return what they return."""
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            waited_for = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer, error = None, None
        try:
            answer = await waited_for if inspect.isawaitable(waited_for) else waited_for
        except BaseException as raised:  # a cancellation too: the steps are told, and may clean up
            error = raised
