"""The rate limiter: exact on the server's clock, whoever calls; bounded; gone when idle."""

import asyncio
import math
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from conftest import Server, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from limiter_program import record
from redis import Redis
from redis.exceptions import RedisError

from ailf.messaging.redis import (
    AsyncRedisClient,
    AsyncRedisRateLimiter,
    RedisMessagingError,
    RedisRateLimiter,
    RedisUnavailable,
    connect,
    connect_async,
    rate_limiter,
)

pytest_plugins = "kinds"

Make = Callable[..., Any]  # make("RedisRateLimiter", server, "limit"): either kind, as kinds.py has it

Start = Callable[..., "subprocess.Popen[str]"]
PROGRAM = "tests/messaging/limiter_program.py"
KEY = "limit:a"  # of RedisRateLimiter("limit", …) and "a"


def now_us(client: Any) -> int:
    """The server's time in microseconds."""
    seconds, microseconds = client.time()
    return int(seconds) * 1_000_000 + int(microseconds)


def start_recording(limiter: Any) -> None:
    limiter.check("other")  # connects
    record(getattr(limiter, "target", limiter))


def recorded(client: Any) -> list[tuple[int, bool]]:
    """What limiter_program.record() recorded: (the server's time in microseconds, whether the call was allowed)."""
    lines = [line.split() for line in client.lrange("calls", 0, -1)]
    return [(int(at), allowed == "1") for at, allowed, _ in lines]


def assert_exact(calls: list[tuple[int, bool]], rate: int, period: float) -> None:
    """Assert what the limiter promises: at most `rate` calls in any window, and no call denied unless one is full."""
    period_us = round(period * 1_000_000)
    times = [at for at, allowed in calls if allowed]
    assert all(later - earlier > period_us for earlier, later in zip(times, times[rate:], strict=False))
    window: deque[int] = deque()
    for at, allowed in calls:
        while window and window[0] < at - period_us:
            window.popleft()
        assert allowed == (len(window) < rate)
        if allowed:
            window.append(at)


# -- what it promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [5, pytest.param(25, marks=pytest.mark.chaos)])
def test_threads_in_4_processes_get_the_rate_and_no_more(
    server: Server, script: Start, kind: str, threads: int
) -> None:
    """Two of the processes are an hour off. No window has more calls, and who is denied finds one that is full.

    The second says "at least `rate` a period while there is demand" without a word on how busy the machine is.
    """
    rate, period, client = 20, 0.4, server.client()

    skews = ("0", "0", "3600", "-3600")
    programs = [
        script(server.url, PROGRAM, kind, str(threads), str(rate), str(period), skew, stdin=subprocess.PIPE)
        for skew in skews
    ]
    wait_until(
        lambda: len({line.split()[2] for line in client.lrange("calls", 0, -1)}) == 4 * threads, "all threads call"
    )
    seen = client.llen("calls")
    wait_until(lambda: sum(allowed for _, allowed in recorded(client)[seen:]) > 5 * rate, "some periods have gone by")
    longest = client.llen("limit:shared")
    for program in programs:
        print(file=program.stdin, flush=True)  # which ends it
    errors = [program.communicate(timeout=60)[1] for program in programs]

    calls = recorded(client)
    assert errors == [""] * 4
    assert [program.returncode for program in programs] == [0] * 4
    assert sum(not allowed for _, allowed in calls) > rate, "there was no demand"
    assert longest <= rate
    assert_exact(calls, rate, period)


def test_bursts_of_any_shape_are_decided_exactly(make: Make, server: Server) -> None:
    """One caller, four rates and periods, with pauses: every decision is the one by definition."""
    for rate, period in [(1, 0.02), (3, 0.05), (7, 0.001), (1000, 0.3)]:
        server.client().flushdb()
        limiter = make("RedisRateLimiter", server, "limit", rate, period)
        start_recording(limiter)

        for burst in range(12):
            for _ in range(burst * 3):
                limiter.is_allowed("a")
            time.sleep(period * burst / 10)

        assert_exact(recorded(server.client()), rate, period)


def test_denied_calls_cost_nothing(make: Make, server: Server) -> None:
    """1,000 of them leave the key as it was: as many times, as many bytes, as long to live."""
    client = server.client()
    limiter = make("RedisRateLimiter", server, "limit", 50, 3600)
    for _ in range(50):
        assert limiter.is_allowed("a")
    times, size, expires = client.lrange(KEY, 0, -1), client.memory_usage(KEY), client.pexpiretime(KEY)

    denied = [limiter.check("a") for _ in range(1000)]

    assert not any(decision.allowed for decision in denied)
    assert client.lrange(KEY, 0, -1) == times
    assert client.memory_usage(KEY) == size
    assert client.pexpiretime(KEY) == expires
    assert client.dbsize() == 1


