"""The one connection policy: which Redis a program talks to, with which timeouts, and what is retried (nothing).

$REDIS_URL decides: redis://, rediss://, unix://, redis+cluster://host:port, redis+sentinel://host:port/service.
Where it is not set: localhost:6379 if a Redis answers there, else the embedded server (embedded.py).

redis-py repeats a command after a lost connection, ten times by default. A repeated LPUSH or XADD may then be there
twice, and a repeated BRPOP may lose an element, so here nothing is repeated blindly: callers repeat what is idempotent.
"""

import logging
import os
import re
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from redis import ConnectionPool, Redis, RedisCluster, Sentinel
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from . import embedded
from .errors import RedisUnavailable

SOCKET_SECONDS = 4.0  # how long a reply may take: a silent server is given up within 5 s; see blocking_client
CONNECT_SECONDS = 2.0  # two addresses (IPv6, IPv4) and a PING stay within 5 s
MARGIN_SECONDS = 5.0  # how much later than its block time a blocking command's reply may come

log = logging.getLogger(__name__)

# Redis, RedisCluster or fakeredis: the same commands. redis-py types a reply as bytes | str | …, whatever the client
# was told to decode; stating what each reply is would only repeat the code around it.
Client: TypeAlias = Any

SCHEMES = (
    "redis://host:port/db, rediss://…, unix:///path, redis+cluster://host:port or redis+sentinel://host:port/service"
)


def connect(url: str | None = None) -> Client:
    """Return a client for the Redis that the policy names, after a PING. It decodes replies and repeats nothing.

    Blocks for 5 s at most (30 s where the embedded server must start first). A server that is still loading its data
    counts as reached. Raises RedisUnavailable, whose message is one line: what, which URL, what to do.
    """
    chosen = url or os.environ.get("REDIS_URL")
    if not chosen:
        chosen = f"redis://{embedded.HOST}:{_local_port()}"
    try:
        client = _client(chosen)
    except (ValueError, TypeError) as error:
        raise RedisUnavailable(f"not a Redis URL: {safe_url(chosen)} ({error}). Expected {SCHEMES}.") from error
    except (errors.RedisError, OSError, errors.RedisClusterException) as error:  # a cluster client connects at once
        raise RedisUnavailable(explain(error, chosen)) from error
    try:
        client.ping()
    except errors.BusyLoadingError:
        log.warning("Redis at %s is still loading its data", safe_url(chosen))
    except (errors.RedisError, OSError) as error:
        raise RedisUnavailable(explain(error, chosen)) from error
    return client


def _local_port() -> int:
    try:
        port, started = embedded.find_or_start()
    except (OSError, ImportError) as error:
        raise RedisUnavailable(
            f"no Redis answers at localhost:{embedded.PORT} and {error}. Start one, or name it in REDIS_URL."
        ) from error
    if started:
        log.warning("started an embedded Redis server at redis://%s:%d (to stop it: make stop)", embedded.HOST, port)
    return port


