"""RedisClient and AsyncRedisClient: the everyday commands, and errors that are clear."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, wait_until
from redis import Redis, exceptions

from ailf.messaging.redis import (
    AsyncRedisClient,
    AsyncRedisPubSub,
    RedisClient,
    RedisConfig,
    RedisMessagingError,
    RedisPubSub,
    RedisUnavailable,
    embedded,
)

VALUES = [
    {"a": [1, 2.5, {"b": None}], "é": "\U0001f600"},
    {},
    [],
    [1, "1", None],
    "text",
    "",
    "7",
    '{"a": 1}',
    0,
    -7,
    2**70,
    0.1,
    True,
    False,
    None,
]


pytest_plugins = "kinds"

Make = Callable[..., Any]  # make(config) -> a connected RedisClient, or an AsyncRedisClient as plain calls


@pytest.fixture
def make(plain: Callable[[Any], Any], kind: str) -> Make:
    def new(config: RedisConfig | None = None) -> Any:
        client = plain(RedisClient(config) if kind == "sync" else AsyncRedisClient(config))
        client.connect()
        return client

    return new


def config_of(server: Server, **options: Any) -> RedisConfig:
    return RedisConfig(**{"host": "127.0.0.1", "port": server.port, **options})


@pytest.fixture
def client(make: Make, valkey: Server) -> Any:
    return make(config_of(valkey))


# -- the commands -----------------------------------------------------------------------------------------------


def test_text_is_kept_under_a_key(client: Any) -> None:
    """set, get, exists and delete say what there was."""
    assert client.get("a") is None
    assert client.exists("a") is False

    assert client.set("a", "1") is True
    assert client.set("b", 2) is True

    assert client.get("a") == "1"
    assert client.get("b") == "2"
    assert client.exists("a") is True
    assert client.delete("a", "b", "c") is True
    assert client.delete("a") is False
    assert client.exists("a") is False


def test_key_expires(client: Any, valkey: Server) -> None:
    """expire is in seconds, and may be a fraction; without it a key stays, also if it expired before."""
    client.set("long", "1", expire=100)
    client.set("short", "1", expire=0.05)
    client.set_json("json", [1], expire=100)
    client.set("kept", "1", expire=100)
    client.set("kept", "2")

    admin = valkey.client()
    assert 90_000 < admin.pttl("long") <= 100_000
    assert 90_000 < admin.pttl("json") <= 100_000
    assert admin.pttl("kept") == -1
    wait_until(lambda: client.get("short") is None, "the key expired")


@pytest.mark.parametrize(("expire", "error"), [(0, ValueError), (-1, ValueError), ("5", TypeError), (True, TypeError)])
def test_bad_expire_is_the_callers_mistake(client: Any, expire: Any, error: type[Exception]) -> None:
    """And nothing is set."""
    with pytest.raises(error, match="expire"):
        client.set("a", "1", expire=expire)

    assert client.exists("a") is False


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_value_comes_back(client: Any, value: Any) -> None:
    """Equal, and of the same type."""
    client.set_json("a", value)

    got = client.get_json("a")
    assert got == value
    assert type(got) is type(value)


def test_json_that_is_none(client: Any) -> None:
    """No key is None; a key that holds no JSON is a ValueError, not None."""
    client.set("a", "no JSON")

    assert client.get_json("missing") is None
    with pytest.raises(ValueError):
        client.get_json("a")
    for value in (float("nan"), {1, 2}, b"bytes"):
        with pytest.raises((ValueError, TypeError)):
            client.set_json("b", value)
    assert client.exists("b") is False


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_published_value_arrives(client: Any, valkey: Server, value: Any) -> None:
    """publish says how many received it, and a RedisPubSub gets what was published."""
    got: list[Any] = []
    with RedisPubSub(valkey.client()) as pubsub:
        pubsub.subscribe("channel", got.append)
        pubsub.run_in_thread()

        assert client.publish("channel", value) == 1
        wait_until(lambda: got, "it arrived")

    assert client.publish("channel", value) == 0
    assert got == [value]
    assert type(got[0]) is type(value)


def test_redis_py_is_at_hand(client: Any, valkey: Server) -> None:
    """client is redis-py's own, and config is what was given."""
    assert client.config == config_of(valkey)
    assert client.client.connection_pool.connection_kwargs["port"] == valkey.port


