"""Calls that share a round trip: each caller gets what it would have got alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Server, wait_until
from redis.exceptions import ConnectionError, ResponseError

from task_streams.batching import SharedScript, run_many

COUNT = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


def test_calls_that_come_while_one_is_under_way_share_a_round_trip(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first goes alone and at once; the eight others, who had to wait for it, go together; each gets its reply."""
    client = valkey.client()
    shared = SharedScript(client, client.register_script(COUNT))
    sizes: list[int] = []
    go_on = threading.Event()

    def send(client: Any, calls: Any) -> Any:
        sizes.append(len(calls))
        assert go_on.wait(30)
        return run_many(client, calls)

    monkeypatch.setattr("task_streams.batching.run_many", send)

    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(shared, keys=["first"], args=[1])
        wait_until(lambda: sizes, "it is under way")
        others = [threads.submit(shared, keys=[f"k{n}"], args=[n]) for n in range(8)]
        wait_until(lambda: len(shared._waiting) == 8, "all of them wait")
        go_on.set()
        replies = [first.result(), *(other.result() for other in others)]

    assert replies == [1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert sizes == [1, 8]


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
