"""A solution of part 1's exercise."""

from redis import Redis

Entry = tuple[str, dict[str, str]]


def read_since(redis: Redis, stream: str, cursor: str) -> tuple[list[Entry], str]:
    """Return the entries after `cursor`, the oldest first, and the cursor for the next call."""
    entries = redis.xrange(stream, f"({cursor}")
    return entries, entries[-1][0] if entries else cursor
