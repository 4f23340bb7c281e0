"""The one connection policy, and the clients: which Redis a program talks to, with which timeouts, what is repeated.

$REDIS_URL decides: redis://, unix://, redis+cluster://host:port, redis+sentinel://host:port/service; or, with TLS,
rediss://, rediss+cluster://, rediss+sentinel://. Options stand in its query, for all of them: ?ssl_ca_certs=ca.crt
Where it is not set: localhost:6379 if a Redis answers there, else the embedded server (embedded.py).

redis-py repeats a command after a lost connection, ten times by default. A repeated LPUSH or XADD may then be there
twice, and a repeated BRPOP may lose an element, so here nothing is repeated blindly: callers repeat what is idempotent.
"""

import asyncio
import inspect
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import redis
from redis import exceptions as errors
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from . import embedded
from .codec import encode, from_json, to_json
from .config import RedisConfig, check_seconds
from .errors import REDIS_ERRORS, RedisUnavailable, explain, is_transient, reason_of, safe_url, translated

SOCKET_SECONDS = 4.0  # how long a reply may take: a silent server is given up within 5 s; see blocking_client
CONNECT_SECONDS = 2.0  # two addresses (IPv6, IPv4) and a PING stay within 5 s
MARGIN_SECONDS = 5.0  # how much later than its block time a blocking command's reply may come

log = logging.getLogger(__name__)

# A redis-py client: Redis, RedisCluster or fakeredis, or one of redis.asyncio: the same commands. redis-py types a
# reply as bytes | str | …, whatever the client was told to decode; stating what each is would only repeat the code.
Client: TypeAlias = Any

SCHEMES = (
    "redis://host:port/db, unix:///path, redis+cluster://host:port or redis+sentinel://host:port/service "
    "(with TLS: rediss://…, rediss+cluster://…, rediss+sentinel://…)"
)

UNREACHED = (*REDIS_ERRORS, OSError, ValueError, TypeError)

# -- the policy -------------------------------------------------------------------------------------------------


def connect(target: str | RedisConfig | None = None, *, start: bool = True) -> Client:
    """Return a redis-py client for a URL, a config or the policy's Redis, after a PING. It repeats nothing.

    Blocks for 5 s at most (30 s where the embedded server must start first). A server that is still loading its data
    counts as reached. With start=False it never starts the embedded server. Raises RedisUnavailable, whose message is
    one line: what, which URL, what to do.
    """
    chosen = _policy(start) if target is None else target
    try:
        client = _build(chosen, redis)
        try:
            client.ping()
        except redis.sentinel.MasterNotFoundError:
            if str(chosen).startswith("rediss"):  # redis-py keeps to itself why a sentinel does not answer: ask again
                client.connection_pool.sentinel_manager.sentinels[0].ping()
            raise
    except UNREACHED as error:
        _judge(error, chosen)
    return client


async def connect_async(target: str | RedisConfig | None = None) -> Client:
    """Return a redis.asyncio client, as connect() does, without blocking the event loop."""
    chosen = await asyncio.to_thread(_policy) if target is None else target
    try:
        client = _build(chosen, redis.asyncio)
        try:
            await client.ping()
        except redis.asyncio.sentinel.MasterNotFoundError:
            if str(chosen).startswith("rediss"):
                await client.connection_pool.sentinel_manager.sentinels[0].ping()
            raise
    except UNREACHED as error:
        _judge(error, chosen)
    return client


def _policy(start: bool = True) -> str:
    """Return the URL of the Redis to use. If there is none, start the embedded server."""
    if url := os.environ.get("REDIS_URL"):
        return url
    if not start and embedded.find() is None:
        raise RedisUnavailable(
            f"no Redis answers at localhost:{embedded.PORT}, and the embedded server is not running. "
            "Any of the scripts starts it; or set REDIS_URL."
        )
    try:
        port, started = embedded.find_or_start()
    except (OSError, ImportError) as error:
        raise RedisUnavailable(
            f"no Redis answers at localhost:{embedded.PORT} and {error}. Start one, or name it in REDIS_URL."
        ) from error
    if started:
        log.warning("started an embedded Redis server at redis://%s:%d (to stop it: make stop)", embedded.HOST, port)
    return f"redis://{embedded.HOST}:{port}"


