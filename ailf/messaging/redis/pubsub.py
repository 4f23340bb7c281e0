"""Publish and subscribe: a message goes to those who listen at that moment, and is kept nowhere.

At most once: a subscriber that isn't there yet, or has lost its connection, misses what is published meanwhile, and one
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
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from redis import exceptions as errors

from .base import OnAsyncio, OnThreads, Utility
from .client import AsyncRedisClient, RedisClient
from .codec import decode, encode
from .errors import REDIS_ERRORS, is_transient, reason_of
from .steps import AsyncClosing, Closing, Steps, both
from .topologies import Client, sibling

POLL_SECONDS = 0.1  # how soon stop() and new subscriptions are noticed if no message comes
SILENCE_SECONDS = 10.0  # without a word from the server it is asked for one; after as many more it counts as lost
CONFIRM_SECONDS = 4.0  # how long the server may take to confirm a subscription, or to send the rest of a message
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)  # before each try to connect again; the last one from then on

T = TypeVar("T")
Handler = Callable[..., Any]  # handler(message) or handler(message, channel)
Name = tuple[str, str]  # "subscribe" and a channel, or "psubscribe" and a pattern

logger = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    handler: Handler
    takes_channel: bool


class _PubSub(Utility):
    _receive: Callable[[float], Steps[Any]]  # return what redis-py's PubSub has within some seconds

    def __init__(self, redis_client: RedisClient | AsyncRedisClient | Client | None = None) -> None:
        self._wanted: dict[Name, _Wanted] = {}
        self._subscriber: Any = None  # redis-py's PubSub, on a connection of its own
        self._connection: Client = None  # the client with that connection
        self._asked: dict[Name, int] = {}  # what the server was asked for on it -> the number of that change
        self._changes = self._confirmed = 0  # how many changes it was asked for, and has confirmed: in this order
        self._early: deque[dict[str, Any]] = deque()  # messages that came while a confirmation was waited for
        self._lock = self.new_condition()  # held while any of these change
        self._stopped = self.new_event()
        self._runner: Any = None  # the thread or task of run()
        self._busy = False  # while a handler runs
        self._losses = 0  # of connections, since all subscriptions were confirmed
        self._open(redis_client)

    @property
    def subscriptions(self) -> dict[str, Handler]:
        """The handler of each channel and pattern, in order of subscription."""
        return {name: wanted.handler for (_, name), wanted in list(self._wanted.items())}

    @both
    def publish(self, channel: str, message: Any) -> Steps[int]:
        """Publish a message; return how many subscribers it was sent to. Never repeated."""
        if self.redis is None:
            yield self.connected()
        return int((yield self.redis.publish(channel, encode(message))))

    @both
    def subscribe(self, channel: str, handler: Handler) -> Steps[None]:
        """Call the handler for each message of a channel, from now on: the server has confirmed it on return.

        Called by a handler, it only asks for it, and the server confirms it soon after. Blocks for 4 s at most, and
        as long as a handler runs. Raises RedisUnavailable if the server does not confirm it in that time.
        """
        yield from self._want(("subscribe", channel), handler)

    @both
    def subscribe_pattern(self, pattern: str, handler: Handler) -> Steps[None]:
        """Call the handler for each message of the channels that a glob-style pattern matches (PSUBSCRIBE)."""
        yield from self._want(("psubscribe", pattern), handler)

    @both
    def unsubscribe(self, name: str) -> Steps[None]:
        """End the subscription to a channel or a pattern: its handler is not called again, except if it runs now.

        Raises ValueError if there is no such subscription.
        """
        yield from self._locked(self._unsubscribe(name))

    @both
    def run(self) -> Steps[None]:
        """Handle messages until stop() or Ctrl-C, or until the task is cancelled. Blocks.

        Raises ValueError if nothing is subscribed, and RedisMessagingError for an error that waiting does not cure.
        """
        self._check_run()
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a script that waits for messages
            yield self._run()

    def stop(self) -> None:
        """Let run() end, within POLL_SECONDS (CONFIRM_SECONDS if the server is silent), after a handler's end."""
        self._stopped.set()

    # -- subscribing --------------------------------------------------------------------------------------------

    def _locked(self, steps: Steps[T]) -> Steps[T]:
        yield self._lock.acquire()
        try:
            return (yield from steps)
        finally:
            self._lock.notify_all()
            self._lock.release()

    def _want(self, name: Name, handler: Handler) -> Steps[None]:
        if not isinstance(name[1], str):
            raise TypeError(f"a channel or pattern must be text, not {name[1]!r}")
        takes_channel = _takes_channel(handler)
        yield self.connected()
        yield from self._locked(self._subscribe(name, _Wanted(handler, takes_channel)))

    def _subscribe(self, name: Name, wanted: _Wanted) -> Steps[None]:
        is_new = name not in self._wanted
        self._wanted[name] = wanted
        try:
            yield from self._await_confirmation(name)
        except BaseException:
            if is_new:
                self._wanted.pop(name, None)
            raise

    def _unsubscribe(self, name: str) -> Steps[None]:
        kinds = [kind for kind in ("subscribe", "psubscribe") if self._wanted.pop((kind, name), None)]
        if not kinds:
            raise ValueError(f"not subscribed to {name!r}")
        if self._runner is None and self._subscriber is not None:
            with contextlib.suppress(errors.ConnectionError):  # that ends it too; the others are made again
                yield from self._sync()

    def _await_confirmation(self, name: Name) -> Steps[None]:
        """Wait for the server's word; whatever is published after it arrives."""
        deadline = time.monotonic() + CONFIRM_SECONDS
        was_connected = self._subscriber is not None
        while name not in self._asked or self._asked[name] > self._confirmed:
            if self._busy and self._runner is not None:  # with a handler: the server is not asked before its end
                deadline = time.monotonic() + CONFIRM_SECONDS
            left = deadline - time.monotonic()
            if left <= 0 or name not in self._wanted:
                raise errors.TimeoutError(f"no confirmation of the subscription to {name[1]}")
            if self._runner is not None and self._runner is self.current():
                yield from self._sync()  # called by a handler: run() reads the confirmation after it
                return
            if self._runner is not None:
                yield self.wait_for(self._lock, left)
                continue
            try:
                yield from self._sync()
                yield from self._read_ahead(left)
            except errors.ConnectionError:
                yield from self._disconnect()
                if not was_connected:
                    raise
                was_connected = False  # it was lost at some time before: connect again, once

    def _sync(self) -> Steps[None]:
        """Ask the server for the subscriptions that are wanted, and no others; connect first if necessary."""
        if self._subscriber is None:
            self._connection = sibling(
                self.redis, socket_timeout=CONFIRM_SECONDS, decode_responses=True, encoding_errors="backslashreplace"
            )
            if hasattr(self._connection, "initialize"):  # redis.asyncio's: a cluster's must learn who has which slot
                yield self._connection.initialize()
            self._subscriber = self._connection.pubsub()
        try:
            for kind, name in self._asked.keys() - self._wanted.keys():
                del self._asked[kind, name]
                self._changes += 1
                yield getattr(self._subscriber, kind.replace("sub", "unsub"))(name)
            for kind, name in [name for name in self._wanted if name not in self._asked]:
                self._changes += 1
                self._asked[kind, name] = self._changes
                yield getattr(self._subscriber, kind)(name)
        except BaseException:
            yield from self._disconnect()  # what was sent is not known
            raise

    def _disconnect(self) -> Steps[None]:
        self._asked.clear()
        self._changes = self._confirmed = 0
        if self._subscriber is not None:
            subscriber, self._subscriber = self._subscriber, None
            yield self.close_one(subscriber)
            if self._connection is not self.redis:  # as a test's double is
                yield self.close_one(self._connection)

    def _read_ahead(self, seconds: float) -> Steps[None]:
        if (message := (yield from self._read(seconds))) and self._is_message(message):
            self._early.append(message)

    def _read(self, seconds: float) -> Steps[Any]:
        """Return what comes next within some seconds, or None."""
        if self._asked:
            return (yield from self._receive(seconds))
        yield self.wait_for(self._stopped, seconds)  # what has still to be confirmed is read later
        return None

    def _is_message(self, message: dict[str, Any]) -> bool:
        """Say whether this is for a handler; if it is a confirmation, count it."""
        if message["type"].endswith("subscribe"):
            self._confirmed += 1
            if self._losses and self._confirmed == self._changes:
                self._losses = 0
                logger.warning("subscribed again: %s", ", ".join(self.subscriptions))
        return message["type"] in ("message", "pmessage")

    # -- running ------------------------------------------------------------------------------------------------

    def _check_run(self) -> None:
        if not self._wanted:
            raise ValueError("No subscription. Call subscribe first.")
        if self._runner is not None:
            raise ValueError("It runs already. Call stop, and wait for the end of run.")
        self._stopped.clear()

    @both
    def _run(self) -> Steps[None]:
        yield from self._locked(self._set_runner(self.current()))  # once no subscribe() reads from the connection
        try:
            while not self._stopped.is_set():
                try:
                    yield from self._listen()
                except REDIS_ERRORS as error:
                    if not is_transient(error):
                        raise
                    yield from self._lose(error)
        except Exception:
            yield from self._locked(self._disconnect())
            raise
        finally:
            yield from self._locked(self._set_runner(None))

    def _set_runner(self, runner: Any) -> Steps[None]:
        if self._runner not in (None, self.current()):
            raise ValueError("It runs already. Call stop, and wait for the end of run.")
        self._runner = runner
        yield

    def _listen(self) -> Steps[None]:
        heard, asked = time.monotonic(), False
        while not self._stopped.is_set():
            if self._early:
                yield from self._handle(self._early.popleft())
                continue
            yield from self._locked(self._sync())
            message = yield from self._read(POLL_SECONDS)
            if message is not None or not self._wanted:
                if message is not None and self._is_message(message):
                    yield from self._handle(message)
                heard, asked = time.monotonic(), False  # subtle: only now, for a handler may take long
            elif time.monotonic() - heard > SILENCE_SECONDS:
                if asked:
                    raise errors.TimeoutError(f"no word for {2 * SILENCE_SECONDS:g} s")
                yield self._subscriber.ping()
                heard, asked = time.monotonic(), True

    def _handle(self, message: dict[str, Any]) -> Steps[None]:
        kind = "subscribe" if message["type"] == "message" else "psubscribe"
        wanted = self._wanted.get((kind, message["pattern"] or message["channel"]))
        if wanted is None:
            return  # unsubscribed meanwhile
        self._busy = True
        try:
            more = (message["channel"],) if wanted.takes_channel else ()
            yield self.call(wanted.handler, decode(message["data"]), *more)
        except Exception:
            logger.exception("the handler of channel %s failed", message["channel"])
        finally:
            self._busy = False

    def _lose(self, error: Exception) -> Steps[None]:
        """Give up the connection; the next one gets all subscriptions."""
        if not self._losses:
            logger.warning("subscriptions lost (%s); connecting again", reason_of(error))
        yield from self._locked(self._disconnect())
        yield self.wait_for(self._stopped, BACK_OFF_SECONDS[min(self._losses, len(BACK_OFF_SECONDS) - 1)])
        self._losses += 1

    def _finish(self) -> Steps[None]:
        self.stop()
        yield from self._locked(self._give_up())
        yield from super()._finish()

    def _give_up(self) -> Steps[None]:
        while self._runner not in (None, self.current()):
            yield self._lock.wait()
        self._wanted.clear()
        self._early.clear()
        yield from self._disconnect()


