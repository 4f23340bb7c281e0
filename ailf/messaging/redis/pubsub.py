"""Publish and subscribe: a message goes to those who listen at that moment, and is kept nowhere.

At most once: who is not subscribed, or has lost its connection, misses what is published meanwhile, and a subscriber
that falls 32 MB behind is cut off by Redis (client-output-buffer-limit). What must arrive belongs in a RedisStream.

subtle: while run() runs, it alone touches the subscriber's connection, which redis-py makes anew in whatever thread it
finds it broken. subscribe() and unsubscribe() say what is wanted, and run() sends it (_sync).
"""

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from redis import exceptions as errors

from .client import MARGIN_SECONDS, AsyncRedisClient, Client, RedisClient, async_client_of, blocking_client, client_of
from .codec import decode, encode
from .errors import REDIS_ERRORS, is_transient, reason_of, translated

POLL_SECONDS = 0.1  # how soon stop() and new subscriptions are noticed where no message comes
SILENCE_SECONDS = 10.0  # without a word from the server it is asked for one; after as many more it counts as lost
CONFIRM_SECONDS = 4.0  # how long the server may take to confirm a subscription, or to send the rest of a message
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
        self._own = self.redis is not getattr(redis_client, "redis", redis_client)
        self._sent: set[Name] = set()  # what that connection has been asked for
        self._unanswered: Counter[Name] = Counter()  # how often the server has still to confirm a change
        self._early: deque[dict[str, Any]] = deque()  # messages that came while a confirmation was waited for
        self._change = threading.Condition()  # held while any of these change; notified of answers and of run()'s end
        self._stopped = threading.Event()
        self._busy = False  # while a handler runs
        self._runner: threading.Thread | None = None

    @translated
    def publish(self, channel: str, message: Any) -> int:
        """Publish a message; return how many subscribers it was sent to."""
        return int(self.redis.publish(channel, encode(message)))

    def subscribe(self, channel: str, handler: Handler) -> None:
        """Call the handler for each message of a channel, from now on: the server has confirmed it on return.

        Called by a handler, it only asks for it, and the server confirms it soon after.
        """
        self._subscribe(("subscribe", channel), handler)

    def subscribe_pattern(self, pattern: str, handler: Handler) -> None:
        """Call the handler for each message of the channels that a glob-style pattern matches (PSUBSCRIBE)."""
        self._subscribe(("psubscribe", pattern), handler)

    @translated
    def unsubscribe(self, name: str) -> None:
        """End the subscription to a channel or a pattern: its handler is not called again, except if it runs now.

        Raises ValueError where there is none.
        """
        with self._change:
            kinds = [kind for kind in ("subscribe", "psubscribe") if (kind, name) in self._handlers]
            if not kinds:
                raise ValueError(f"not subscribed to {name!r}")
            for kind in kinds:
                del self._handlers[kind, name]
            if self._runner is None and self._subscriber is not None:
                with contextlib.suppress(errors.ConnectionError):  # that ends it too; the others are made again
                    self._sync()

    @property
    def subscriptions(self) -> list[str]:
        """The channels and patterns subscribed to, in order of subscription."""
        return [name for _, name in list(self._handlers)]

    @translated
    def run(self) -> None:
        """Handle messages until stop(), or Ctrl-C. Blocks. Raises ValueError where nothing is subscribed."""
        self._begin(threading.current_thread())
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a script that waits for messages
            self._run()

    def run_in_thread(self, daemon: bool = True) -> threading.Thread:
        """Handle messages in a new thread, which ends after stop()."""
        thread = threading.Thread(target=self._run, daemon=daemon, name="pubsub")
        self._begin(thread)
        thread.start()
        return thread

    def stop(self) -> None:
        """Let run() end, within POLL_SECONDS (CONFIRM_SECONDS where the server is silent), after a handler's end."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, wait for the end of run(), and give up the subscriptions and their connection."""
        self.stop()
        with self._change:
            self._change.wait_for(lambda: self._runner in (None, threading.current_thread()))
            self._handlers.clear()
            self._early.clear()
            self._disconnect()
        if self._own:
            self.redis.close()

    def __enter__(self) -> "RedisPubSub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- subscribing --------------------------------------------------------------------------------------------

    @translated
    def _subscribe(self, name: Name, handler: Handler) -> None:
        call = _checked(name, handler)
        with self._change:
            known = name in self._handlers
            self._handlers[name] = call
            try:
                self._await_confirmation(name)
            except BaseException:
                if not known:
                    self._handlers.pop(name, None)
                raise

    def _await_confirmation(self, name: Name) -> None:
        """Wait for the server's word; what is published after it arrives."""
        deadline = time.monotonic() + CONFIRM_SECONDS
        was_connected = self._subscriber is not None
        while name not in self._sent or self._unanswered[name]:
            if self._busy and self._runner is not None:  # with a handler: the server is not asked before its end
                deadline = time.monotonic() + CONFIRM_SECONDS
            left = deadline - time.monotonic()
            if left <= 0 or name not in self._handlers:
                raise errors.TimeoutError(f"no confirmation of the subscription to {name[1]}")
            if self._runner is threading.current_thread():
                return self._sync()  # called by a handler: run() reads the confirmation when the handler has returned
            if self._runner is not None:
                self._change.wait(left)
                continue
            try:
                self._sync()
                self._read_ahead(left)
            except errors.ConnectionError:
                self._disconnect()
                if not was_connected:
                    raise
                was_connected = False  # it was lost at some time before: connect again, once
        return None

    def _sync(self) -> None:
        """Ask the server for the subscriptions that are wanted, and no others; connect first where that is needed."""
        if self._subscriber is None:
            self._connection = blocking_client(self.redis, CONFIRM_SECONDS - MARGIN_SECONDS)
            self._subscriber = self._connection.pubsub()
        if self._handlers.keys() == self._sent:
            return
        try:
            for kind, name in self._sent - self._handlers.keys():
                self._sent.remove((kind, name))
                self._unanswered[kind, name] += 1
                getattr(self._subscriber, kind.replace("sub", "unsub"))(name)
            for kind, name in [name for name in self._handlers if name not in self._sent]:
                self._sent.add((kind, name))
                self._unanswered[kind, name] += 1
                getattr(self._subscriber, kind)(name)
        except BaseException:
            self._disconnect()  # what was sent is not known
            raise

    def _disconnect(self) -> None:
        self._sent.clear()
        self._unanswered.clear()
        if self._subscriber is not None:
            self._subscriber.close()
            self._connection.close()
            self._subscriber = None

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """Return what comes next within some seconds, or None."""
        connection = self._subscriber.connection
        if connection is None:  # subscribed to nothing
            self._stopped.wait(seconds)
            return None
        # subtle: get_message() would allow no longer than that for the rest of a message, too, and then give it up
        if not connection.can_read(timeout=seconds):
            return None
        response = self._subscriber.parse_response(block=False, timeout=CONFIRM_SECONDS)
        message: dict[str, Any] | None = self._subscriber.handle_message(response)
        return message

    def _read_ahead(self, seconds: float) -> None:
        if (message := self._read(seconds)) and not self._note(message):
            self._early.append(message)

    def _note(self, message: dict[str, Any]) -> bool:
        """Take note of a confirmation; say whether the message was one, or another of the server's own."""
        if message["type"].endswith("subscribe"):
            with self._change:
                name = message["type"].replace("unsub", "sub"), message["channel"]
                self._unanswered[name] -= 1
                if not self._unanswered[name]:
                    del self._unanswered[name]
                self._change.notify_all()
        return message["type"] not in ("message", "pmessage")

    # -- running ------------------------------------------------------------------------------------------------

    def _begin(self, runner: threading.Thread) -> None:
        with self._change:
            if not self._handlers:
                raise ValueError("No subscription. Call subscribe first.")
            if self._runner is not None:
                raise ValueError("It runs already. Call stop, and wait for the end of run.")
            self._runner = runner
            self._stopped.clear()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    self._listen()
                except REDIS_ERRORS as error:
                    if not is_transient(error):
                        raise
                    self._reconnect(error)
        except Exception:
            with self._change:
                self._disconnect()
            raise
        finally:
            with self._change:
                self._runner = None
                self._change.notify_all()

    def _listen(self) -> None:
        heard, asked = time.monotonic(), False
        while not self._stopped.is_set():
            if self._early:
                self._handle(self._early.popleft())
                continue
            with self._change:
                self._sync()
            message = self._read(POLL_SECONDS)
            if message is not None or not self._handlers:
                if message is not None and not self._note(message):
                    self._handle(message)
                heard, asked = time.monotonic(), False  # subtle: only now, for a handler may take long
            elif time.monotonic() - heard > SILENCE_SECONDS:
                if asked:
                    raise errors.TimeoutError(f"no word for {2 * SILENCE_SECONDS:g} s")
                self._subscriber.ping()
                heard, asked = time.monotonic(), True

    def _handle(self, message: dict[str, Any]) -> None:
        kind = "subscribe" if message["type"] == "message" else "psubscribe"
        handler = self._handlers.get((kind, message["pattern"] or message["channel"]))
        if handler is None:
            return  # unsubscribed meanwhile
        self._busy = True
        try:
            handler(decode(message["data"]), message["channel"])
        except Exception:
            logger.exception("the handler of channel %s failed", message["channel"])
        finally:
            self._busy = False

    def _reconnect(self, error: Exception) -> None:
        """Connect again; try until all subscriptions are confirmed or stop() is called."""
        logger.warning("subscriptions lost (%s); connecting again", reason_of(error))
        for tries in range(2**31):
            try:
                with self._change:
                    self._disconnect()
                    self._sync()
                    deadline = time.monotonic() + CONFIRM_SECONDS
                    while any(self._unanswered.values()):
                        if (left := deadline - time.monotonic()) <= 0:
                            raise errors.TimeoutError("no confirmation")
                        self._read_ahead(left)
                logger.warning("subscribed again: %s", ", ".join(self.subscriptions))
                return
            except REDIS_ERRORS as again:
                if not is_transient(again):
                    raise
            if self._stopped.wait(_back_off(tries)):
                break
        with self._change:
            self._disconnect()  # run() connects, if it is called again


