"""RedisPubSub and AsyncRedisPubSub: in order, one handler at a time, and back by themselves after a loss."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fakeredis
import pytest
from conftest import Proxy, Server, wait_until
from redis import Redis

from ailf.messaging.redis import (
    AsyncRedisClient,
    AsyncRedisPubSub,
    RedisClient,
    RedisConfig,
    RedisMessagingError,
    RedisPubSub,
    RedisUnavailable,
    connect,
    pubsub,
)

Start = Callable[..., "subprocess.Popen[str]"]
LOGGER = "ailf.messaging.redis.pubsub"


pytest_plugins = "kinds"

Make = Callable[..., Any]  # make(server) -> a RedisPubSub, or an AsyncRedisPubSub as plain calls


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, "RedisPubSub")


def subscribers(server: Server, channel: str) -> int:
    return dict(server.client().pubsub_numsub(channel))[channel]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def is_told(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return any(words in line for line in warnings(caplog))


# -- the documentation's snippet ---------------------------------------------------------------------------------

PUBLISHER = """
from ailf.messaging.redis import RedisPubSub
pubsub = RedisPubSub()
pubsub.publish("agent-commands", {"command": "analyze", "data": "content to analyze"})
"""
SUBSCRIBER = """
def analyze_content(text):
    return text.upper()

from ailf.messaging.redis import RedisPubSub
def handle_command(message):
    if message["command"] == "analyze":
        pubsub.publish("agent-results", {"result": analyze_content(message["data"])})
pubsub = RedisPubSub()
pubsub.subscribe("agent-commands", handle_command)
pubsub.run()  # blocking
"""


def test_snippet_of_the_documentation_runs_as_it_stands(server: Server, script: Start) -> None:
    """Publisher and subscriber are two processes; Ctrl-C ends the subscriber without a word."""
    results: list[Any] = []
    with RedisPubSub(server.client()) as listener:
        listener.subscribe("agent-results", results.append)
        listener.run_in_thread()
        subscriber = script(server.url, "-c", SUBSCRIBER)
        wait_until(lambda: subscribers(server, "agent-commands"), "the subscriber is there")

        publisher = script(server.url, "-c", PUBLISHER)

        wait_until(lambda: results, "the result came")
        assert publisher.communicate(timeout=60) == ("", "")
    subscriber.send_signal(signal.SIGINT)

    assert results == [{"result": "CONTENT TO ANALYZE"}]
    assert subscriber.communicate(timeout=60) == ("", "")
    assert (publisher.returncode, subscriber.returncode) == (0, 0)


def test_ctrl_c_ends_run_in_a_handler_too(valkey: Server, script: Start) -> None:
    """The program goes on after run()."""
    program = SUBSCRIBER.replace("text.upper()", "__import__('time').sleep(60)") + "\nprint('went on')"
    subscriber = script(valkey.url, "-c", program)
    wait_until(lambda: subscribers(valkey, "agent-commands"), "the subscriber is there")
    valkey.client().publish("agent-commands", '{"command": "analyze", "data": ""}')
    admin = valkey.client()
    wait_until(lambda: admin.info("commandstats")["cmdstat_publish"]["calls"] == 1, "it was published")

    subscriber.send_signal(signal.SIGINT)

    assert subscriber.communicate(timeout=60) == ("went on\n", "")


# -- subscribing and handling -----------------------------------------------------------------------------------


VALUES = [{"a": [1, None]}, [1, 2], [], "text", "", "7", '{"a"', 0, -2.5, 2**70, True, False, None, "é\U0001f600\n"]


def test_values_and_text_arrive_as_they_were(make: Make, valkey: Server) -> None:
    """Any JSON value, and text, in the order of publishing; publish says how many got it."""
    subject, got = make(valkey), []
    subject.subscribe("channel", got.append)
    subject.run_in_thread()

    counts = [subject.publish("channel", value) for value in VALUES]

    wait_until(lambda: len(got) == len(VALUES), "all arrived")
    assert got == VALUES
    assert [type(value) for value in got] == [type(value) for value in VALUES]
    assert counts == [1] * len(VALUES)
    assert subject.publish("nobody listens", 1) == 0


def test_what_json_cannot_hold_is_the_callers_mistake(make: Make, valkey: Server) -> None:
    """ValueError or TypeError, and nothing is published."""
    subject = make(valkey)
    for value in (float("nan"), b"bytes", {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            subject.publish("channel", value)
    for name in (None, 7, b"channel"):
        with pytest.raises(TypeError):
            subject.subscribe(name, print)
        with pytest.raises(TypeError):
            subject.subscribe_pattern(name, print)
    with pytest.raises(TypeError, match="callable"):
        subject.subscribe("channel", None)

    assert subject.subscriptions == {}


def test_handler_with_two_arguments_gets_the_channel(make: Make, valkey: Server) -> None:
    """A second argument with a default is the handler's own; so are *args."""
    got: list[Any] = []

    class Agent:
        def handle(self, message: Any, channel: str) -> None:
            got.append(("method", message, channel))

    subject = make(valkey)
    subject.subscribe("one", lambda message: got.append(("one", message)))
    subject.subscribe("two", lambda message, channel: got.append(("two", message, channel)))
    subject.subscribe("default", lambda message, channel="mine": got.append(("default", message, channel)))
    subject.subscribe("star", lambda *args: got.append(("star", args)))
    subject.subscribe("method", Agent().handle)
    subject.run_in_thread()

    for channel in ("one", "two", "default", "star", "method"):
        subject.publish(channel, 1)

    wait_until(lambda: len(got) == 5, "all arrived")
    assert got == [("one", 1), ("two", 1, "two"), ("default", 1, "mine"), ("star", (1,)), ("method", 1, "method")]


