"""Exercise of part 2: a member of a consumer group that loses nothing.

Check:   python -m pytest tutorial/exercises/test_part2_share.py
"""

from collections.abc import Callable

from redis import Redis

Handler = Callable[[dict[str, str]], None]  # called with the fields of an entry


def work(redis: Redis, stream: str, group: str, consumer: str, handle: Handler, min_idle_ms: int) -> int:
    """Handle what others have left idle for min_idle_ms, then what is new; return how many entries. It does not wait.

    An entry is acknowledged when it has been handled, and not before: if handle() raises, the entry stays pending.
    """
    raise NotImplementedError("your code: XAUTOCLAIM, XREADGROUP with '>', and XACK after each handle()")
