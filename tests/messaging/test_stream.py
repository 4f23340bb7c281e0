"""RedisStream and AsyncRedisStream: what they keep, what they give again, and what breaks them (nothing, it should)."""

import asyncio
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from conftest import Server, wait_until
from redis import Redis
from redis import exceptions as errors
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from stream_program import Consumers

from ailf.messaging.redis import (
    AsyncRedisClient,
    AsyncRedisStream,
    RedisClient,
    RedisConfig,
    RedisMessagingError,
    RedisStream,
    RedisUnavailable,
)
from ailf.messaging.redis import stream as stream_module
from ailf.messaging.redis.lua import load
from ailf.messaging.redis.steps import Steps, run, run_async

pytest_plugins = "kinds"

Make = Callable[..., Any]  # make(server, name="tasks", consumer="") -> a stream of either kind
Start = Callable[..., "subprocess.Popen[str]"]

JSON_VALUES = {
    "text": "Process this data...",
    "empty": "",
    "like a number": "7",
    "like JSON": '{"a": 1}',
    "quoted": '"7"',
    "number": 7,
    "fraction": -1.5e300,
    "large": 2**70,
    "true": True,
    "none": None,
    "list": [1, ["two", None], {}],
    "dict": {"a": {"b": [False]}},
    "unicode": "naïve 漢字 \U0001f642",
    "lines": "one\ntwo\r\n\x00",
    "surrogate": "\ud800",
    "": "a field without a name",
}


@pytest.fixture
def make(make: Make) -> Make:
    """Make a stream of this kind; with a consumer, in the group "workers"."""

    def new(server: Any, name: str = "tasks", consumer: str = "", start_id: str = "0", **options: Any) -> Any:
        config = {"socket_timeout": options.pop("socket_timeout", 5)}
        stream = make("RedisStream", server, name, config=config, **options)
        if consumer:
            stream.create_consumer_group("workers", consumer, start_id)
        return stream

    return new


@contextmanager
def working(stream: Any, handler: Callable[[dict[str, Any]], Any], **options: Any) -> Iterator[None]:
    """Process messages in a thread meanwhile; at the end, stop it, and fail where it raised or does not stop."""
    with ThreadPoolExecutor() as pool:
        work = pool.submit(stream.process_messages, handler, **{"block": 50, **options})
        try:
            yield
        finally:
            stream.stop()
            work.result(timeout=60)


def settled(client: Redis, name: str = "tasks") -> bool:
    """Whether the group has had every message, and none is pending."""
    group = client.xinfo_groups(name)[0]
    return group["pending"] == 0 and group["last-delivered-id"] == client.xinfo_stream(name)["last-generated-id"]


def make_stale(client: Redis, consumer: str, *ids: str) -> None:
    """Let a consumer look as if it had given no sign of life for an hour."""
    client.xclaim("tasks", "workers", consumer, 0, ids, idle=3_600_000, justid=True)


def blocked(client: Redis) -> bool:
    return bool(client.info("clients")["blocked_clients"])


def warnings(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


# -- add and read -----------------------------------------------------------------------------------------------


def test_message_is_read_as_it_was_added(make: Make, fake: fakeredis.FakeServer) -> None:
    """add() returns the entry id; read() gives id and data, every JSON value as it was."""
    stream = make(fake)

    entry_id = stream.add(JSON_VALUES)

    assert stream.read(last_id="0") == [{"id": entry_id, "data": JSON_VALUES}]


def test_fields_are_readable_in_redis_cli(make: Make, valkey: Server) -> None:
    """Text is stored without quotes, the rest as JSON."""
    make(valkey).add({"content": "naïve text", "n": 7, "tags": ["a"], "done": False})

    ((_, fields),) = valkey.client().xrange("tasks")

    assert fields == {"content": "naïve text", "n": "7", "tags": '["a"]', "done": "false"}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({}, ValueError),
        ([("a", 1)], TypeError),
        (None, TypeError),
        ({1: "a"}, TypeError),
        ({"a": float("nan")}, ValueError),
        ({"a": {1}}, TypeError),
        ({"a": b"bytes"}, TypeError),
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(make: Make, fake: fakeredis.FakeServer, data: Any, error: type) -> None:
    """A caller's mistake is a ValueError or TypeError, and nothing is added."""
    stream = make(fake)

    with pytest.raises(error):
        stream.add(data)

    assert stream.read(last_id="0") == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("", {}), (7, {}), ("a", {"maxlen": 0}), ("a", {"max_deliveries": 0}), ("a", {"stale_ms": -1})],
    ids=str,
)
def test_impossible_stream_is_refused(make: Make, fake: fakeredis.FakeServer, name: Any, options: Any) -> None:
    """A stream needs a name; its limits are at least 1."""
    with pytest.raises(ValueError, match="must be"):
        make(fake, name, **options)


def test_stream_is_kept_at_about_maxlen(make: Make, valkey: Server) -> None:
    """Of 1,000 messages with maxlen=100 the newest are kept, and no more than 100 and a node of 100; None keeps all."""
    bounded, unbounded = make(valkey, "bounded", maxlen=100), make(valkey, "unbounded", maxlen=None)

    for n in range(1_000):
        bounded.add({"n": n})
        unbounded.add({"n": n})

    kept = [entry["data"]["n"] for entry in bounded.read(count=1_000, last_id="0")]
    assert kept == list(range(1_000 - len(kept), 1_000))
    assert 100 <= len(kept) <= 200
    assert valkey.client().xlen("unbounded") == 1_000


def test_new_messages_start_where_the_stream_ends(make: Make, fake: fakeredis.FakeServer) -> None:
    """With "$" the first read() skips what is there; what is added after it is read, `count` at a time, once."""
    stream = make(fake)
    stream.add({"n": 0})

    first = stream.read()
    for n in range(1, 4):
        stream.add({"n": n})

    assert first == []
    assert [entry["data"]["n"] for entry in stream.read(count=2)] == [1, 2]
    assert [entry["data"]["n"] for entry in stream.read(count=2)] == [3]
    assert stream.read() == []


