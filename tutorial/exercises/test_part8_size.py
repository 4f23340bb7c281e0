"""The check of part 8's exercise: figures that you can follow in your head."""

import pytest
from part8_size import memory_bytes, workers


@pytest.mark.parametrize(
    ("tasks_per_second", "seconds_each", "concurrency", "expected"),
    [
        (5, 2, 10, 2),  # 10 run, so there is place for 13.3
        (0.75, 10, 10, 1),  # 7.5 run, so one worker with 10 places will just do
        (100, 30, 50, 80),
        (0.001, 1, 10, 1),
    ],
)
def test_there_is_place_for_a_third_more(
    tasks_per_second: float, seconds_each: float, concurrency: int, expected: int
) -> None:
    """Enough workers, and not one too many."""
    assert workers(tasks_per_second, seconds_each, concurrency) == expected


def test_a_worker_is_whole() -> None:
    """Nobody can start half a worker."""
    assert isinstance(workers(1, 1, 3), int)


def test_records_are_kept_for_two_days() -> None:
    """A day's streams, and two days' records."""
    assert memory_bytes(100_000, 10_000, 1_000) == 1_200_000_000
