"""Exercise of part 1: read a stream with breaks, and miss nothing.

Check:   python -m pytest tutorial/exercises/test_part1_resume.py
"""

from redis import Redis

Entry = tuple[str, dict[str, str]]  # the id, the fields


def read_since(redis: Redis, stream: str, cursor: str) -> tuple[list[Entry], str]:
    """Return the entries after `cursor`, the oldest first, and the cursor for the next call. It does not wait.

    read_since(redis, "diary", "0") -> ([("1700000000000-0", {"event": "started"})], "1700000000000-0")
    """
    raise NotImplementedError("your code: one XREAD or one XRANGE, and the last id")
