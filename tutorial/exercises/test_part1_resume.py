"""The check of part 1's exercise; fakeredis is a Redis in memory, so it needs no server."""

import pytest
from fakeredis import FakeRedis
from part1_resume import read_since


@pytest.fixture
def redis() -> FakeRedis:
    redis = FakeRedis(decode_responses=True)
    for n in range(3):
        redis.xadd("diary", {"n": n}, id=f"10-{n + 1}")
    return redis


def test_everything_comes_from_the_start(redis: FakeRedis) -> None:
    """From "0" on all entries come, in order."""
    entries, _ = read_since(redis, "diary", "0")

    assert entries == [("10-1", {"n": "0"}), ("10-2", {"n": "1"}), ("10-3", {"n": "2"})]


def test_a_break_loses_nothing_and_repeats_nothing(redis: FakeRedis) -> None:
    """After a break only what was written meanwhile comes."""
    _, cursor = read_since(redis, "diary", "10-1")
    redis.xadd("diary", {"n": 3}, id="11-1")

    assert read_since(redis, "diary", cursor) == ([("11-1", {"n": "3"})], "11-1")


def test_the_cursor_stays_where_nothing_is_new(redis: FakeRedis) -> None:
    """Where nothing was written the cursor is the one that was given."""
    assert read_since(redis, "diary", "10-3") == ([], "10-3")