def test_no_message_is_missed_between_two_reads(make: Make, server: Server) -> None:
    """10 at a time, with pauses in which more are added: "$" stands for the end of the stream only once."""
    reader, writer = make(server), make(server)
    reader.read()
    read: list[int] = []

    for n in range(0, 100, 4):
        for each in range(n, n + 4):
            writer.add({"n": each})
        read += [entry["data"]["n"] for entry in reader.read(count=3, block=1)]
    while entries := reader.read():
        read += [entry["data"]["n"] for entry in entries]

    assert read == list(range(100))


def test_message_on_an_empty_stream_is_not_missed(make: Make, fake: fakeredis.FakeServer) -> None:
    """Where there is no stream yet, "$" is its beginning."""
    stream = make(fake)

    nothing = stream.read()
    stream.add({"n": 1})

    assert nothing == []
    assert [entry["data"] for entry in stream.read()] == [{"n": 1}]


def test_message_that_comes_during_the_block_is_returned_at_once(make: Make, server: Server) -> None:
    """read() and read_group() that would wait for a minute return as soon as a message is there."""
    reader, member, writer = make(server), make(server, consumer="a"), make(server)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(reader.read, block=60_000), pool.submit(member.read_group, block=60_000)]
        wait_until(lambda: server.client().info("clients")["blocked_clients"] == 2, "both wait")

        writer.add({"n": 1})

        for each in waiting:
            assert [entry["data"] for entry in each.result(timeout=60)] == [{"n": 1}]


