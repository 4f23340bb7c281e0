"""Repeat what may safely be repeated while Redis is away."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ailf.messaging.redis import REDIS_ERRORS, is_transient, reason_of

FIRST_DELAY_SECONDS = 0.05
LONGEST_DELAY_SECONDS = 1.0  # so that work goes on within a second of the server's return

logger = logging.getLogger(__name__)

T = TypeVar("T")


def delays() -> Iterator[float]:
    """Yield the seconds to wait before each further try: doubling, with jitter, so that clients do not come at once."""
    delay = FIRST_DELAY_SECONDS
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(delay * 2, LONGEST_DELAY_SECONDS)


def repeat(call: Callable[[], T], patience_seconds: float) -> T:
    """Call an idempotent function until it succeeds, for patience_seconds at most; then raise its last error."""
    began = time.monotonic()
    wait = None
    while True:
        try:
            return call()
        except REDIS_ERRORS as error:
            is_first, wait = wait is None, wait or delays()
            delay = next(wait)
            if not is_transient(error) or time.monotonic() + delay > began + patience_seconds:
                raise
            if is_first:
                logger.warning("Redis does not serve (%s); trying for %g s", reason_of(error), patience_seconds)
        time.sleep(delay)
