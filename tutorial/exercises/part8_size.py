"""Exercise of part 8: how many workers, and how much memory?

Check:   python -m pytest tutorial/exercises/test_part8_size.py
"""


def workers(tasks_per_second: float, seconds_each: float, concurrency: int) -> int:
    """Return how many workers are needed, each for `concurrency` tasks at a time; at least 1.

    On average tasks_per_second * seconds_each tasks run at a time (Little's law). Tasks do not come evenly, so there
    must be place for a third more than that. workers(5, 2, 10) -> 2
    """
    raise NotImplementedError("your code: one line, and whole workers only")


def memory_bytes(tasks_per_day: int, stream_bytes: int, record_bytes: int) -> int:
    """Return what finished tasks take: a stream is kept for 24 hours, a record for 48."""
    raise NotImplementedError("your code: one line")