def test_health_is_told(client: Any, valkey: Server) -> None:
    """True while the server answers, False without an exception while it does not, True again after that."""
    assert client.health_check() is True

    valkey.stop(signal.SIGKILL)
    assert client.health_check() is False

    valkey.start()
    assert client.health_check() is True


def test_health_of_what_was_never_reached() -> None:
    """The async class connects on first use, so that may be health_check()."""
    assert asyncio.run(AsyncRedisClient(RedisConfig("127.0.0.1", 1)).health_check()) is False


def test_closed_client_connects_again(client: Any, valkey: Server) -> None:
    """close() closes the connections, twice does no harm, and the next call opens one."""
    client.set("a", "1")
    client.close()
    client.close()
    admin = valkey.client()
    wait_until(lambda: len(admin.client_list()) == 1, "only the test's own connection is left")

    assert client.get("a") == "1"
    client.connect()
    assert client.get("a") == "1"


def test_context_manager_closes(valkey: Server) -> None:
    """Both are context managers, and leave no connection behind."""

    async def use() -> Any:
        async with AsyncRedisClient(config_of(valkey)) as client:
            await client.set("b", "2")
            return client.client is not None

    with RedisClient(config_of(valkey)) as client:
        client.set("a", "1")
    assert asyncio.run(use())

    admin = valkey.client()
    wait_until(lambda: len(admin.client_list()) == 1, "only the test's own connection is left")
    assert admin.mget("a", "b") == ["1", "2"]


def test_async_client_connects_on_first_use_and_once(valkey: Server) -> None:
    """No connection before; 20 first calls at once share one client."""

    async def use() -> None:
        client = AsyncRedisClient(config_of(valkey))
        assert client.client is None
        await asyncio.gather(*[client.set(f"key{n}", "1") for n in range(20)])
        first = client.client
        assert await client.connect() is first is client.client
        await client.close()

    asyncio.run(use())

    assert valkey.client().dbsize() == 20


# -- pipelines --------------------------------------------------------------------------------------------------


def test_pipeline_runs_on_leaving_the_block(client: Any, valkey: Server) -> None:
    """As one MULTI; nothing of it is there before."""
    admin = valkey.client()

    with client.pipeline() as pipe:
        pipe.set("a", "1")
        pipe.incr("b")
        assert not admin.exists("a", "b")

    assert admin.mget("a", "b") == ["1", "1"]
    assert admin.info("commandstats")["cmdstat_exec"]["calls"] == 1


def test_pipeline_does_not_run_after_an_exception(client: Any, valkey: Server) -> None:
    """What the block raised comes out, and nothing was sent; the client works on."""
    with pytest.raises(KeyError), client.pipeline() as pipe:
        pipe.set("a", "1")
        raise KeyError("mine")
    client.set("b", "2")

    assert valkey.client().mget("a", "b") == [None, "2"]


def test_error_in_a_pipeline_is_of_this_package(client: Any, valkey: Server) -> None:
    """A refused command, and a lost server."""
    client.set("text", "1")

    with pytest.raises(RedisMessagingError, match="WRONGTYPE"), client.pipeline() as pipe:
        pipe.lpop("text")
    valkey.stop(signal.SIGKILL)
    with pytest.raises(RedisUnavailable), client.pipeline(transaction=False) as pipe:
        pipe.set("a", "1")


# -- errors -----------------------------------------------------------------------------------------------------


def is_one_clear_line(error: RedisUnavailable, port: int) -> bool:
    message = str(error)
    return "\n" not in message and str(port) in message and "secret" not in message and len(message) < 300


def unreachable(make: Make, monkeypatch: pytest.MonkeyPatch, how: str) -> RedisConfig | None:
    if how == "config":
        return RedisConfig("127.0.0.1", 1, password="secret")
    monkeypatch.setenv("REDIS_URL", "redis://:secret@127.0.0.1:1")
    return None


