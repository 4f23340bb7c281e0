"""A solution of part 2's exercise."""

from collections.abc import Callable

from redis import Redis

Handler = Callable[[dict[str, str]], None]


def work(redis: Redis, stream: str, group: str, consumer: str, handle: Handler, min_idle_ms: int) -> int:
    """Handle what others have left idle for min_idle_ms, then what is new; return how many entries."""
    entries = list(redis.xautoclaim(stream, group, consumer, min_idle_ms, "0-0")[1])
    for _, new in redis.xreadgroup(group, consumer, {stream: ">"}):
        entries += new
    for entry_id, fields in entries:
        handle(fields)
        redis.xack(stream, group, entry_id)
    return len(entries)
