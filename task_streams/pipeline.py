"""An asyncio connection to Redis on which commands that are issued at the same time share one round trip.

    Pipeline          one server: all commands of one turn of the event loop travel in one write; replies come in order
    ClusterPipeline   a Redis Cluster: its client sends each command to the node that has the key

Both have call(), run() and close(); the code above doesn't know the difference. ioredis calls this auto-pipelining.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio import RedisCluster
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from ailf.messaging.redis import Client, is_transient

from .lua import Script
from .retrying import delays

logger = logging.getLogger(__name__)

MOST_UNSENT_BYTES = 16 * 1024 * 1024  # then `ready()` waits: what nobody can send must not fill the memory

Call = tuple[Script, Sequence[str], Sequence[Any]]  # a script, its keys, its arguments


class Pipeline(asyncio.Protocol):
    """One connection to one server. It connects again when it is lost, and says nothing.

    A command on its way when the connection is lost fails with redis-py's ConnectionError, and so does one that is
    issued before there is a new one. The caller deals with it. A reply that takes longer than `silence_seconds`
    counts as lost, too. Replies are text, or bytes with `decode=False`.
    """

    is_one_server = True  # so that one script may have the keys of the queue and those of a stream

    def __init__(self, client: Client, silence_seconds: float, decode: bool = True) -> None:
        # redis-py connects: it knows about TLS, logins, sentinels. From then on the socket is ours, since its own
        # reading of one reply after the other takes a quarter of a worker's time.
        self._connection = client.connection_pool.make_connection()
        self._client = client  # subtle: a sentinel's connection holds its pool by a weak reference only
        self._silence_seconds, self._decode = silence_seconds, decode
        self._waiting: deque[asyncio.Future[Any]] = deque()  # for replies, in the order of their commands
        self._unsent: list[bytes] = []
        self._error: Exception = LostConnection("not connected yet")
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._heard_at = 0.0  # loop time of the last reply, or of a command when none was awaited
        self._task: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect. Raises redis-py's error if that fails; later losses are repaired in the background."""
        self._loop = asyncio.get_running_loop()
        self._lost = self._loop.create_future()
        await self._open()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Close the connection. Commands on their way fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._lose("closed")
        await self._connection.disconnect(nowait=True)

    def call(self, *command: Any) -> "asyncio.Future[Any]":
        """Send a command with all others of this turn of the event loop; the future has its reply or its error."""
        future, packed = self._loop.create_future(), hiredis.pack_command(command)
        if self._transport is None:
            future.set_exception(self._error)
            return future
        if not self._waiting:
            self._heard_at = self._loop.time()
        self._waiting.append(future)
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(packed)
        return future

    async def run(self, call: Call) -> Any:
        """Run a script by its hash; send it whole if the server doesn't know it, as after a restart."""
        reply = await _run(self.call, call)
        if self._transport and isinstance(reply, list) and any(isinstance(one, ReadOnlyError) for one in reply):
            self._transport.abort()
        return reply

    async def ready(self) -> None:
        """Wait while too much is unsent."""
        await self._writable.wait()

    async def _open(self) -> None:
        await self._connection.connect()
        transport: asyncio.Transport = self._connection._writer.transport
        if transport.is_closing():  # subtle: then connection_lost() went to the protocol before us
            raise LostConnection("the server closed the connection")
        self._replies = hiredis.Reader(
            protocolError=LostConnection,
            replyError=self._connection._parser.parse_error,
            **({"encoding": "utf-8", "errors": "backslashreplace"} if self._decode else {}),
        )
        transport.set_protocol(self)
        transport.set_write_buffer_limits(MOST_UNSENT_BYTES)
        self._transport, self._lost = transport, self._loop.create_future()
        self._writable.set()

    async def _keep(self) -> None:
        """Connect again after each loss."""
        while True:
            await self._until_lost()
            for delay in delays():
                await self._connection.disconnect(nowait=True)
                try:
                    await self._open()
                    break
                except Exception as away:  # whatever it is, this must go on: nobody else connects again
                    self._error = away if isinstance(away, RedisError) else LostConnection(str(away))
                await asyncio.sleep(delay)

    async def _until_lost(self) -> None:
        """Wait for the loss of the connection, and give it up if the server is silent."""
        while not self._lost.done():
            # subtle: not wait_for(), which forgets that it was cancelled if the loss comes in the same moment
            await asyncio.wait([self._lost], timeout=self._silence_seconds / 4)
            if self._waiting and self._loop.time() - self._heard_at > self._silence_seconds and self._transport:
                self._transport.abort()

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(unsent))

    def data_received(self, data: bytes) -> None:
        """Give each reply to the command that waits for it. Called by asyncio, as are the three below."""
        self._heard_at = self._loop.time()
        self._replies.feed(data)
        try:
            while (reply := self._replies.gets()) is not False:
                future = self._waiting.popleft()
                if isinstance(reply, ReadOnlyError) and self._transport:  # a replica by now: look for the master again
                    self._transport.abort()
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except LostConnection:  # this is not Redis's protocol
            if self._transport:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(str(error or "the server closed the connection"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _lose(self, reason: str) -> None:
        self._transport, self._error, self._unsent = None, LostConnection(reason), []
        lost, self._waiting = self._waiting, deque()
        for future in lost:
            if not future.done():
                future.set_exception(LostConnection(reason))
        if not self._lost.done():
            self._lost.set_result(None)
        self._writable.set()


class ClusterPipeline:
    """The same for a Redis Cluster, whose client sends each command to its node by itself."""

    is_one_server = False

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        for name in ("XRANGE", "XADD", "BRPOP"):  # as the server sends them, like Pipeline
            client.set_response_callback(name, lambda reply, **_: reply)  # type: ignore[arg-type]

    async def connect(self) -> None:
        await self._client.initialize()

    async def close(self) -> None:
        await self._client.aclose()

    def call(self, *command: Any) -> "asyncio.Future[Any]":
        return asyncio.ensure_future(self._execute(command))

    async def _execute(self, command: tuple[Any, ...]) -> Any:
        try:
            return await self._client.execute_command(*command)
        except (AttributeError, TypeError) as error:  # it was closed while in use: redis/redis-py#4287
            raise LostConnection(f"the connection was closed meanwhile ({error})") from error

    async def run(self, call: Call) -> Any:
        return await _run(self.call, call)

    async def ready(self) -> None:
        """Never waits: each command waits for its node."""


AnyPipeline = Pipeline | ClusterPipeline


async def _run(send: Callable[..., Awaitable[Any]], call: Call) -> Any:
    script, keys, args = call
    try:
        return await send("EVALSHA", script.sha, len(keys), *keys, *args)
    except NoScriptError:
        return await send("EVAL", script.source, len(keys), *keys, *args)


def run(client: Client, call: Call) -> Any:
    """Run a script on a synchronous client, as Pipeline.run() does. It may be repeated if its effect may."""
    script, keys, args = call
    try:
        return client.evalsha(script.sha, len(keys), *keys, *args)
    except NoScriptError:
        return client.eval(script.source, len(keys), *keys, *args)


def first_transient(replies: Sequence[Any]) -> None:
    """Raise the first of some replies that is an error which may go away by itself: then the whole call is repeated."""
    for reply in replies:
        if isinstance(reply, ResponseError) and is_transient(reply):
            raise reply
