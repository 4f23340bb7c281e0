"""A rate limit that all processes share: at most `rate` calls in any window of `period` seconds.

The exact sliding window log: Redis keeps the times of the last `rate` allowed calls, and a call is allowed where fewer
than that are in the window. (A token bucket or fixed windows need less memory and let up to twice the rate through.)
"""

import asyncio
import time
from typing import Any, NamedTuple

from .client import AsyncRedisClient, Client, RedisClient, async_client_of, client_of
from .config import check_seconds
from .errors import translated
from .lua import load


class Decision(NamedTuple):
    """Whether a call is allowed, how many are left, and in how many seconds to ask again (0 if allowed)."""

    allowed: bool
    remaining: int
    retry_after_seconds: float


class RedisRateLimiter:
    """Allow `rate` calls a `period` (seconds) for each key. Thread-safe; all limiters of one key_prefix count together.

    Exact over all processes and threads: one atomic script decides, on the server's clock. A denied call costs nothing.
    A key `<key_prefix>:<key>` holds `rate` times at most, and is gone a period after the last allowed call. Callers
    that give one key different rates share its calls, each held to its own rate; for another period, take another
    prefix. Every method raises RedisUnavailable while Redis is away: then it is the caller who decides whether to call.
    """

    def __init__(
        self,
        key_prefix: str,
        rate: int = 10,
        period: float = 1,
        redis_client: RedisClient | Client | None = None,
    ) -> None:
        self._prefix, self._args = _check(key_prefix, rate, period)
        self.rate, self.period = rate, period
        self.redis = client_of(redis_client)
        self._allow = load(self.redis, "allow")

    @translated
    def check(self, key: str) -> Decision:
        """Decide about one call, and count it if it is allowed."""
        return _decision(self._allow(keys=[self._prefix + key], args=self._args))

    def is_allowed(self, key: str) -> bool:
        """Say whether a call may be made now, and count it if so."""
        return self.check(key).allowed

    def wait(self, key: str, timeout: float | None = None) -> bool:
        """Block until a call is allowed, and count it; False after `timeout` seconds. There is no order of waiting."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (decision := self.check(key)).allowed:
            if deadline is None:
                time.sleep(decision.retry_after_seconds)
            elif (left := deadline - time.monotonic()) > 0:
                time.sleep(min(decision.retry_after_seconds, left))
            else:
                return False
        return True


class AsyncRedisRateLimiter:
    """RedisRateLimiter for asyncio. It connects on first use."""

    def __init__(
        self,
        key_prefix: str,
        rate: int = 10,
        period: float = 1,
        redis_client: AsyncRedisClient | Client | None = None,
    ) -> None:
        self._prefix, self._args = _check(key_prefix, rate, period)
        self.rate, self.period = rate, period
        self._own = redis_client is None
        self._source = AsyncRedisClient() if redis_client is None else redis_client  # it connects once for all tasks
        self.redis: Client = None

    @translated
    async def check(self, key: str) -> Decision:
        if self.redis is None:
            self.redis = await async_client_of(self._source)
            self._allow = load(self.redis, "allow")
        return _decision(await self._allow(keys=[self._prefix + key], args=self._args))

    async def close(self) -> None:
        """Close the connection, where it is this object's own."""
        if self._own:
            await self._source.close()

    async def is_allowed(self, key: str) -> bool:
        return (await self.check(key)).allowed

    async def wait(self, key: str, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (decision := await self.check(key)).allowed:
            if deadline is None:
                await asyncio.sleep(decision.retry_after_seconds)
            elif (left := deadline - time.monotonic()) > 0:
                await asyncio.sleep(min(decision.retry_after_seconds, left))
            else:
                return False
        return True


def _check(key_prefix: str, rate: int, period: float) -> tuple[str, list[int]]:
    if not isinstance(key_prefix, str) or not key_prefix:
        raise ValueError(f"key_prefix must be a name, not {key_prefix!r}")
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise TypeError(f"rate must be a whole number of calls, not {rate!r}")
    if rate < 1:
        raise ValueError(f"rate must be at least 1 call, not {rate}")
    check_seconds("period", period)
    return f"{key_prefix}:", [rate, max(1, round(period * 1_000_000))]


def _decision(reply: list[Any]) -> Decision:
    return Decision(bool(reply[0]), reply[1], reply[2] / 1_000_000)