class RedisPubSub(_PubSub, Closing, OnThreads):
    """Send messages to channels, and call a handler for each message of the channels subscribed to. Thread-safe.

    A message may be any JSON value; text arrives as text. A handler is called with the message, and with the channel
    too if it takes two arguments (without defaults); with one message after the other, in the order of arrival, in the
    thread of run(). If it raises, that is logged and the next message is handled. A lost connection is made again with
    all its subscriptions. close() stops run(), waits for its end, and gives up subscriptions and connection.
    """

    def run_in_thread(self, daemon: bool = True) -> threading.Thread:
        """Handle messages in a new thread, which ends after stop()."""
        self._check_run()
        self._runner = threading.Thread(target=self._run, daemon=daemon, name="pubsub")
        self._runner.start()
        return self._runner  # type: ignore[no-any-return]

    def _receive(self, seconds: float) -> Steps[Any]:
        # subtle: get_message() would allow no longer than that for the rest of a message, too, and then give it up
        ready = yield self._subscriber.connection.can_read(timeout=seconds)
        return (yield self._subscriber.get_message(timeout=CONFIRM_SECONDS)) if ready else None


class AsyncRedisPubSub(_PubSub, AsyncClosing, OnAsyncio):
    """RedisPubSub for asyncio: await every method but stop(). Handlers may be functions or coroutine functions."""

    def run_in_task(self) -> "asyncio.Task[None]":
        """Handle messages in a new task, which ends after stop()."""
        self._check_run()
        return asyncio.create_task(self._run())

    def _receive(self, seconds: float) -> Steps[Any]:
        return (yield self._subscriber.get_message(timeout=seconds))


def _takes_channel(handler: Handler) -> bool:
    """Say whether a handler takes (message, channel), not only the message. Raises TypeError if it is no function."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:  # some that are written in C do not say
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in positional and one.default is one.empty for one in parameters) > 1
