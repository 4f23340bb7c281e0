"""A solution of part 8's exercise."""

import math


def workers(tasks_per_second: float, seconds_each: float, concurrency: int) -> int:
    """Return how many workers are needed, each for `concurrency` tasks at a time; at least 1."""
    return max(1, math.ceil(tasks_per_second * seconds_each * 4 / 3 / concurrency))


def memory_bytes(tasks_per_day: int, stream_bytes: int, record_bytes: int) -> int:
    """Return what finished tasks take: a stream is kept for 24 hours, a record for 48."""
    return tasks_per_day * (stream_bytes + 2 * record_bytes)
