"""The auto-pipelined connection: what shares a round trip, who gets which reply, and what is lost with a connection."""

import asyncio
import gc
import hashlib
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from attempts import run
from conftest import Server
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from ailf.messaging.redis import connect_async
from task_streams import pipeline as pipeline_module
from task_streams.lua import Script
from task_streams.pipeline import Pipeline
from tutorial.topologies import Sentinels

ANSWER = Script("return ARGV[1]", "cc0f91a2a1ce87a8c8ef4e1b6b2f8d3fa42f9d11")  # of another script: it is never known


@asynccontextmanager
async def pipeline(url: str, silence_seconds: float = 60) -> AsyncIterator[Pipeline]:
    client = await connect_async(url)
    pipe = Pipeline(client, silence_seconds)
    await pipe.connect()
    try:
        yield pipe
    finally:
        await pipe.close()
        await client.aclose()


def writes_of(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list to which every write to the pipeline's socket is added from now on."""
    writes: list[bytes] = []
    transport = pipe._transport
    assert transport is not None
    write = transport.write
    monkeypatch.setattr(transport, "write", lambda data: (writes.append(bytes(data)), write(data))[1])
    return writes


async def until(predicate: Callable[[], Awaitable[object]]) -> None:
    """Wait until the predicate holds; an error of a lost connection means: not yet."""

    async def wait() -> None:
        while True:
            try:
                if await predicate():
                    return
            except LostConnection:
                pass
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 60)


# -- one round trip ---------------------------------------------------------------------------------------------


