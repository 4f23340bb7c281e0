"""What channels, streams, lock and limiter share: the client that they were given, or one of their own."""

from typing import Any

from . import client as clients
from .steps import Awaiting, Blocking, Steps, Waits, both
from .topologies import ASYNC, BLOCKING, Client, is_double, sibling


class Utility(Waits):
    """A utility on a client of redis-py."""

    connected: Any  # () -> None, once `redis` is there

    def _open(self, redis_client: Any) -> None:
        """Take the client to use, or None for one by the policy."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Make whatever needs the client, once it is there."""

    @both
    def close(self) -> Steps[None]:
        """Close the connections that are this object's own; a client that it was given stays open."""
        yield from self._finish()

    def _finish(self) -> Steps[None]:
        raise NotImplementedError


class OnThreads(Utility, Blocking):
    """It is connected from the beginning."""

    def _open(self, redis_client: Any) -> None:
        given = redis_client.redis if isinstance(redis_client, clients.RedisClient) else redis_client
        if given is not None and not _fits(given, BLOCKING):
            raise TypeError(f"redis_client must be a RedisClient or a redis.Redis, not {type(given).__name__}")
        self.redis = clients.connect() if given is None else _decoding(given)
        self._own = self.redis is not given
        self._prepare()

    def connected(self) -> None:
        """Do nothing: it is."""

    def _finish(self) -> Steps[None]:
        if self._own:
            yield self.redis.close()


class OnAsyncio(Utility, Awaiting):
    """It connects on first use."""

    def _open(self, redis_client: Any) -> None:
        self._own = redis_client is None
        self._source = clients.AsyncRedisClient() if redis_client is None else redis_client
        self._copy: Client = None  # of a client that doesn't decode

    async def connected(self) -> None:
        if self.redis is not None:
            return
        source = self._source
        given = await source.connect() if isinstance(source, clients.AsyncRedisClient) else source
        if not _fits(given, ASYNC):
            kind = type(given).__name__
            raise TypeError(f"redis_client must be an AsyncRedisClient or a redis.asyncio.Redis, not {kind}")
        if self.redis is None:  # subtle: asked again, for another task may have come first
            self.redis = _decoding(given)
            self._copy = None if self.redis is given else self.redis
            self._prepare()

    def _finish(self) -> Steps[None]:
        if self._copy is not None:
            yield self._copy.aclose()
        if self._own:
            yield self._source.close()


def _fits(client: Client, kinds: tuple[type, ...]) -> bool:
    """Say whether a client is of some kinds, or at least looks like a client, as a test's double does."""
    return hasattr(client, "execute_command") if is_double(client) else isinstance(client, kinds)


def _decoding(client: Client) -> Client:
    """Return the client, or one like it that returns text if this one returns bytes."""
    if is_double(client) or client.get_encoder().decode_responses:
        return client
    return sibling(client, decode_responses=True, encoding_errors="backslashreplace")