def _client(url: str) -> Client:
    """Return an unconnected client for a URL; ValueError where it is none."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }
    scheme, _, rest = url.partition("://")
    if scheme == "redis+cluster":
        return RedisCluster.from_url(f"redis://{rest}", **options)
    if scheme == "redis+sentinel":
        parts = urlsplit(url)
        login, _, hosts = parts.netloc.rpartition("@")
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError("the service's name is missing")
        user, _, password = login.partition(":")
        if password:
            options |= {"username": unquote(user) or None, "password": unquote(password)}
        pairs = [host.rpartition(":") for host in hosts.split(",")]
        quick = {
            "socket_timeout": CONNECT_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "retry": Retry(NoBackoff(), 0),
        }
        sentinel: Any = Sentinel([(host, int(port)) for host, _, port in pairs], sentinel_kwargs=quick)
        return sentinel.master_for(service, db=int(db or 0), **options)
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("unknown scheme")
    return Redis.from_url(url, **options)


def blocking_client(client: Client, block_seconds: float, decode_responses: bool = True) -> Client:
    """Return a client like the given one, on connections of its own, for commands that block up to block_seconds.

    Its socket waits longer than the server does, so that a blocking command ends with the server's answer and never by
    a time-out of the socket; and it repeats nothing.
    """
    changes: dict[str, Any] = {
        "socket_timeout": block_seconds + MARGIN_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": decode_responses,
    }
    if isinstance(client, RedisCluster):
        nodes = [ClusterNode(str(node.host), int(node.port)) for node in client.get_nodes()]
        options = {k: v for k, v in client.get_connection_kwargs().items() if k not in ("host", "port")}
        return RedisCluster(startup_nodes=nodes, **{**options, **changes})
    pool = client.connection_pool
    options = {**pool.connection_kwargs, **changes}
    if isinstance(pool, SentinelConnectionPool):
        options.pop("connection_pool")
        return pool.sentinel_manager.master_for(pool.service_name, **options)
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))


def url_of(client: Client) -> str:
    """Return where a client connects, as a URL without a password, for messages."""
    if isinstance(client, RedisCluster):
        return "redis+cluster://" + ",".join(f"{node.host}:{node.port}" for node in client.get_nodes())
    pool = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        return f"redis+sentinel://…/{pool.service_name}"
    options = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"redis://{options.get('host', 'localhost')}:{options.get('port', embedded.PORT)}/{options.get('db', 0)}"


def safe_url(url: str) -> str:
    """Return a URL without its password. safe_url("redis://me:secret@db:6379") -> 'redis://me@db:6379'"""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    query = urlencode([(k, v) for k, v in parse_qsl(parts.query) if "password" not in k])
    return urlunsplit((parts.scheme, f"{user}@{host}" if user else host, parts.path, query, ""))


def is_transient(error: BaseException) -> bool:
    """Say whether an error may go away by itself, so that a worker should wait and try again.

    So do a lost connection, a time-out, and a server that is loading, full, read-only or without its replicas; a
    refused login and a wrong command do not.
    """
    if isinstance(error, errors.AuthenticationError | errors.AuthorizationError):
        return False
    if isinstance(error, errors.ConnectionError | errors.TimeoutError | errors.ReadOnlyError):
        return True
    if isinstance(error, errors.OutOfMemoryError | errors.ClusterDownError | errors.TryAgainError):
        return True
    words = ("MISCONF", "NOREPLICAS", "UNBLOCKED", "MASTERDOWN")
    return isinstance(error, errors.ResponseError) and str(error).startswith(words)


def reason_of(error: BaseException) -> str:
    """Return an error's message as one short line, without the internals that redis-py and Lua scripts append."""
    return re.split(r"\n|\.? script: | : <", str(error))[0].rstrip(".") or type(error).__name__


def explain(error: BaseException, url: str) -> str:
    """Return one line for a person: what went wrong, at which URL (without its password), what to do."""
    where = f"Redis at {safe_url(url)}"
    reason = reason_of(error)
    if isinstance(error, errors.AuthenticationError | errors.NoPermissionError):
        return f"{where} refused the login or the command ({reason}). Check the user and password in REDIS_URL."
    if isinstance(error, errors.BusyLoadingError):
        return f"{where} is still loading its data. Try again in a moment."
    if isinstance(error, errors.InvalidResponse):
        return f"what answers is no Redis at {safe_url(url)} ({reason}). Check host and port in REDIS_URL."
    if isinstance(error, errors.ReadOnlyError):
        return f"{where} is read-only ({reason}). Point REDIS_URL at the primary."
    if isinstance(error, errors.OutOfMemoryError):
        return f"{where} is out of memory ({reason}). Free some, or raise its maxmemory."
    if isinstance(error, errors.ConnectionError | errors.TimeoutError | errors.RedisClusterException | OSError):
        return f"cannot reach {where} ({reason}). Is it running? Unset REDIS_URL to use the embedded server."
    return f"{where} answered: {reason}"
