"""Calls that share a round trip: each caller gets what it would have got alone."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Server, wait_until
from redis.exceptions import ConnectionError, ResponseError

from task_streams import TaskQueue, keys
from task_streams.batching import AT_ONCE, Call, SharedScript, _Waiting, run_many, send

COUNT = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


def test_calls_that_come_while_one_is_under_way_share_a_round_trip(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three go alone and at once; the eight others, who had to wait for them, share what is needed of three more."""
    client = valkey.client()
    shared = SharedScript(client, client.register_script(COUNT))
    sizes: list[int] = []
    go_on = threading.Event()

    def send(client: Any, calls: Any) -> Any:
        sizes.append(len(calls))
        assert go_on.wait(30)
        return run_many(client, calls)

    monkeypatch.setattr("task_streams.batching.run_many", send)

    with ThreadPoolExecutor(AT_ONCE + 8) as threads:
        firsts = [threads.submit(shared, keys=["first"], args=[1]) for _ in range(AT_ONCE)]
        try:
            wait_until(lambda: len(sizes) == AT_ONCE, "they are under way")
            others = [threads.submit(shared, keys=[f"k{n}"], args=[n]) for n in range(8)]
            wait_until(lambda: len(shared._waiting) == 8, "all of them wait")
        finally:
            go_on.set()
        replies = [one.result() for one in firsts + others]

    assert sorted(replies[:AT_ONCE]) == [1, 2, 3]
    assert replies[AT_ONCE:] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sizes[:AT_ONCE] == [1] * AT_ONCE
    assert sum(sizes[AT_ONCE:]) == 8
    assert len(sizes) <= 2 * AT_ONCE


def test_calls_one_after_the_other_go_at_once(valkey: Server) -> None:
    """Nobody waits for company: with no other thread, each call is answered."""
    shared = SharedScript(client := valkey.client(), client.register_script(COUNT))

    assert [shared(keys=["n"], args=[1]) for _ in range(3)] == [1, 2, 3]


def test_each_of_many_threads_gets_its_own_reply_or_error(valkey: Server) -> None:
    """40 threads, 50 calls each; the server refuses those of every fourth thread. Nobody gets another one's."""
    client = valkey.client()
    shared = SharedScript(client, client.register_script(COUNT))
    for number in range(0, 40, 4):
        client.rpush(f"k{number}", "a list cannot be counted")

    def call(number: int) -> list[Any]:
        outcomes: list[Any] = []
        for _ in range(50):
            try:
                outcomes.append(shared(keys=[f"k{number}"], args=[number]))
            except ResponseError as error:
                outcomes.append(str(error)[:9])
        return outcomes

    with ThreadPoolExecutor(40) as threads:
        found = list(threads.map(call, range(40)))

    for number, outcomes in enumerate(found):
        assert outcomes == (["WRONGTYPE"] * 50 if number % 4 == 0 else [number * n for n in range(1, 51)])


def test_error_of_one_call_takes_only_its_place(valkey: Server) -> None:
    """A batch of three, of which the server refuses the second."""
    client = valkey.client()
    client.rpush("list", "x")

    count = client.register_script(COUNT)

    one, refused, three = run_many(client, [(count, ["a"], [1]), (count, ["list"], [1]), (count, ["b"], [3])])

    assert (one, three) == (1, 3)
    assert isinstance(refused, ResponseError)


def test_batch_is_carried_out_once_where_the_server_has_forgotten_the_script(valkey: Server) -> None:
    """SCRIPT FLUSH, as a restart does: the script is loaded, and each call has run exactly once."""
    client = valkey.client()
    script = client.register_script(COUNT)
    client.script_flush()

    assert run_many(client, [(script, ["a"], [1]), (script, ["a"], [1]), (script, ["b"], [5])]) == [1, 2, 5]


def test_calls_before_a_script_that_the_server_lacks_are_not_sent_again(valkey: Server) -> None:
    """The server knows the first script, and not the second: it is told the second, and the first has run once."""
    client = valkey.client()
    known, unknown = client.register_script(COUNT), client.register_script(f"{COUNT} -- another one")
    client.script_load(COUNT)

    replies = run_many(client, [(known, ["a"], [1]), (unknown, ["b"], [1])])

    assert replies == [1, 1]
    assert client.get("a") == "1"


