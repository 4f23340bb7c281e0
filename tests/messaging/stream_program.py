"""Consumers of a stream, each a process of its own, for the tests to stop and to kill.

They are forked from a server process that has imported everything, so that a new one is there within milliseconds even
on a busy machine. Each ends when the test's process does.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ailf.messaging.redis import AsyncRedisClient, AsyncRedisStream, RedisClient, RedisConfig, RedisStream

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ailf.messaging.redis", "stream_program"])


class Consumers:
    """Start consumers of the group "workers" of the stream "tasks"; read what they wrote to their journal."""

    def __init__(self, kind: str, port: int, journal: Path, **options: int) -> None:
        self.kind, self.port, self.journal, self.options = kind, port, journal, options
        self.started: list[ForkServerProcess] = []
        journal.touch()

    def start(self, name: str) -> ForkServerProcess:
        process = context.Process(target=_consume, args=(self.kind, self.port, self.journal, name, self.options))
        process.start()
        self.started.append(process)
        return process

    def lines(self) -> list[list[str]]:
        """[consumer, "began" or "did", number of the message] of each line."""
        return [line.split() for line in self.journal.read_text().splitlines()]

    def done(self, consumer: str | None = None) -> list[int]:
        """The messages that consumers (or one of them) did, in this order."""
        return [int(n) for name, what, n in self.lines() if what == "did" and consumer in (None, name)]

    def end(self) -> None:
        for process in self.started:
            process.kill()
        for process in self.started:
            process.join(60)
            process.close()


def _consume(kind: str, port: int, journal: Path, name: str, options: dict[str, int]) -> None:
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    config = RedisConfig(host="127.0.0.1", port=port)
    handler = _handler(journal, name)
    if kind == "sync":
        stream = RedisStream("tasks", RedisClient(config), **options)
        stream.create_consumer_group("workers", name)
        stream.process_messages(handler, block=100)
        return

    async def consume() -> None:
        stream = AsyncRedisStream("tasks", AsyncRedisClient(config), **options)
        await stream.create_consumer_group("workers", name)
        await stream.process_messages(lambda data: asyncio.to_thread(handler, data), block=100)

    asyncio.run(consume())


def _end_with_the_test() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _handler(journal: Path, name: str) -> Callable[[dict[str, Any]], bool]:
    """A handler of {"n": number, "seconds": how long it takes, "poison": "exit" or "kill" to end its process}."""
    file = os.open(journal, os.O_WRONLY | os.O_APPEND)

    def handle(data: dict[str, Any]) -> bool:
        os.write(file, f"{name} began {data['n']}\n".encode())
        if data.get("poison") == "exit":
            os._exit(3)
        if data.get("poison") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(data["seconds"])
        os.write(file, f"{name} did {data['n']}\n".encode())
        return True

    return handle
