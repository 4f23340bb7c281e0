"""Messaging utilities on Redis: clients, PubSub, streams with consumer groups, a lock and a rate limiter."""

from .client import AsyncRedisClient, RedisClient, blocking_client, connect, connect_async
from .codec import decode, encode, from_json, to_json
from .config import RedisConfig
from .errors import (
    REDIS_ERRORS,
    LockNotOwned,
    RedisMessagingError,
    RedisUnavailable,
    explain,
    is_transient,
    reason_of,
    safe_url,
)
from .lock import AsyncRedisLock, RedisLock
from .pubsub import AsyncRedisPubSub, RedisPubSub
from .rate_limiter import AsyncRedisRateLimiter, RedisRateLimiter
from .stream import AsyncRedisStream, RedisStream
from .topologies import Client, url_of

# fmt: off
__all__ = [
    "REDIS_ERRORS", "AsyncRedisClient", "AsyncRedisLock", "AsyncRedisPubSub", "AsyncRedisRateLimiter",
    "AsyncRedisStream", "Client", "LockNotOwned", "RedisClient", "RedisConfig", "RedisLock",
    "RedisMessagingError", "RedisPubSub", "RedisRateLimiter", "RedisStream", "RedisUnavailable",
    "blocking_client", "connect", "connect_async", "decode", "encode", "explain", "from_json", "is_transient",
    "reason_of", "safe_url", "to_json", "url_of",
]
# fmt: on
