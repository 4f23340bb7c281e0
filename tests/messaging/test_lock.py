"""The lock: one holder at a time as judged by its fencing tokens, whoever is killed, stopped or late."""

import asyncio
import contextlib
import logging
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fakeredis
import pytest
from conftest import Server, serve_cluster_of_one, wait_until
from lock_program import WRITE
from redis.exceptions import RedisError

from ailf.messaging.redis import (
    AsyncRedisLock,
    LockNotOwned,
    RedisClient,
    RedisConfig,
    RedisLock,
    RedisMessagingError,
    RedisUnavailable,
    connect,
    connect_async,
)

Start = Callable[..., "subprocess.Popen[str]"]
PROGRAM = "tests/messaging/lock_program.py"
KEY, FENCE = "lock:shared", "{lock:shared}:fence"  # of RedisLock("shared")
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def fake() -> Any:
    return fakeredis.FakeRedis(decode_responses=True)


def lock_on(server: Server, expire: float = 30, auto_renew: bool = False) -> RedisLock:
    return RedisLock("shared", expire, connect(server.url), auto_renew)


def lose(lock: RedisLock) -> None:
    """Let a lock expire now, as it would by itself later."""
    lock.redis.pexpire(KEY, 1)
    wait_until(lambda: not lock.locked(), "the lock has expired")


def renewing_threads() -> int:
    return sum("_renew" in thread.name for thread in threading.enumerate())


def renewing_tasks() -> int:
    return sum("Lock._renew" in repr(task.get_coro()) for task in asyncio.all_tasks())


class Event(NamedTuple):
    """One line of the history that lock_program writes."""

    holder: str  # one acquisition: <process>:<its number>
    token: int
    what: str  # a write that was accepted or refused, or: released, lost, not-extended


def history_of(client: Any) -> list[Event]:
    lines = [line.split() for line in client.lrange("history", 0, -1)]
    return [Event(holder, int(token), what) for holder, token, what in lines]


def assert_no_overlap(history: list[Event]) -> None:
    """Assert that fencing tokens tell all holders apart, and that who released a lock had held it without a break."""
    token_of = {event.holder: event.token for event in history}
    assert len(set(token_of.values())) == len(token_of), "two acquisitions drew the same token"
    numbers = [(*map(int, holder.split(":")), token) for holder, token in token_of.items()]
    for process in {process for process, _, _ in numbers}:
        drawn = [token for of, _, token in sorted(numbers) if of == process]
        assert drawn == sorted(drawn)

    accepted = [event.token for event in history if event.what == "accepted"]
    assert accepted == sorted(accepted), "the resource took a write of a holder that came late"

    for holder in {event.holder for event in history if event.what == "released"}:
        writes = [event for event in history if event.what in ("accepted", "refused")]
        own = [n for n, event in enumerate(writes) if event.holder == holder]
        between = writes[own[0] : own[-1] + 1]
        assert [event.what for event in between if event.holder == holder] == ["accepted", "accepted"]
        assert all(event.what == "refused" for event in between if event.holder != holder), "two held the lock"


