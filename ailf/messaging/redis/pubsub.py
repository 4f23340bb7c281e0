"""Publish and subscribe: a message goes to those who listen at that moment, and is kept nowhere.

At most once: who is not subscribed, or has lost its connection, misses what is published meanwhile, and a subscriber
that falls 32 MB behind is cut off by Redis (client-output-buffer-limit). What must arrive belongs in a RedisStream.
"""

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from redis import exceptions as errors

from .client import AsyncRedisClient, Client, RedisClient, async_client_of, blocking_client, client_of
from .codec import decode, encode
from .errors import is_transient, reason_of, translated

POLL_SECONDS = 0.2  # how soon stop() is noticed where no message comes
SILENCE_SECONDS = 10.0  # without a word from the server it is asked for one; after as many more it counts as lost
CONFIRM_SECONDS = 4.0  # how long the server may take to confirm a subscription
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)  # before each try to connect again; the last one from then on

Handler = Callable[..., Any]  # handler(message) or handler(message, channel)
Name = tuple[str, str]  # "subscribe" and a channel, or "psubscribe" and a pattern

logger = logging.getLogger(__name__)


class RedisPubSub:
    """Send messages to channels, and call a handler for each message of the channels subscribed to. Thread-safe.

    A message may be any JSON value; text arrives as text. A handler is called with the message, and with the channel
    too if it takes two arguments (without defaults); with one message after the other, in the order of arrival, in the
    thread of run(). If it raises, that is logged and the next message is handled. A lost connection is made again with
    all its subscriptions.
    """

    def __init__(self, redis_client: RedisClient | Client | None = None) -> None:
        self.redis = client_of(redis_client)
        self._handlers: dict[Name, Handler] = {}
        self._subscriber: Any = None  # redis-py's PubSub, on a connection of its own
        self._early: deque[dict[str, Any]] = deque()  # messages that came before run()
        self._confirmed: set[Name] = set()
        self._change = threading.Condition()  # held while subscriptions change; notified when one is confirmed
        self._stopped = threading.Event()
        self._runner: threading.Thread | None = None

    @translated
    def publish(self, channel: str, message: Any) -> int:
        """Publish a message; return how many subscribers it was sent to."""
        return int(self.redis.publish(channel, encode(message)))

    def subscribe(self, channel: str, handler: Handler) -> None:
        """Call the handler for each message of a channel, from now on: the server has confirmed it on return."""
        self._subscribe(("subscribe", channel), handler)

    def subscribe_pattern(self, pattern: str, handler: Handler) -> None:
        """Call the handler for each message of the channels that a glob-style pattern matches (PSUBSCRIBE)."""
        self._subscribe(("psubscribe", pattern), handler)

    @translated
    def unsubscribe(self, name: str) -> None:
        """End the subscription to a channel or a pattern. Raises ValueError where there is none."""
        with self._change:
            kinds = [kind for kind in ("subscribe", "psubscribe") if (kind, name) in self._handlers]
            if not kinds:
                raise ValueError(f"not subscribed to {name!r}")
            for kind in kinds:
                del self._handlers[kind, name]
                self._confirmed.discard((kind, name))
                if self._subscriber is not None:
                    getattr(self._subscriber, kind.replace("sub", "unsub"))(name)

    @property
    def subscriptions(self) -> list[str]:
        """The channels and patterns subscribed to, in order of subscription."""
        return [name for _, name in self._handlers]

    @translated
    def run(self) -> None:
        """Handle messages until stop(), or Ctrl-C. Blocks. Raises ValueError where nothing is subscribed."""
        self._begin()
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a script that waits for messages
            self._run()

    def run_in_thread(self, daemon: bool = True) -> threading.Thread:
        """Handle messages in a new thread, which ends after stop()."""
        self._begin()
        self._runner = threading.Thread(target=self._run, daemon=daemon, name="pubsub")
        self._runner.start()
        return self._runner

    def stop(self) -> None:
        """Let run() end, within POLL_SECONDS; a handler that is running is not interrupted."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, wait for the thread of run_in_thread(), and give up the subscriptions and their connection."""
        self.stop()
        runner = self._runner
        if runner is not None and runner is not threading.current_thread():
            runner.join()
        with self._change:
            self._handlers.clear()
            self._disconnect()

    def __enter__(self) -> "RedisPubSub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- subscribing --------------------------------------------------------------------------------------------

    @translated
    def _subscribe(self, name: Name, handler: Handler) -> None:
        with self._change:
            known = name in self._handlers
            self._handlers[name] = _with_channel(handler)
            try:
                if self._subscriber is None:
                    self._connect()
                elif not known:
                    getattr(self._subscriber, name[0])(name[1])
                self._await_confirmation(name)
            except BaseException:
                if not known:
                    del self._handlers[name]
                raise

    def _connect(self) -> None:
        """Connect, and subscribe to all that has a handler."""
        self._disconnect()
        self._connection = blocking_client(self.redis, CONFIRM_SECONDS)
        subscriber = self._connection.pubsub()
        for kind, name in list(self._handlers):
            getattr(subscriber, kind)(name)
        self._subscriber = subscriber

    def _disconnect(self) -> None:
        self._confirmed.clear()
        if self._subscriber is not None:
            self._subscriber.close()
            self._connection.close()
            self._subscriber = None

    def _await_confirmation(self, name: Name) -> None:
        """Wait for the server's word; what is published after it arrives."""
        deadline = time.monotonic() + CONFIRM_SECONDS
        while name not in self._confirmed:
            if self._runner is threading.current_thread():
                return  # called by a handler: run() reads the confirmation when the handler has returned
            if (left := deadline - time.monotonic()) <= 0:
                raise errors.TimeoutError(f"no confirmation of the subscription to {name[1]}")
            if self._runner is not None:
                self._change.wait(left)
            elif (message := self._subscriber.get_message(timeout=left)) and not self._note(message):
                self._early.append(message)

    def _note(self, message: dict[str, Any]) -> bool:
        """Take note of a confirmation; say whether the message was one, or another of the server's own."""
        if message["type"] in ("subscribe", "psubscribe"):
            with self._change:
                self._confirmed.add((message["type"], message["channel"]))
                self._change.notify_all()
        return message["type"] not in ("message", "pmessage")

    # -- running ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._handlers:
            raise ValueError("No subscription. Call subscribe first.")
        self._stopped.clear()

    def _run(self) -> None:
        self._runner = threading.current_thread()
        try:
            while not self._stopped.is_set():
                try:
                    self._listen()
                except errors.RedisError as error:
                    if not is_transient(error):
                        raise
                    self._reconnect(error)
        finally:
            self._runner = None

    def _listen(self) -> None:
        heard, asked = time.monotonic(), False
        while not self._stopped.is_set():
            while self._early:
                self._handle(self._early.popleft())
            message = self._subscriber.get_message(timeout=POLL_SECONDS)
            now = time.monotonic()
            if message is not None or not self._handlers:
                heard, asked = now, False
                if message is not None and not self._note(message):
                    self._handle(message)
            elif now - heard > 2 * SILENCE_SECONDS:
                raise errors.TimeoutError(f"no word for {now - heard:.0f} s")
            elif now - heard > SILENCE_SECONDS and not asked:
                asked = True
                self._subscriber.ping()

    def _handle(self, message: dict[str, Any]) -> None:
        kind = "subscribe" if message["type"] == "message" else "psubscribe"
        handler = self._handlers.get((kind, message["pattern"] or message["channel"]))
        if handler is None:
            return  # unsubscribed meanwhile
        try:
            handler(decode(message["data"]), message["channel"])
        except Exception:
            logger.exception("the handler of channel %s failed", message["channel"])

    def _reconnect(self, error: Exception) -> None:
        """Connect again; try until it works or stop() is called."""
        logger.warning("subscriptions lost (%s); connecting again", reason_of(error))
        for tries in range(2**31):
            try:
                with self._change:
                    self._connect()
                logger.warning("subscribed again: %s", ", ".join(self.subscriptions))
                return
            except (errors.RedisError, errors.RedisClusterException) as again:
                if not is_transient(again):
                    raise
            if self._stopped.wait(_back_off(tries)):
                return