def test_script_flush_in_the_middle_of_a_batch_puts_no_task_twice(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server forgets put.lua when 100 of 300 tasks are put: only the others are sent again."""
    queue = TaskQueue(valkey.client())
    queue.put("so that the script is known")
    sizes: list[int] = []

    def send_in_parts(client: Any, commands: Any) -> list[Any]:
        sizes.append(len(commands))
        replies = send(client, commands[:100])
        if len(sizes) == 1:
            client.script_flush()
        return replies + send(client, commands[100:])

    monkeypatch.setattr("task_streams.batching.send", send_in_parts)

    queue.put_many(range(300))

    found = [json.loads(element)["data"] for element in queue.redis.lrange(keys.QUEUE, 0, -1)]
    assert found[-2::-1] == list(range(300))
    assert sizes == [300, 200]


def test_script_that_another_client_loads_in_the_middle_of_a_batch_puts_no_task_twice(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tasks only the second finds no put.lua: it alone is sent again."""
    queue = TaskQueue(valkey.client())
    queue.put("so that the script is known")
    sizes: list[int] = []

    def send_one_by_one(client: Any, commands: Any) -> list[Any]:
        sizes.append(len(commands))
        replies = []
        for place, command in enumerate(commands):
            if len(sizes) == 1 and place == 1:
                client.script_flush()
            replies += send(client, [command])
            if len(sizes) == 1 and place == 1:
                client.script_load(queue._scripts["put"].script)
        return replies

    monkeypatch.setattr("task_streams.batching.send", send_one_by_one)

    queue.put_many(range(3))

    found = [json.loads(element)["data"] for element in queue.redis.lrange(keys.QUEUE, 0, -1)]
    assert sorted(found[:-1]) == [0, 1, 2]
    assert sizes == [3, 1]


def interrupted(lock: Any, moment: str) -> Any:
    """Return a lock whose acquire() is interrupted by Ctrl-C, at once or when it has been acquired."""

    class Interrupted:
        release = lock.release

        def acquire(self) -> None:
            if moment == "when it is to send":
                lock.acquire()
            raise KeyboardInterrupt

    return Interrupted()


@pytest.mark.parametrize("moment", ["while it waits", "when it is to send"])
def test_thread_that_is_interrupted_holds_up_nobody(
    valkey: Server, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Ctrl-C in a thread that waits, or whose turn to send has just come: who calls later is answered."""
    client = valkey.client()
    shared = SharedScript(client, client.register_script(COUNT))
    under_way, go_on, replies = threading.Event(), threading.Event(), []

    def send(client: Any, calls: Any) -> Any:
        under_way.set()
        assert go_on.wait(30)
        return run_many(client, calls)

    class Waiting(_Waiting):
        def __init__(self, call: Call) -> None:
            super().__init__(call)
            if call[1] == ["interrupted"]:
                self.wake = interrupted(self.wake, moment)

    monkeypatch.setattr("task_streams.batching.AT_ONCE", 1)
    monkeypatch.setattr("task_streams.batching.run_many", send)
    monkeypatch.setattr("task_streams.batching._Waiting", Waiting)

    def call(key: str) -> None:
        try:
            replies.append((key, shared(keys=[key], args=[1])))
        except KeyboardInterrupt:
            replies.append((key, "interrupted"))

    def start(key: str, is_there: Callable[[], object]) -> None:
        threading.Thread(target=call, args=[key], daemon=True).start()
        wait_until(is_there, f"{key} is there")

    start("first", under_way.is_set)
    start("interrupted", lambda: shared._waiting or replies)
    start("later", lambda: any(one.call[1] == ["later"] for one in shared._waiting))
    go_on.set()

    wait_until(lambda: len(replies) == 3, "all have returned", 10)
    assert sorted(replies) == [("first", 1), ("interrupted", "interrupted"), ("later", 1)]


def test_lost_connection_is_told_to_all_who_wait_and_the_next_call_works(valkey: Server) -> None:
    """The server goes while 20 threads call: each gets a result or an error, none hangs; afterwards it works again."""
    client = valkey.client()
    shared = SharedScript(client, client.register_script(COUNT))
    stopped, errors = threading.Event(), []

    def call(number: int) -> None:
        while not stopped.is_set():
            try:
                shared(keys=[f"k{number}"], args=[1])
            except ConnectionError as error:
                errors.append(error)
                return

    with ThreadPoolExecutor(20) as threads:
        running = [threads.submit(call, number) for number in range(20)]
        wait_until(lambda: client.exists("k0", "k19") == 2, "they are at work")
        valkey.stop()
        wait_until(lambda: len(errors) == 20, "each has been told")
        stopped.set()
        assert [one.result() for one in running] == [None] * 20
    valkey.start()
    wait_until(lambda: not valkey.is_loading(), "it has its data again")

    assert shared(keys=["new"], args=[1]) == 1