def test_memory_is_bounded_by_the_rate(make: Make, server: Server) -> None:
    """However many calls are allowed, the key holds the last `rate`, and takes no more memory for that."""
    client, sizes = server.client(), []
    limiter = make("RedisRateLimiter", server, "limit", 10, 0.002)

    for _ in range(40):
        for _ in range(10):
            limiter.wait("a")
        sizes.append((client.llen(KEY), client.memory_usage(KEY) or 0))

    assert max(length for length, _ in sizes) <= 10
    assert max(size for _, size in sizes) < 300


def test_key_is_gone_after_the_period(make: Make, server: Server) -> None:
    """It lives a period from the last allowed call: a millisecond or two longer, and never less."""
    client = server.client()
    limiter = make("RedisRateLimiter", server, "limit", 2, 0.3)

    limiter.is_allowed("a")
    limiter.is_allowed("a")
    newest, expires = int(client.lindex(KEY, 0)), client.pexpiretime(KEY) * 1000
    limiter.is_allowed("a")

    assert newest + 300_000 < expires <= newest + 302_000
    wait_until(lambda: client.dbsize() == 0, "the key is gone")
    assert limiter.check("a") == (True, 1, 0)


@pytest.mark.parametrize("there", [1, 3, 5])
def test_clock_put_back_is_recovered_from_within_a_period(make: Make, server: Server, there: int) -> None:
    """Calls an hour ahead of the server's clock count as made just now: for one period, not for an hour."""
    rate, period, client = 5, 1.0, server.client()
    limiter = make("RedisRateLimiter", server, "limit", rate, period)
    ahead = now_us(client) + 3_600_000_000
    client.rpush(KEY, *[ahead - n for n in range(there)])

    allowed = [limiter.is_allowed("a") for _ in range(rate - there)]
    denied = limiter.check("a")
    kept = [int(at) for at in client.lrange(KEY, 0, -1)]

    assert all(allowed)
    assert not denied.allowed
    assert denied.retry_after_seconds <= period + 0.000_001
    assert max(kept) <= now_us(client)
    assert limiter.wait("a", timeout=60)
    start_recording(limiter)
    for _ in range(rate + 1):
        limiter.wait("a")
    times = [at for at, allowed in recorded(client) if allowed]
    assert all(later - earlier > period * 1_000_000 for earlier, later in zip(times, times[rate:], strict=False))


def test_clock_put_back_amid_the_calls_is_strict(make: Make, server: Server) -> None:
    """Some calls are ahead, some are not: all count, for a period from now at most."""
    client = server.client()
    limiter = make("RedisRateLimiter", server, "limit", 3, 60)
    now = now_us(client)
    client.rpush(KEY, now + 3_600_000_000, now - 30_000_000)

    first, second = limiter.check("a"), limiter.check("a")

    assert first == (True, 0, 0)
    assert not second.allowed
    assert 50 < second.retry_after_seconds <= 60.000_001


def test_retry_after_is_when_the_window_has_room(make: Make, server: Server) -> None:
    """It ends one microsecond after the oldest call is a period old, whenever one asks."""
    client = server.client()
    limiter = make("RedisRateLimiter", server, "limit", 2, 100)
    now = now_us(client)
    client.rpush(KEY, now - 10_000_000, now - 90_000_000)

    before = now_us(client)
    decision = limiter.check("a")
    after = now_us(client)

    asked = now - 90_000_000 + 100_000_000 + 1 - round(decision.retry_after_seconds * 1_000_000)
    assert decision[:2] == (False, 0)
    assert before <= asked <= after


# -- on a clock that the tests set ------------------------------------------------------------------------------


