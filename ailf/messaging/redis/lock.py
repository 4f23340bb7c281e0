"""A lock that processes share: one holder at a time, gone when its holder is, with a fencing token.

redis-py's Lock releases and extends it, and only one's own
(https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/). acquire.lua acquires it, since it also draws
a fencing token.

A holder that is stopped for longer than `expire` comes late: it believes that it holds what somebody else holds by now.
No lock service can prevent that (Kleppmann, "How to do distributed locking", 2016). So pass `fencing_token` along with
whatever you write, and let the resource refuse a token that is less than one it has seen.
"""

import logging
import random
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from redis.asyncio.lock import Lock as AsyncLock
from redis.exceptions import LockError
from redis.lock import Lock

from .base import OnAsyncio, OnThreads, Utility
from .client import AsyncRedisClient, RedisClient
from .config import check_seconds
from .errors import REDIS_ERRORS, LockNotOwned, RedisMessagingError, is_transient, translate
from .lua import load
from .steps import Steps, async_block, block, both
from .topologies import Client

FENCE_MS = 24 * 3600 * 1000  # how long a fence outlives its lock; after that the server's clock takes over
RETRY_SECONDS = 1.0  # at most, after a renewal that failed
JITTER = 0.5  # of retry_delay: those who wait come one after the other

logger = logging.getLogger(__name__)


class _RegistersItsOwn:
    """redis-py registers a lock's scripts once for all locks, with the first one's client: perhaps a test's double."""

    redis: Any
    LUA_RELEASE_SCRIPT: str
    LUA_EXTEND_SCRIPT: str

    def register_scripts(self) -> None:
        self.lua_release = self.redis.register_script(self.LUA_RELEASE_SCRIPT)
        self.lua_extend = self.redis.register_script(self.LUA_EXTEND_SCRIPT)


class _Lock(Utility):
    _kind: type  # of redis-py's lock
    _lock: Any = None
    _draw: Any  # acquire.lua

    def __init__(
        self,
        lock_name: str,
        expire: float = 10,
        redis_client: RedisClient | AsyncRedisClient | Client | None = None,
        auto_renew: bool = False,
    ) -> None:
        _check(lock_name, expire)
        self._name, self._expire, self._auto_renew = f"lock:{lock_name}", expire, auto_renew
        self._released: Any = None  # the event that ends the renewals of the last acquisition
        self._renewal: Any = None  # their thread or task
        self._token: int | None = None
        self._open(redis_client)

    def _prepare(self) -> None:
        self._lock = self._kind(self.redis, self._name, timeout=self._expire, thread_local=False)
        self._draw = load(self.redis, "acquire")

    @property
    def fencing_token(self) -> int | None:
        """The token of this object's last acquisition: greater than that of every acquisition before it."""
        return self._token

    @both
    def acquire(self, retry: int = 3, retry_delay: float = 0.2) -> Steps[bool]:
        """Try to acquire the lock, then up to `retry` times again, retry_delay seconds apart (with jitter).

        False if somebody holds it, this very object included; what it holds is not disturbed.
        """
        yield self.connected()
        for delay in _delays(retry, retry_delay):
            if delay:
                yield self.sleep(delay)
            mark = uuid.uuid4().hex.encode()  # of this acquisition, as redis-py has it
            args = [mark, int(self._expire * 1000), FENCE_MS]
            if token := int((yield self._draw(keys=_keys(self._name), args=args))):
                self._lock.local.token, self._token = mark, token
                if self._auto_renew:
                    self._stop_renewing()
                    self._released = self.new_event()
                    self._renewal = self.begin(self._renew(self._released), "renew " + self._name)
                return True
        return False

    @both
    def release(self) -> Steps[bool]:
        """Release the lock. False if it is not one's own: never acquired, released already, or expired."""
        self._stop_renewing()
        yield self.connected()
        mark = self._lock.local.token
        try:
            yield self._lock.release()
        except LockError:
            return False
        except BaseException:
            self._lock.local.token = mark  # subtle: redis-py forgets it too early; release() can be called again
            raise
        return True

    @both
    def extend(self) -> Steps[None]:
        """Let the lock expire `expire` seconds from now. Raises LockNotOwned if it is not one's own any more."""
        yield self.connected()
        yield self._lock.extend(self._expire, replace_ttl=True)

    @both
    def locked(self) -> Steps[bool]:
        """Say whether anybody holds the lock."""
        yield self.connected()
        return bool((yield self._lock.locked()))

    @both
    def _leave(self, acquired: bool, failed: bool) -> Steps[None]:
        """Release the lock at the end of a block; a block's own error matters more than one of this."""
        try:
            if acquired and not (yield self.release()):
                raise LockNotOwned(f"{self._name} was lost before its block ended")
        except RedisMessagingError:
            if not failed:
                raise

    def _finish(self) -> Steps[None]:
        self._stop_renewing()
        yield from super()._finish()

    def _stop_renewing(self) -> None:
        if self._released is not None:
            self._released.set()

    def _renew(self, released: Any) -> Steps[None]:
        """Extend the lock three times within `expire`, until it is released or lost."""
        pause = self._expire / 3
        while not (yield self.wait_for(released, pause)):
            try:
                yield self._lock.extend(self._expire, replace_ttl=True)
                pause = self._expire / 3
            except REDIS_ERRORS as error:
                if released.is_set():  # meanwhile
                    return
                if isinstance(error, LockError):
                    logger.warning("%s was lost while it was held", self._name)
                    return
                if not is_transient(error):
                    raise
                if pause == self._expire / 3:  # the first failure
                    logger.warning("%s was not renewed: %s", self._name, translate(error, self.redis))
                pause = min(RETRY_SECONDS, self._expire / 10)  # soon: much of the time has gone