class AsyncRedisPubSub:
    """RedisPubSub for asyncio. It connects on first use. Handlers may be functions or coroutine functions."""

    def __init__(self, redis_client: AsyncRedisClient | Client | None = None) -> None:
        self._source = redis_client
        self.redis: Client = None
        self._handlers: dict[Name, Handler] = {}
        self._subscriber: Any = None
        self._early: deque[dict[str, Any]] = deque()
        self._confirmed: set[Name] = set()
        self._change = asyncio.Condition()
        self._stopped = asyncio.Event()
        self._runner: asyncio.Task[Any] | None = None

    async def _ready(self) -> Client:
        if self.redis is None:
            self.redis = await async_client_of(self._source)
        return self.redis

    @translated
    async def publish(self, channel: str, message: Any) -> int:
        return int(await (self.redis or await self._ready()).publish(channel, encode(message)))

    async def subscribe(self, channel: str, handler: Handler) -> None:
        await self._subscribe(("subscribe", channel), handler)

    async def subscribe_pattern(self, pattern: str, handler: Handler) -> None:
        await self._subscribe(("psubscribe", pattern), handler)

    @translated
    async def unsubscribe(self, name: str) -> None:
        async with self._change:
            kinds = [kind for kind in ("subscribe", "psubscribe") if (kind, name) in self._handlers]
            if not kinds:
                raise ValueError(f"not subscribed to {name!r}")
            for kind in kinds:
                del self._handlers[kind, name]
                self._confirmed.discard((kind, name))
                if self._subscriber is not None:
                    await getattr(self._subscriber, kind.replace("sub", "unsub"))(name)

    @property
    def subscriptions(self) -> list[str]:
        return [name for _, name in self._handlers]

    @translated
    async def run(self) -> None:
        """Handle messages until stop(), or until the task is cancelled. Raises ValueError without a subscription."""
        if not self._handlers:
            raise ValueError("No subscription. Call subscribe first.")
        self._stopped.clear()
        await self._run()

    def run_in_task(self) -> asyncio.Task[None]:
        """Handle messages in a new task, which ends after stop()."""
        task = asyncio.create_task(self.run())
        self._runner = task
        return task

    def stop(self) -> None:
        self._stopped.set()

    async def close(self) -> None:
        self.stop()
        if self._runner is not None and self._runner is not asyncio.current_task():
            await asyncio.wait([self._runner])
        async with self._change:
            self._handlers.clear()
            await self._disconnect()

    async def __aenter__(self) -> "AsyncRedisPubSub":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- subscribing --------------------------------------------------------------------------------------------

    @translated
    async def _subscribe(self, name: Name, handler: Handler) -> None:
        await self._ready()
        async with self._change:
            known = name in self._handlers
            self._handlers[name] = _with_channel(handler)
            try:
                if self._subscriber is None:
                    await self._connect()
                elif not known:
                    await getattr(self._subscriber, name[0])(name[1])
                await self._await_confirmation(name)
            except BaseException:
                if not known:
                    del self._handlers[name]
                raise

    async def _connect(self) -> None:
        await self._disconnect()
        self._connection = blocking_client(self.redis, CONFIRM_SECONDS)
        subscriber = self._connection.pubsub()
        for kind, name in list(self._handlers):
            await getattr(subscriber, kind)(name)
        self._subscriber = subscriber

    async def _disconnect(self) -> None:
        self._confirmed.clear()
        if self._subscriber is not None:
            await self._subscriber.aclose()
            await self._connection.aclose()
            self._subscriber = None

    async def _await_confirmation(self, name: Name) -> None:
        deadline = time.monotonic() + CONFIRM_SECONDS
        while name not in self._confirmed:
            if self._runner is asyncio.current_task():
                return  # called by a handler: run() reads the confirmation when the handler has returned
            if (left := deadline - time.monotonic()) <= 0:
                raise errors.TimeoutError(f"no confirmation of the subscription to {name[1]}")
            if self._runner is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._change.wait(), left)
            elif (message := await self._subscriber.get_message(timeout=left)) and not await self._note(message):
                self._early.append(message)

    async def _note(self, message: dict[str, Any]) -> bool:
        if message["type"] in ("subscribe", "psubscribe"):
            self._confirmed.add((message["type"], message["channel"]))
            if self._runner is asyncio.current_task():
                async with self._change:
                    self._change.notify_all()
        return message["type"] not in ("message", "pmessage")

    # -- running ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._runner = asyncio.current_task()
        try:
            while not self._stopped.is_set():
                try:
                    await self._listen()
                except errors.RedisError as error:
                    if not is_transient(error):
                        raise
                    await self._reconnect(error)
        finally:
            self._runner = None

    async def _listen(self) -> None:
        heard, asked = time.monotonic(), False
        while not self._stopped.is_set():
            while self._early:
                await self._handle(self._early.popleft())
            message = await self._subscriber.get_message(timeout=POLL_SECONDS)
            now = time.monotonic()
            if message is not None or not self._handlers:
                heard, asked = now, False
                if message is not None and not await self._note(message):
                    await self._handle(message)
            elif now - heard > 2 * SILENCE_SECONDS:
                raise errors.TimeoutError(f"no word for {now - heard:.0f} s")
            elif now - heard > SILENCE_SECONDS and not asked:
                asked = True
                await self._subscriber.ping()

    async def _handle(self, message: dict[str, Any]) -> None:
        kind = "subscribe" if message["type"] == "message" else "psubscribe"
        handler = self._handlers.get((kind, message["pattern"] or message["channel"]))
        if handler is None:
            return
        try:
            result = handler(decode(message["data"]), message["channel"])
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.exception("the handler of channel %s failed", message["channel"])

    async def _reconnect(self, error: Exception) -> None:
        logger.warning("subscriptions lost (%s); connecting again", reason_of(error))
        for tries in range(2**31):
            try:
                async with self._change:
                    await self._connect()
                logger.warning("subscribed again: %s", ", ".join(self.subscriptions))
                return
            except (errors.RedisError, errors.RedisClusterException) as again:
                if not is_transient(again):
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _back_off(tries))
                return


def _back_off(tries: int) -> float:
    return BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS) - 1)]


def _with_channel(handler: Handler) -> Handler:
    """Return a handler of (message, channel) for one that takes both or only the message."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:  # some that are written in C do not say
        parameters = {}.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in parameters if one.kind in positional and one.default is one.empty]
    return handler if len(required) > 1 else lambda message, _channel: handler(message)
