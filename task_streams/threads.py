"""Run a plain function beside the event loop, in a thread that nobody has to wait for."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

Outcome = tuple[Any, BaseException | None]  # what a function returned, what it raised


def in_thread(call: Callable[[], Any], name: str) -> "asyncio.Future[Outcome]":
    """Run a function in a daemon thread of its own; the future has its outcome, whatever that is.

    Not in asyncio's few threads: functions that never end would take them for ever, and the process could not exit.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Outcome] = loop.create_future()

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:  # the task boundary
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has left without this thread
            loop.call_soon_threadsafe(done.set_result, (result, error))

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