class Clock:
    """The clock of a fakeredis server, in microseconds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.us = 1_000_000_000_000
        patch.setattr(time, "time", lambda: self.us / 1_000_000)


RATES = st.lists(st.integers(1, 4), min_size=1, max_size=3)
STEPS = st.lists(st.sampled_from([0, 1, 10, 49, 50, 99, 100, 101, 150, 5_000]), max_size=60)


@given(RATES, STEPS)
@settings(deadline=None, max_examples=50)
def test_every_decision_is_the_one_by_definition(rates: list[int], steps: list[int]) -> None:
    """To the microsecond, also where callers with different rates take turns: each is held to its own."""
    with pytest.MonkeyPatch.context() as patch:
        clock, fake = Clock(patch), fakeredis.FakeRedis(decode_responses=True)
        limiters = [RedisRateLimiter("limit", rate, 0.000_1, fake) for rate in rates]
        allowed: list[int] = []

        for n, step in enumerate(steps):
            clock.us += step
            rate = rates[n % len(rates)]
            decision = limiters[n % len(rates)].check("a")

            window = [at for at in allowed if at >= clock.us - 100]
            assert decision.allowed == (len(window) < rate)
            if decision.allowed:
                assert decision == (True, rate - len(window) - 1, 0)
                allowed.append(clock.us)
            else:
                room = window[len(window) - rate] + 100 + 1 - clock.us
                assert decision == (False, 0, room / 1_000_000)
            assert fake.llen(KEY) <= max(rates)


@given(st.integers(1, 4), STEPS, st.data())
@settings(deadline=None, max_examples=50)
def test_clock_that_is_put_back_lets_no_more_through(rate: int, steps: list[int], data: st.DataObject) -> None:
    """However often, and by whatever: never more than `rate` in a true window; denied for a period at most."""
    with pytest.MonkeyPatch.context() as patch:
        clock, fake = Clock(patch), fakeredis.FakeRedis(decode_responses=True)
        limiter = RedisRateLimiter("limit", rate, 0.000_1, fake)
        true_us, allowed = 0, []

        for step in steps:
            true_us += step
            clock.us += step - data.draw(st.sampled_from([0, 0, 0, 1, 60, 3_600_000_000]))
            decision = limiter.check("a")
            if decision.allowed:
                allowed.append(true_us)
            assert decision.retry_after_seconds <= 0.000_101

        assert all(later - earlier > 100 for earlier, later in zip(allowed, allowed[rate:], strict=False))
        clock.us += 101
        assert limiter.is_allowed("a")


# -- waiting ----------------------------------------------------------------------------------------------------


def test_wait_blocks_until_allowed_and_counts_the_call(make: Make, server: Server) -> None:
    """With and without a timeout that is long enough; the calls are a period apart."""
    client = server.client()
    limiter = make("RedisRateLimiter", server, "limit", 1, 0.1)
    start_recording(limiter)

    waited = [limiter.wait("a"), limiter.wait("a"), limiter.wait("a", timeout=30), limiter.wait("a", timeout=math.inf)]

    assert waited == [True] * 4
    assert sum(allowed for _, allowed in recorded(client)) == 4
    assert_exact(recorded(client), 1, 0.1)


@pytest.mark.parametrize(("timeout", "slept"), [(0, []), (20, [20]), (-1, [])])
def test_wait_gives_up_after_the_timeout(
    make: Make, fake: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch, timeout: float, slept: list[float]
) -> None:
    """False, not before the timeout, long before there is room; the call is not counted."""
    sleeps = list[float]()
    monkeypatch.setattr(rate_limiter, "time", SimpleNamespace(monotonic=lambda: 1_000.0 + sum(sleeps)))
    for of_kind in (RedisRateLimiter, AsyncRedisRateLimiter):
        monkeypatch.setattr(of_kind, "sleep", staticmethod(sleeps.append))
    limiter = make("RedisRateLimiter", fake, "limit", 1, 3600)
    limiter.is_allowed("a")

    waited = limiter.wait("a", timeout=timeout)

    assert (waited, sleeps) == (False, slept)
    assert fakeredis.FakeRedis(server=fake).llen(KEY) == 1


def test_wait_without_need_does_not_wait(
    make: Make, fake: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room: no sleep, also with timeout 0."""
    for of_kind in (RedisRateLimiter, AsyncRedisRateLimiter):
        monkeypatch.setattr(of_kind, "sleep", staticmethod(lambda _: pytest.fail("it slept")))
    limiter = make("RedisRateLimiter", fake, "limit", 2, 3600)

    assert limiter.wait("a", timeout=0)
    assert limiter.wait("a")


# -- keys and rates ---------------------------------------------------------------------------------------------


def test_remaining_counts_down(make: Make, fake: fakeredis.FakeServer) -> None:
    """check() says how many calls are left, and 0 seconds as long as it allows one."""
    limiter = make("RedisRateLimiter", fake, "limit", 3, 3600)

    decisions = [limiter.check("a") for _ in range(4)]

    assert decisions[:3] == [(True, 2, 0), (True, 1, 0), (True, 0, 0)]
    assert decisions[3][:2] == (False, 0)
    assert 3500 < decisions[3].retry_after_seconds <= 3600.000_001


