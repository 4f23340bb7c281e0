"""The one connection policy, and the clients: which Redis a program talks to, with which timeouts, what is repeated.

$REDIS_URL decides: redis://, unix://, redis+cluster://host:port, redis+sentinel://host:port/service; or, with TLS,
rediss://, rediss+cluster://, rediss+sentinel://. Options go into its query, for all of them: ?ssl_ca_certs=ca.crt
If it isn't set: localhost:6379 if a Redis answers there, else the embedded server (embedded.py).

redis-py repeats a command after a lost connection, ten times by default. A repeated LPUSH or XADD may then be there
twice, and a repeated BRPOP may lose an element. So nothing is repeated blindly here: callers repeat what is idempotent.
"""

import asyncio
import logging
import os
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import ModuleType
from typing import Any, Self

import redis
from redis import exceptions as errors
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.sentinel import MasterNotFoundError

from . import embedded
from .codec import encode, from_json, to_json
from .config import RedisConfig, check_seconds
from .errors import REDIS_ERRORS, RedisUnavailable, explain, is_transient, reason_of, safe_url
from .steps import AsyncClosing, Awaiting, Blocking, Closing, Steps, Waits, async_block, block, both, run, run_async
from .topologies import SCHEMES, Client, build, sibling

SOCKET_SECONDS = 4.0  # how long a reply may take: a silent server is given up within 5 s; see blocking_client
CONNECT_SECONDS = 2.0  # two addresses (IPv6, IPv4) and a PING stay within 5 s
MARGIN_SECONDS = 5.0  # how much later than its block time a blocking command's reply may come

log = logging.getLogger(__name__)

# -- the policy -------------------------------------------------------------------------------------------------


def connect(target: str | RedisConfig | None = None, *, start: bool = True) -> Client:
    """Return a redis-py client for a URL, a config or the policy's Redis, after a PING. It repeats nothing.

    Blocks for 5 s at most (30 s if the embedded server must start first). A server that is still loading its data
    counts as reached. With start=False it never starts the embedded server. Raises RedisUnavailable, whose message is
    one line: what, which URL, what to do.
    """
    return run(_reach(_policy(start) if target is None else target, redis))


async def connect_async(target: str | RedisConfig | None = None) -> Client:
    """Return a redis.asyncio client, as connect() does, without blocking the event loop."""
    return await run_async(_reach(await asyncio.to_thread(_policy) if target is None else target, redis.asyncio))


def blocking_client(
    client: Client, block_seconds: float, decode_responses: bool = True, client_name: str | None = None
) -> Client:
    """Return a client like the given one, on connections of its own, for commands that block up to block_seconds.

    Its socket waits longer than the server does, so a blocking command ends with the server's answer and never with a
    time-out of the socket; and it repeats nothing. Bytes that aren't UTF-8 are decoded as \\xff and so on: what
    somebody else wrote must not stop a reader. `client_name` is how CLIENT LIST names it.
    """
    name = {} if client_name is None else {"client_name": client_name}
    seconds = block_seconds + MARGIN_SECONDS
    changes = {"decode_responses": decode_responses, "encoding_errors": "backslashreplace", **name}
    return sibling(client, socket_timeout=seconds, **changes)


def _policy(start: bool = True) -> str:
    """Return the URL of the Redis to use. If there is none, start the embedded server."""
    if url := os.environ.get("REDIS_URL"):
        return url
    nobody = f"no Redis answers at localhost:{embedded.PORT}, and"
    if not start and embedded.find() is None:
        raise RedisUnavailable(
            f"{nobody} the embedded server is not running. Any of the scripts starts it; or set REDIS_URL."
        )
    try:
        port, started = embedded.find_or_start()
    except (OSError, ImportError) as error:
        raise RedisUnavailable(f"{nobody} {error}. Start one, or name it in REDIS_URL.") from error
    if started:
        log.warning("started an embedded Redis server at redis://%s:%d (to stop it: make stop)", embedded.HOST, port)
    return f"redis://{embedded.HOST}:{port}"


def _reach(target: str | RedisConfig, library: ModuleType) -> Steps[Client]:
    """Build a client of redis or redis.asyncio, and PING with it."""
    try:
        client = build(target, library, SOCKET_SECONDS, CONNECT_SECONDS)
        try:
            yield client.ping()
        except (MasterNotFoundError, AsyncMasterNotFoundError):
            if str(target).startswith("rediss"):  # redis-py doesn't tell why a sentinel doesn't answer: ask again
                yield client.connection_pool.sentinel_manager.sentinels[0].ping()
            raise
    except (*REDIS_ERRORS, OSError, ValueError, TypeError) as error:
        _judge(error, target)
    return client


def _judge(error: Exception, target: str | RedisConfig) -> None:
    """Raise what a failed PING means; return if it only means to wait."""
    url = target if isinstance(target, str) else f"redis{'s' * target.ssl}://{target.host}:{target.port}/{target.db}"
    if isinstance(error, errors.BusyLoadingError):
        log.warning("Redis at %s is still loading its data", safe_url(url))
    elif isinstance(error, errors.ResponseError) and is_transient(error):
        log.warning("Redis at %s does not serve (%s)", safe_url(url), reason_of(error))
    elif isinstance(error, ValueError | TypeError):
        raise RedisUnavailable(f"not a Redis URL: {safe_url(url)} ({error}). Expected {SCHEMES}.") from error
    else:
        raise RedisUnavailable(explain(error, url)) from error