class AsyncRedisPubSub:
    """RedisPubSub for asyncio. It connects on first use. Handlers may be functions or coroutine functions."""

    def __init__(self, redis_client: AsyncRedisClient | Client | None = None) -> None:
        self._own_source = redis_client is None
        self._source = AsyncRedisClient() if redis_client is None else redis_client  # it connects once for all tasks
        self.redis: Client = None
        self._handlers: dict[Name, Handler] = {}
        self._subscriber: Any = None
        self._own = False
        self._sent: set[Name] = set()
        self._unanswered: Counter[Name] = Counter()
        self._early: deque[dict[str, Any]] = deque()
        self._change = asyncio.Condition()
        self._stopped = asyncio.Event()
        self._busy = False
        self._runner: asyncio.Task[Any] | None = None

    async def _ready(self) -> Client:
        if self.redis is None:
            redis = await async_client_of(self._source)
            self.redis = self.redis or redis
            self._own = self.redis is not getattr(self._source, "redis", self._source)
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
            if self._runner is None and self._subscriber is not None:
                with contextlib.suppress(errors.ConnectionError):
                    await self._sync()

    @property
    def subscriptions(self) -> list[str]:
        return [name for _, name in list(self._handlers)]

    async def run(self) -> None:
        """Handle messages until stop(), or until the task is cancelled. Raises ValueError without a subscription."""
        self._begin()
        await self._run()

    def run_in_task(self) -> asyncio.Task[None]:
        """Handle messages in a new task, which ends after stop()."""
        self._begin()
        return asyncio.create_task(self._run())

    def stop(self) -> None:
        self._stopped.set()

    async def close(self) -> None:
        self.stop()
        async with self._change:
            await self._change.wait_for(lambda: self._runner in (None, asyncio.current_task()))
            self._handlers.clear()
            self._early.clear()
            await self._disconnect()
        if self._own:
            await self.redis.aclose()
        if self._own_source:
            await self._source.close()

    async def __aenter__(self) -> "AsyncRedisPubSub":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- subscribing --------------------------------------------------------------------------------------------

    @translated
    async def _subscribe(self, name: Name, handler: Handler) -> None:
        call = _checked(name, handler)
        await self._ready()
        async with self._change:
            known = name in self._handlers
            self._handlers[name] = call
            try:
                await self._await_confirmation(name)
            except BaseException:
                if not known:
                    self._handlers.pop(name, None)
                raise

    async def _await_confirmation(self, name: Name) -> None:
        deadline = time.monotonic() + CONFIRM_SECONDS
        was_connected = self._subscriber is not None
        while name not in self._sent or self._unanswered[name]:
            if self._busy and self._runner is not None:  # with a handler: the server is not asked before its end
                deadline = time.monotonic() + CONFIRM_SECONDS
            left = deadline - time.monotonic()
            if left <= 0 or name not in self._handlers:
                raise errors.TimeoutError(f"no confirmation of the subscription to {name[1]}")
            if self._runner is asyncio.current_task():
                return await self._sync()  # called by a handler
            if self._runner is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._change.wait(), left)
                continue
            try:
                await self._sync()
                await self._read_ahead(left)
            except errors.ConnectionError:
                await self._disconnect()
                if not was_connected:
                    raise
                was_connected = False
        return None

    async def _sync(self) -> None:
        if self._subscriber is None:
            self._connection = blocking_client(self.redis, CONFIRM_SECONDS - MARGIN_SECONDS)
            await self._connection.initialize()  # a cluster's client must learn first which node has which slot
            self._subscriber = self._connection.pubsub()
        if self._handlers.keys() == self._sent:
            return
        try:
            for kind, name in self._sent - self._handlers.keys():
                self._sent.remove((kind, name))
                self._unanswered[kind, name] += 1
                await getattr(self._subscriber, kind.replace("sub", "unsub"))(name)
            for kind, name in [name for name in self._handlers if name not in self._sent]:
                self._sent.add((kind, name))
                self._unanswered[kind, name] += 1
                await getattr(self._subscriber, kind)(name)
        except BaseException:
            await self._disconnect()
            raise

    async def _disconnect(self) -> None:
        self._sent.clear()
        self._unanswered.clear()
        if self._subscriber is not None:
            subscriber, self._subscriber = self._subscriber, None
            await subscriber.aclose()
            await self._connection.aclose()

    async def _read(self, seconds: float) -> dict[str, Any] | None:
        if self._subscriber.connection is None:  # subscribed to nothing
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)
            return None
        response = await self._subscriber.parse_response(block=False, timeout=seconds)
        message: dict[str, Any] | None = response and await self._subscriber.handle_message(response)
        return message

    async def _read_ahead(self, seconds: float) -> None:
        if (message := await self._read(seconds)) and not self._note(message):
            self._early.append(message)

    def _note(self, message: dict[str, Any]) -> bool:
        if message["type"].endswith("subscribe"):
            name = message["type"].replace("unsub", "sub"), message["channel"]
            self._unanswered[name] -= 1
            if not self._unanswered[name]:
                del self._unanswered[name]
        return message["type"] not in ("message", "pmessage")

    # -- running ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._handlers:
            raise ValueError("No subscription. Call subscribe first.")
        if self._runner is not None:
            raise ValueError("It runs already. Call stop, and wait for the end of run.")
        self._stopped.clear()

    @translated
    async def _run(self) -> None:
        async with self._change:  # no subscribe() reads from the connection now
            if self._runner is not None:
                raise ValueError("It runs already. Call stop, and wait for the end of run.")
            self._runner = asyncio.current_task()
        try:
            while not self._stopped.is_set():
                try:
                    await self._listen()
                except REDIS_ERRORS as error:
                    if not is_transient(error):
                        raise
                    await self._reconnect(error)
        except Exception:
            async with self._change:
                await self._disconnect()
            raise
        finally:
            self._runner = None
            async with self._change:
                self._change.notify_all()

    async def _listen(self) -> None:
        heard, asked = time.monotonic(), False
        while not self._stopped.is_set():
            if self._early:
                await self._handle(self._early.popleft())
                continue
            async with self._change:
                await self._sync()
            message = await self._read(POLL_SECONDS)
            if message is not None or not self._handlers:
                if message is not None and not self._note(message):
                    await self._handle(message)
                elif message is not None:
                    async with self._change:
                        self._change.notify_all()
                heard, asked = time.monotonic(), False
            elif time.monotonic() - heard > SILENCE_SECONDS:
                if asked:
                    raise errors.TimeoutError(f"no word for {2 * SILENCE_SECONDS:g} s")
                await self._subscriber.ping()
                heard, asked = time.monotonic(), True

    async def _handle(self, message: dict[str, Any]) -> None:
        kind = "subscribe" if message["type"] == "message" else "psubscribe"
        handler = self._handlers.get((kind, message["pattern"] or message["channel"]))
        if handler is None:
            return
        self._busy = True
        try:
            result = handler(decode(message["data"]), message["channel"])
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.exception("the handler of channel %s failed", message["channel"])
        finally:
            self._busy = False

    async def _reconnect(self, error: Exception) -> None:
        logger.warning("subscriptions lost (%s); connecting again", reason_of(error))
        for tries in range(2**31):
            try:
                async with self._change:
                    await self._disconnect()
                    await self._sync()
                    deadline = time.monotonic() + CONFIRM_SECONDS
                    while any(self._unanswered.values()):
                        if (left := deadline - time.monotonic()) <= 0:
                            raise errors.TimeoutError("no confirmation")
                        await self._read_ahead(left)
                    self._change.notify_all()
                logger.warning("subscribed again: %s", ", ".join(self.subscriptions))
                return
            except REDIS_ERRORS as again:
                if not is_transient(again):
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _back_off(tries))
                break
        async with self._change:
            await self._disconnect()


def _back_off(tries: int) -> float:
    return BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS) - 1)]


def _checked(name: Name, handler: Handler) -> Handler:
    """Return a handler of (message, channel) for one that takes both or only the message. TypeError for a mistake."""
    if not isinstance(name[1], str):
        raise TypeError(f"a channel or pattern must be text, not {name[1]!r}")
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:  # some that are written in C do not say
        parameters = {}.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in parameters if one.kind in positional and one.default is one.empty]
    return handler if len(required) > 1 else lambda message, _channel: handler(message)
