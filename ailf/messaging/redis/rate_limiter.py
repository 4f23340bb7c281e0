"""A rate limit that all processes share: at most `rate` calls in any window of `period` seconds.

The exact sliding window log: Redis keeps the times of the last `rate` allowed calls, and a call is allowed if fewer
than that are in the window. (A token bucket or fixed windows need less memory and let up to twice the rate through.)
"""

import time
from typing import Any, NamedTuple

from .base import OnAsyncio, OnThreads, Utility
from .client import AsyncRedisClient, RedisClient
from .config import check_seconds
from .lua import load
from .steps import Steps, both
from .topologies import Client


class Decision(NamedTuple):
    """Whether a call is allowed, how many are left, and in how many seconds to ask again (0 if allowed)."""

    allowed: bool
    remaining: int
    retry_after_seconds: float


class _RateLimiter(Utility):
    _allow: Any  # allow.lua

    def __init__(
        self,
        key_prefix: str,
        rate: int = 10,
        period: float = 1,
        redis_client: RedisClient | AsyncRedisClient | Client | None = None,
    ) -> None:
        if not isinstance(key_prefix, str) or not key_prefix:
            raise ValueError(f"key_prefix must be a name, not {key_prefix!r}")
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise TypeError(f"rate must be a whole number of calls, not {rate!r}")
        if rate < 1:
            raise ValueError(f"rate must be at least 1 call, not {rate}")
        check_seconds("period", period)
        self.rate, self.period = rate, period
        self._prefix = f"{key_prefix}:"
        self._args = [rate, max(1, round(period * 1_000_000))]
        self._open(redis_client)

    def _prepare(self) -> None:
        self._allow = load(self.redis, "allow")

    @both
    def check(self, key: str) -> Steps[Decision]:
        """Decide about one call, and count it if it is allowed, in one atomic script."""
        if self.redis is None:
            yield self.connected()
        allowed, remaining, microseconds = yield self._allow(keys=[self._prefix + key], args=self._args)
        return Decision(bool(allowed), remaining, microseconds / 1_000_000)

    @both
    def is_allowed(self, key: str) -> Steps[bool]:
        """Say whether a call may be made now, and count it if so."""
        if self.redis is None:
            yield self.connected()
        return bool((yield self._allow(keys=[self._prefix + key], args=self._args))[0])

    @both
    def wait(self, key: str, timeout: float | None = None) -> Steps[bool]:
        """Block until a call is allowed, and count it; False after `timeout` seconds. There is no order of waiting."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while not (decision := (yield self.check(key))).allowed:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            yield self.sleep(min(decision.retry_after_seconds, left))
        return True


class RedisRateLimiter(_RateLimiter, OnThreads):
    """Allow `rate` calls a `period` (seconds) for each key. Thread-safe; all limiters of one key_prefix count together.

    Exact over all processes and threads: one atomic script decides, on the server's clock. A denied call costs nothing.
    A key `<key_prefix>:<key>` holds `rate` times at most, and is gone a period after the last allowed call. Callers
    that give one key different rates share its calls, each held to its own rate; for another period, take another
    prefix. Every method raises RedisUnavailable while Redis is away: the caller decides whether to call then.
    """


class AsyncRedisRateLimiter(_RateLimiter, OnAsyncio):
    """RedisRateLimiter for asyncio: await every method. It connects on first use."""