# -- the clients ------------------------------------------------------------------------------------------------


class _Client(Waits):
    """The commands of RedisClient and AsyncRedisClient."""

    connect: Any  # () -> the client of redis-py, connected

    def __init__(self, config: RedisConfig | None = None) -> None:
        if config is not None and not isinstance(config, RedisConfig):
            raise TypeError(f"config must be a RedisConfig or None, not {type(config).__name__}")
        self.config = config

    @property
    def client(self) -> Client:
        """redis-py's own client, for every other command. None before the first use of an AsyncRedisClient."""
        return self.redis

    @both
    def get(self, key: str) -> Steps[Any]:
        """Return a string key's value as text; None if the key does not exist."""
        return (yield (self.redis or (yield self.connect())).get(key))

    @both
    def set(self, key: str, value: str | bytes | int | float, expire: float | None = None) -> Steps[bool]:
        """Set a string key, which lives for `expire` seconds, or until it is deleted."""
        if not isinstance(value, str | bytes | int | float) or isinstance(value, bool):
            kind = type(value).__name__
            raise TypeError(f"value must be text, bytes or a number, not {kind}: set_json takes the others")
        if expire is not None:
            check_seconds("expire", expire)
        expire_ms = None if expire is None else max(1, round(expire * 1000))
        return bool((yield (self.redis or (yield self.connect())).set(key, value, px=expire_ms)))

    @both
    def delete(self, *keys: str) -> Steps[bool]:
        """Delete a key, or several at once; return whether there was one."""
        return bool((yield (self.redis or (yield self.connect())).delete(*keys)))

    @both
    def exists(self, key: str) -> Steps[bool]:
        """Say whether there is such a key."""
        return bool((yield (self.redis or (yield self.connect())).exists(key)))

    @both
    def set_json(self, key: str, value: Any, expire: float | None = None) -> Steps[bool]:
        """Set a key to a value as JSON. Raises ValueError or TypeError for what JSON can't hold."""
        return bool((yield self.set(key, to_json(value), expire)))

    @both
    def get_json(self, key: str) -> Steps[Any]:
        """Return the value that a key holds as JSON; None if there is no key. Raises ValueError if it isn't JSON."""
        text = yield self.get(key)
        if text is None:
            return None
        return from_json(text if isinstance(text, str) else str(text, "utf-8"))  # bytes: decode_responses=False

    @both
    def publish(self, channel: str, message: Any) -> Steps[int]:
        """Publish a message (text as it is, everything else as JSON: see codec.py); return how many received it."""
        return int((yield (self.redis or (yield self.connect())).publish(channel, encode(message))))

    @both
    def health_check(self) -> Steps[bool]:
        """Say whether the server answers a PING within the socket's time-out. Raises nothing."""
        try:
            return bool((yield (self.redis or (yield self.connect())).ping()))
        except (*REDIS_ERRORS, OSError, RedisUnavailable):
            return False

    @both
    def _open_pipeline(self, transaction: bool) -> Steps[Any]:
        return (self.redis or (yield self.connect())).pipeline(transaction=transaction)

    @both
    def _run_pipeline(self, pipe: Any, failed: bool) -> Steps[None]:
        try:
            if not failed:
                yield pipe.execute()
        finally:
            yield pipe.reset()


class RedisClient(_Client, Closing, Blocking):
    """A connection to Redis with the everyday commands; `client` is redis-py's own client, for all others. Thread-safe.

    Connects at once, by the config or else by the policy, and raises RedisUnavailable, in one line, if it can't. So
    does every method while Redis is away; other refusals of the server are a RedisMessagingError.
    """

    def __init__(self, config: RedisConfig | None = None) -> None:
        super().__init__(config)
        self.connect()

    def connect(self) -> Client:
        """Connect, or connect again after close(); return redis-py's own client."""
        self.redis = connect(self.config)
        return self.redis

    def close(self) -> None:
        """Close the connections. A later call connects again."""
        self.redis.close()

    def pipeline(self, transaction: bool = True) -> AbstractContextManager[Any]:
        """Give a `with` block a redis-py pipeline, and run it at the block's end (as one MULTI), unless it raised."""
        return block(lambda: self._open_pipeline(transaction), self._run_pipeline)


class AsyncRedisClient(_Client, AsyncClosing, Awaiting):
    """RedisClient for asyncio. It connects on first use, or by `await connect()`."""

    def __init__(self, config: RedisConfig | None = None) -> None:
        super().__init__(config)
        self._connecting = asyncio.Lock()

    async def connect(self) -> Client:
        """Connect, if that hasn't been done; return redis.asyncio's own client."""
        async with self._connecting:
            if self.redis is None:
                self.redis = await connect_async(self.config)
        return self.redis

    async def close(self) -> None:
        """Close the connections. A later call connects again."""
        if self.redis is not None:
            client, self.redis = self.redis, None
            await client.aclose()

    def pipeline(self, transaction: bool = True) -> AbstractAsyncContextManager[Any]:
        """Give an `async with` block a pipeline, and run it at the block's end (as one MULTI), unless it raised."""
        return async_block(lambda: self._open_pipeline(transaction), self._run_pipeline)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self
