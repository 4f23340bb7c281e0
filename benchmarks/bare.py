"""The bare Redis commands that speed.py compares with, each in a process of its own; and agents for both sides."""

import asyncio
import itertools
import operator
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import hiredis
from common import PATIENCE_SECONDS, memory_mb

from ailf.messaging.redis import Client, blocking_client, connect, connect_async
from task_streams.log import MAXLEN, now_text

LIST, STREAM = "bare", "bare:stream"
ELEMENT = '{"id": 1, "data": null}'  # as put() writes the element of a no-op task
TEXT = "some words of it "
FIELDS = {"event": "llm_delta", "timestamp": now_text(), "text": TEXT}  # what log.add() writes of an event


def per_second(count: int, call: Callable[[], object]) -> float:
    began = time.monotonic()
    for _ in range(count):
        call()
    return count / (time.monotonic() - began)


def push_in_pipelines(client: Client, count: int, size: int) -> float:
    """LPUSH elements in pipelines of a size; return how many a second."""

    def push() -> None:
        with client.pipeline(transaction=False) as pipe:
            for _ in range(size):
                pipe.lpush(LIST, ELEMENT)
            pipe.execute()

    return per_second(-(-count // size), push) * size


def pop(url: str, count: int) -> float:
    """BRPOP some elements; return how many a second."""
    client = blocking_client(connect(url), 1, decode_responses=False)
    client.ping()
    return per_second(count, lambda: client.brpop([LIST]))


def pop_until_stop(url: str) -> list[float]:
    """BRPOP until "stop" comes; return when each element came, by the clock that all processes share."""
    client = blocking_client(connect(url), PATIENCE_SECONDS)
    came = []
    while True:
        _, element = client.brpop([LIST])
        came.append(time.monotonic())
        if element == "stop":
            return came


def add_in_pipelines(url: str, agents: int, events: int) -> float:
    """XADD an event of every agent in one pipeline, again and again; return how many events a second."""
    client = connect(url)

    def add() -> None:
        with client.pipeline(transaction=False) as pipe:
            for number in range(agents):
                pipe.xadd(f"{STREAM}:{number}", FIELDS, maxlen=MAXLEN)
            pipe.execute()

    return per_second(events, add) * agents


def add_one_by_one(url: str, events: int) -> list[float]:
    """XADD through redis.asyncio, one event after the other; return the figures of this one agent."""
    crowd = Agents(1, events)

    async def main() -> None:
        client = await connect_async(url)
        await crowd.run(0, lambda: client.xadd(STREAM, FIELDS, maxlen=MAXLEN))

    asyncio.run(main())
    return crowd.figures()


def add_through_pipe(url: str, agents: int, events: int, pace: int) -> list[float]:
    """XADD from many agents through one bare pipe; return their figures."""
    crowd, (host, port) = Agents(agents, events, pace), url.removeprefix("redis://").split(":")

    async def main() -> None:
        _, pipe = await asyncio.get_running_loop().create_connection(Pipe, host, int(port))
        adds = [partial(pipe.add, f"{STREAM}:{number}", itertools.count(1)) for number in range(agents)]
        await asyncio.gather(*itertools.starmap(crowd.run, enumerate(adds)))

    asyncio.run(main())
    return crowd.figures()


class Pipe(asyncio.Protocol):
    """The commands of one turn of the event loop travel in one write. An error or a lost connection ends it."""

    def __init__(self) -> None:
        self.unsent: list[bytes] = []
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.replies = hiredis.Reader(encoding="utf-8")

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.replies.feed(data)
        while (reply := self.replies.gets()) is not False:
            self.waiting.popleft().set_result(reply)

    def add(self, stream: str, seqs: "itertools.count[int]") -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        self.waiting.append(loop.create_future())
        if not self.unsent:
            loop.call_soon(self.flush)
        command: Any = ("XADD", stream, "MAXLEN", "~", MAXLEN, f"1-{next(seqs)}", "event", "llm_delta")
        self.unsent.append(hiredis.pack_command((*command, "timestamp", now_text(), "text", TEXT)))
        return self.waiting[-1]

    def flush(self) -> None:
        self.transport.write(b"".join(self.unsent))
        self.unsent.clear()


class Agents:
    """Agents in one process that append events: `pace` a second each, or with 0 as fast as they can."""

    def __init__(self, agents: int, events: int, pace: int = 0) -> None:
        self.agents, self.events, self.pace = agents, events, pace
        self.all_are_here = asyncio.Barrier(agents)
        self.waits: list[float] = []  # seconds until an event was stored

    async def run(self, number: int, add: Callable[[], Awaitable[object]]) -> None:
        """Be one of them."""
        await self.all_are_here.wait()
        if not self.waits:
            self.began = time.monotonic(), time.process_time()
        start = time.monotonic() + (number / self.agents / self.pace if self.pace else 0)  # not all at one moment
        for n in range(self.events):
            if self.pace and (early := start + n / self.pace - time.monotonic()) > 0:
                await asyncio.sleep(early)
            asked = time.monotonic()
            await add()
            self.waits.append(time.monotonic() - asked)
        self.ended = time.monotonic(), time.process_time()

    def figures(self) -> list[float]:
        """Return events a second, p99 until one was stored (ms), peak memory (MB) and CPU (%) of this process."""
        assert len(self.waits) == self.agents * self.events
        seconds, cpu_seconds = map(operator.sub, self.ended, self.began)
        p99_ms = statistics.quantiles(self.waits, n=100)[98] * 1000
        return [len(self.waits) / seconds, p99_ms, memory_mb(what="VmHWM"), 100 * cpu_seconds / seconds]
