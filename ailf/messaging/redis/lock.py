"""A lock that processes share: one holder at a time, gone when its holder is, with a fencing token.

It is redis-py's Lock (SET NX PX, and scripts that release and extend only one's own, after
https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/), whose acquisition also draws a fencing token.

A holder that is stopped for longer than `expire` comes late: it believes to hold what somebody else holds by now. No
lock service can prevent that (Kleppmann, "How to do distributed locking", 2016). So pass `fencing_token` along with
what you write, and let the resource refuse a token that is less than one that it has seen.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from redis.asyncio.lock import Lock as AsyncLock
from redis.exceptions import LockError
from redis.lock import Lock

from .client import AsyncRedisClient, Client, RedisClient, async_client_of, client_of
from .config import check_seconds
from .errors import LockNotOwned, RedisMessagingError, is_transient, translated
from .lua import load

FENCE_MS = 24 * 3600 * 1000  # how long a fence outlives its lock; after that the server's clock takes over
RETRY_SECONDS = 1.0  # at most, after a renewal that failed
JITTER = 0.5  # of retry_delay: those who wait come one after the other

logger = logging.getLogger(__name__)


def _keys(name: str) -> list[str]:
    # The braces put the fence into the lock's own slot of a cluster; where the name has a hash tag, that does it.
    return [name, f"fence:{name}" if "}" in name else f"{{{name}}}:fence"]


class _FencedLock(Lock):
    """redis-py's Lock, whose acquisition is acquire.lua."""

    fencing_token: int | None = None
    draw: Any  # acquire.lua

    def do_acquire(self, token: str) -> bool:
        args = [token, int(self.timeout * 1000), FENCE_MS]  # type: ignore[operator]  # there always is one
        drawn = int(self.draw(keys=_keys(str(self.name)), args=args))
        self.fencing_token = drawn or self.fencing_token
        return bool(drawn)

    def do_release(self, expected_token: str) -> None:
        self.local.token = expected_token  # where this fails, release() can be called again, as it can with asyncio
        super().do_release(expected_token)
        self.local.token = None


class RedisLock:
    """The lock `lock:<lock_name>`, which expires `expire` seconds after it was acquired or extended.

    One object is one holder: threads that compete need an object each. It is not re-entrant. With auto_renew a thread
    extends it three times in that time, from acquire() to release(), for as long as this process lives.
    """

    def __init__(
        self,
        lock_name: str,
        expire: float = 10,
        redis_client: RedisClient | Client | None = None,
        auto_renew: bool = False,
    ) -> None:
        self._expire, self._auto_renew = _check(lock_name, expire), auto_renew
        self.redis = client_of(redis_client)
        self._lock = _FencedLock(self.redis, f"lock:{lock_name}", timeout=expire, thread_local=False)
        self._lock.draw = load(self.redis, "acquire")
        self._renewing: threading.Event | None = None

    @translated
    def acquire(self, retry: int = 3, retry_delay: float = 0.2) -> bool:
        """Try to acquire the lock, then up to `retry` times again, retry_delay seconds apart (with jitter).

        False where somebody holds it, this very object included; what it holds is not disturbed.
        """
        for delay in _delays(retry, retry_delay):
            if delay:
                time.sleep(delay)
            if self._lock.acquire(blocking=False):
                if self._auto_renew:
                    self._start_renewing()
                return True
        return False

    @translated
    def release(self) -> bool:
        """Release the lock. False where it is not one's own: never acquired, released already, or expired."""
        self._stop_renewing()
        try:
            self._lock.release()
        except LockError:
            return False
        return True

    @translated
    def extend(self) -> None:
        """Let the lock expire `expire` seconds from now. Raises LockNotOwned where it is not one's own any more."""
        self._lock.extend(self._expire, replace_ttl=True)

    @contextmanager
    def acquire_context(self, retry: int = 3, retry_delay: float = 0.2) -> Iterator[bool]:
        """Yield whether the lock was acquired; release it on leaving the block.

        Raises LockNotOwned on leaving where it was lost meanwhile: then what the block did may have overlapped.
        """
        acquired = self.acquire(retry, retry_delay)
        try:
            yield acquired
        except BaseException:
            if acquired:
                with contextlib.suppress(RedisMessagingError):  # the block's own error matters more; the lock expires
                    self.release()
            raise
        if acquired and not self.release():
            raise LockNotOwned(f"{self._lock.name} was lost before its block ended")

    @property
    def fencing_token(self) -> int | None:
        """The token of this object's last acquisition: greater than that of every acquisition before it."""
        return self._lock.fencing_token

    @translated
    def locked(self) -> bool:
        """Say whether anybody holds the lock."""
        return bool(self._lock.locked())

    def _start_renewing(self) -> None:
        self._stop_renewing()
        self._renewing = threading.Event()
        threading.Thread(target=self._renew, args=(self._renewing,), daemon=True).start()

    def _stop_renewing(self) -> None:
        if self._renewing is not None:
            self._renewing.set()

    def _renew(self, stopped: threading.Event) -> None:
        pause = self._expire / 3
        while not stopped.wait(pause):
            try:
                self.extend()
                pause = self._expire / 3
            except (RedisMessagingError, TypeError) as error:  # TypeError: redis-py sends a mark that it set to None
                if stopped.is_set():  # released meanwhile
                    return
                if isinstance(error, LockNotOwned):
                    logger.warning("%s was lost while it was held", self._lock.name)
                    return
                if not is_transient(error):
                    raise
                if pause == self._expire / 3:  # the first failure
                    logger.warning("%s was not renewed: %s", self._lock.name, error)
                pause = min(RETRY_SECONDS, self._expire / 10)  # soon: much of the time has gone