def test_limiters_of_one_prefix_count_together(make: Make, fake: fakeredis.FakeServer) -> None:
    """Two objects share a key; other keys and other prefixes have their own calls."""
    one, other = make("RedisRateLimiter", fake, "limit", 2, 3600), make("RedisRateLimiter", fake, "limit", 2, 3600)

    assert [each.is_allowed("a") for each in (one, other, one, other)] == [True, True, False, False]
    assert one.is_allowed("b")
    assert make("RedisRateLimiter", fake, "limit2", 2, 3600).is_allowed("a")


def test_different_rates_on_one_key_are_each_kept(make: Make, server: Server) -> None:
    """All calls count for both; the lower rate is denied first, and told when its own window has room."""
    client = server.client()
    low, high = make("RedisRateLimiter", server, "limit", 2, 3600), make("RedisRateLimiter", server, "limit", 4, 3600)

    decisions = [each.check("a") for each in (low, high, low, high, high, high, low)]

    assert [decision.allowed for decision in decisions] == [True, True, False, True, True, False, False]
    assert [decision.remaining for decision in decisions] == [1, 2, 0, 1, 0, 0, 0]
    times = [int(at) for at in client.lrange(KEY, 0, -1)]
    assert len(times) == 4
    low_asks_again = times[1] + 3600_000_001 - decisions[6].retry_after_seconds * 1_000_000
    high_asks_again = times[3] + 3600_000_001 - decisions[5].retry_after_seconds * 1_000_000
    assert times[0] < high_asks_again < low_asks_again < now_us(client)


ODD = ["", " ", "a b\r\n*1", "ü☃\U0001f600", "{x}", "}{", "*", "a:b", "\x00", "k" * 10_000, "'); return 1 --"]


@pytest.mark.parametrize("key", ODD, ids=lambda key: repr(key[:20]))
def test_odd_keys_are_keys_like_others(make: Make, valkey: Server, key: str) -> None:
    """Whatever is in it, it is one key of its own."""
    client = valkey.client()
    limiter = make("RedisRateLimiter", valkey, f"odd {key}", 1, 3600)

    assert [limiter.is_allowed(key), limiter.is_allowed(key), limiter.is_allowed(key + "'")] == [True, False, True]

    assert sorted(client.keys()) == sorted([f"odd {key}:{key}", f"odd {key}:{key}'"])


WRONG: list[tuple[type[Exception], tuple[Any, ...]]] = [
    *[(ValueError, (prefix,)) for prefix in ("", None, b"limit")],
    *[(ValueError, ("limit", rate)) for rate in (0, -1)],
    *[(TypeError, ("limit", rate)) for rate in (1.5, "10", True, None)],
    *[(ValueError, ("limit", 1, period)) for period in (0, -1, math.nan, math.inf)],
    *[(TypeError, ("limit", 1, period)) for period in ("1", None)],
]


@pytest.mark.parametrize(("error", "arguments"), WRONG, ids=str)
def test_wrong_arguments_are_refused(error: type[Exception], arguments: tuple[Any, ...]) -> None:
    """When the limiter is made, by both classes, with a word on what is expected."""
    for kind in (RedisRateLimiter, AsyncRedisRateLimiter):
        with pytest.raises(error, match="must be"):
            kind(*arguments, redis_client=fakeredis.FakeRedis())


@pytest.mark.parametrize("key", [None, 1, b"a"])
def test_key_must_be_text(make: Make, fake: fakeredis.FakeServer, key: Any) -> None:
    with pytest.raises(TypeError):
        make("RedisRateLimiter", fake, "limit").is_allowed(key)


# -- when Redis is away -----------------------------------------------------------------------------------------


def test_server_that_is_gone_is_redis_unavailable(make: Make, server: Server) -> None:
    """Neither allowed nor denied, from the first use on: the caller decides. It works again when the server is back."""
    limiter = make("RedisRateLimiter", server, "limit", 3, 3600)
    limiter.is_allowed("a")
    server.stop(signal.SIGKILL)

    for call in (limiter.check, limiter.is_allowed, limiter.wait):
        with pytest.raises(RedisUnavailable, match="cannot reach Redis") as caught:
            call("a")
        assert isinstance(caught.value.__cause__, RedisError)
    server.start()

    assert limiter.is_allowed("a")