# -- what it promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [40, pytest.param(200, marks=pytest.mark.chaos)])
def test_no_two_of_many_holders_overlap(server: Server, script: Start, each: int) -> None:
    """4 processes, many acquisitions each: one dies while it holds the lock, one is killed anywhere, one is frozen.

    That one comes late: its write is refused, it cannot extend, and it does not release the next holder's lock.
    """
    client, pause_at = server.client(), each // 4
    dying = script(server.url, PROGRAM, "write", str(each), "--die-at", str(each // 10))
    frozen = script(server.url, PROGRAM, "write", str(each), "--pause-at", str(pause_at), stdin=subprocess.PIPE)
    killed = script(server.url, PROGRAM, "write", str(each))
    programs = [frozen, script(server.url, PROGRAM, "write", str(each))]

    def acquired(program: "subprocess.Popen[str]") -> int:
        return len({event.holder for event in history_of(client) if event.holder.startswith(f"{program.pid}:")})

    wait_until(lambda: acquired(killed) > each // 10, "the process to kill is at work")
    killed.kill()
    assert dying.wait(timeout=60) == killed.wait(timeout=60) == -signal.SIGKILL
    programs += [script(server.url, PROGRAM, "write", str(each - acquired(gone))) for gone in (dying, killed)]
    assert frozen.stdout.readline() == "holding\n"
    frozen.send_signal(signal.SIGSTOP)
    late = f"{frozen.pid}:{pause_at}"
    stale = next(event.token for event in history_of(client) if event.holder == late)
    wait_until(lambda: history_of(client)[-1].token > stale, "somebody else has the lock")
    print(file=frozen.stdin, flush=True)
    frozen.send_signal(signal.SIGCONT)
    ended = [program.communicate(timeout=60) for program in programs]

    history = history_of(client)
    assert [error for _, error in ended] == [""] * 4
    assert [program.returncode for program in programs] == [0] * 4
    assert len({event.holder for event in history}) >= 4 * each
    assert [event.what for event in history if event.holder == late] == ["accepted", "not-extended", "refused", "lost"]
    assert sum(event.what == "released" for event in history) > 3 * each
    assert_no_overlap(history)


def test_stale_holder_disturbs_nobody(server: Server) -> None:
    """Its write is refused, extend() raises, release() is False; the new holder keeps the lock and can release it."""
    stale, new = lock_on(server), lock_on(server)
    resource = server.client().register_script(WRITE)
    stale.acquire()
    lose(stale)
    new.acquire()
    mark = server.client().get(KEY)

    written = [
        bool(resource(keys=["resource", "history"], args=["x", lock.fencing_token])) for lock in (stale, new, stale)
    ]
    with pytest.raises(LockNotOwned) as caught:
        stale.extend()
    released = stale.release()

    assert written == [True, True, False]
    assert isinstance(caught.value.__cause__, RedisError)
    assert released is False
    assert server.client().get(KEY) == mark
    assert stale.fencing_token < new.fencing_token
    assert new.release() is True


def test_failed_acquire_disturbs_nothing(server: Server) -> None:
    """Neither by the object that holds the lock nor by another: same mark, same expiry, same tokens."""
    client = server.client()
    holder, other = lock_on(server), lock_on(server)
    holder.acquire()
    token, before = holder.fencing_token, [client.get(KEY), client.pexpiretime(KEY), client.get(FENCE)]

    tries = [lock.acquire(retry=1, retry_delay=0) for lock in (holder, other, holder)]

    assert tries == [False] * 3
    assert [client.get(KEY), client.pexpiretime(KEY), client.get(FENCE)] == before
    assert (holder.fencing_token, other.fencing_token) == (token, None)
    assert other.release() is False
    holder.extend()
    assert holder.release() is True


def test_release_is_only_for_ones_own(server: Server) -> None:
    """False before acquire(), after release(), and once it has expired, whether or not somebody else holds it."""
    lock, other = lock_on(server), lock_on(server)

    never = lock.release()
    lock.acquire()
    first, second = lock.release(), lock.release()
    lock.acquire()
    lose(lock)
    expired = lock.release()
    other.acquire()
    others = lock.release()

    assert (never, first, second, expired, others) == (False, True, False, False, False)
    assert other.locked()
    for unheld in (lock, lock_on(server)):
        with pytest.raises(LockNotOwned):
            unheld.extend()


def test_lock_expires_and_extend_puts_that_off(server: Server) -> None:
    """`expire` seconds from acquire(), and from extend() again; it does not add up."""
    client, lock = server.client(), lock_on(server, expire=20)

    lock.acquire()
    acquired = client.pttl(KEY)
    client.pexpire(KEY, 5_000)
    lock.extend()
    lock.extend()
    extended = client.pttl(KEY)

    assert 5_000 < acquired <= 20_000
    assert 5_000 < extended <= 20_000
    assert lock.locked()


def test_forgotten_lock_is_free_after_expire(server: Server) -> None:
    """Its holder is gone, and the next need not do anything but wait."""
    lock_on(server, expire=0.2).acquire()

    other = lock_on(server)

    assert other.acquire(retry=10_000, retry_delay=0.01)


# -- fencing tokens ---------------------------------------------------------------------------------------------


def test_tokens_grow_over_release_expiry_restart_and_flushall(server: Server) -> None:
    """Whatever happens between two acquisitions, the later has the greater token; every lock has its own."""
    tokens, client = [], server.client()

    def acquire() -> None:
        lock = lock_on(server)
        assert lock.acquire()
        tokens.append(lock.fencing_token)

    acquire()
    for happening in (
        lambda: client.delete(KEY),
        lambda: lose(lock_on(server)),
        lambda: client.delete(KEY, FENCE),
        client.flushall,
        lambda: (server.stop(), server.start(), client.delete(KEY)),
        lambda: (client.script_flush(), client.delete(KEY)),
    ):
        happening()
        acquire()

    assert tokens == sorted(set(tokens))
    assert len(tokens) == 7


def test_fence_outlives_its_lock_by_a_day(server: Server) -> None:
    """So a clock that is put back by less than that cannot make tokens shrink; then the key is gone."""
    lock, client = lock_on(server, expire=20), server.client()
    lock.acquire()
    lived = client.pttl(FENCE)
    lose(lock)

    assert DAY_MS < lived <= DAY_MS + 20_000
    assert client.get(FENCE) == str(lock.fencing_token)


def test_fence_ahead_of_the_clock_grows_by_one(server: Server) -> None:
    """The server's clock was put back an hour: tokens go on from the last; later it is the clock's turn again."""
    lock, client = lock_on(server), server.client()
    ahead = (client.time()[0] + 3600) * 1_000_000
    client.set(FENCE, ahead)
    tokens = []

    for _ in range(3):
        lock.acquire()
        tokens.append(lock.fencing_token)
        lock.release()
    client.set(FENCE, 5)
    before = client.time()
    lock.acquire()

    assert tokens == [ahead + 1, ahead + 2, ahead + 3]
    assert client.pttl(FENCE) > DAY_MS
    assert before[0] * 1_000_000 + before[1] <= lock.fencing_token < ahead


# -- auto_renew -------------------------------------------------------------------------------------------------


def now_ms(client: Any) -> int:
    """The server's clock."""
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def test_auto_renew_keeps_the_lock_beyond_expire_and_ends_with_release(server: Server) -> None:
    """Nobody gets it meanwhile; after release() it is free, and nothing goes on renewing."""
    lock, other = lock_on(server, expire=6, auto_renew=True), lock_on(server)
    lock.acquire()
    mark, over_ms = lock.redis.get(KEY), now_ms(lock.redis) + 6_000

    got_by_other = []
    wait_until(lambda: got_by_other.append(other.acquire(retry=0)) or now_ms(lock.redis) > over_ms, "expire is over")
    kept = lock.redis.get(KEY)
    lock.release()

    assert set(got_by_other) == {False}
    assert kept == mark
    assert not lock.locked()
    wait_until(lambda: renewing_threads() == 0, "the thread has ended")
    assert other.acquire(retry=0)


def test_each_acquisition_has_one_renewing_thread(server: Server) -> None:
    """A failed acquire() starts none, release() ends the one."""
    lock = lock_on(server, auto_renew=True)
    other = lock_on(server, auto_renew=True)

    for _ in range(5):
        assert lock.acquire()
        assert not other.acquire(retry=0)
        assert not lock.acquire(retry=0)
        wait_until(lambda: renewing_threads() == 1, "one thread renews")
        assert lock.release()

    wait_until(lambda: renewing_threads() == 0, "all threads have ended")


def test_auto_renew_ends_with_its_process(server: Server, script: Start) -> None:
    """kill -9: from then on nobody renews, and the lock is free after `expire`."""
    holder = script(server.url, PROGRAM, "hold", "1.5")
    token = int(holder.stdout.readline())
    client, other = server.client(), lock_on(server)
    renewed = client.pexpiretime(KEY)
    wait_until(lambda: client.pexpiretime(KEY) > renewed, "it is renewed")
    assert not other.acquire(retry=0)

    holder.kill()
    holder.wait(timeout=60)
    left, expires = client.pttl(KEY), client.pexpiretime(KEY)

    assert left <= 1500
    assert other.acquire(retry=10_000, retry_delay=0.01)
    assert client.time()[0] * 1000 + client.time()[1] // 1000 >= expires
    assert other.fencing_token > token


def test_auto_renew_survives_a_server_that_is_away(valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """It warns, tries again, and the lock that the server kept is renewed."""
    lock = lock_on(valkey, expire=9, auto_renew=True)
    lock.acquire()
    expires = lock.redis.pexpiretime(KEY)
    valkey.stop()

    wait_until(lambda: "was not renewed: cannot reach Redis" in caplog.text, "it warns")
    valkey.start()

    wait_until(lambda: valkey.client().pexpiretime(KEY) > expires, "it is renewed")
    assert lock.release()


def test_auto_renew_tells_of_a_lost_lock(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A warning in the log, once; the thread ends, and does not take the lock from its new holder."""
    lock, other = lock_on(server, expire=0.3, auto_renew=True), lock_on(server)
    lock.acquire()
    lock.redis.delete(KEY)
    other.acquire()

    wait_until(lambda: renewing_threads() == 0, "the thread has ended")

    assert [record.getMessage() for record in caplog.records] == ["lock:shared was lost while it was held"]
    assert lock.release() is False
    assert other.release() is True


def test_release_amid_a_renewal_is_no_error(fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The thread finds the lock given up between two of its steps: it ends, and says nothing."""
    failed: list[Any] = []
    lock = RedisLock("shared", 0.3, fake, auto_renew=True)
    extend = lock._lock.do_extend

    def release_first(*arguments: Any) -> Any:
        assert lock.release()
        return extend(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failed.append)
        patch.setattr(lock._lock, "do_extend", release_first)
        lock.acquire()
        fake.persist(KEY)  # so that the thread may come as late as it likes
        wait_until(lambda: renewing_threads() == 0, "the thread has ended")

    assert not lock.locked()
    assert (failed, caplog.records) == ([], [])


# -- acquire and its context ------------------------------------------------------------------------------------


def test_retries_are_spread_and_counted(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`retry` times after the first try, each after half of retry_delay up to all of it."""
    slept: list[float] = []
    here, sleep = threading.current_thread(), time.sleep

    def record(seconds: float) -> None:  # of this thread: earlier tests may have left others
        (slept.append if threading.current_thread() is here else sleep)(seconds)

    monkeypatch.setattr(time, "sleep", record)
    RedisLock("shared", redis_client=fake).acquire()
    slept.clear()
    lock = RedisLock("shared", redis_client=fake)

    assert lock.acquire() is False
    default, slept[:] = list(slept), []
    assert lock.acquire(retry=50, retry_delay=4) is False
    chosen, slept[:] = list(slept), []
    assert lock.acquire(retry=0) is False

    assert (len(default), len(chosen), slept) == (3, 50, [])
    assert all(0.1 <= delay <= 0.2 for delay in default)
    assert all(2 <= delay <= 4 for delay in chosen)
    assert len(set(chosen)) > 10


def test_acquire_waits_for_the_holder(server: Server) -> None:
    """A retry gets the lock once it is released."""
    holder, waiting = lock_on(server), lock_on(server)
    holder.acquire()
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(waiting.acquire(retry=100_000, retry_delay=0.01)))
    thread.start()
    calls = server.client().info("commandstats")["cmdstat_evalsha"]["calls"]
    wait_until(lambda: server.client().info("commandstats")["cmdstat_evalsha"]["calls"] > calls, "it tries")

    assert got == []
    holder.release()
    thread.join(timeout=60)

    assert got == [True]
    assert waiting.fencing_token > holder.fencing_token


def test_context_holds_the_lock_and_releases_it(fake: Any) -> None:
    """It yields True; an exception of the block passes, after the release."""
    lock = RedisLock("shared", redis_client=fake)

    with lock.acquire_context() as acquired:
        held = lock.locked()
    after = lock.locked()
    with pytest.raises(KeyError, match="mine"), lock.acquire_context():
        raise KeyError("mine")

    assert (acquired, held, after, lock.locked()) == (True, True, False, False)


def test_context_without_the_lock_leaves_it_to_its_holder(fake: Any) -> None:
    """It yields False, and neither its end nor its exception releases the other's lock, nor this object's own."""
    holder, other = RedisLock("shared", redis_client=fake), RedisLock("shared", redis_client=fake)
    holder.acquire()
    mark = fake.get(KEY)

    for lock in (other, holder):
        with lock.acquire_context(retry=0) as acquired:
            assert acquired is False
        with pytest.raises(KeyError), lock.acquire_context(retry=1, retry_delay=0):
            raise KeyError("mine")

    assert fake.get(KEY) == mark
    assert holder.release() is True


def test_context_tells_of_a_lost_lock_on_leaving(fake: Any) -> None:
    """LockNotOwned, unless the block has an exception of its own, which wins. The new holder keeps the lock."""
    lock, other = RedisLock("shared", redis_client=fake), RedisLock("shared", redis_client=fake)

    for raised in (None, KeyError("mine")):
        fake.delete(KEY)
        with pytest.raises(KeyError if raised else LockNotOwned), lock.acquire_context():
            fake.delete(KEY)
            assert other.acquire()
            if raised:
                raise raised

    assert other.release() is True


def test_blocks_own_exception_wins_over_a_server_that_is_gone(server: Server) -> None:
    """Without one, leaving the block raises RedisUnavailable."""
    lock = lock_on(server)

    with pytest.raises(KeyError, match="mine"), lock.acquire_context():
        server.stop(signal.SIGKILL)
        raise KeyError("mine")
    server.start()
    server.client().delete(KEY)
    with pytest.raises(RedisUnavailable), lock.acquire_context():
        server.stop(signal.SIGKILL)


WRONG: list[tuple[type[Exception], tuple[Any, ...]]] = [
    (ValueError, ("",)),
    (ValueError, (None,)),
    (ValueError, (b"shared",)),
    (ValueError, ("shared", 0)),
    (ValueError, ("shared", -1)),
    (ValueError, ("shared", 0.0009)),
    (ValueError, ("shared", math.nan)),
    (ValueError, ("shared", math.inf)),
    (TypeError, ("shared", "10")),
    (TypeError, ("shared", None)),
    (TypeError, ("shared", True)),
]


@pytest.mark.parametrize(("error", "arguments"), WRONG, ids=str)
def test_wrong_arguments_are_refused(fake: Any, error: type[Exception], arguments: tuple[Any, ...]) -> None:
    """When the lock is made, by both classes, with a word on what is expected."""
    for kind in (RedisLock, AsyncRedisLock):
        with pytest.raises(error, match="must be"):
            kind(*arguments, redis_client=fake)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"retry": -1}),
        (ValueError, {"retry_delay": -0.1}),
        (ValueError, {"retry_delay": math.nan}),
        (TypeError, {"retry": 1.5}),
        (TypeError, {"retry": None}),
        (TypeError, {"retry_delay": "1"}),
    ],
    ids=str,
)
def test_wrong_retries_are_refused_before_the_first_try(
    fake: Any, error: type[Exception], options: dict[str, Any]
) -> None:
    """Nothing is acquired, by either class."""
    lock = RedisLock("shared", redis_client=fake)
    async_lock = AsyncRedisLock("shared", redis_client=fakeredis.FakeAsyncRedis(decode_responses=True))

    with pytest.raises(error):
        lock.acquire(**options)
    with pytest.raises(error):
        asyncio.run(async_lock.acquire(**options))

    assert not lock.locked()


# -- servers ----------------------------------------------------------------------------------------------------


def test_server_that_is_gone_is_redis_unavailable(server: Server) -> None:
    """Each method says so, release() too; when the server is back with the lock, it can still be released."""
    lock = lock_on(server)
    lock.acquire()
    server.stop(signal.SIGTERM)

    for call in (lock.acquire, lock.extend, lock.locked, lock.release, lock.release):
        with pytest.raises(RedisUnavailable, match="cannot reach Redis") as caught:
            call()
        assert isinstance(caught.value.__cause__, RedisError)
    server.start()

    assert lock.locked()
    assert lock.release() is True
    assert lock.release() is False


def test_flushed_scripts_are_survived(server: Server) -> None:
    """The server forgot them, as after a restart: acquire, extend and release load theirs."""
    lock, admin = lock_on(server), server.client()
    for _ in range(2):
        admin.script_flush()
        assert lock.acquire()
        admin.script_flush()
        lock.extend()
        admin.script_flush()
        assert lock.release()


def test_key_of_another_kind_is_never_ones_own(server: Server) -> None:
    """Somebody else's list under the lock's name counts as held; only asking further is an error."""
    server.client().rpush(KEY, "mine")
    lock = lock_on(server)

    assert lock.acquire(retry=0) is False
    assert lock.release() is False
    with pytest.raises(RedisMessagingError, match="WRONGTYPE"):
        lock.locked()


NAMES = ["shared", "a b\r\n", "ü☃\U0001f600", "{tag}", "user:{42}:x", "{", "{a", "{{a}}", "a{b}c{d}", "*", "k" * 10_000]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a cluster of one node, which refuses to mix slots."""
    yield from serve_cluster_of_one(tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_both_keys_of_any_name_share_a_slot(cluster: str, name: str) -> None:
    """Lock and fence, also where the name has a hash tag or half of one; and by both classes."""
    client = connect(cluster)
    lock = RedisLock(name, 30, client)

    async def compete() -> tuple[Any, ...]:
        async_client = await connect_async(cluster)
        try:
            other = AsyncRedisLock(name, 30, async_client)
            first = await other.acquire(retry=0)
            lock.extend()
            lock.release()
            return first, await other.acquire(retry=0), other.fencing_token, await other.release()
        finally:
            await async_client.aclose()

    assert lock.acquire()
    keys = [key for key in client.scan_iter() if name in key]
    first, second, token, released = asyncio.run(compete())

    assert len(keys) == 2
    assert f"lock:{name}" in keys
    assert len({client.cluster_keyslot(key) for key in keys}) == 1
    assert (first, second, released) == (False, True, True)
    assert token > lock.fencing_token
    client.delete(*keys)


def test_no_fence_is_another_locks_key(valkey: Server) -> None:
    """Names that look like fences are locks like others."""
    client = connect(valkey.url)
    names = ["a", "a:fence", "{a}", "{a}:fence", "{", "{:fence", "{lock:a}:fence", "fence:lock:{a}"]

    locks = [RedisLock(name, 30, client) for name in names]

    assert [lock.acquire(retry=0) for lock in locks] == [True] * 8
    assert [lock.release() for lock in locks] == [True] * 8


@pytest.mark.parametrize("name", ["a}b", "{}", "}{", "x{}y", "user:}1"])
def test_name_with_braces_that_are_no_hash_tag_is_refused(fake: Any, name: str) -> None:
    """A cluster would put lock and fence into different slots."""
    with pytest.raises(ValueError, match="hash tag"):
        RedisLock(name, redis_client=fake)


def test_lock_outlives_one_failed_renewal(valkey: Server) -> None:
    """The server refuses writes for longer than the socket waits; the next renewal comes soon enough."""
    lock = RedisLock("shared", 6, RedisClient(RedisConfig(port=valkey.port, socket_timeout=2)), auto_renew=True)
    assert lock.acquire()
    client = valkey.client()

    client.client_pause(4_600, all=False)  # from the renewal at 2 s: it fails at 4 s, and the third would come at 6 s
    wait_until(lambda: client.pttl("lock:shared") < 2_000, "a renewal has failed")
    wait_until(lambda: client.pttl("lock:shared") > 5_000, "it is renewed")

    assert lock.release()


# -- asyncio ----------------------------------------------------------------------------------------------------


def with_client(server: Server, use: Callable[[Any], Any]) -> Any:
    """Run a coroutine function with a redis.asyncio client for the server; return its result."""

    async def run() -> Any:
        client = await connect_async(server.url)
        try:
            return await use(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


async def wait_until_async(predicate: Callable[[], Any], what: str) -> None:
    """wait_until(), for a predicate that is a coroutine function."""
    async with asyncio.timeout(60):
        while not await predicate():
            await asyncio.sleep(0.02)


def test_no_two_tasks_hold_the_lock(server: Server) -> None:
    """20 tasks x 10 acquisitions: one at a time, each with a greater token than the one before."""

    async def use(client: Any) -> tuple[int, list[int]]:
        inside, most, tokens = 0, 0, []

        async def work() -> None:
            nonlocal inside, most
            lock = AsyncRedisLock("shared", 30, client)
            for _ in range(10):
                async with lock.acquire_context(retry=100_000, retry_delay=0.01) as acquired:
                    assert acquired
                    inside += 1
                    most = max(most, inside)
                    tokens.append(lock.fencing_token)
                    await client.ping()
                    inside -= 1

        await asyncio.gather(*[work() for _ in range(20)])
        return most, tokens

    most, tokens = with_client(server, use)

    assert most == 1
    assert len(tokens) == 200
    assert tokens == sorted(set(tokens))


def test_async_stale_holder_and_failed_acquire_disturb_nobody(server: Server) -> None:
    """As with RedisLock, and with the two against each other."""

    async def use(client: Any) -> None:
        stale, new = AsyncRedisLock("shared", 30, client), AsyncRedisLock("shared", 30, client)
        assert stale.fencing_token is None
        assert await stale.release() is False
        assert await stale.acquire()
        await client.delete(KEY)
        assert await new.acquire()
        mark = await client.get(KEY)

        with pytest.raises(LockNotOwned):
            await stale.extend()
        assert await stale.release() is False
        assert [await lock.acquire(retry=1, retry_delay=0) for lock in (stale, new)] == [False, False]
        assert await asyncio.to_thread(lock_on(server).acquire, 0) is False

        assert await client.get(KEY) == mark
        assert stale.fencing_token < new.fencing_token
        await new.extend()
        assert await new.locked()
        assert await new.release() is True
        assert await new.release() is False
        assert not await new.locked()

    with_client(server, use)


def test_async_context_keeps_the_same_promises(server: Server) -> None:
    """False where not got, LockNotOwned where lost, and the block's own exception wins."""

    async def use(client: Any) -> None:
        lock, other = AsyncRedisLock("shared", 30, client), AsyncRedisLock("shared", 30, client)
        async with lock.acquire_context() as acquired:
            assert acquired is True
            async with other.acquire_context(retry=0) as second:
                assert second is False
            assert await lock.locked()
        assert not await lock.locked()
        with pytest.raises(LockNotOwned):
            async with lock.acquire_context():
                await client.delete(KEY)
                assert await other.acquire()
        with pytest.raises(KeyError):
            async with lock.acquire_context(retry=0):
                raise KeyError("not got")
        assert await other.release() is True
        with pytest.raises(KeyError):
            async with lock.acquire_context():
                await client.delete(KEY)
                raise KeyError("mine")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), lock.acquire_context():
                await asyncio.sleep(60)
        assert not await lock.locked()

    with_client(server, use)


def test_async_auto_renew_keeps_the_lock_and_ends(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond expire; it ends with release(), and where the lock was lost, which it logs."""

    async def use(client: Any) -> None:
        lock, other = AsyncRedisLock("shared", 6, client, auto_renew=True), AsyncRedisLock("shared", 30, client)
        assert await lock.acquire()
        mark, over = await client.get(KEY), (await client.time())[0] + 7

        async def expire_is_over() -> bool:
            assert not await other.acquire(retry=0)
            assert not await lock.acquire(retry=0)
            return (await client.time())[0] > over

        async def has_ended() -> bool:
            return renewing_tasks() == 0

        await wait_until_async(expire_is_over, "expire is over")
        assert await client.get(KEY) == mark
        assert renewing_tasks() == 1
        assert await lock.release()
        assert await other.acquire(retry=0)
        assert await other.release()
        await wait_until_async(has_ended, "the task has ended")

        assert await lock.acquire()
        await client.delete(KEY)
        assert await other.acquire()

        await wait_until_async(has_ended, "the task has ended")
        assert await lock.release() is False
        assert await other.release() is True

    with caplog.at_level(logging.WARNING):
        with_client(server, use)

    assert [record.getMessage() for record in caplog.records] == ["lock:shared was lost while it was held"]


def test_async_release_amid_a_renewal_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The task ends and says nothing, also where the cancellation is swallowed, as by wait_for in Python 3.11."""

    async def use() -> None:
        client = fakeredis.FakeAsyncRedis(decode_responses=True)
        lock, renewing = AsyncRedisLock("shared", 0.03, client, auto_renew=True), asyncio.Event()

        async def swallow(*_: object) -> bool:
            renewing.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            return True

        assert await lock.acquire()
        await client.persist(KEY)  # so that the task may come as late as it likes
        assert lock._lock is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock._lock, "do_extend", swallow)
            await renewing.wait()
            assert await lock.release()

        async def has_ended() -> bool:
            return renewing_tasks() == 0

        await wait_until_async(has_ended, "the task has ended")

    asyncio.run(use())

    assert caplog.records == []


def test_async_server_that_is_gone_is_redis_unavailable(server: Server) -> None:
    """Before the first use as after it; when the server is back with the lock, it can still be released."""

    async def use(client: Any) -> None:
        lock = AsyncRedisLock("shared", 30, client)
        assert await lock.acquire()
        await client.script_flush()
        await lock.extend()
        server.stop(signal.SIGTERM)
        for call in (lock.acquire, lock.extend, lock.locked, lock.release, lock.release):
            with pytest.raises(RedisUnavailable, match="cannot reach Redis"):
                await call()
        with pytest.raises(RedisUnavailable, match="cannot reach Redis"):
            await AsyncRedisLock("shared").acquire()
        server.start()
        assert await lock.release() is True

    with_client(server, use)


def test_tasks_that_use_a_new_lock_at_once_share_it(server: Server) -> None:
    """The first uses of one object connect once; what one of them acquires, the object can release."""

    async def use(client: Any) -> list[Any]:
        lock = AsyncRedisLock("shared", 30, client)
        got = await asyncio.gather(lock.acquire(retry=0), lock.locked(), lock.acquire(retry=0))
        return [sorted([got[0], got[2]]), await lock.release(), await lock.locked()]

    assert with_client(server, use) == [[False, True], True, False]


def test_close_ends_the_locks_own_connection(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without a client, it connects by itself, and close() leaves no connection."""
    monkeypatch.setenv("REDIS_URL", valkey.url)

    async def use() -> bool:
        lock = AsyncRedisLock("shared")
        acquired = await lock.acquire()
        await lock.close()
        return acquired

    assert asyncio.run(use())
    wait_until(lambda: len(valkey.client().client_list()) == 1, "only this test is connected")
