"""How a client of redis-py is built: for one server, a cluster, what sentinels watch over, or a Unix socket.

It never repeats a command (see client.py). `library` is redis or redis.asyncio: their clients are built alike.
"""

import inspect
from dataclasses import asdict
from types import ModuleType
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import redis
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from .config import RedisConfig

# A redis-py client: Redis, RedisCluster or fakeredis, or one of redis.asyncio: the same commands. redis-py types a
# reply as bytes | str | …, whatever the client was told to decode; stating what each is would only repeat the code.
Client: TypeAlias = Any

# The classes as they are now: a test that patches redis.Redis must not change what is what.
BLOCKING = (redis.Redis, redis.RedisCluster)
ASYNC = (redis.asyncio.Redis, redis.asyncio.RedisCluster)
CLUSTERS = (redis.RedisCluster, redis.asyncio.RedisCluster)

SCHEMES = (
    "redis://host:port/db, unix:///path, redis+cluster://host:port or redis+sentinel://host:port/service "
    "(with TLS: rediss://…, rediss+cluster://…, rediss+sentinel://…)"
)


def build(target: str | RedisConfig, library: ModuleType, seconds: float, connect_seconds: float) -> Client:
    """Return an unconnected client for a URL or a config. Raises ValueError if the URL is not valid."""
    if isinstance(target, RedisConfig):
        options = asdict(target)
        options["connection_class"] = library.SSLConnection if options.pop("ssl") else library.Connection
        options |= {"timeout": target.socket_timeout, "retry": _no_retry(library), **_no_notices(library)}
        return _on_pool(library, library.BlockingConnectionPool(**options))
    options = {
        "decode_responses": True,
        "socket_timeout": seconds,
        "socket_connect_timeout": connect_seconds,
        "retry": _no_retry(library),
    }
    scheme = target.partition("://")[0]
    if scheme in ("redis+cluster", "rediss+cluster"):
        return library.RedisCluster.from_url(target.replace("+cluster", "", 1), **options)
    if scheme in ("redis+sentinel", "rediss+sentinel"):
        return _watched(target, library, options)
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("unknown scheme")
    return _on_pool(library, library.ConnectionPool.from_url(target, **options, **_no_notices(library)))


def _watched(url: str, library: ModuleType, options: dict[str, Any]) -> Client:
    """Return a client for the master of a service, which it asks the sentinels for at each new connection."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the service's name is missing")
    addresses = [host.rpartition(":") for host in hosts.split(",")]
    asked = library.connection.parse_url(f"redis://{login}@?{parts.query}")
    secure = {"ssl": parts.scheme.startswith("rediss")}
    seconds = options["socket_connect_timeout"]
    of_sentinels = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": options["retry"], **secure}
    of_sentinels |= {name: value for name, value in asked.items() if name.startswith("ssl_")}
    sentinel = library.Sentinel([(host, int(port)) for host, _, port in addresses], sentinel_kwargs=of_sentinels)
    return sentinel.master_for(service, **{"db": int(db or 0), **secure, **options, **asked})


def sibling(client: Client, **changes: Any) -> Client:
    """Return a client like the given one, on connections of its own, with other options. It repeats nothing."""
    if is_double(client):
        return client
    library = redis.asyncio if isinstance(client, ASYNC) else redis
    changes["retry"] = _no_retry(library)
    if isinstance(client, CLUSTERS):
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
    options |= {"connection_class": pool.connection_class, **_no_notices(library)}
    return _on_pool(library, library.ConnectionPool(**options))


def is_double(client: Client) -> bool:
    """Say whether something stands in for a client, as a test's mock does. It has no connections."""
    return not issubclass(type(client), BLOCKING + ASYNC)


def url_of(client: Client) -> str:
    """Return where a client connects, as a URL without a password, for messages."""
    if client is None or is_double(client):
        return "redis://…"
    if isinstance(client, CLUSTERS):
        nodes = ",".join(f"{node.host}:{node.port}" for node in client.get_nodes())
        return f"{_scheme(**client.get_connection_kwargs())}+cluster://{nodes}"
    pool = client.connection_pool
    scheme = _scheme(pool.connection_class)
    if isinstance(pool, SentinelConnectionPool | AsyncSentinelConnectionPool):
        return f"{scheme}+sentinel://…/{pool.service_name}"
    options = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db', 0)}"


def _scheme(connection_class: type = redis.Connection, ssl: bool = False, **_: Any) -> str:
    """Return redis or rediss, by the options of a client's connections: a cluster's has one of the two, or neither."""
    secure = ssl or issubclass(connection_class, redis.SSLConnection | redis.asyncio.SSLConnection)
    return "rediss" if secure else "redis"


def _on_pool(library: ModuleType, pool: Any) -> Client:
    client = library.Redis(connection_pool=pool)  # not from_pool(): a test that patches redis.Redis expects this call
    client.auto_close_connection_pool = True
    return client


def _no_notices(library: ModuleType) -> dict[str, Any]:
    """Turn off redis.asyncio's maintenance notices: with them its pool takes a connection that was lost for a good one.

    Its first call after a restart of the server would fail, once for each connection in the pool.
    """
    return {} if library is redis else {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def _no_retry(library: ModuleType) -> Retry | AsyncRetry:
    return Retry(NoBackoff(), 0) if library is redis else AsyncRetry(NoBackoff(), 0)