class RedisLock(_Lock, OnThreads):
    """The lock `lock:<lock_name>`, which expires `expire` seconds after it was acquired or extended.

    One object is one holder: threads that compete need an object each. It is not re-entrant. With auto_renew a thread
    extends it three times in that time, from acquire() to release(), for as long as this process lives. Every method
    raises RedisUnavailable while Redis is away.
    """

    _kind = type("_Lock", (_RegistersItsOwn, Lock), {})

    def acquire_context(self, retry: int = 3, retry_delay: float = 0.2) -> AbstractContextManager[bool]:
        """Tell a `with` block whether the lock was acquired; release it at the block's end.

        Raises LockNotOwned at the end if it was lost meanwhile: what the block did may have overlapped.
        """
        return block(lambda: self.acquire(retry, retry_delay), self._leave)


class AsyncRedisLock(_Lock, OnAsyncio):
    """RedisLock for asyncio: await every method. It connects on first use; tasks that compete need an object each."""

    _kind = type("_Lock", (_RegistersItsOwn, AsyncLock), {})

    def acquire_context(self, retry: int = 3, retry_delay: float = 0.2) -> AbstractAsyncContextManager[bool]:
        """The same for an `async with` block."""
        return async_block(lambda: self.acquire(retry, retry_delay), self._leave)


def _keys(name: str) -> list[str]:
    # The braces put the fence into the lock's own slot of a cluster; if the name has a hash tag, that does it.
    return [name, f"fence:{name}" if "}" in name else f"{{{name}}}:fence"]


def _check(lock_name: str, expire: float) -> None:
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


def _delays(retry: int, retry_delay: float) -> Iterator[float]:
    """Yield the seconds to sleep before each try: none before the first."""
    if retry < 0 or not retry_delay >= 0:
        raise ValueError(f"retry and retry_delay must not be negative, not {retry} and {retry_delay}")
    retries = range(retry)
    yield 0.0
    for _ in retries:
        yield retry_delay * random.uniform(1 - JITTER, 1.0)