def test_pattern_matches_channels(make: Make, valkey: Server) -> None:
    """Its handler gets the channel; a channel's own handler is called besides; each can be given up for itself."""
    subject, got = make(valkey), []
    subject.subscribe("agent:1", lambda message: got.append(("own", message)))
    subject.subscribe_pattern("agent:*", lambda message, channel: got.append((channel, message)))
    subject.run_in_thread()
    assert list(subject.subscriptions) == ["agent:1", "agent:*"]

    assert subject.publish("agent:1", "a") == 2
    assert subject.publish("agent:2", "b") == 1
    assert subject.publish("other", "c") == 0
    wait_until(lambda: len(got) == 3, "all arrived")
    assert sorted(got) == [("agent:1", "a"), ("agent:2", "b"), ("own", "a")]

    subject.unsubscribe("agent:*")
    wait_until(lambda: subject.publish("agent:2", "d") == 0, "the server has heard of it")
    assert subject.publish("agent:1", "e") == 1
    wait_until(lambda: got[-1] == ("own", "e"), "the other is still there")
    assert list(subject.subscriptions) == ["agent:1"]


def test_second_handler_replaces_the_first(make: Make, valkey: Server) -> None:
    """One handler a channel; no second subscription."""
    subject, first, second = make(valkey), [], []
    subject.subscribe("channel", first.append)
    subject.subscribe("channel", second.append)
    subject.run_in_thread()

    assert subject.publish("channel", 1) == 1

    wait_until(lambda: second, "it arrived")
    assert (first, second) == ([], [1])
    assert list(subject.subscriptions) == ["channel"]