def test_commands_of_one_turn_share_one_write(empty_valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred commands of different coroutines leave in one write; the next turn's in another."""

    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            writes = writes_of(pipe, monkeypatch)

            async def ask(n: int) -> Any:
                return await pipe.call("ECHO", n)

            assert await asyncio.gather(*map(ask, range(300))) == [str(n) for n in range(300)]
            assert len(writes) == 1
            await pipe.call("PING")
            assert len(writes) == 2

    run(test)


def test_replies_come_in_the_order_of_the_commands(empty_valkey: Server) -> None:
    """Also when they are issued in many turns, large and small ones mixed."""

    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            asked = []
            for n in range(200):
                asked.append(pipe.call("ECHO", f"{n}:" + "x" * (100_000 if n % 20 == 0 else 10)))
                if n % 7 == 0:
                    await asyncio.sleep(0)
            replies = await asyncio.gather(*asked)
            assert [reply.partition(":")[0] for reply in replies] == [str(n) for n in range(200)]

    run(test)


def test_cancelled_waiter_does_not_shift_the_replies_of_the_others(empty_valkey: Server) -> None:
    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            asked = [pipe.call("ECHO", n) for n in range(30)]
            for future in asked[::3]:
                future.cancel()
            await asyncio.sleep(0)  # they are sent
            asked[1].cancel()
            replies = await asyncio.gather(*asked, return_exceptions=True)
            assert [reply for reply in replies if isinstance(reply, str)] == [
                str(n) for n in range(30) if n % 3 and n != 1
            ]

    run(test)


def test_error_concerns_one_command_only(empty_valkey: Server) -> None:
    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            calls = [pipe.call("SET", "a", "text"), pipe.call("INCR", "a"), pipe.call("GET", "a")]
            first, error, last = await asyncio.gather(*calls, return_exceptions=True)
            assert (first, last) == ("OK", "text")
            assert isinstance(error, ResponseError)

    run(test)


def test_replies_are_bytes_if_nothing_is_to_be_decoded(empty_valkey: Server) -> None:
    async def test() -> None:
        pipe = Pipeline(await connect_async(empty_valkey.url), silence_seconds=60, decode=False)
        await pipe.connect()
        assert await pipe.call("ECHO", b"\xff") == b"\xff"
        await pipe.close()

    run(test)


def test_text_that_is_not_utf_8_stops_nobody(empty_valkey: Server) -> None:
    """Somebody's key holds bytes: they are shown as such, and the replies behind come as ever."""

    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            replies = await asyncio.gather(pipe.call("ECHO", b"a\xff"), pipe.call("PING"))
            assert replies == ["a\\xff", "PONG"]

    run(test)


def test_script_that_the_server_does_not_know_is_sent_whole(empty_valkey: Server) -> None:
    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            with pytest.raises(NoScriptError):
                await pipe.call("EVALSHA", ANSWER.sha, 0, "hello")
            assert await pipe.run((ANSWER, [], ["hello"])) == "hello"

    run(test)


# -- lost connections -------------------------------------------------------------------------------------------


def test_lost_connection_fails_all_that_is_on_its_way_and_later_commands_work(empty_valkey: Server) -> None:
    """No future stays unresolved: neither of what was sent, nor of what was not sent yet."""

    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            sent = [pipe.call("BLPOP", "nothing", 0), pipe.call("PING")]
            await asyncio.sleep(0)
            empty_valkey.client().client_kill_filter(_type="normal")  # the event loop does not know it yet
            unsent = [pipe.call("PING"), pipe.call("PING")]
            results = await asyncio.wait_for(asyncio.gather(*sent, *unsent, return_exceptions=True), 60)
            assert [type(result) for result in results] == [LostConnection] * 4
            await until(lambda: pipe.call("PING"))

    run(test)


def test_commands_fail_while_the_server_is_away_and_work_when_it_is_back(valkey: Server) -> None:
    async def test() -> None:
        async with pipeline(valkey.url) as pipe:
            await asyncio.to_thread(valkey.stop)
            with pytest.raises(LostConnection):
                while True:
                    await asyncio.wait_for(pipe.call("PING"), 60)
            await asyncio.to_thread(valkey.start)
            await until(lambda: pipe.call("PING"))

    run(test)


def test_lost_connection_is_made_again_through_the_sentinels(tmp_path: Path) -> None:
    """Also if the client that it was made from is kept by nobody else."""
    first = random.randrange(10_000, 20_000)
    with Sentinels(tmp_path / "servers", first, first + 10) as sentinels:

        async def test() -> None:
            pipe = Pipeline(await connect_async(sentinels.url), silence_seconds=60)
            await pipe.connect()
            gc.collect()
            sentinels.master().client().client_kill_filter(_type="normal")
            await until(lambda: pipe.call("PING"))
            await pipe.close()

        run(test)


def test_silent_server_is_given_up(valkey: Server) -> None:
    """SIGSTOP: its connections stay open, and nothing comes. The commands fail; when it goes on, later ones work."""

    async def test() -> None:
        async with pipeline(valkey.url, silence_seconds=0.5) as pipe:
            valkey.send(signal.SIGSTOP)
            with pytest.raises(LostConnection):
                await asyncio.wait_for(pipe.call("PING"), 60)
            valkey.send(signal.SIGCONT)
            await until(lambda: pipe.call("PING"))

    run(test)


def test_connection_on_which_nothing_is_awaited_is_not_silent(empty_valkey: Server) -> None:
    """It is kept for as long as nobody asks anything."""

    async def test() -> None:
        async with pipeline(empty_valkey.url, silence_seconds=0.05) as pipe:
            before = await pipe.call("CLIENT", "ID")
            for _ in range(3):  # longer than the silence that is allowed
                await asyncio.sleep(0.05)
            assert await pipe.call("CLIENT", "ID") == before

    run(test)


def test_close_fails_what_is_on_its_way(empty_valkey: Server) -> None:
    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            waiting = pipe.call("BLPOP", "nothing", 0)
            await asyncio.sleep(0)  # it is sent
            await pipe.close()
            with pytest.raises(LostConnection):
                await asyncio.wait_for(waiting, 60)
            with pytest.raises(LostConnection):
                await pipe.call("PING")

    run(test)


@pytest.mark.parametrize("turns", range(4))
def test_close_returns_in_the_moment_in_which_the_connection_is_lost(empty_valkey: Server, turns: int) -> None:
    async def test() -> None:
        async with pipeline(empty_valkey.url) as pipe:
            waiting = pipe.call("BLPOP", "nothing", 0)
            await asyncio.sleep(0)  # it is sent
            assert pipe._transport is not None
            pipe._transport.abort()
            with pytest.raises(LostConnection):
                await waiting
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(pipe.close(), 60)

    run(test)


def test_read_only_reply_makes_it_connect_again(valkey: Server) -> None:
    """The server has become a replica: the command fails, and a new connection may find the master."""

    async def test() -> None:
        async with pipeline(valkey.url) as pipe:
            before = await pipe.call("CLIENT", "ID")
            await pipe.call("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(ReadOnlyError):
                await pipe.call("SET", "a", 1)

            async def is_another() -> bool:
                return bool(await pipe.call("CLIENT", "ID") != before)

            await until(is_another)
            await pipe.call("REPLICAOF", "NO", "ONE")
            assert await pipe.call("SET", "a", 1) == "OK"

    run(test)


def test_read_only_reply_inside_that_of_a_script_makes_it_connect_again(valkey: Server) -> None:
    """The scripts catch the error of each task, so it comes within a list."""
    source = "return {1, redis.pcall('SET', KEYS[1], 1)}"
    script = Script(source, hashlib.sha1(source.encode()).hexdigest())

    async def test() -> None:
        async with pipeline(valkey.url) as pipe:
            before = await pipe.call("CLIENT", "ID")
            await pipe.call("REPLICAOF", "127.0.0.1", "1")
            reply = await pipe.run((script, ["a"], []))
            assert isinstance(reply[1], ReadOnlyError)

            async def is_another() -> bool:
                return bool(await pipe.call("CLIENT", "ID") != before)

            await until(is_another)

    run(test)


def test_ready_waits_while_too_much_is_unsent(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server reads nothing, ready() waits. It returns when the server reads again."""
    monkeypatch.setattr(pipeline_module, "MOST_UNSENT_BYTES", 1_000_000)

    async def test() -> None:
        async with pipeline(valkey.url) as pipe:
            await asyncio.wait_for(pipe.ready(), 60)
            valkey.send(signal.SIGSTOP)
            calls = [pipe.call("SET", "a", "x" * 1_000_000) for _ in range(32)]
            await asyncio.sleep(0)  # they are written
            waiting = asyncio.create_task(pipe.ready())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting.done()
            valkey.send(signal.SIGCONT)
            await asyncio.wait_for(waiting, 60)
            assert await asyncio.gather(*calls) == ["OK"] * 32

    run(test)