def _judge(error: Exception, target: str | RedisConfig) -> None:
    """Raise what a failed PING means; return where it means no more than wait."""
    url = target if isinstance(target, str) else f"redis{'s' * target.ssl}://{target.host}:{target.port}/{target.db}"
    if isinstance(error, errors.BusyLoadingError):
        log.warning("Redis at %s is still loading its data", safe_url(url))
    elif isinstance(error, errors.ResponseError) and is_transient(error):
        log.warning("Redis at %s does not serve (%s)", safe_url(url), reason_of(error))
    elif isinstance(error, ValueError | TypeError):
        raise RedisUnavailable(f"not a Redis URL: {safe_url(url)} ({error}). Expected {SCHEMES}.") from error
    else:
        raise RedisUnavailable(explain(error, url)) from error


def _build(target: str | RedisConfig, library: Any) -> Client:
    """Return an unconnected client of `library` (redis or redis.asyncio); ValueError where a URL is none."""
    if isinstance(target, RedisConfig):
        options = {**asdict(target), **_no_notices(library)}
        kind = library.SSLConnection if options.pop("ssl") else library.Connection
        pool = library.BlockingConnectionPool(
            connection_class=kind, timeout=target.socket_timeout, retry=_no_retry(library), **options
        )
        return library.Redis.from_pool(pool)
    options = {
        "decode_responses": True,
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": _no_retry(library),
    }
    scheme = target.partition("://")[0]
    secure = scheme.startswith("rediss")
    if scheme in ("redis+cluster", "rediss+cluster"):
        return library.RedisCluster.from_url(target.replace("+cluster", "", 1), **options)
    if scheme in ("redis+sentinel", "rediss+sentinel"):
        parts = urlsplit(target)
        login, _, hosts = parts.netloc.rpartition("@")
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError("the service's name is missing")
        pairs = [host.rpartition(":") for host in hosts.split(",")]
        asked = library.connection.parse_url(f"redis://{login}@?{parts.query}")
        quick = {
            "socket_timeout": CONNECT_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "retry": _no_retry(library),
            "ssl": secure,
            **{name: value for name, value in asked.items() if name.startswith("ssl_")},
        }
        sentinel = library.Sentinel([(host, int(port)) for host, _, port in pairs], sentinel_kwargs=quick)
        return sentinel.master_for(service, **{"db": int(db or 0), "ssl": secure, **options, **asked})
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("unknown scheme")
    return library.Redis.from_url(target, **options, **_no_notices(library))


def _no_notices(library: Any) -> dict[str, Any]:
    """Turn off redis.asyncio's maintenance notices: with them its pool takes a connection that was lost for a good one.

    Its first call after a restart of the server would fail, once for each connection in the pool.
    """
    return {} if library is redis else {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def _no_retry(library: Any) -> Retry | AsyncRetry:
    return Retry(NoBackoff(), 0) if library is redis else AsyncRetry(NoBackoff(), 0)


def blocking_client(
    client: Client, block_seconds: float, decode_responses: bool = True, client_name: str | None = None
) -> Client:
    """Return a client like the given one, on connections of its own, for commands that block up to block_seconds.

    Its socket waits longer than the server does, so that a blocking command ends with the server's answer and never by
    a time-out of the socket; and it repeats nothing. Bytes that are not UTF-8 are decoded as \\xff and so on: what
    somebody else wrote must not stop a reader. `client_name` is how CLIENT LIST names it.
    """
    library = redis.asyncio if isinstance(client, redis.asyncio.Redis | redis.asyncio.RedisCluster) else redis
    changes: dict[str, Any] = {
        "socket_timeout": block_seconds + MARGIN_SECONDS,
        "retry": _no_retry(library),
        "decode_responses": decode_responses,
        "encoding_errors": "backslashreplace",
    }
    if client_name is not None:
        changes["client_name"] = client_name
    if isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster):
        node_class = ClusterNode if library is redis else AsyncClusterNode
        nodes = [node_class(str(node.host), int(node.port)) for node in client.get_nodes()]
        options = {**client.get_connection_kwargs(), **changes}
        if "connection_class" in options:
            options["ssl"] = issubclass(options.pop("connection_class"), library.SSLConnection)
        if library is redis.asyncio:  # it keeps what its connections take, which is not what the client takes
            accepted = inspect.signature(library.RedisCluster.__init__).parameters
            options = {name: value for name, value in options.items() if name in accepted}
        options = {name: value for name, value in options.items() if name not in ("host", "port")}
        return library.RedisCluster(startup_nodes=nodes, **options)
    pool = client.connection_pool
    options = {**pool.connection_kwargs, **changes}
    if isinstance(pool, SentinelConnectionPool | AsyncSentinelConnectionPool):
        options.pop("connection_pool")
        options["connection_class"] = pool.connection_class
        return pool.sentinel_manager.master_for(pool.service_name, **options)
    options |= _no_notices(library)
    return library.Redis.from_pool(library.ConnectionPool(connection_class=pool.connection_class, **options))


