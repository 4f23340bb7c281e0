"""Many threads share one queue: each caller gets what it would have got alone, whatever shares a round trip."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conftest import Server, wait_until
from redis.exceptions import RedisError

from task_streams import Task, TaskQueue, keys

THREADS = 20


def listed(queue: TaskQueue) -> list[Any]:
    """Return the data of the tasks in the list."""
    return [json.loads(element)["data"] for element in queue.redis.lrange(keys.QUEUE, 0, -1)]


def test_each_of_many_threads_gets_its_own_task_or_error(valkey: Server) -> None:
    """20 threads put 25 tasks each; those of every fourth are refused. Nobody gets another one's."""
    queue = TaskQueue(valkey.client())

    def put(number: int) -> list[Task | None]:
        outcomes: list[Task | None] = []
        for n in range(25):
            try:
                outcomes.append(queue.put([number, n], id="not an id" if number % 4 == 0 else None))
            except ValueError:
                outcomes.append(None)
        return outcomes

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(put, range(THREADS)))

    tasks = [task for outcomes in found for task in outcomes if task]
    for number, outcomes in enumerate(found):
        expected = [None if number % 4 == 0 else [number, n] for n in range(25)]
        assert [task and task.data for task in outcomes] == expected
    assert len({task.id for task in tasks}) == len(tasks)
    assert sorted(listed(queue)) == sorted(task.data for task in tasks)


def test_scripts_that_the_server_forgets_put_no_task_twice(valkey: Server) -> None:
    """SCRIPT FLUSH, while two threads put one by one and many at once: each task is there once."""
    queue, admin = TaskQueue(valkey.client()), valkey.client()

    with ThreadPoolExecutor() as threads:
        for first in range(0, 2_000, 200):
            one_by_one = threads.submit(lambda first=first: [queue.put(n) for n in range(first, first + 20)])  # type: ignore[misc]
            at_once = threads.submit(queue.put_many, range(first + 20, first + 200))
            admin.script_flush()
            one_by_one.result(timeout=60)
            at_once.result(timeout=60)

    assert sorted(listed(queue)) == list(range(2_000))


def test_lost_server_is_told_to_all_who_wait_and_the_next_call_works(valkey: Server) -> None:
    """The server goes while 20 threads put: each is told, none hangs; when it is back, it works again."""
    queue = TaskQueue(valkey.client(), patience_seconds=0)
    put, told = set[int](), set[int]()

    def work(number: int) -> None:
        try:
            while True:
                queue.put(number)
                put.add(number)
        except RedisError:
            told.add(number)

    with ThreadPoolExecutor(THREADS) as threads:
        running = [threads.submit(work, number) for number in range(THREADS)]
        wait_until(lambda: len(put) == THREADS, "they are at work")
        valkey.stop()
        wait_until(lambda: len(told) == THREADS, "each has been told")
        for each in running:
            each.result(timeout=60)
    valkey.start()

    assert queue.put("new").data == "new"
