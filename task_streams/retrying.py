"""Repeat what may safely be repeated while Redis is away."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from redis.exceptions import RedisError

from ailf.messaging.redis import is_transient

FIRST_DELAY_SECONDS = 0.05
LONGEST_DELAY_SECONDS = 1.0  # so that work goes on within a second of the server's return

T = TypeVar("T")


def delays() -> Iterator[float]:
    """Yield the seconds to wait before each further try: doubling, with jitter, so that clients do not come at once."""
    delay = FIRST_DELAY_SECONDS
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(delay * 2, LONGEST_DELAY_SECONDS)


def repeat(call: Callable[[], T], patience_seconds: float) -> T:
    """Call an idempotent function until it succeeds, for patience_seconds at most; then raise its last error."""
    deadline = time.monotonic() + patience_seconds
    for delay in delays():
        try:
            return call()
        except RedisError as error:
            if not is_transient(error) or time.monotonic() + delay > deadline:
                raise
        time.sleep(delay)
    raise AssertionError("delays() never ends")
