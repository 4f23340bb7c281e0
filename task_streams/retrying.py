"""Repeat what may safely be repeated while Redis is away."""

import logging
import math
import random
import threading
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


class Outage:
    """Say once that Redis does not serve, and once that it serves again, whichever operation notices. Thread-safe."""

    def __init__(self) -> None:
        self._failing: set[str] = set()  # kinds of operations
        self._since = 0.0  # time.monotonic() when the first of them began to
        self._back_at = -math.inf  # when the last outage was over
        self._is_said = False
        self._lock = threading.Lock()

    def failed(self, kind: str, error: BaseException) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._failing:
                self._since = now
            self._failing.add(kind)
            # subtle: a connection that waits for its next try does not know yet that Redis is back
            if not self._is_said and now > self._back_at + 2 * LONGEST_DELAY_SECONDS:
                self._is_said = True
                logger.warning("Redis does not serve (%s); waiting for it", reason_of(error))

    def worked(self, kind: str) -> None:
        if kind in self._failing:
            with self._lock:
                self._failing.discard(kind)
                if not self._failing and self._is_said:
                    self._is_said, self._back_at = False, time.monotonic()
                    logger.warning("Redis serves again, after %.1f s", self._back_at - self._since)