@pytest.mark.parametrize("how", ["config", "REDIS_URL"])
def test_unreachable_server_is_told(make: Make, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """One line that names the address and not the password, and chains redis-py's error."""
    config = unreachable(make, monkeypatch, how)

    with pytest.raises(RedisUnavailable, match="cannot reach") as caught:
        make(config)

    assert is_one_clear_line(caught.value, 1)
    assert isinstance(caught.value.__cause__, exceptions.ConnectionError)


def test_silent_server_is_told_within_the_timeout(make: Make) -> None:
    """Something accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RedisUnavailable, match="cannot reach") as caught:
            make(RedisConfig("127.0.0.1", port, socket_timeout=0.5))

    assert is_one_clear_line(caught.value, port)
    assert isinstance(caught.value.__cause__, exceptions.TimeoutError)


def test_refused_login_is_told(make: Make, valkey: Server) -> None:
    """With the right password it connects, with a wrong one it says so and does not show it."""
    valkey.client().config_set("requirepass", "right")

    assert make(config_of(valkey, password="right")).health_check() is True
    assert make(config_of(valkey, password="right", username="default")).health_check() is True
    with pytest.raises(RedisUnavailable, match="refused the login") as caught:
        make(config_of(valkey, password="secret"))

    assert is_one_clear_line(caught.value, valkey.port)


def test_without_config_redis_url_decides(make: Make, valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the design: REDIS_URL first."""
    monkeypatch.setenv("REDIS_URL", valkey.url)

    client = make()
    client.set("a", "1")

    assert client.config is None
    assert valkey.client().get("a") == "1"


def test_without_config_and_url_the_local_one_is_used(
    make: Make, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers at the usual port."""
    monkeypatch.delenv("REDIS_URL")
    monkeypatch.setattr(embedded.find_or_start, "__defaults__", (valkey.port, Path("/nonexistent")))

    make().set("a", "1")

    assert valkey.client().get("a") == "1"


def test_without_any_redis_it_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No REDIS_URL, nothing at the usual port, and no embedded server to be had: one line, and its cause."""

    def fail() -> None:
        raise ImportError("no embedded server is installed")

    monkeypatch.delenv("REDIS_URL")
    monkeypatch.setattr(embedded, "find_or_start", fail)

    with pytest.raises(RedisUnavailable, match="no Redis answers") as caught:
        make()

    assert is_one_clear_line(caught.value, embedded.PORT)
    assert isinstance(caught.value.__cause__, ImportError)


def test_other_than_a_config_is_the_callers_mistake() -> None:
    """A TypeError that does not show what was given: it may hold a password."""
    for cls in (RedisClient, AsyncRedisClient):
        with pytest.raises(TypeError, match="RedisConfig or None, not str") as caught:
            cls("redis://:secret@db")  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)


def test_other_than_a_client_is_the_callers_mistake(valkey: Server) -> None:
    """The sync classes take sync clients, the async ones async clients."""
    with pytest.raises(TypeError, match="not AsyncRedisClient"):
        RedisPubSub(AsyncRedisClient())
    with pytest.raises(TypeError, match="not RedisConfig"):
        RedisPubSub(RedisConfig())
    with pytest.raises(TypeError, match="not RedisClient"):
        asyncio.run(AsyncRedisPubSub(RedisClient(config_of(valkey))).publish("a", 1))


def test_wrong_type_of_key_is_not_unavailability(client: Any, valkey: Server) -> None:
    """The server answered, so waiting would not help: RedisMessagingError, and redis-py's error chained."""
    valkey.client().lpush("list", "a")

    with pytest.raises(RedisMessagingError, match="WRONGTYPE") as caught:
        client.get("list")

    assert not isinstance(caught.value, RedisUnavailable)
    assert isinstance(caught.value.__cause__, exceptions.ResponseError)


@pytest.mark.parametrize("value", [{"a": 1}, None, [1], True], ids=repr)
def test_value_that_is_no_text_is_the_callers_mistake(client: Any, value: Any) -> None:
    """set() takes text and numbers; the rest is for set_json()."""
    with pytest.raises(TypeError):
        client.set("a", value)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("get", ("a",)),
    ("set", ("a", "1")),
    ("delete", ("a",)),
    ("exists", ("a",)),
    ("get_json", ("a",)),
    ("set_json", ("a", 1)),
    ("publish", ("a", 1)),
]