# -- the clients ------------------------------------------------------------------------------------------------


class RedisClient:
    """A connection to Redis with the everyday commands; `client` is redis-py's own client, for all others. Thread-safe.

    Connects at once, by the config or else by the policy, and raises RedisUnavailable, in one line, where it cannot. So
    does every method while Redis is away; other refusals of the server are a RedisMessagingError.
    """

    def __init__(self, config: RedisConfig | None = None) -> None:
        self.config = _checked(config)
        self.connect()

    def connect(self) -> None:
        """Connect, or connect again after close()."""
        self.redis = connect(self.config)

    @property
    def client(self) -> Client:
        return self.redis

    def close(self) -> None:
        """Close the connections. What is called after that connects again."""
        self.redis.close()

    def __enter__(self) -> "RedisClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def pipeline(self, transaction: bool = True) -> Iterator[Any]:
        """Yield a redis-py pipeline, and run it on leaving the block (as one MULTI); not after an exception."""
        with self.redis.pipeline(transaction=transaction) as pipe:
            yield pipe
            self._execute(pipe)

    @translated
    def _execute(self, pipe: Any) -> None:
        pipe.execute()

    @translated
    def get(self, key: str) -> Any:
        """Return a string key's value as text; None where there is none."""
        return self.redis.get(key)

    @translated
    def set(self, key: str, value: str | bytes | int | float, expire: float | None = None) -> bool:
        """Set a string key, which lives for `expire` seconds, or without end."""
        return bool(self.redis.set(key, _plain(value), px=_milliseconds(expire)))

    @translated
    def delete(self, *keys: str) -> int:
        """Delete keys; return how many there were."""
        return int(self.redis.delete(*keys))

    @translated
    def exists(self, key: str) -> bool:
        return bool(self.redis.exists(key))

    def set_json(self, key: str, value: Any, expire: float | None = None) -> bool:
        """Set a key to a value as JSON. Raises ValueError or TypeError for what JSON cannot hold."""
        return self.set(key, to_json(value), expire)

    def get_json(self, key: str) -> Any:
        """Return the value that a key holds as JSON; None where there is none. Raises ValueError if it is not JSON."""
        text = self.get(key)
        return None if text is None else from_json(_text(text))

    @translated
    def publish(self, channel: str, message: Any) -> int:
        """Publish a message (text as it is, all else as JSON: see codec.py); return how many received it."""
        return int(self.redis.publish(channel, encode(message)))

    def health_check(self) -> bool:
        """Say whether the server answers a PING, within the socket's time-out."""
        try:
            return bool(self.redis.ping())
        except (*REDIS_ERRORS, OSError):
            return False


