"""The lock: one holder at a time as judged by its fencing tokens, whoever is killed, stopped or late."""

import asyncio
import math
import signal
import subprocess
import threading
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
    RedisLock,
    RedisMessagingError,
    RedisUnavailable,
    connect,
    connect_async,
)

pytest_plugins = "kinds"

Make = Callable[..., Any]  # make("RedisLock", server, "name"): either kind, as kinds.py has it

Start = Callable[..., "subprocess.Popen[str]"]
Lock = Callable[..., Any]  # lock() -> a RedisLock or AsyncRedisLock "shared" on the test's server
PROGRAM = "tests/messaging/lock_program.py"
KEY, FENCE = "lock:shared", "{lock:shared}:fence"  # of RedisLock("shared")
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def lock(make: Make, server: Server) -> Lock:
    """Another holder each time: lock(), lock(expire=20), lock(auto_renew=True)."""
    return lambda expire=30, **options: make("RedisLock", server, "shared", expire, **options)


@pytest.fixture
def fake_lock(make: Make, fake: fakeredis.FakeServer) -> Lock:
    return lambda expire=30, **options: make("RedisLock", fake, "shared", expire, **options)


def lose(client: Any) -> None:
    """Let a lock expire now, as it would by itself later."""
    client.pexpire(KEY, 1)
    wait_until(lambda: not client.exists(KEY), "the lock has expired")