class _AsyncFencedLock(AsyncLock):
    """redis.asyncio's Lock, whose acquisition is acquire.lua."""

    fencing_token: int | None = None
    draw: Any  # acquire.lua

    async def do_acquire(self, token: str | bytes) -> bool:
        args = [token, int(self.timeout * 1000), FENCE_MS]  # type: ignore[operator]  # there always is one
        drawn = int(await self.draw(keys=_keys(str(self.name)), args=args))
        self.fencing_token = drawn or self.fencing_token
        return bool(drawn)


class AsyncRedisLock:
    """RedisLock for asyncio. It connects on first use; tasks that compete need an object each."""

    def __init__(
        self,
        lock_name: str,
        expire: float = 10,
        redis_client: AsyncRedisClient | Client | None = None,
        auto_renew: bool = False,
    ) -> None:
        self._name, self._expire, self._auto_renew = f"lock:{lock_name}", _check(lock_name, expire), auto_renew
        self._own = redis_client is None
        self._source = AsyncRedisClient() if redis_client is None else redis_client  # it connects once for all tasks
        self.redis: Client = None
        self._lock: _AsyncFencedLock | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def _ready(self) -> _AsyncFencedLock:
        redis = await async_client_of(self._source)
        if self._lock is None:  # subtle: asked only now, for another task may have come first
            self.redis = redis
            self._lock = _AsyncFencedLock(redis, self._name, timeout=self._expire, thread_local=False)
            self._lock.draw = load(redis, "acquire")
        return self._lock

    @translated
    async def acquire(self, retry: int = 3, retry_delay: float = 0.2) -> bool:
        lock = self._lock or await self._ready()
        for delay in _delays(retry, retry_delay):
            if delay:
                await asyncio.sleep(delay)
            if await lock.acquire(blocking=False):
                if self._auto_renew:
                    self._stop_renewing()
                    self._renewing = asyncio.create_task(self._renew())
                return True
        return False

    @translated
    async def release(self) -> bool:
        self._stop_renewing()
        try:
            await (self._lock or await self._ready()).release()
        except LockError:
            return False
        return True

    @translated
    async def extend(self) -> None:
        await (self._lock or await self._ready()).extend(self._expire, replace_ttl=True)

    @asynccontextmanager
    async def acquire_context(self, retry: int = 3, retry_delay: float = 0.2) -> AsyncIterator[bool]:
        acquired = await self.acquire(retry, retry_delay)
        try:
            yield acquired
        except BaseException:
            if acquired:
                with contextlib.suppress(RedisMessagingError):  # the block's own error matters more; the lock expires
                    await self.release()
            raise
        if acquired and not await self.release():
            raise LockNotOwned(f"{self._name} was lost before its block ended")

    @property
    def fencing_token(self) -> int | None:
        return None if self._lock is None else self._lock.fencing_token

    @translated
    async def locked(self) -> bool:
        return bool(await (self._lock or await self._ready()).locked())

    async def close(self) -> None:
        """Close the connection, where it is this object's own; the lock is not released."""
        self._stop_renewing()
        if self._own:
            await self._source.close()

    def _stop_renewing(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None

    async def _renew(self) -> None:
        myself, pause = asyncio.current_task(), self._expire / 3
        while self._renewing is myself:  # subtle: before Python 3.12, asyncio.wait_for may swallow the cancellation
            await asyncio.sleep(pause)
            try:
                await self.extend()
                pause = self._expire / 3
            except RedisMessagingError as error:
                if self._renewing is not myself:  # released meanwhile
                    return
                if isinstance(error, LockNotOwned):
                    logger.warning("%s was lost while it was held", self._name)
                    return
                if not is_transient(error):
                    raise
                if pause == self._expire / 3:
                    logger.warning("%s was not renewed: %s", self._name, error)
                pause = min(RETRY_SECONDS, self._expire / 10)


def _check(lock_name: str, expire: float) -> float:
    if not isinstance(lock_name, str) or not lock_name:
        raise ValueError(f"lock_name must be a name, not {lock_name!r}")
    tag = lock_name.partition("{")[2].partition("}")  # what a cluster hashes
    if "}" in lock_name and not (tag[0] and tag[1]):
        raise ValueError(
            f"lock_name may have braces only around a hash tag, as in {{user:1}}:report, not {lock_name!r}"
        )
    check_seconds("expire", expire)
    if expire < 0.001:
        raise ValueError(f"expire must be at least a millisecond, not {expire}")
    return expire


def _delays(retry: int, retry_delay: float) -> Iterator[float]:
    """Yield the seconds to sleep before each try: none before the first."""
    if retry < 0 or not retry_delay >= 0:
        raise ValueError(f"retry and retry_delay must not be negative, not {retry} and {retry_delay}")
    retries = range(retry)
    yield 0.0
    for _ in retries:
        yield retry_delay * random.uniform(1 - JITTER, 1.0)