def test_block_outlasts_the_socket_time_out(make: Make, valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config with socket_timeout=1 does not cut a block of 2 s short: the server ends it, and nothing is returned."""
    monkeypatch.setattr(stream_module, "BLOCK_SECONDS", 2.0)
    reader, member = make(valkey, socket_timeout=1), make(valkey, consumer="a", socket_timeout=1)

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(reader.read, block=2_000), pool.submit(member.read_group, block=2_000)]
        results = [each.result(timeout=60) for each in waiting]

    calls = valkey.client().info("commandstats")
    assert results == [[], []]
    assert calls["cmdstat_xread"]["calls"] == calls["cmdstat_xreadgroup"]["calls"] == 1


def test_negative_block_is_refused(make: Make, fake: fakeredis.FakeServer) -> None:
    """It would mean not to read at all."""
    stream = make(fake, consumer="a")

    for call in (stream.read, stream.read_group):
        with pytest.raises(ValueError, match="block must be"):
            call(block=-1)
    with pytest.raises(ValueError, match="block must be"):
        stream.process_messages(print, block=-1)


def test_what_others_wrote_is_read(make: Make, valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are not UTF-8 and what only looks like JSON reach reader, handler and dead letter."""
    raw: Any = {b"\xff\xfe": b"\x80abc", "n": "7", "text": "[broken", "quoted": '"7"', "nan": "NaN"}
    expected = {"\\xff\\xfe": "\\x80abc", "n": 7, "text": "[broken", "quoted": "7", "nan": "NaN"}
    Redis(host="127.0.0.1", port=valkey.port).xadd("tasks", raw)
    stream = make(valkey, consumer="a", max_deliveries=1)
    handled: list[Any] = []

    read = stream.read(last_id="0") + stream.read_group(count=1)
    claimed = make(valkey, consumer="b", max_deliveries=2).claim_stale(0)
    stream.claim_stale(0)
    make(valkey, consumer="a", max_deliveries=4).process_messages(handled.append, burst=True)  # it returns None

    assert [entry["data"] for entry in read + claimed] == [expected] * 3
    assert handled == [expected]
    assert make(valkey, "tasks:dead").read(last_id="0")[0]["data"]["data"] == expected


# -- the group --------------------------------------------------------------------------------------------------


def test_without_group_each_method_says_so(make: Make, fake: fakeredis.FakeServer) -> None:
    """ValueError with the words of the documentation, from all that need a group."""
    stream = make(fake)
    stream.add({"n": 1})
    calls: dict[str, tuple[Any, ...]] = {
        "read_group": (),
        "acknowledge": ("1-0",),
        "pending": (),
        "claim_stale": (0,),
        "process_messages": (print,),
    }
    calls["process_in_thread" if isinstance(stream, RedisStream) else "process_in_task"] = (print,)

    for name, args in calls.items():
        with pytest.raises(ValueError) as caught:
            getattr(stream, name)(*args)
        assert str(caught.value) == "No consumer group set. Call create_consumer_group first.", name


def test_group_is_created_once_and_leaves_no_entry(make: Make, server: Server) -> None:
    """True for a new group, False for one that is there; the stream stays empty and the group is not set back."""
    stream = make(server)

    created = [stream.create_consumer_group("workers", "a") for _ in range(2)]
    length = server.client().xlen("tasks")
    stream.add({"n": 1})
    read = stream.read_group()
    again = stream.create_consumer_group("workers", "a")

    assert created == [True, False]
    assert length == 0
    assert len(read) == 1
    assert again is False
    assert stream.read_group() == []


def test_group_starts_at_the_beginning_unless_told_otherwise(make: Make, server: Server) -> None:
    """A message added before the group is created is still done; with "$" or an id only what comes after it."""
    writer = make(server)
    ids = [writer.add({"n": n}) for n in range(3)]
    groups = {start_id: make(server) for start_id in ("0", "$", ids[1])}
    for start_id, stream in groups.items():
        stream.create_consumer_group(f"from {start_id}", "a", **({} if start_id == "0" else {"start_id": start_id}))
    ids.append(writer.add({"n": 3}))

    read = [[entry["data"]["n"] for entry in stream.read_group()] for stream in groups.values()]

    assert read == [[0, 1, 2, 3], [3], [2, 3]]


def test_group_and_consumer_need_names(make: Make, fake: fakeredis.FakeServer) -> None:
    """An empty name is refused, and no group is set by that."""
    stream = make(fake)

    for names in (("", "a"), ("workers", "")):
        with pytest.raises(ValueError, match="need a name"):
            stream.create_consumer_group(*names)
    with pytest.raises(ValueError, match="No consumer group set"):
        stream.read_group()


def test_each_message_goes_to_one_consumer_and_stays_pending(make: Make, fake: fakeredis.FakeServer) -> None:
    """read_group(">") shares the messages out; with an id it gives one's own again, until they are acknowledged."""
    a, b = make(fake, consumer="a"), make(fake, consumer="b")
    ids = [a.add({"n": n}) for n in range(4)]

    first, second = a.read_group(count=2), b.read_group(count=5)
    acknowledged = [a.acknowledge(ids[0]) for _ in range(2)]

    assert [entry["id"] for entry in first + second] == ids
    assert acknowledged == [True, False]
    assert a.read_group(last_id="0", block=60_000) == first[1:]
    assert a.read_group(last_id=ids[1]) == []
    assert a.read_group() == []


def test_pending_tells_who_has_what(make: Make, server: Server) -> None:
    """Id, consumer, time since the delivery and how many there were."""
    a, b = make(server, consumer="a"), make(server, consumer="b")
    ids = [a.add({"n": n}) for n in range(2)]
    a.read_group(count=1)
    b.read_group()
    b.read_group(last_id="0")  # a second delivery

    pending = a.pending()

    assert [(one["id"], one["consumer"], one["deliveries"]) for one in pending] == [(ids[0], "a", 1), (ids[1], "b", 2)]
    assert all(one["idle_ms"] >= 0 for one in pending)
    assert len(a.pending(count=1)) == 1


def test_stale_messages_are_claimed_and_others_are_not(make: Make, server: Server) -> None:
    """claim_stale() takes over what has been pending for so long, `count` at most, and counts a delivery."""
    a, b = make(server, consumer="a"), make(server, consumer="b")
    ids = [a.add({"n": n}) for n in range(30)]
    a.read_group(count=30)
    make_stale(server.client(), "a", *ids[5:])

    claimed = b.claim_stale(60_000, count=20)

    assert [entry["id"] for entry in claimed] == ids[5:25]
    assert [entry["data"]["n"] for entry in claimed] == list(range(5, 25))
    assert b.claim_stale(60_000, count=20) == [{"id": ids[n], "data": {"n": n}} for n in range(25, 30)]
    assert {one["consumer"] for one in a.pending()[5:]} == {"b"}
    assert {one["deliveries"] for one in a.pending()[5:]} == {2}


def test_errors_are_this_packages_and_chain_redis_pys(make: Make, server: Server) -> None:
    """A wrong type or a lost group is a RedisMessagingError, a server that has gone RedisUnavailable."""
    client = server.client()
    client.set("text", "1")
    wrong, stream = make(server, "text"), make(server, consumer="a")
    client.delete("tasks")

    with pytest.raises(RedisMessagingError, match="WRONGTYPE") as wrong_type:
        wrong.add({"n": 1})
    with pytest.raises(RedisMessagingError, match="NOGROUP"):
        stream.read_group()
    server.stop(signal.SIGKILL)
    for call in (lambda: stream.add({"n": 1}), stream.read, stream.pending, lambda: stream.claim_stale(0)):
        with pytest.raises(RedisUnavailable, match="cannot reach"):
            call()

    assert isinstance(wrong_type.value.__cause__, errors.ResponseError)


def test_async_stream_connects_on_first_use(valkey: Server) -> None:
    """Made while the server is away it raises RedisUnavailable, and has no group, until the server is there."""
    config = RedisConfig(host="127.0.0.1", port=valkey.port)
    valkey.stop()

    async def scenario() -> list[dict[str, Any]]:
        stream = AsyncRedisStream("tasks", AsyncRedisClient(config))
        with pytest.raises(RedisUnavailable):
            await stream.create_consumer_group("workers", "a")
        with pytest.raises(ValueError, match="No consumer group set"):
            await stream.read_group()
        await asyncio.to_thread(valkey.start)
        await stream.add({"n": 1})
        await stream.create_consumer_group("workers", "a")
        return await stream.read_group()

    assert [entry["data"] for entry in asyncio.run(scenario())] == [{"n": 1}]


# -- process_messages -------------------------------------------------------------------------------------------


def test_snippet_of_the_documentation_runs_as_it_stands(server: Server, script: Start) -> None:
    """The task that was added before the group existed is done; Ctrl-C ends the worker without a traceback."""
    prelude = "def process_document(content):\n    print('processed:', content, flush=True)\n"
    snippet = """
from ailf.messaging.redis import RedisStream
task_stream = RedisStream("tasks")
task_stream.add({"task_id": "123", "type": "document_processing", "content": "Document content"})

worker_stream = RedisStream("tasks")
worker_stream.create_consumer_group("workers", "worker-1")
def process_task(task):
    if task["type"] == "document_processing":
        process_document(task["content"])
    return True  # mark as processed successfully
worker_stream.process_messages(process_task)
"""
    client = server.client()

    process = script(server.url, "-c", prelude + snippet)
    wait_until(lambda: client.exists("tasks") and client.xinfo_groups("tasks") and settled(client), "it is done")
    process.send_signal(signal.SIGINT)

    output, complaints = process.communicate(timeout=60)
    assert output == "processed: Document content\n"
    assert (process.returncode, complaints) == (0, "")


def test_messages_are_handled_in_order_and_acknowledged(make: Make, fake: fakeredis.FakeServer) -> None:
    """With burst it returns when nothing is left, and says how many were done."""
    stream = make(fake, consumer="a")
    for n in range(25):
        stream.add({"n": n})
    handled: list[int] = []

    done = stream.process_messages(lambda data: handled.append(data["n"]) or True, burst=True)

    assert handled == list(range(25))
    assert done == 25
    assert stream.pending() == []
    assert stream.process_messages(lambda data: True, burst=True) == 0


def test_coroutine_function_is_a_handler_of_the_async_stream_only(fake: fakeredis.FakeServer) -> None:
    """RedisStream would take the coroutine, which is never run, for true."""
    handled = []

    async def handler(data: dict[str, Any]) -> bool:
        await asyncio.sleep(0)
        handled.append(data["n"])
        return True

    async def scenario() -> int:
        stream = AsyncRedisStream("tasks", fakeredis.FakeAsyncRedis(server=fake, decode_responses=True))
        await stream.add({"n": 1})
        await stream.create_consumer_group("workers", "a")
        return await stream.process_messages(handler, burst=True)

    stream = RedisStream("tasks", fakeredis.FakeRedis(server=fake, decode_responses=True))
    stream.create_consumer_group("workers", "a")
    for mistake in (handler, None):
        with pytest.raises(TypeError, match="handler must be"):
            stream.process_messages(mistake)  # type: ignore[arg-type]

    assert asyncio.run(scenario()) == 1
    assert handled == [1]


def test_own_pending_messages_come_first_then_those_of_the_dead_then_new_ones(make: Make, server: Server) -> None:
    """What a consumer that is alive has in hand is left to it."""
    stream, client = make(server, consumer="me"), server.client()
    ids = [stream.add({"n": n}) for n in range(7)]
    for consumer, count in (("dead", 2), ("me", 1), ("alive", 1), ("dead too", 1)):
        client.xreadgroup("workers", consumer, {"tasks": ">"}, count)
    make_stale(client, "dead", *ids[:2])
    make_stale(client, "dead too", ids[4])
    handled: list[int] = []

    stream.process_messages(lambda data: handled.append(data["n"]) or True, burst=True)

    assert handled == [2, 0, 1, 4, 5, 6]
    assert [(one["id"], one["consumer"]) for one in stream.pending()] == [(ids[3], "alive")]


def fail_by_false(data: Any) -> Any:
    return False


def fail_by_none(data: Any) -> Any:
    return None


def fail_by_raising(data: Any) -> Any:
    raise ValueError("bad \ud800 content")


FAILURES = [
    (fail_by_false, "the handler did not return true"),
    (fail_by_none, "the handler did not return true"),
    (fail_by_raising, "ValueError: bad \\ud800 content"),
]


@pytest.mark.parametrize(("failure", "error"), FAILURES, ids=[failure.__name__ for failure, _ in FAILURES])
def test_message_that_fails_is_tried_again_and_buried_at_last(
    make: Make, server: Server, failure: Callable[..., Any], error: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays pending; stale, it is tried again; the third time it goes to tasks:dead. The others are done at once."""
    caplog.set_level(logging.CRITICAL)  # pytest-xdist cannot pass on a log with a lone surrogate
    stream, client = make(server, consumer="a", max_deliveries=3), server.client()
    ids = [stream.add({"n": n}) for n in range(3)]
    handled: list[int] = []

    def handler(data: dict[str, Any]) -> Any:
        handled.append(data["n"])
        return failure(data) if data["n"] == 1 else True

    for deliveries in (1, 2):
        assert stream.process_messages(handler, burst=True) == (2 if deliveries == 1 else 0)
        (left,) = stream.pending()
        assert (left["id"], left["consumer"], left["deliveries"]) == (ids[1], "a", deliveries)
        make_stale(client, "another consumer" if deliveries == 2 else "a", ids[1])
    stream.process_messages(handler, burst=True)

    assert handled == [0, 1, 2, 1, 1]
    assert stream.pending() == []
    (letter,) = make(server, "tasks:dead").read(last_id="0")
    assert letter["data"] == {"id": ids[1], "error": error, "deliveries": 3, "data": {"n": 1}}


def test_failing_messages_come_again_by_themselves_and_block_nobody(make: Make, valkey: Server) -> None:
    """While it works, a consumer finds again what failed, also in its own hands, and does new messages meanwhile."""
    stream, writer = make(valkey, consumer="a", stale_ms=100, max_deliveries=4), make(valkey)
    tries: dict[int, int] = {}

    def handler(data: dict[str, Any]) -> bool:
        tries[data["n"]] = tries.get(data["n"], 0) + 1
        return data["n"] % 5 != 0 and (data["n"] % 5 != 1 or tries[data["n"]] == 2)

    with working(stream, handler):
        for n in range(20):
            writer.add({"n": n})
        wait_until(lambda: valkey.client().xlen("tasks:dead") == 4 and settled(valkey.client()), "four are buried")

    assert tries == {n: {0: 4, 1: 2}.get(n % 5, 1) for n in range(20)}


def test_dead_letter_holds_the_message_as_it_was_added(make: Make, valkey: Server) -> None:
    """Not as the handler left it, which may not even be JSON."""
    stream = make(valkey, consumer="a", max_deliveries=1)
    stream.add({"n": 1, "content": "text"})

    def handler(data: dict[str, Any]) -> None:
        data["result"] = object()
        data.pop("content")

    stream.process_messages(handler, burst=True)

    (letter,) = make(valkey, "tasks:dead").read(last_id="0")
    assert letter["data"]["data"] == {"n": 1, "content": "text"}


def test_trimmed_message_is_acknowledged_with_a_warning(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """What is pending and no longer in the stream, one's own and a dead consumer's, is let go, and others are done."""
    stream, client = make(server, consumer="a"), server.client()
    ids = [stream.add({"n": n}) for n in range(3)]
    client.xreadgroup("workers", "a", {"tasks": ">"}, 1)
    client.xreadgroup("workers", "dead", {"tasks": ">"}, 1)
    make_stale(client, "dead", ids[1])
    client.xtrim("tasks", maxlen=1, approximate=False)
    handled: list[int] = []

    stream.process_messages(lambda data: handled.append(data["n"]) or True, burst=True)

    assert handled == [2]
    assert stream.pending() == []
    assert [line.split()[3] for line in warnings(caplog, "was trimmed")] == ids[:2]


def test_stop_leaves_the_rest_of_the_batch_pending(make: Make, fake: fakeredis.FakeServer) -> None:
    """After the handler that runs it ends; a consumer that comes back under the same name goes on there."""
    stream = make(fake, consumer="a")
    for n in range(5):
        stream.add({"n": n})
    handled: list[int] = []

    def handler(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        if data["n"] == 1:
            stream.stop()
        return True

    done = stream.process_messages(handler)
    left = len(stream.pending())
    make(fake, consumer="a").process_messages(handler, burst=True)

    assert (done, left) == (2, 3)
    assert handled == [0, 1, 2, 3, 4]


def test_stop_ends_a_consumer_that_waits(make: Make, valkey: Server) -> None:
    """Though nothing comes and its block has no end."""
    stream = make(valkey, consumer="a")

    with working(stream, lambda data: True, block=0):
        wait_until(lambda: blocked(valkey.client()), "it waits")


def test_ctrl_c_in_a_handler_leaves_its_message_pending(valkey: Server, script: Start) -> None:
    """process_messages() returns how many were done; what was in hand comes again."""
    program = """
import time
from ailf.messaging.redis import RedisStream
stream = RedisStream("tasks")
def handler(task):
    print(task, flush=True)
    if task["n"] == 1:
        stream.redis.set("busy", 1)
        time.sleep(60)
    return True
for n in range(3):
    stream.add({"n": n})
stream.create_consumer_group("workers", "a")
print(stream.process_messages(handler), len(stream.pending()))
"""
    process = script(valkey.url, "-c", program)
    wait_until(lambda: valkey.client().exists("busy"), "it is busy")

    process.send_signal(signal.SIGINT)

    output, complaints = process.communicate(timeout=60)
    assert output.splitlines() == ["{'n': 0}", "{'n': 1}", "1 2"]
    assert (process.returncode, complaints) == (0, "")


def test_thread_processes_messages_until_stop(valkey: Server) -> None:
    """process_in_thread() returns the thread at once; stop() ends it, and one that comes at once too."""
    stream = RedisStream("tasks", RedisClient(RedisConfig(host="127.0.0.1", port=valkey.port)))
    stream.create_consumer_group("workers", "a")
    handled: list[int] = []

    thread = stream.process_in_thread(lambda data: handled.append(data["n"]) or True)
    stream.add({"n": 1})
    wait_until(lambda: handled, "it is handled")
    stream.stop()
    thread.join(60)
    brief = stream.process_in_thread(print, daemon=False)
    stream.stop()
    brief.join(60)

    assert thread.daemon
    assert not brief.daemon
    assert not thread.is_alive()
    assert not brief.is_alive()


def test_close_ends_a_thread_that_waits(
    valkey: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though its connection is closed under it, nothing is raised there, and no trouble is reported."""
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    stream = RedisStream("tasks", RedisClient(RedisConfig(host="127.0.0.1", port=valkey.port)))
    stream.create_consumer_group("workers", "a")
    thread = stream.process_in_thread(print)
    wait_until(lambda: blocked(valkey.client()), "it waits")

    stream.close()
    thread.join(60)

    assert not thread.is_alive()
    assert raised == []
    assert warnings(caplog, "does not serve") == []


def test_task_processes_messages_until_stop_or_cancellation(valkey: Server) -> None:
    """process_in_task() returns the task; cancelled amid a handler, it leaves the message pending, and can go on."""

    async def scenario() -> None:
        stream = AsyncRedisStream("tasks", AsyncRedisClient(RedisConfig(host="127.0.0.1", port=valkey.port)))
        await stream.create_consumer_group("workers", "a")
        busy, handled = asyncio.Event(), []

        async def handler(data: dict[str, Any]) -> bool:
            busy.set()
            if not handled:
                handled.append("cancelled")
                await asyncio.sleep(60)
            handled.append(data["n"])
            return True

        await stream.add({"n": 1})
        task = stream.process_in_task(handler)
        await asyncio.wait_for(busy.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(await stream.pending()) == 1

        task = stream.process_in_task(handler)
        while len(handled) < 2:
            await asyncio.sleep(0.02)
        stream.stop()
        assert await asyncio.wait_for(task, 60) == 1
        assert handled == ["cancelled", 1]
        await stream.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


# -- signs of life ----------------------------------------------------------------------------------------------


def test_sign_of_life_is_for_ones_own_messages_and_counts_no_delivery(server: Server) -> None:
    """renew.lua sets their idle time back, and returns those still held; what is done or another's is left alone."""
    client = server.client()
    client.xgroup_create("tasks", "workers", "0", mkstream=True)
    ids = [str(client.xadd("tasks", {"n": n})) for n in range(4)]
    client.xreadgroup("workers", "a", {"tasks": ">"}, 3)
    client.xreadgroup("workers", "b", {"tasks": ">"}, 1)
    make_stale(client, "a", ids[0], ids[1])
    make_stale(client, "b", ids[3])
    client.xack("tasks", "workers", ids[2])

    held = load(client, "renew")(keys=["tasks"], args=["workers", "a", ids[0], ids[2], ids[3], "9-9"])

    assert held == [ids[0]]
    pending = client.xpending_range("tasks", "workers", "-", "+", 10)
    assert [(one["message_id"], one["consumer"], one["times_delivered"]) for one in pending] == [
        (ids[0], "a", 1),
        (ids[1], "a", 1),
        (ids[3], "b", 1),
    ]
    assert [one["time_since_delivered"] > 60_000 for one in pending] == [False, True, True]


def test_message_in_hand_is_not_given_to_another(make: Make, kind: str, valkey: Server) -> None:
    """A handler that takes longer than stale_ms keeps its message; others get the rest of its batch meanwhile."""
    slow, other = (make(valkey, consumer=name, stale_ms=1_500) for name in ("slow", "other"))
    ids = [slow.add({"n": n}) for n in range(3)]
    began, goes_on = threading.Event(), threading.Event()
    handled: list[tuple[str, int]] = []

    def handle(data: dict[str, Any]) -> bool:
        began.set()
        handled.append(("slow", data["n"]))
        return goes_on.wait(60)

    async def handle_async(data: dict[str, Any]) -> bool:
        return await asyncio.to_thread(handle, data)

    with working(slow, handle if kind == "sync" else handle_async):
        wait_until(began.is_set, "the slow handler is called")
        with working(other, lambda data: handled.append(("other", data["n"])) or True):
            claims = valkey.client().info("commandstats").get("cmdstat_xautoclaim", {"calls": 0})["calls"]
            wait_until(  # the slow one is at its handler; so these are the other's, each 0.75 s after the last
                lambda: valkey.client().info("commandstats")["cmdstat_xautoclaim"]["calls"] >= claims + 5,
                "the other has looked for stale messages for twice stale_ms",
            )
            pending = valkey.client().xpending_range("tasks", "workers", "-", "+", 10)
            wait_until(lambda: len(handled) == 3, "the other has done the rest")
            goes_on.set()
            wait_until(lambda: settled(valkey.client()), "all are done")

    assert [(one["message_id"], one["consumer"], one["times_delivered"]) for one in pending] == [(ids[0], "slow", 1)]
    assert handled == [("slow", 0), ("other", 1), ("other", 2)]


def test_lost_connections_do_not_shorten_the_rest_of_a_failed_message(make: Make, kind: str, valkey: Server) -> None:
    """Whatever happens to its connections, what a consumer failed on comes again after stale_ms, and not before."""
    stream, client = make(valkey, consumer="a", stale_ms=600_000), valkey.client()
    handled: list[int] = []

    def handle(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        return data["n"] != 1

    with working(stream, handle):
        for n in range(1, 5):
            client.xadd("tasks", {"n": n})
            wait_until(lambda n=n: n in handled, "it reads")  # type: ignore[misc]
            client.client_kill_filter(_type="normal", skipme=True)

    assert handled == [1, 2, 3, 4]
    # the last kill may have cut off the acknowledgement of the last message, too
    [first, *_] = client.xpending_range("tasks", "workers", "-", "+", 10)
    assert first["times_delivered"] == 1


@pytest.fixture
def consumers(kind: str, tmp_path: Path) -> Iterator[Callable[..., Consumers]]:
    """Consumers in processes of their own: consumers(server, stale_ms=…). All are ended after the test."""
    made: list[Consumers] = []

    def new(server: Server, **options: int) -> Consumers:
        made.append(Consumers(kind, server.port, tmp_path / "journal", **options))
        return made[-1]

    yield new
    for each in made:
        each.end()


def test_stopped_process_loses_its_messages_to_others(
    make: Make, server: Server, consumers: Callable[..., Consumers]
) -> None:
    """SIGSTOP past stale_ms: another does them all; woken up, the process does not do the rest of its batch again."""
    crew, writer, client = consumers(server, stale_ms=500), make(server), server.client()
    for n in range(5):
        writer.add({"n": n, "seconds": 0.1})
    sleeper = crew.start("sleeper")
    wait_until(lambda: ["sleeper", "began", "1"] in crew.lines(), "it is at its second message")

    os.kill(sleeper.pid, signal.SIGSTOP)
    other = crew.start("other")
    wait_until(lambda: settled(client), "the other has done them")
    before, others_part = crew.done("sleeper"), crew.done("other")
    other.kill()
    other.join(60)
    os.kill(sleeper.pid, signal.SIGCONT)
    writer.add({"n": 5, "seconds": 0})
    wait_until(lambda: 5 in crew.done("sleeper"), "the first goes on")

    assert set(before) | set(others_part) == set(range(5))
    woken_up = crew.done("sleeper")[len(before) :]
    assert woken_up[-1] == 5
    assert len(woken_up) <= 2  # the one that it had begun


@pytest.mark.parametrize("poison", ["exit", "kill"])
@pytest.mark.parametrize("names", [["same"], ["a", "b", "c", "d", "e"]], ids=["same-name", "new-names"])
def test_poison_message_is_buried_and_its_batch_is_done(
    make: Make, valkey: Server, consumers: Callable[..., Consumers], names: list[str], poison: str
) -> None:
    """Each time it ends the process. After three deaths it is in tasks:dead; the others of its batch are done."""
    crew, writer, client = consumers(valkey, stale_ms=1_000, max_deliveries=3), make(valkey), valkey.client()
    for n in range(10):
        writer.add({"n": n, "seconds": 0} | ({"poison": poison} if n == 3 else {}))

    def is_over() -> bool:
        return bool(client.xlen("tasks:dead")) and settled(client)

    deaths = 0
    while not is_over():
        assert deaths <= 3, "it is not buried"
        consumer = crew.start(names[deaths % len(names)])
        wait_until(lambda: not consumer.is_alive() or is_over(), "the consumer ends, or all is done")  # noqa: B023
        deaths += not consumer.is_alive()

    assert deaths == 3
    assert sorted(crew.done()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    (letter,) = make(valkey, "tasks:dead").read(last_id="0")
    assert letter["data"]["data"] == {"n": 3, "seconds": 0, "poison": poison}
    assert letter["data"]["deliveries"] == 3
    assert letter["data"]["error"] == "its consumers ended without acknowledging it"


def test_poison_messages_block_nobody(make: Make, valkey: Server, consumers: Callable[..., Consumers]) -> None:
    """Two of them among others, and two consumers that are started again: all others are done, none of them buried."""
    crew, writer, client = consumers(valkey, stale_ms=1_500, max_deliveries=2), make(valkey), valkey.client()
    for n in range(40):
        writer.add({"n": n, "seconds": 0} | ({"poison": "kill"} if n in (5, 25) else {}))
    alive = {name: crew.start(name) for name in ("a", "b")}

    def is_over() -> bool:
        for name, process in alive.items():
            if not process.is_alive() and len(crew.started) < 12:
                alive[name] = crew.start(name)
        return client.xlen("tasks:dead") == 2 and settled(client)

    wait_until(is_over, "both are buried and the others done")

    assert sorted(set(crew.done())) == [n for n in range(40) if n not in (5, 25)]
    letters = make(valkey, "tasks:dead").read(last_id="0")
    assert sorted(letter["data"]["data"]["n"] for letter in letters) == [5, 25]


@pytest.mark.parametrize("messages", [300, pytest.param(1_000, marks=pytest.mark.chaos)])
def test_messages_survive_a_kill_every_300_ms(
    make: Make, server: Server, consumers: Callable[..., Consumers], messages: int
) -> None:
    """4 consumers, one killed with -9 every 0.3 s and replaced: all is done at least once, and nothing is buried."""
    crew, writer, client = consumers(server, stale_ms=500), make(server), server.client()
    chance = random.Random(7)
    for n in range(messages):
        writer.add({"n": n, "seconds": 0.02})
    crew_now = [crew.start(name) for name in "abcd"]

    kills = 0
    kill_at = time.monotonic() + 0.3
    deadline = time.monotonic() + 180
    while not (settled(client) if client.xinfo_groups("tasks") else False):
        assert time.monotonic() < deadline, "the messages are not done"
        if time.monotonic() >= kill_at and kills < 40:
            place = chance.randrange(4)
            crew_now[place].kill()  # by its pid, with SIGKILL
            crew_now[place].join(60)
            kills += 1
            crew_now[place] = crew.start("abcd"[place] if kills % 2 else f"replacement-{kills}")
            kill_at = time.monotonic() + 0.3
        time.sleep(0.02)

    assert kills >= 3
    assert make(server, consumer="observer").pending() == []
    assert set(crew.done()) == set(range(messages))
    assert client.exists("tasks:dead") == 0


# -- when Redis goes away ---------------------------------------------------------------------------------------


def test_server_restart_is_waited_for(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line when it goes, one when it is back, however long that takes; then it goes on."""
    monkeypatch.setattr(stream_module, "BACK_OFF_SECONDS", 0.05)
    tries = []
    judge = stream_module.is_transient
    monkeypatch.setattr(stream_module, "is_transient", lambda error: tries.append(error) or judge(error))
    stream, writer = make(server, consumer="a"), server.client()
    handled: list[int] = []

    with working(stream, lambda data: handled.append(int(data["n"])) or True):
        for round_ in (1, 2):
            writer.config_set("appendfsync", "always")  # else the XACK may be lost with the server
            writer.xadd("tasks", {"n": round_})
            wait_until(lambda: handled == list(range(1, round_ + 1)), "it is handled")  # noqa: B023
            wait_until(lambda: settled(writer), "it is acknowledged")
            tries.clear()
            server.stop(signal.SIGKILL)
            wait_until(lambda: len(tries) >= 3, "it has tried to go on")
            server.start()
            wait_until(lambda: len(warnings(caplog, "Redis is back")) == round_, "it says so")  # noqa: B023
        writer.xadd("tasks", {"n": 3})
        wait_until(lambda: handled == [1, 2, 3], "it goes on")

    lines = [record.getMessage().split(": ")[1][:14] for record in caplog.records if record.name.endswith("stream")]
    assert lines == ["Redis does not", "Redis is back"] * 2


def test_handled_message_whose_xack_failed_is_not_handled_again(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The server goes away during the handler: it is acknowledged later, and the rest of the batch handled once."""
    stream, client = make(server, consumer="a"), server.client()
    client.config_set("appendfsync", "always")  # else the first XACK may be lost with the server
    for n in range(3):
        stream.add({"n": n})
    handled: list[int] = []

    def handler(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        if data["n"] == 1:
            server.stop(signal.SIGKILL)
        return True

    with working(stream, handler):
        wait_until(lambda: warnings(caplog, "does not serve"), "it notices that the server has gone")
        server.start()
        wait_until(lambda: settled(client), "all is acknowledged")

    assert handled == [0, 1, 2]


@pytest.mark.parametrize("what", ["stream", "group"])
@pytest.mark.parametrize("when", ["while it waits", "amid a handler"])
def test_deleted_stream_or_group_is_survived(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, what: str, when: str
) -> None:
    """The group is created again, and what is added meanwhile is handled."""
    stream, client = make(server, consumer="a"), server.client()
    handled: list[int] = []

    def delete() -> None:
        if what == "stream":
            client.delete("tasks")
        else:
            client.xgroup_destroy("tasks", "workers")
        client.xadd("tasks", {"n": 2})

    def handler(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        if when == "amid a handler" and handled == [1]:
            delete()
        return True

    with working(stream, handler):
        client.xadd("tasks", {"n": 1})
        wait_until(lambda: handled, "the first is handled")
        if when == "while it waits":
            wait_until(lambda: blocked(client) and settled(client), "it waits")
            delete()
        wait_until(lambda: 2 in handled and settled(client), "it goes on")

    assert len(warnings(caplog, "group workers is gone; creating it again")) == 1
    assert handled == ([1, 2] if what == "stream" else [1, 1, 2])


def test_group_that_began_at_the_end_misses_nothing_when_made_anew(make: Make, server: Server) -> None:
    """With start_id="$", what is added while the group is gone is handled; what was there before it is not."""
    make(server).add({"n": 0})
    stream, client = make(server, consumer="a", start_id="$"), server.client()
    stream.add({"n": 1})
    handled: list[int] = []

    def handler(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        if len(handled) == 1:
            client.xgroup_destroy("tasks", "workers")
            client.xadd("tasks", {"n": 2})
        return True

    stream.process_messages(handler, burst=True)

    assert handled == [1, 1, 2]


def test_group_is_created_again_though_the_server_goes_too(
    make: Make, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is gone, and when it is to be created, so is the connection: both are got over."""
    monkeypatch.setattr(stream_module, "BACK_OFF_SECONDS", 0.02)
    stream, client = make(valkey, consumer="a"), valkey.client()
    stream.add({"n": 1})
    client.xgroup_destroy("tasks", "workers")
    create, tries = stream_module._Stream._create_group, []

    def create_at_the_third_try(self: Any, group: str, start_id: str) -> Any:
        tries.append(self)
        if len(tries) < 3:
            raise errors.ConnectionError("gone")
        return create(self, group, start_id)

    monkeypatch.setattr(stream_module._Stream, "_create_group", create_at_the_third_try)

    assert stream.process_messages(lambda data: True, burst=True) == 1
    assert len(tries) == 3


def test_killed_connection_is_made_again(make: Make, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """CLIENT KILL of the connection blocked in XREADGROUP, and of the other one: it reads on, and tells it once."""
    stream, client = make(server, consumer="a"), server.client()
    handled: list[int] = []

    with working(stream, lambda data: handled.append(data["n"]) or True, block=10_000):
        client.xadd("tasks", {"n": 1})
        wait_until(lambda: handled and settled(client), "it has used both")
        wait_until(lambda: blocked(client), "it waits")
        client.client_kill_filter(_type="normal", skipme=True)
        client.xadd("tasks", {"n": 2})
        wait_until(lambda: warnings(caplog, "Redis is back"), "it says so")
        client.xadd("tasks", {"n": 3})
        wait_until(lambda: len(handled) == 3 and settled(client), "it goes on")

    assert handled == [1, 2, 3]
    assert len(warnings(caplog, "does not serve")) == 1


def test_dead_connection_in_the_callers_pool_is_no_second_outage(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A client of redis.asyncio's own, with its maintenance notices, takes a lost connection for a good one."""
    client, handled = server.client(), []
    no_retry = AsyncRetry(NoBackoff(), 0)

    async def scenario() -> None:
        own = AsyncRedis(host="127.0.0.1", port=server.port, decode_responses=True, retry=no_retry)
        stream = AsyncRedisStream("tasks", own)
        await stream.create_consumer_group("workers", "a")
        task = stream.process_in_task(lambda data: handled.append(data["n"]) or True, block=50)
        client.xadd("tasks", {"n": 1})
        await asyncio.to_thread(wait_until, lambda: handled and settled(client) and blocked(client), "it waits")
        client.client_kill_filter(_type="normal", skipme=True)
        await asyncio.to_thread(wait_until, lambda: warnings(caplog, "Redis is back"), "it says so")
        client.xadd("tasks", {"n": 2})
        await asyncio.to_thread(wait_until, lambda: len(handled) == 2 and settled(client), "it goes on")
        stream.stop()
        assert await asyncio.wait_for(task, 60) == 2
        await stream.close()
        await own.aclose()

    asyncio.run(scenario())

    assert handled == [1, 2]
    assert len(warnings(caplog, "does not serve")) == 1


def test_full_memory_delays_a_burial_and_changes_nothing(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis refuses the dead letter: it waits, and buries it once there is room, once, with the handler's error."""
    monkeypatch.setattr(stream_module, "BACK_OFF_SECONDS", 0.05)
    stream, client = make(server, consumer="a", max_deliveries=1), server.client()
    for n in range(3):
        stream.add({"n": n})
    handled: list[int] = []

    def handler(data: dict[str, Any]) -> bool:
        handled.append(data["n"])
        if data["n"] == 1:
            client.config_set("maxmemory", "1")
            raise ValueError("bad content")
        return True

    with working(stream, handler):
        wait_until(lambda: warnings(caplog, "does not serve"), "it is refused")
        wait_until(lambda: stream_deliveries(client) > 3, "it has tried again")
        client.config_set("maxmemory", "0")
        wait_until(lambda: settled(client), "all is done")

    assert handled == [0, 1, 2]
    (letter,) = make(server, "tasks:dead").read(last_id="0")
    assert letter["data"]["data"] == {"n": 1}
    assert (letter["data"]["deliveries"], letter["data"]["error"]) == (1, "ValueError: bad content")
    assert len(warnings(caplog, "does not serve")) == 1
    assert "maxmemory" in warnings(caplog, "does not serve")[0]


def stream_deliveries(client: Redis) -> int:
    """How often the first pending message has been delivered."""
    pending = client.xpending_range("tasks", "workers", "-", "+", 1)
    return int(pending[0]["times_delivered"]) if pending else 0


def test_refused_login_is_not_waited_for(make: Make, valkey: Server) -> None:
    """What does not go away by itself is raised."""
    stream, client = make(valkey, consumer="a"), valkey.client()

    def handler(data: dict[str, Any]) -> bool:
        client.execute_command("ACL", "SETUSER", "default", "-xack")
        return True

    stream.add({"n": 1})

    with pytest.raises(RedisMessagingError, match="refused the login or the command"):
        stream.process_messages(handler, burst=True)


# -- one algorithm for both -------------------------------------------------------------------------------------


def test_steps_get_answers_errors_and_cancellation() -> None:
    """What is waited for comes back at its yield, or is raised there: in threads and on asyncio alike."""

    def steps(call: Callable[[int], Any]) -> Steps[list[Any]]:
        results: list[Any] = [(yield call(1))]
        try:
            yield call(0)
        except ZeroDivisionError:
            results.append("caught")
        results.append((yield None))
        return results

    async def inverse(n: int) -> float:
        await asyncio.sleep(0)
        return 1 / n

    async def cancelled() -> list[str]:
        seen: list[str] = []

        def endless() -> Steps[None]:
            try:
                yield asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("told")
                raise

        task = asyncio.create_task(run_async(endless()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert run(steps(lambda n: 1 / n)) == [1.0, "caught", None]
    assert asyncio.run(run_async(steps(inverse))) == [1.0, "caught", None]
    assert asyncio.run(cancelled()) == ["told"]


def test_ids_that_are_none_are_the_callers_mistake(make: Make, valkey: Server) -> None:
    """ValueError, and a group that could not be created is not set."""
    stream = make(valkey)

    with pytest.raises(ValueError, match="Invalid stream ID"):
        stream.read(last_id="nonsense")
    with pytest.raises(ValueError, match="Invalid stream ID"):
        stream.create_consumer_group("workers", "a", "abc")
    with pytest.raises(ValueError, match="No consumer group set"):
        stream.pending()
