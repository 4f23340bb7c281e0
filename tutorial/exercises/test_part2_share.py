"""The check of part 2's exercise; fakeredis is a Redis in memory, so it needs no server."""

import pytest
from fakeredis import FakeRedis
from part2_share import work


@pytest.fixture
def redis() -> FakeRedis:
    redis = FakeRedis(decode_responses=True)
    redis.xgroup_create("jobs", "workers", "0", mkstream=True)
    for n in (1, 2, 3):
        redis.xadd("jobs", {"n": n}, id=f"1-{n}")
    return redis


def test_new_entries_are_handled_and_acknowledged(redis: FakeRedis) -> None:
    """All that is new is handled, in order, and nothing stays pending."""
    seen: list[str] = []

    assert work(redis, "jobs", "workers", "bob", lambda fields: seen.append(fields["n"]), 60_000) == 3

    assert seen == ["1", "2", "3"]
    assert redis.xpending("jobs", "workers")["pending"] == 0


def test_the_share_of_the_dead_comes_first(redis: FakeRedis) -> None:
    """What Ann has taken and not acknowledged is handled too."""
    redis.xreadgroup("workers", "ann", {"jobs": ">"}, count=2)
    seen: list[str] = []

    work(redis, "jobs", "workers", "bob", lambda fields: seen.append(fields["n"]), 0)

    assert seen == ["1", "2", "3"]
    assert redis.xpending("jobs", "workers")["pending"] == 0


def test_what_fails_stays_pending(redis: FakeRedis) -> None:
    """An entry whose handler raises is not acknowledged."""

    def fail_at_two(fields: dict[str, str]) -> None:
        if fields["n"] == "2":
            raise RuntimeError("as told")

    with pytest.raises(RuntimeError):
        work(redis, "jobs", "workers", "bob", fail_at_two, 60_000)

    pending = redis.xpending_range("jobs", "workers", "-", "+", 10)
    assert "1-2" in [entry["message_id"] for entry in pending]
    assert "1-1" not in [entry["message_id"] for entry in pending]