class AsyncRedisClient:
    """RedisClient for asyncio. It connects on first use, or by `await connect()`."""

    def __init__(self, config: RedisConfig | None = None) -> None:
        self.config = _checked(config)
        self.redis: Client = None
        self._connecting = asyncio.Lock()

    async def connect(self) -> Client:
        """Connect, where that has not been done; return redis.asyncio's own client."""
        async with self._connecting:
            if self.redis is None:
                self.redis = await connect_async(self.config)
        return self.redis

    @property
    def client(self) -> Client:
        """redis.asyncio's own client. None before the first use."""
        return self.redis

    async def close(self) -> None:
        """Close the connections. What is called after that connects again."""
        if self.redis is not None:
            client, self.redis = self.redis, None
            await client.aclose()

    async def __aenter__(self) -> "AsyncRedisClient":
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def pipeline(self, transaction: bool = True) -> AsyncIterator[Any]:
        """Yield a redis.asyncio pipeline, and run it on leaving the block (as one MULTI); not after an exception."""
        async with (self.redis or await self.connect()).pipeline(transaction=transaction) as pipe:
            yield pipe
            await self._execute(pipe)

    @translated
    async def _execute(self, pipe: Any) -> None:
        await pipe.execute()

    @translated
    async def get(self, key: str) -> Any:
        return await (self.redis or await self.connect()).get(key)

    @translated
    async def set(self, key: str, value: str | bytes | int | float, expire: float | None = None) -> bool:
        return bool(await (self.redis or await self.connect()).set(key, _plain(value), px=_milliseconds(expire)))

    @translated
    async def delete(self, *keys: str) -> int:
        return int(await (self.redis or await self.connect()).delete(*keys))

    @translated
    async def exists(self, key: str) -> bool:
        return bool(await (self.redis or await self.connect()).exists(key))

    async def set_json(self, key: str, value: Any, expire: float | None = None) -> bool:
        return await self.set(key, to_json(value), expire)

    async def get_json(self, key: str) -> Any:
        text = await self.get(key)
        return None if text is None else from_json(_text(text))

    @translated
    async def publish(self, channel: str, message: Any) -> int:
        return int(await (self.redis or await self.connect()).publish(channel, encode(message)))

    async def health_check(self) -> bool:
        try:
            return bool(await (self.redis or await self.connect()).ping())
        except (*REDIS_ERRORS, OSError, RedisUnavailable):
            return False


def _checked(config: RedisConfig | None) -> RedisConfig | None:
    if config is not None and not isinstance(config, RedisConfig):
        raise TypeError(f"config must be a RedisConfig or None, not {type(config).__name__}")
    return config


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else str(value, "utf-8")  # bytes: by decode_responses=False


def _plain(value: str | bytes | int | float) -> str | bytes | int | float:
    if not isinstance(value, str | bytes | int | float) or isinstance(value, bool):
        raise TypeError(f"value must be text, bytes or a number, not {type(value).__name__}: set_json takes the others")
    return value


def _milliseconds(expire: float | None) -> int | None:
    if expire is None:
        return None
    check_seconds("expire", expire)
    return max(1, round(expire * 1000))


# -- for the other utilities ------------------------------------------------------------------------------------


def client_of(redis_client: RedisClient | Client | None) -> Client:
    """Return the redis-py client to use for a RedisClient, for one of redis-py's, or for None: by the policy."""
    client: Client = connect() if redis_client is None else getattr(redis_client, "redis", redis_client)
    if not isinstance(client, redis.Redis | redis.RedisCluster):
        raise TypeError(f"redis_client must be a RedisClient or a redis.Redis, not {type(redis_client).__name__}")
    if client.get_encoder().decode_responses:
        return client
    return blocking_client(client, SOCKET_SECONDS - MARGIN_SECONDS)  # one that decodes, with the same time-out


async def async_client_of(redis_client: AsyncRedisClient | Client | None) -> Client:
    """Return the redis.asyncio client to use, as client_of() does."""
    if redis_client is None:
        return await connect_async()
    client: Client = await redis_client.connect() if isinstance(redis_client, AsyncRedisClient) else redis_client
    if not isinstance(client, redis.asyncio.Redis | redis.asyncio.RedisCluster):
        kind = type(redis_client).__name__
        raise TypeError(f"redis_client must be an AsyncRedisClient or a redis.asyncio.Redis, not {kind}")
    if client.get_encoder().decode_responses:
        return client
    return blocking_client(client, SOCKET_SECONDS - MARGIN_SECONDS)