def test_every_method_says_that_redis_is_away(client: Any, valkey: Server) -> None:
    """RedisUnavailable with redis-py's error as its cause; nothing is swallowed; afterwards they work again."""
    valkey.stop(signal.SIGKILL)
    for name, arguments in CALLS:
        with pytest.raises(RedisUnavailable, match="cannot reach") as caught:
            getattr(client, name)(*arguments)
        assert is_one_clear_line(caught.value, valkey.port)
        assert isinstance(caught.value.__cause__, exceptions.RedisError)

    valkey.start()
    for name, arguments in CALLS:
        getattr(client, name)(*arguments)


def test_first_call_after_a_restart_works(make: Make, valkey: Server) -> None:
    """The connections that the restart broke are noticed before a command is sent on them: it need not be repeated."""
    for config in (config_of(valkey), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REDIS_URL", valkey.url)
            client = make(config)
        valkey.stop(signal.SIGKILL)
        valkey.start()
        client.set("a", "1")

        assert client.get("a") == "1"


def test_frozen_server_is_given_up(make: Make, valkey: Server) -> None:
    """After socket_timeout; a health check says False; when it runs again, so does the client."""
    client = make(config_of(valkey, socket_timeout=2))
    valkey.send(signal.SIGSTOP)
    with pytest.raises(RedisUnavailable, match="cannot reach") as caught:
        client.get("a")
    assert client.health_check() is False
    valkey.send(signal.SIGCONT)

    assert isinstance(caught.value.__cause__, exceptions.TimeoutError)
    assert client.health_check() is True


def test_closing_during_a_call_is_unavailability(valkey: Server) -> None:
    """The call that waited tells it as every lost connection is told."""

    async def use() -> None:
        client = AsyncRedisClient(config_of(valkey))
        await client.connect()
        valkey.send(signal.SIGSTOP)
        call = asyncio.create_task(client.get("a"))
        await asyncio.sleep(0.1)  # it may be sent or not: both must end well
        await client.close()
        with pytest.raises(RedisUnavailable):
            await call

    asyncio.run(use())


def test_bytes_that_are_no_text_spoil_nothing(client: Any, valkey: Server) -> None:
    """get() cannot return them as text and says so; the next call gets its own answer."""
    binary = Redis(port=valkey.port, host="127.0.0.1")
    binary.set("binary", b"\xff\xfe")
    client.set("a", "1")

    for _ in range(3):
        with pytest.raises(UnicodeDecodeError):
            client.get("binary")
        assert client.get("a") == "1"


def test_bytes_are_returned_as_they_are_if_wished(make: Make, valkey: Server) -> None:
    """decode_responses=False: get() returns bytes, and JSON works all the same."""
    client = make(config_of(valkey, decode_responses=False))

    client.set("a", b"\xff")
    client.set_json("json", {"é": [1]})

    assert client.get("a") == b"\xff"
    assert client.get_json("json") == {"é": [1]}


# -- many at once -----------------------------------------------------------------------------------------------


def test_30_threads_share_10_connections(server: Server) -> None:
    """None fails for want of a connection, and there are never more than 10."""
    client = RedisClient(config_of(server))
    admin = server.client()
    most, failures = 0, []
    start = threading.Barrier(30)

    def work(number: int) -> None:
        start.wait()
        try:
            for n in range(100):
                client.set(f"{number}:{n}", n)
                assert client.get(f"{number}:{n}") == str(n)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(admin.client_list()) - 1)
    client.close()

    assert failures == []
    assert admin.dbsize() == 3000
    assert 1 <= most <= 10


def test_30_tasks_share_10_connections(server: Server) -> None:
    """The same on asyncio."""

    async def work() -> int:
        async with AsyncRedisClient(config_of(server)) as client:
            await asyncio.gather(*[client.set(f"{n}", n) for n in range(300)])
            return len(await client.client.client_list())

    assert asyncio.run(work()) <= 10
    assert server.client().dbsize() == 300


def test_waiting_for_a_connection_has_an_end(valkey: Server) -> None:
    """With the only connection in use, a call gives up after socket_timeout and says so."""
    client = RedisClient(config_of(valkey, max_connections=1, socket_timeout=1))
    connection = client.client.connection_pool.get_connection()

    with pytest.raises(RedisUnavailable, match="No connection available"):
        client.get("a")

    client.client.connection_pool.release(connection)
    assert client.get("a") is None