def test_raising_handler_is_logged_and_the_next_message_arrives(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """With its traceback and the channel."""
    subject, got = make(valkey), []

    def handle(message: int) -> None:
        if message == 1:
            raise KeyError("mine")
        got.append(message)

    subject.subscribe("channel", handle)
    subject.subscribe("other", lambda: None)  # takes too few arguments
    subject.run_in_thread()

    for channel, message in [("channel", 1), ("other", 1), ("channel", 2)]:
        subject.publish(channel, message)

    wait_until(lambda: got == [2], "the next message arrived")
    records = [record for record in caplog.records if record.name == LOGGER]
    assert [record.levelname for record in records] == ["ERROR", "ERROR"]
    assert "channel" in records[0].getMessage()
    assert "KeyError: 'mine'" in caplog.text


def test_coroutine_functions_are_handlers_of_the_async_class(valkey: Server) -> None:
    """One after the other: the next message waits for the handler's end."""
    got: list[Any] = []

    async def main() -> None:
        async def handle(message: int, channel: str) -> None:
            got.append(("begin", message))
            await asyncio.sleep(0)
            got.append(("end", message))
            if message == 3:
                subject.stop()

        async with (
            AsyncRedisClient(RedisConfig("127.0.0.1", valkey.port)) as client,
            AsyncRedisPubSub(client) as subject,
        ):
            await subject.subscribe("channel", handle)
            for message in (1, 2, 3):
                await subject.publish("channel", message)
            await asyncio.wait_for(subject.run(), 60)

    asyncio.run(main())

    assert got == [(what, message) for message in (1, 2, 3) for what in ("begin", "end")]


def test_messages_that_are_no_utf_8_do_not_stop_it(make: Make, valkey: Server) -> None:
    """They arrive with what is no text escaped, from channels whose names are no UTF-8 either."""
    subject, got = make(valkey), []
    subject.subscribe_pattern("*", lambda message, channel: got.append((channel, message)))
    subject.run_in_thread()
    binary = Redis(port=valkey.port, host="127.0.0.1")

    binary.publish("channel", b"\xff\x00a")
    binary.publish(b"\xfe", b"{")
    subject.publish("channel", "next")

    wait_until(lambda: len(got) == 3, "all arrived")
    assert got == [("channel", "\\xff\x00a"), ("\\xfe", "{"), ("channel", "next")]


def test_subscription_is_confirmed_on_return_before_run(make: Make, server: Server) -> None:
    """What is published right after subscribe() is handled by run()."""
    subject, got = make(server), []
    admin = server.client()

    for n in range(30):
        subject.subscribe(f"channel{n}", got.append)
        assert admin.publish(f"channel{n}", n) == 1
    subject.run_in_thread()

    wait_until(lambda: len(got) == 30, "all arrived")
    assert got == list(range(30))


def test_subscription_is_confirmed_on_return_while_it_runs(make: Make, server: Server) -> None:
    """The same for a subscription from another thread or task; unsubscribed, no message is handled any more."""
    subject, got = make(server), []
    admin = server.client()
    subject.subscribe("first", got.append)
    subject.run_in_thread()

    for n in range(10):
        subject.subscribe(f"channel{n}", got.append)
        assert admin.publish(f"channel{n}", n) == 1
        wait_until(lambda n=n: got == list(range(n + 1)), "it arrived")  # type: ignore[misc]
    for n in range(10):
        subject.unsubscribe(f"channel{n}")
        admin.publish(f"channel{n}", "late")
    admin.publish("first", "end")
    wait_until(lambda: got[-1] == "end", "the last arrived")

    assert "late" not in got
    assert list(subject.subscriptions) == ["first"]
    wait_until(lambda: admin.pubsub_channels() == ["first"], "the server has heard of it")


def test_handler_subscribes_and_unsubscribes(make: Make, valkey: Server, kind: str) -> None:
    """A handler may change the subscriptions, its own too."""
    subject, got = make(valkey), []
    target = getattr(subject, "target", subject)

    def handle_sync(message: Any) -> None:
        target.subscribe("second", got.append)
        target.unsubscribe("first")
        got.append(message)

    async def handle_async(message: Any) -> None:
        await target.subscribe("second", got.append)
        await target.unsubscribe("first")
        got.append(message)

    subject.subscribe("first", handle_async if kind == "async" else handle_sync)
    subject.run_in_thread()

    subject.publish("first", 1)

    wait_until(lambda: valkey.client().pubsub_channels() == ["second"], "the subscriptions changed")
    subject.publish("first", 2)
    subject.publish("second", 3)
    wait_until(lambda: len(got) == 2, "both arrived")
    assert got == [1, 3]
    assert list(subject.subscriptions) == ["second"]


def test_all_subscriptions_may_end_and_others_begin(make: Make, valkey: Server) -> None:
    """It goes on running without any."""
    subject, got = make(valkey), []
    subject.subscribe("first", got.append)
    runner = subject.run_in_thread()
    subject.unsubscribe("first")
    wait_until(lambda: not valkey.client().pubsub_channels(), "the server has heard of it")

    subject.subscribe("second", got.append)
    assert subject.publish("second", 1) == 1

    wait_until(lambda: got == [1], "it arrived")
    assert runner.is_alive()


def test_unsubscribing_from_what_is_not_subscribed_is_the_callers_mistake(make: Make, valkey: Server) -> None:
    """ValueError that names it."""
    subject = make(valkey)
    subject.subscribe("channel", print)

    with pytest.raises(ValueError, match="'other'"):
        subject.unsubscribe("other")
    subject.unsubscribe("channel")
    with pytest.raises(ValueError, match="'channel'"):
        subject.unsubscribe("channel")


def test_threads_subscribe_at_the_same_time(make: Make, valkey: Server) -> None:
    """Before and while it runs: each subscription is confirmed, none is lost."""
    subject, got, failures = make(valkey), [], []
    admin = valkey.client()
    subject.subscribe("first", got.append)

    def work(number: int) -> None:
        for n in range(3):
            try:
                subject.subscribe(f"{number}:{n}", got.append)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads[:4]:
        thread.start()
    subject.run_in_thread()
    for thread in threads[4:]:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len(admin.pubsub_channels()) == 25
    for name in subject.subscriptions:
        subject.publish(name, name)
    wait_until(lambda: len(got) == 25, "all arrived")
    assert sorted(got) == sorted(subject.subscriptions)


# -- running and stopping ---------------------------------------------------------------------------------------


def test_running_without_subscription_is_the_callers_mistake(make: Make, valkey: Server) -> None:
    """ValueError at once, from run() and in the background; a subscription afterwards works."""
    subject, got = make(valkey), []
    with pytest.raises(ValueError, match="Call subscribe first"):
        subject.run()
    with pytest.raises(ValueError, match="Call subscribe first"):
        subject.run_in_thread()

    subject.subscribe("channel", got.append)
    subject.run_in_thread()
    subject.publish("channel", 1)
    wait_until(lambda: got == [1], "it arrived")


def test_running_twice_at_once_is_the_callers_mistake(make: Make, valkey: Server) -> None:
    """Two that read from one connection would take each other's messages."""
    subject = make(valkey)
    subject.subscribe("channel", print)
    runner = subject.run_in_thread()
    wait_until(lambda: getattr(subject, "target", subject)._runner is not None, "it runs")

    with pytest.raises(ValueError, match="runs already"):
        subject.run()
    with pytest.raises(ValueError, match="runs already"):
        subject.run_in_thread()

    assert runner.is_alive()


def test_stop_ends_run_and_it_can_run_again(make: Make, valkey: Server) -> None:
    """run() returns; what is published meanwhile is kept by the server for the next run()."""
    subject, got = make(valkey), []
    subject.subscribe("channel", got.append)
    for n in range(3):
        thread = threading.Thread(target=subject.run)
        thread.start()
        subject.publish("channel", n)
        wait_until(lambda n=n: len(got) == 2 * n + 1, "it arrived")  # type: ignore[misc]

        subject.stop()
        thread.join(60)
        assert not thread.is_alive()

        subject.publish("channel", "between")
    subject.run_in_thread()
    wait_until(lambda: len(got) == 6, "all arrived")

    assert got == [0, "between", 1, "between", 2, "between"]


def test_handler_may_stop_it(make: Make, valkey: Server, kind: str) -> None:
    """run() returns after that handler."""
    subject, got = make(valkey), []
    target = getattr(subject, "target", subject)

    def handle(message: Any) -> None:
        target.stop()
        got.append(message)

    subject.subscribe("channel", handle)
    subject.publish("channel", 1)
    subject.publish("channel", 2)
    subject.run()
    assert got == [1]

    subject.run()
    assert got == [1, 2]


def test_stop_right_after_the_start_is_not_lost(make: Make, valkey: Server) -> None:
    """Also where the thread or task has not begun yet."""
    subject = make(valkey)
    subject.subscribe("channel", print)
    for _ in range(20):
        runner = subject.run_in_thread()
        subject.stop()
        wait_until(lambda runner=runner: not runner.is_alive(), "it ended")  # type: ignore[misc]


def test_thread_is_a_daemon_unless_told_otherwise(valkey: Server) -> None:
    """A program may end while it waits for messages."""
    with RedisPubSub(valkey.client()) as subject:
        subject.subscribe("channel", print)
        assert subject.run_in_thread().daemon
    with RedisPubSub(valkey.client()) as subject:
        subject.subscribe("channel", print)
        assert not subject.run_in_thread(daemon=False).daemon


def test_cancelled_task_ends_the_async_run(valkey: Server) -> None:
    """asyncio's way to stop; it can run again."""

    async def main() -> list[Any]:
        got: list[Any] = []
        async with (
            AsyncRedisClient(RedisConfig("127.0.0.1", valkey.port)) as client,
            AsyncRedisPubSub(client) as subject,
        ):
            await subject.subscribe("channel", got.append)
            for pause in (0, 0.01):
                task = subject.run_in_task()
                await asyncio.sleep(pause)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            task = subject.run_in_task()
            await subject.publish("channel", 1)
            while not got:
                await asyncio.sleep(0.01)
        assert task.done()
        return got

    assert asyncio.run(main()) == [1]


def test_ctrl_c_ends_the_async_run(valkey: Server, script: Start) -> None:
    """asyncio.run() cancels it, and raises KeyboardInterrupt as it always does."""
    program = """
import asyncio
from ailf.messaging.redis import AsyncRedisPubSub
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a slow machine is no fault
    async with AsyncRedisPubSub() as pubsub:
        await pubsub.subscribe("channel", print)
        await pubsub.run()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("ended")
"""
    process = script(valkey.url, "-X", "dev", "-c", program)
    wait_until(lambda: subscribers(valkey, "channel"), "it is subscribed")

    process.send_signal(signal.SIGINT)

    assert process.communicate(timeout=60) == ("ended\n", "")


def test_closing_gives_up_everything(make: Make, valkey: Server, kind: str) -> None:
    """Subscriptions, thread and connection; a handler may do it; twice does no harm; it can be used again."""
    subject, got = make(valkey), []
    admin = valkey.client()
    subject.subscribe("channel", got.append)
    runner = subject.run_in_thread()

    subject.close()
    subject.close()

    assert subject.subscriptions == {}
    wait_until(lambda: not runner.is_alive(), "it ended")
    wait_until(lambda: not admin.client_list(_type="pubsub"), "the connection is closed")

    target = getattr(subject, "target", subject)
    subject.subscribe("channel", (lambda message: target.close()) if kind == "sync" else lambda m: target.close())
    runner = subject.run_in_thread()
    subject.publish("channel", 1)
    wait_until(lambda: not runner.is_alive(), "the handler closed it")
    assert subject.subscriptions == {}


def test_close_waits_for_run_and_not_for_its_thread(valkey: Server) -> None:
    """The thread that ran run() may have more to do."""
    subject, go_on = RedisPubSub(valkey.client()), threading.Event()
    subject.subscribe("channel", print)

    def work() -> None:
        subject.run()
        go_on.wait(120)

    thread = threading.Thread(target=work)
    thread.start()
    closer = threading.Thread(target=subject.close)
    closer.start()
    closer.join(60)
    closed = not closer.is_alive()
    go_on.set()
    thread.join()

    assert closed


def test_close_leaves_the_given_client_alone_and_closes_its_own(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is left behind, on asyncio either."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    admin = valkey.client()

    async def use() -> None:
        async with AsyncRedisPubSub() as subject:
            await subject.subscribe("channel", print)
            await subject.publish("channel", 1)

    with RedisPubSub() as subject:
        subject.subscribe("channel", print)
        subject.publish("channel", 1)
    asyncio.run(use())
    wait_until(lambda: len(admin.client_list()) == 1, "only the test's own connection is left")

    client = connect(valkey.url)
    with RedisPubSub(client):
        pass
    assert len(admin.client_list()) == 2


def test_client_that_returns_bytes_does(valkey: Server) -> None:
    """A config with decode_responses=False: messages arrive decoded all the same."""
    config = RedisConfig("127.0.0.1", valkey.port, decode_responses=False)
    got: list[Any] = []

    def handle(message: Any, channel: str) -> None:
        got.append((channel, message))

    async def main() -> None:
        async with AsyncRedisClient(config) as client, AsyncRedisPubSub(client) as subject:
            await subject.subscribe("channel", handle)
            subject.run_in_task()
            assert await client.publish("channel", {"b": 2}) == 1
            while len(got) < 2:
                await asyncio.sleep(0.01)

    with RedisClient(config) as client, RedisPubSub(client) as subject:
        subject.subscribe("channel", handle)
        subject.run_in_thread()
        assert client.publish("channel", {"a": 1}) == 1
        wait_until(lambda: got, "it arrived")
    asyncio.run(asyncio.wait_for(main(), 60))

    assert got == [("channel", {"a": 1}), ("channel", {"b": 2})]


def test_fakeredis_does() -> None:
    """For the unit tests of those who use it."""
    got: list[Any] = []

    async def main() -> None:
        async with AsyncRedisPubSub(fakeredis.FakeAsyncRedis(decode_responses=True)) as subject:
            await subject.subscribe("channel", got.append)
            subject.run_in_task()
            await subject.publish("channel", {"b": 2})
            while len(got) < 2:
                await asyncio.sleep(0.01)

    with RedisPubSub(fakeredis.FakeRedis(decode_responses=True)) as subject:
        subject.subscribe("channel", got.append)
        subject.run_in_thread()
        subject.publish("channel", {"a": 1})
        wait_until(lambda: got, "it arrived")
    asyncio.run(asyncio.wait_for(main(), 60))

    assert got == [{"a": 1}, {"b": 2}]


# -- many -------------------------------------------------------------------------------------------------------


def publish_all(server: Server, messages: int) -> None:
    client = connect(server.url)
    for first in range(0, messages, 100):
        with client.pipeline(transaction=False) as pipe:
            for n in range(first, first + 100):
                pipe.publish("channel", json.dumps({"n": n}))
            pipe.execute()


@pytest.mark.parametrize("messages", [1_000, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_many_messages_arrive_in_order_at_10_subscribers(make: Make, server: Server, messages: int) -> None:
    """Every message, once, in order, at each of them."""
    received: list[list[int]] = [[] for _ in range(10)]
    for numbers in received:
        subject = make(server)
        subject.subscribe("channel", lambda message, numbers=numbers: numbers.append(message["n"]))  # type: ignore[misc]
        subject.run_in_thread()

    publish_all(server, messages)

    wait_until(lambda: all(len(numbers) == messages for numbers in received), "all arrived", 120)
    assert all(numbers == list(range(messages)) for numbers in received)


# -- losses -----------------------------------------------------------------------------------------------------


def start_two(make: Make, server: Server) -> tuple[Any, list[Any], Any]:
    subject, got = make(server), []
    subject.subscribe("channel", got.append)
    subject.subscribe_pattern("pattern*", got.append)
    return subject, got, subject.run_in_thread()


def assert_back(subject: Any, got: list[Any], runner: Any, caplog: pytest.LogCaptureFixture) -> None:
    wait_until(lambda: is_told(caplog, "subscribed again: channel, pattern*"), "the subscriptions are back")
    assert subject.publish("channel", "after") == 1
    assert subject.publish("pattern 1", "after too") == 1
    wait_until(lambda: got[-2:] == ["after", "after too"], "messages arrive again")
    assert runner.is_alive()
    assert len(warnings(caplog)) == 2, "one line when lost, and one when back"
    assert "subscriptions lost" in warnings(caplog)[0]


def test_subscriptions_come_back_after_a_restart_of_the_server(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9, a while without any server, and a new one: one line when lost, one when back, and nobody did a thing."""
    subject, got, runner = start_two(make, server)
    subject.publish("channel", "before")
    wait_until(lambda: got == ["before"], "it arrived")

    server.stop(signal.SIGKILL)
    wait_until(lambda: is_told(caplog, "subscriptions lost"), "the loss is noticed")
    with pytest.raises(RedisUnavailable, match="cannot reach"):
        subject.publish("channel", "nobody there")
    server.start()

    assert_back(subject, got, runner, caplog)
    assert got[0] == "before"


def test_subscriptions_come_back_after_their_connection_was_killed(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """CLIENT KILL TYPE pubsub, as after an output buffer that grew too large."""
    subject, got, runner = start_two(make, server)

    server.client().client_kill_filter(_type="pubsub")

    assert_back(subject, got, runner, caplog)


def test_silence_is_noticed(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is frozen, or a cable that is pulled, breaks no connection: no answer to a PING does it."""
    monkeypatch.setattr(pubsub, "SILENCE_SECONDS", 2.0)
    subject, got, runner = start_two(make, server)

    server.send(signal.SIGSTOP)
    wait_until(lambda: is_told(caplog, "no word for"), "the silence is noticed")
    server.send(signal.SIGCONT)

    assert_back(subject, got, runner, caplog)


def test_silence_because_nobody_publishes_is_no_loss(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the PINGs, and the connection stays."""
    monkeypatch.setattr(pubsub, "SILENCE_SECONDS", 1.0)
    subject, got, _ = start_two(make, valkey)
    admin = valkey.client()

    wait_until(lambda: admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] > 2, "it was asked often")

    subject.publish("channel", 1)
    wait_until(lambda: got == [1], "it arrived")
    assert warnings(caplog) == []


def test_slow_handler_is_no_silence(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs nobody listens, which says nothing about the server."""
    monkeypatch.setattr(pubsub, "SILENCE_SECONDS", 1.0)
    subject, got = make(valkey), []
    subject.subscribe("slow", lambda message: (time.sleep(3), got.append(message)))
    subject.run_in_thread()

    subject.publish("slow", 1)
    wait_until(lambda: got == [1], "it was handled")
    wait_until(lambda: valkey.client().info("commandstats")["cmdstat_ping"]["calls"] > 1, "the server was asked")
    subject.publish("slow", 2)
    wait_until(lambda: got == [1, 2], "the next, too")

    assert warnings(caplog) == []


class Pausing(Proxy):
    """A proxy that pauses in the middle of every reply that says "halves"."""

    def _pass(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        if not replies:
            super()._pass(source, target, replies)
            return
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                before, found, after = data.partition(b"halves")
                target.sendall(before + found[:3])
                if found:
                    time.sleep(5 * pubsub.POLL_SECONDS)  # the network is slow
                target.sendall(found[3:] + after)


def test_message_that_comes_in_two_halves_is_no_loss(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """On a slow network the rest of a large message may take longer than POLL_SECONDS."""
    with Pausing(valkey.port, b"") as proxy:
        subject, got = make(proxy), []
        subject.subscribe("channel", got.append)
        subject.run_in_thread()

        for n in range(2):
            valkey.client().publish("channel", f"two halves {n}")
        wait_until(lambda: len(got) == 2, "both arrived")
        subject.close()

    assert got == ["two halves 0", "two halves 1"]
    assert warnings(caplog) == []


def test_losses_and_changes_at_the_same_time_do_not_end_it(make: Make, valkey: Server) -> None:
    """Connections killed again and again while another thread subscribes and unsubscribes: it goes on, and is right."""
    subject, got, runner = start_two(make, valkey)
    admin, ended = valkey.client(), threading.Event()

    def kill() -> None:
        while not ended.is_set():
            admin.client_kill_filter(_type="pubsub")
            ended.wait(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for n in range(60):
            with contextlib.suppress(RedisUnavailable):  # not confirmed in time: then it does not count
                subject.subscribe(f"more{n % 5}", got.append)
            if n % 3 and f"more{n % 5}" in subject.subscriptions:
                subject.unsubscribe(f"more{n % 5}")
    finally:
        ended.set()
        killer.join()

    wanted = set(subject.subscriptions) - {"pattern*"}
    wait_until(lambda: set(admin.pubsub_channels()) == wanted and admin.pubsub_numpat() == 1, "all are back")
    subject.publish("channel", "after")
    wait_until(lambda: "after" in got, "messages arrive again")
    assert runner.is_alive()


def test_connection_lost_before_run_is_made_again(make: Make, valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A second subscribe() or unsubscribe() mends it, and so does run()."""
    subject, got = make(valkey), []
    admin = valkey.client()
    subject.subscribe("one", got.append)
    subject.subscribe("gone", got.append)
    admin.client_kill_filter(_type="pubsub")

    subject.subscribe("two", got.append)
    assert sorted(admin.pubsub_channels()) == ["gone", "one", "two"]

    admin.client_kill_filter(_type="pubsub")
    subject.unsubscribe("gone")
    admin.client_kill_filter(_type="pubsub")
    subject.run_in_thread()
    wait_until(lambda: sorted(admin.pubsub_channels()) == ["one", "two"], "they are back")
    subject.publish("one", 1)
    wait_until(lambda: got == [1], "it arrived")


def test_subscribing_while_redis_is_away_is_told(make: Make, valkey: Server) -> None:
    """RedisUnavailable, chained, and no subscription is left behind; the others stay."""
    subject, got, _ = start_two(make, valkey)
    other = make(valkey)
    with contextlib.suppress(RedisMessagingError):
        other.publish("nobody", 1)
    valkey.stop(signal.SIGKILL)

    for each in (subject, other):
        with pytest.raises(RedisUnavailable) as caught:
            each.subscribe("new", print)
        assert caught.value.__cause__ is not None
    assert list(subject.subscriptions) == ["channel", "pattern*"]
    assert other.subscriptions == {}

    valkey.start()
    subject.subscribe("new", got.append)
    assert subject.publish("new", 1) == 1
    wait_until(lambda: got == [1], "it arrived")


def test_it_can_be_stopped_while_redis_is_away(make: Make, valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """stop() and close() do not wait for Redis to come back; run again, it is subscribed."""
    subject, got, runner = start_two(make, valkey)
    valkey.stop(signal.SIGKILL)
    wait_until(lambda: is_told(caplog, "subscriptions lost"), "the loss is noticed")

    subject.stop()
    wait_until(lambda: not runner.is_alive(), "it ended")
    valkey.start()
    subject.run_in_thread()

    wait_until(lambda: subscribers(valkey, "channel"), "it is subscribed again")
    subject.publish("channel", 1)
    wait_until(lambda: got == [1], "it arrived")


def test_refusal_ends_run_with_an_error_of_this_package(
    make: Make, valkey: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A login that is refused does not mend itself: waiting for it would hide it."""
    subject = make(valkey)
    subject.subscribe("channel", print)
    errors: list[Exception] = []

    def work() -> None:
        try:
            subject.run()
        except RedisMessagingError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    admin = valkey.client()
    admin.config_set("requirepass", "secret")
    admin.client_kill_filter(_type="pubsub")
    thread.join(60)

    assert not thread.is_alive()
    assert len(errors) == 1
    assert not isinstance(errors[0], RedisUnavailable)
    assert errors[0].__cause__ is not None


def test_subscribing_waits_for_a_handler_that_takes_long(make: Make, valkey: Server) -> None:
    """While a handler runs nothing is sent, and that is no sign that the server is away."""
    heard: list[Any] = []
    talker = make(valkey)
    talker.subscribe("slow", lambda message: (heard.append(message), time.sleep(pubsub.CONFIRM_SECONDS + 1)))
    talker.run_in_thread()
    talker.publish("slow", 1)
    wait_until(lambda: heard == [1], "the handler runs")

    talker.subscribe("other", heard.append)
    talker.publish("other", 2)

    wait_until(lambda: heard == [1, 2], "the other channel is heard")


def test_channels_of_the_past_are_forgotten(make: Make, valkey: Server) -> None:
    """A channel for each reply costs no memory once it is unsubscribed from."""
    talker = make(valkey)
    talker.subscribe("stays", print)
    for n in range(20):
        talker.subscribe(f"reply-{n}", print)
        talker.unsubscribe(f"reply-{n}")
    talker.subscribe("last", print)  # with its confirmation, those of all before have come

    assert list(talker.subscriptions) == ["stays", "last"]