@pytest.fixture
def renewals(kind: str, loop: asyncio.AbstractEventLoop) -> Callable[[], int]:
    """Count the threads, or tasks, that renew a lock."""
    if kind == "sync":
        return lambda: sum(thread.name.startswith("renew") for thread in threading.enumerate())
    return lambda: sum(task.get_name().startswith("renew") for task in asyncio.all_tasks(loop))


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
def test_no_two_of_many_holders_overlap(server: Server, script: Start, kind: str, each: int) -> None:
    """4 processes, many acquisitions each: one dies while it holds the lock, one is killed anywhere, one is frozen.

    That one comes late: its write is refused, it cannot extend, and it does not release the next holder's lock.
    """
    client, pause_at = server.client(), each // 4

    def start(count: int, *more: str, **options: Any) -> "subprocess.Popen[str]":
        return script(server.url, PROGRAM, "write", kind, str(count), *more, **options)

    dying = start(each, "--die-at", str(each // 10))
    frozen = start(each, "--pause-at", str(pause_at), stdin=subprocess.PIPE)
    killed = start(each)
    programs = [frozen, start(each)]

    def acquired(program: "subprocess.Popen[str]") -> int:
        return len({event.holder for event in history_of(client) if event.holder.startswith(f"{program.pid}:")})

    wait_until(lambda: acquired(killed) > each // 10, "the process to kill is at work")
    killed.kill()
    assert dying.wait(timeout=60) == killed.wait(timeout=60) == -signal.SIGKILL
    programs += [start(each - acquired(gone)) for gone in (dying, killed)]
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


def test_stale_holder_disturbs_nobody(lock: Lock, server: Server) -> None:
    """Its write is refused, extend() raises, release() is False; the new holder keeps the lock and can release it."""
    stale, new, client = lock(), lock(), server.client()
    resource = client.register_script(WRITE)
    stale.acquire()
    lose(client)
    new.acquire()
    mark = client.get(KEY)

    written = [
        bool(resource(keys=["resource", "history"], args=["x", each.fencing_token])) for each in (stale, new, stale)
    ]
    with pytest.raises(LockNotOwned) as caught:
        stale.extend()
    released = stale.release()

    assert written == [True, True, False]
    assert isinstance(caught.value.__cause__, RedisError)
    assert released is False
    assert client.get(KEY) == mark
    assert stale.fencing_token < new.fencing_token
    assert new.release() is True


def test_failed_acquire_disturbs_nothing(lock: Lock, server: Server) -> None:
    """Neither by the object that holds the lock nor by another: same mark, same expiry, same tokens."""
    client = server.client()
    holder, other = lock(), lock()
    holder.acquire()
    token, before = holder.fencing_token, [client.get(KEY), client.pexpiretime(KEY), client.get(FENCE)]

    tries = [each.acquire(retry=1, retry_delay=0) for each in (holder, other, holder)]

    assert tries == [False] * 3
    assert [client.get(KEY), client.pexpiretime(KEY), client.get(FENCE)] == before
    assert (holder.fencing_token, other.fencing_token) == (token, None)
    assert other.release() is False
    holder.extend()
    assert holder.release() is True


def test_release_is_only_for_ones_own(lock: Lock, server: Server) -> None:
    """False before acquire(), after release(), and once it has expired, whether or not somebody else holds it."""
    subject, other = lock(), lock()

    never = subject.release()
    subject.acquire()
    first, second = subject.release(), subject.release()
    subject.acquire()
    lose(server.client())
    expired = subject.release()
    other.acquire()
    others = subject.release()

    assert (never, first, second, expired, others) == (False, True, False, False, False)
    assert other.locked()
    for unheld in (subject, lock()):
        with pytest.raises(LockNotOwned):
            unheld.extend()


def test_blocking_and_asyncio_locks_exclude_each_other(server: Server) -> None:
    """They are the same lock, with one row of tokens."""

    async def use() -> None:
        client = await connect_async(server.url)
        ours, theirs = AsyncRedisLock("shared", 30, client), RedisLock("shared", 30, connect(server.url))
        assert await ours.acquire()
        assert await asyncio.to_thread(theirs.acquire, 0) is False
        assert await ours.release()
        assert await asyncio.to_thread(theirs.acquire, 0) is True
        assert await ours.acquire(retry=0) is False
        assert ours.fencing_token < theirs.fencing_token  # type: ignore[operator]
        await client.aclose()

    asyncio.run(use())


def test_extend_sets_the_expiry_anew(lock: Lock, server: Server) -> None:
    """`expire` seconds from acquire(), and from extend() again; it does not add up."""
    client, subject = server.client(), lock(expire=20)

    subject.acquire()
    acquired = client.pttl(KEY)
    client.pexpire(KEY, 5_000)
    subject.extend()
    subject.extend()

    assert 5_000 < acquired <= 20_000
    assert 5_000 < client.pttl(KEY) <= 20_000
    assert subject.locked()


def test_forgotten_lock_is_free_after_expire(lock: Lock) -> None:
    """Its holder is gone, and the next need not do anything but wait."""
    lock(expire=0.2).acquire()

    assert lock().acquire(retry=10_000, retry_delay=0.01)


def test_one_task_at_a_time_holds_the_lock(server: Server) -> None:
    """20 tasks x 10 acquisitions in one process: each has a greater token than the one before."""

    async def use() -> tuple[int, list[int]]:
        client = await connect_async(server.url)
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
        await client.aclose()
        return most, tokens

    most, tokens = asyncio.run(use())

    assert most == 1
    assert len(tokens) == 200
    assert tokens == sorted(set(tokens))


# -- fencing tokens ---------------------------------------------------------------------------------------------


def test_tokens_grow_over_release_expiry_restart_and_flushall(lock: Lock, server: Server) -> None:
    """Whatever happens between two acquisitions, the later has the greater token."""
    tokens, client = [], server.client()
    for happening in (
        lambda: None,
        lambda: client.delete(KEY),
        lambda: lose(client),
        lambda: client.delete(KEY, FENCE),
        client.flushall,
        lambda: (server.stop(), server.start(), client.delete(KEY)),
        lambda: (client.script_flush(), client.delete(KEY)),
    ):
        happening()
        subject = lock()
        assert subject.acquire()
        tokens.append(subject.fencing_token)

    assert tokens == sorted(set(tokens))
    assert len(tokens) == 7


def test_fence_outlives_its_lock_by_a_day(lock: Lock, server: Server) -> None:
    """So a clock that is put back by less than that cannot make tokens shrink; then the key is gone."""
    subject, client = lock(expire=20), server.client()
    subject.acquire()
    lived = client.pttl(FENCE)
    lose(client)

    assert DAY_MS < lived <= DAY_MS + 20_000
    assert client.get(FENCE) == str(subject.fencing_token)


def test_fence_ahead_of_the_clock_grows_by_one(lock: Lock, server: Server) -> None:
    """The server's clock was put back an hour: tokens go on from the last; later it is the clock's turn again."""
    subject, client = lock(), server.client()
    ahead = (client.time()[0] + 3600) * 1_000_000
    client.set(FENCE, ahead)
    tokens = []

    for _ in range(3):
        subject.acquire()
        tokens.append(subject.fencing_token)
        subject.release()
    client.set(FENCE, 5)
    before = client.time()
    subject.acquire()

    assert tokens == [ahead + 1, ahead + 2, ahead + 3]
    assert client.pttl(FENCE) > DAY_MS
    assert before[0] * 1_000_000 + before[1] <= subject.fencing_token < ahead


# -- auto_renew -------------------------------------------------------------------------------------------------


def now_ms(client: Any) -> int:
    """The server's clock."""
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def test_auto_renew_keeps_the_lock_beyond_expire_and_ends_with_release(
    lock: Lock, server: Server, renewals: Callable[[], int]
) -> None:
    """Nobody gets it meanwhile; after release() it is free, and nothing goes on renewing."""
    subject, other, client = lock(expire=6, auto_renew=True), lock(), server.client()
    subject.acquire()
    mark, over_ms = client.get(KEY), now_ms(client) + 6_000

    got_by_other = []
    wait_until(lambda: got_by_other.append(other.acquire(retry=0)) or now_ms(client) > over_ms, "expire is over")
    kept = client.get(KEY)
    subject.release()

    assert set(got_by_other) == {False}
    assert kept == mark
    assert not subject.locked()
    wait_until(lambda: renewals() == 0, "the renewing has ended")
    assert other.acquire(retry=0)


def test_each_acquisition_is_renewed_once(lock: Lock, renewals: Callable[[], int]) -> None:
    """A failed acquire() starts nothing, release() ends what acquire() began."""
    subject, other = lock(auto_renew=True), lock(auto_renew=True)

    for _ in range(5):
        assert subject.acquire()
        assert not other.acquire(retry=0)
        assert not subject.acquire(retry=0)
        wait_until(lambda: renewals() == 1, "one renews")
        assert subject.release()

    wait_until(lambda: renewals() == 0, "all have ended")


def test_auto_renew_ends_with_its_process(lock: Lock, server: Server, script: Start, kind: str) -> None:
    """kill -9: from then on nobody renews, and the lock is free after `expire`."""
    holder = script(server.url, PROGRAM, "hold", kind, "1.5")
    token = int(holder.stdout.readline())
    client, other = server.client(), lock()
    renewed = client.pexpiretime(KEY)
    wait_until(lambda: client.pexpiretime(KEY) > renewed, "it is renewed")
    assert not other.acquire(retry=0)

    holder.kill()
    holder.wait(timeout=60)
    left, expires = client.pttl(KEY), client.pexpiretime(KEY)

    assert left <= 1500
    assert other.acquire(retry=10_000, retry_delay=0.01)
    assert now_ms(client) >= expires
    assert other.fencing_token > token


def test_auto_renew_survives_a_server_that_is_away(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns, tries again, and the lock that the server kept is renewed."""
    subject = make("RedisLock", valkey, "shared", 9, auto_renew=True)
    subject.acquire()
    expires = valkey.client().pexpiretime(KEY)
    valkey.stop()

    wait_until(lambda: "was not renewed: cannot reach Redis" in caplog.text, "it warns")
    valkey.start()

    wait_until(lambda: valkey.client().pexpiretime(KEY) > expires, "it is renewed")
    assert subject.release()


def test_lock_outlives_one_failed_renewal(make: Make, valkey: Server) -> None:
    """The server refuses writes for longer than the socket waits; the next renewal comes soon enough."""
    subject = make("RedisLock", valkey, "shared", 6, auto_renew=True, config={"socket_timeout": 2})
    assert subject.acquire()
    client = valkey.client()

    client.client_pause(4_600, all=False)  # from the renewal at 2 s: it fails at 4 s, and the third would come at 6 s
    wait_until(lambda: client.pttl(KEY) < 2_000, "a renewal has failed")
    wait_until(lambda: client.pttl(KEY) > 5_000, "it is renewed")

    assert subject.release()


def test_auto_renew_tells_of_a_lost_lock(
    lock: Lock, server: Server, caplog: pytest.LogCaptureFixture, renewals: Callable[[], int]
) -> None:
    """A warning in the log, once; it ends, and does not take the lock from its new holder."""
    subject, other = lock(expire=0.3, auto_renew=True), lock()
    subject.acquire()
    server.client().delete(KEY)
    other.acquire()

    wait_until(lambda: renewals() == 0, "the renewing has ended")

    assert [record.getMessage() for record in caplog.records] == ["lock:shared was lost while it was held"]
    assert subject.release() is False
    assert other.release() is True


def test_release_amid_a_renewal_is_no_error(
    fake_lock: Lock,
    fake: fakeredis.FakeServer,
    kind: str,
    renewals: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The renewing finds the lock given up between two of its steps: it ends, and says nothing."""
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    subject = fake_lock(expire=0.3, auto_renew=True)
    assert not subject.locked()  # connects
    target = getattr(subject, "target", subject)
    extend = target._lock.do_extend

    def release_first(*arguments: Any) -> Any:
        assert target.release()
        return extend(*arguments)

    async def release_first_async(*arguments: Any) -> Any:
        assert await target.release()
        return await extend(*arguments)

    monkeypatch.setattr(target._lock, "do_extend", release_first if kind == "sync" else release_first_async)
    subject.acquire()
    fakeredis.FakeRedis(server=fake).persist(KEY)  # so that the thread may come as late as it likes

    wait_until(lambda: renewals() == 0, "the renewing has ended")

    assert not subject.locked()
    assert (failed, caplog.records) == ([], [])


# -- acquire and its context ------------------------------------------------------------------------------------


def test_retries_are_spread_and_counted(fake_lock: Lock, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`retry` times after the first try, each after half of retry_delay up to all of it."""
    slept: list[float] = []
    for of_kind in (RedisLock, AsyncRedisLock):
        monkeypatch.setattr(of_kind, "sleep", staticmethod(slept.append))
    fake_lock().acquire()
    subject = fake_lock()

    assert subject.acquire() is False
    default, slept[:] = list(slept), []
    assert subject.acquire(retry=50, retry_delay=4) is False
    chosen, slept[:] = list(slept), []
    assert subject.acquire(retry=0) is False

    assert (len(default), len(chosen), slept) == (3, 50, [])
    assert all(0.1 <= delay <= 0.2 for delay in default)
    assert all(2 <= delay <= 4 for delay in chosen)
    assert len(set(chosen)) > 10


def test_acquire_waits_for_the_holder(lock: Lock, server: Server) -> None:
    """A retry gets the lock once it is released."""
    holder, waiting = lock(), lock()
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


def test_context_holds_the_lock_and_releases_it(fake_lock: Lock) -> None:
    """It yields True; an exception of the block passes, after the release."""
    subject = fake_lock()

    with subject.acquire_context() as acquired:
        held = subject.locked()
    after = subject.locked()
    with pytest.raises(KeyError, match="mine"), subject.acquire_context():
        raise KeyError("mine")

    assert (acquired, held, after, subject.locked()) == (True, True, False, False)


def test_context_without_the_lock_leaves_it_to_its_holder(fake_lock: Lock, fake: fakeredis.FakeServer) -> None:
    """It yields False, and neither its end nor its exception releases the other's lock, nor this object's own."""
    holder, other, client = fake_lock(), fake_lock(), fakeredis.FakeRedis(server=fake)
    holder.acquire()
    mark = client.get(KEY)

    for each in (other, holder):
        with each.acquire_context(retry=0) as acquired:
            assert acquired is False
        with pytest.raises(KeyError), each.acquire_context(retry=1, retry_delay=0):
            raise KeyError("mine")

    assert client.get(KEY) == mark
    assert holder.release() is True


def test_context_tells_of_a_lost_lock_on_leaving(fake_lock: Lock, fake: fakeredis.FakeServer) -> None:
    """LockNotOwned, unless the block has an exception of its own, which wins. The new holder keeps the lock."""
    subject, other, client = fake_lock(), fake_lock(), fakeredis.FakeRedis(server=fake)

    for raised in (None, KeyError("mine")):
        client.delete(KEY)
        with pytest.raises(KeyError if raised else LockNotOwned), subject.acquire_context():
            client.delete(KEY)
            assert other.acquire()
            if raised:
                raise raised

    assert other.release() is True


def test_blocks_own_exception_wins_over_a_server_that_is_gone(lock: Lock, server: Server) -> None:
    """Without one, leaving the block raises RedisUnavailable."""
    subject = lock()

    with pytest.raises(KeyError, match="mine"), subject.acquire_context():
        server.stop(signal.SIGKILL)
        raise KeyError("mine")
    server.start()
    server.client().delete(KEY)
    with pytest.raises(RedisUnavailable), subject.acquire_context():
        server.stop(signal.SIGKILL)


def test_cancelled_block_releases_the_lock(fake: fakeredis.FakeServer) -> None:
    """asyncio's way out of a block is an exception like others."""

    async def use() -> bool:
        lock = AsyncRedisLock("shared", 30, fakeredis.FakeAsyncRedis(server=fake, decode_responses=True))
        is_inside = asyncio.Event()

        async def hold() -> None:
            async with lock.acquire_context():
                is_inside.set()
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await is_inside.wait()
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding
        return await lock.locked()

    assert asyncio.run(use()) is False


WRONG: list[tuple[type[Exception], tuple[Any, ...]]] = [
    *[(ValueError, (name,)) for name in ("", None, b"shared")],
    *[(ValueError, ("shared", expire)) for expire in (0, -1, 0.0009, math.nan, math.inf)],
    *[(TypeError, ("shared", expire)) for expire in ("10", None, True)],
]


@pytest.mark.parametrize(("error", "arguments"), WRONG, ids=str)
def test_wrong_arguments_are_refused(error: type[Exception], arguments: tuple[Any, ...]) -> None:
    """When the lock is made, with a word on what is expected."""
    for kind in (RedisLock, AsyncRedisLock):
        with pytest.raises(error, match="must be"):
            kind(*arguments, redis_client=fakeredis.FakeRedis())


@pytest.mark.parametrize(
    ("error", "options"),
    [
        *[(ValueError, option) for option in ({"retry": -1}, {"retry_delay": -0.1}, {"retry_delay": math.nan})],
        *[(TypeError, option) for option in ({"retry": 1.5}, {"retry": None}, {"retry_delay": "1"})],
    ],
    ids=str,
)
def test_wrong_retries_are_refused_before_the_first_try(
    fake_lock: Lock, error: type[Exception], options: dict[str, Any]
) -> None:
    """Nothing is acquired."""
    subject = fake_lock()

    with pytest.raises(error):
        subject.acquire(**options)

    assert not subject.locked()


# -- servers ----------------------------------------------------------------------------------------------------


def test_server_that_is_gone_is_redis_unavailable(lock: Lock, server: Server) -> None:
    """Each method says so, release() too; when the server is back with the lock, it can still be released."""
    subject, fresh = lock(), lock()
    subject.acquire()
    server.stop(signal.SIGTERM)

    for call in (subject.acquire, subject.extend, subject.locked, subject.release, subject.release, fresh.acquire):
        with pytest.raises(RedisUnavailable, match="cannot reach Redis") as caught:
            call()
        assert isinstance(caught.value.__cause__, RedisError)
    server.start()

    assert subject.locked()
    assert subject.release() is True
    assert subject.release() is False


def test_flushed_scripts_are_survived(lock: Lock, server: Server) -> None:
    """The server forgot them, as after a restart: acquire, extend and release load theirs."""
    subject, admin = lock(), server.client()
    for _ in range(2):
        for call in (subject.acquire, lambda: subject.extend() or True, subject.release):
            admin.script_flush()
            assert call()


def test_key_of_another_kind_is_never_ones_own(lock: Lock, server: Server) -> None:
    """Somebody else's list under the lock's name counts as held; only asking further is an error."""
    server.client().rpush(KEY, "mine")
    subject = lock()

    assert subject.acquire(retry=0) is False
    assert subject.release() is False
    with pytest.raises(RedisMessagingError, match="WRONGTYPE"):
        subject.locked()


NAMES = ["shared", "a b\r\n", "ü☃\U0001f600", "{tag}", "user:{42}:x", "{", "{a", "{{a}}", "a{b}c{d}", "*", "k" * 10_000]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a cluster of one node, which refuses to mix slots."""
    yield from serve_cluster_of_one(tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_both_keys_of_any_name_share_a_slot(make: Make, cluster: str, name: str) -> None:
    """Lock and fence, also if the name has a hash tag or half of one."""
    client, subject = connect(cluster), make("RedisLock", cluster, name, 30)

    assert subject.acquire(retry=0)
    keys = [key for key in client.scan_iter() if name in key]
    subject.extend()

    assert len(keys) == 2
    assert f"lock:{name}" in keys
    assert len({client.cluster_keyslot(key) for key in keys}) == 1
    assert subject.release()
    client.delete(*keys)


def test_no_fence_is_another_locks_key(valkey: Server) -> None:
    """Names that look like fences are locks like others."""
    client = connect(valkey.url)
    names = ["a", "a:fence", "{a}", "{a}:fence", "{", "{:fence", "{lock:a}:fence", "fence:lock:{a}"]

    locks = [RedisLock(name, 30, client) for name in names]

    assert [lock.acquire(retry=0) for lock in locks] == [True] * 8
    assert [lock.release() for lock in locks] == [True] * 8


@pytest.mark.parametrize("name", ["a}b", "{}", "}{", "x{}y", "user:}1"])
def test_name_with_braces_that_are_no_hash_tag_is_refused(name: str) -> None:
    """A cluster would put lock and fence into different slots."""
    with pytest.raises(ValueError, match="hash tag"):
        RedisLock(name, redis_client=fakeredis.FakeRedis())


def test_tasks_that_use_a_new_lock_at_once_share_it(server: Server) -> None:
    """The first uses of one object connect once; what one of them acquires, the object can release."""

    async def use() -> list[Any]:
        client = await connect_async(server.url)
        lock = AsyncRedisLock("shared", 30, client)
        got = await asyncio.gather(lock.acquire(retry=0), lock.locked(), lock.acquire(retry=0))
        result = [sorted([got[0], got[2]]), await lock.release(), await lock.locked()]
        await client.aclose()
        return result

    assert asyncio.run(use()) == [[False, True], True, False]


def test_close_ends_the_locks_own_connection(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without a client, it connects by itself, and close() leaves no connection."""
    monkeypatch.setenv("REDIS_URL", valkey.url)

    async def use() -> bool:
        lock = AsyncRedisLock("shared")
        acquired = await lock.acquire()
        await lock.close()
        return acquired

    blocking = RedisLock("shared")
    assert blocking.acquire() and blocking.release()
    blocking.close()
    assert asyncio.run(use())
    wait_until(lambda: len(valkey.client().client_list()) == 1, "only this test is connected")