def test_restarted_server_and_flushed_scripts_are_survived(make: Make, server: Server) -> None:
    """The server forgot the script, which is loaded again; calls made before count if the server kept them."""
    limiter = make("RedisRateLimiter", server, "limit", 3, 3600)

    first = limiter.check("a")
    server.client().script_flush()
    second = limiter.check("a")
    server.stop()
    server.start()
    third, fourth = limiter.check("a"), limiter.check("a")

    assert [decision[:2] for decision in (first, second, third, fourth)] == [
        (True, 2),
        (True, 1),
        (True, 0),
        (False, 0),
    ]


def test_key_of_another_kind_is_an_error(make: Make, server: Server) -> None:
    """Somebody else's string under that name is neither counted nor overwritten."""
    server.client().set(KEY, "mine")

    with pytest.raises(RedisMessagingError, match="WRONGTYPE") as caught:
        make("RedisRateLimiter", server, "limit").is_allowed("a")

    assert not isinstance(caught.value, RedisUnavailable)
    assert server.client().get(KEY) == "mine"


def test_it_runs_on_a_cluster(make: Make, cluster_of_one: str) -> None:
    """Its script has one key."""
    limiter = make("RedisRateLimiter", cluster_of_one, "limit", 3, 3600)

    assert [limiter.is_allowed("a") for _ in range(4)] == [True, True, True, False]


# -- many callers, and clients -----------------------------------------------------------------------------------


def test_100_tasks_get_the_rate_and_no_more(server: Server) -> None:
    """They wait without blocking the event loop, and every decision is exact."""

    async def use() -> tuple[list[bool], int]:
        client = await connect_async(server.url)
        limiter = AsyncRedisRateLimiter("limit", 20, 0.2, client)
        await limiter.check("other")  # connects
        record(limiter)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        waited = await asyncio.gather(*[limiter.wait("a") for _ in range(100)])
        ticking.cancel()
        await client.aclose()
        return waited, ticks

    waited, ticks = asyncio.run(use())

    assert waited == [True] * 100
    assert ticks > 3
    calls = recorded(server.client())
    assert sum(allowed for _, allowed in calls) == 100
    assert_exact(calls, 20, 0.2)


def test_blocking_and_asyncio_limiters_count_together(server: Server) -> None:
    """They run the same script on the same keys."""

    async def use() -> list[Any]:
        client = await connect_async(server.url)
        limiter = AsyncRedisRateLimiter("limit", 2, 3600, client)
        other = RedisRateLimiter("limit", 2, 3600, connect(server.url))
        decisions = [await limiter.check("a"), await asyncio.to_thread(other.check, "a"), await limiter.check("a")]
        await client.aclose()
        return [decision[:2] for decision in decisions]

    assert asyncio.run(use()) == [(True, 1), (True, 0), (False, 0)]


def test_async_limiter_connects_once_for_all_its_tasks(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a client it makes one on first use, also where that is 20 tasks at once."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    made: list[Any] = []

    async def connect_counted(*arguments: Any) -> Any:
        made.append(await connect_async(*arguments))
        return made[-1]

    monkeypatch.setattr("ailf.messaging.redis.client.connect_async", connect_counted)

    async def use() -> list[bool]:
        limiter = AsyncRedisRateLimiter("limit", 20, 3600)
        allowed = await asyncio.gather(*[limiter.is_allowed("a") for _ in range(20)])
        for client in made:
            await client.aclose()
        return allowed

    assert asyncio.run(use()) == [True] * 20
    assert len(made) == 1


def test_one_limiter_serves_many_threads(server: Server) -> None:
    """One object, 20 threads with 10 connections to share: exactly `rate` of 200 calls."""
    limiter = RedisRateLimiter("limit", 50, 3600, connect(server.url))
    allowed: list[bool] = []

    def call() -> None:
        allowed.extend([limiter.is_allowed("a") for _ in range(10)])

    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(allowed), sum(allowed)) == (200, 50)


def test_given_clients_may_be_of_either_kind(valkey: Server) -> None:
    """redis-py's own clients, also those that do not decode, and this package's: all count together."""
    plain = Redis(port=valkey.port, host="127.0.0.1")

    async def use() -> list[bool]:
        client = AsyncRedisClient()
        try:
            return [await AsyncRedisRateLimiter("limit", 3, 3600, client).is_allowed("a") for _ in range(2)]
        finally:
            await client.close()

    assert RedisRateLimiter("limit", 3, 3600, plain).is_allowed("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_URL", valkey.url)
        assert asyncio.run(use()) == [True, True]
        assert RedisRateLimiter("limit", 3, 3600).is_allowed("a") is False
