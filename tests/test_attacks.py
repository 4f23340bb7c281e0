"""The fence under attack: lost servers, foreign entries, lost replies, two workers for one task. On a real server."""

import asyncio
import os
import random
import signal
import time
from typing import Any

import pytest
from attempts import Attempts, attempts, end_lease, names, popped, run, seqs
from conftest import Proxy, Server, wait_until
from redis import Redis
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import ResponseError

from ailf.messaging.redis import connect
from task_streams import LeaseLost, LogReader, StreamEnded, Task, TaskLog, TaskQueue, keys
from task_streams import queue as queue_module
from task_streams.claims import claim_steps, new_token
from task_streams.worker import work

LARGEST = 2**64 - 1


@pytest.fixture
def queue(redis: Redis) -> TaskQueue:
    return TaskQueue(redis)


def now_ms(redis: Redis) -> int:
    seconds, microseconds = redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


class LosingReplies:
    """A pipeline that carries commands out and loses the replies of those that `lose` picks."""

    def __init__(self, pipe: Any, lose: Any) -> None:
        self.pipe, self.lose = pipe, lose
        self.is_one_server = True

    def call(self, *command: Any) -> "asyncio.Future[Any]":
        future = self.pipe.call(*command)
        return asyncio.ensure_future(self._lost(future)) if self.lose(command) else future

    async def _lost(self, future: "asyncio.Future[Any]") -> Any:
        await future
        raise LostConnection("the reply was lost")

    async def run(self, call: Any) -> Any:
        reply = await self.pipe.run(call)
        if self.lose(("SCRIPT", call[0])):
            raise LostConnection("the reply was lost")
        return reply

    async def ready(self) -> None:
        pass


# -- two attempts -----------------------------------------------------------------------------------------------


def test_late_append_of_an_earlier_attempt_is_refused(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(url) as first, attempts(url, "other") as second:
            element = popped(redis)
            _, old = await first.claim(element)
            await old.add("progress", percent=1)
            end_lease(queue, "1")
            _, new = await second.claim(element)
            with pytest.raises(LeaseLost):
                await old.add("progress", percent=2)
            with pytest.raises(LeaseLost):
                await old.end("completed", "old", result="old")
            await new.end("completed", "new", result="new")

    run(test)
    assert names(redis) == ["started", "progress", "worker_lost", "started", "completed"]
    assert seqs(redis) == [1, 2, 3, 4, 5]
    assert queue.get("1") is not None and queue.get("1")["result"] == "new"  # type: ignore[index]


@pytest.mark.parametrize("step", ["add", "end"])
def test_attempt_whose_claim_was_lost_writes_nothing_into_the_next_one(
    step: str, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """A power cut loses the first claim, so both workers hold attempt 1."""
    queue.put({"n": 1})
    record = redis.hgetall(keys.record("1"))

    async def test() -> None:
        async with attempts(url) as first, attempts(url, "other") as second:
            element = popped(redis)
            old_task, old = await first.claim(element)
            redis.delete(keys.record("1"), keys.stream("1"))  # what the last second wrote is gone
            redis.zrem(keys.LEASES, "1")
            redis.hset(keys.record("1"), mapping=record)
            wait_until(lambda: now_ms(redis) > int(old_task.epoch), "a power cut takes longer than a millisecond")
            new_task, new = await second.claim(element)
            assert (old_task.attempt, new_task.attempt) == (1, 1)
            with pytest.raises(LeaseLost):
                await (old.add("progress", percent=1) if step == "add" else old.end("completed", "old", result="old"))
            await new.end("completed", "new", result="new")

    run(test)
    assert names(redis) == ["started", "completed"]


@pytest.mark.parametrize("lost", ["stream", "record", "both"])
def test_worker_goes_on_or_is_told_when_the_server_forgets(lost: str, url: str, queue: TaskQueue, redis: Redis) -> None:
    """The stream, the record or both are lost while a worker works; the next attempt reaches the one end."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as first, attempts(url, "other") as second:
            _, old = await first.claim(element)
            await old.add("progress", percent=1)
            if lost in ("stream", "both"):
                redis.delete(keys.stream("1"))
            if lost in ("record", "both"):
                redis.delete(keys.record("1"))
                redis.zrem(keys.LEASES, "1")
                redis.zrem(keys.UNFINISHED, "1")
            if lost == "record":
                await old.add("progress", percent=2)  # its stream knows it still
            else:
                with pytest.raises(LeaseLost):
                    await old.add("progress", percent=2)
            with pytest.raises(LeaseLost):
                await old.end("completed", "old", result="old")
            end_lease(queue, "1")
            _, new = await second.claim(element)
            await new.end("completed", "new", result="new")
            assert new.epoch > old.epoch

    run(test)
    found = names(redis)
    assert found[-1] == "completed" and found.count("completed") == 1
    assert LogReader("1", redis).read()[-1].fields["result"] == "new"
    assert seqs(redis) == list(range(seqs(redis)[0], seqs(redis)[0] + len(found)))


def test_task_of_a_reused_id_over_an_old_ended_stream_runs(url: str, queue: TaskQueue, redis: Redis) -> None:
    redis.xadd(keys.stream("again"), {"event": "started"}, id="1000-1")
    redis.xadd(keys.stream("again"), {"event": "completed", "result": "old"}, id="1000-2")
    queue.put({"n": 1}, id="again")

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            await log.end("completed", "new", result="new")

    run(test)
    assert names(redis, "again") == ["started", "completed"]
    assert seqs(redis, "again") == [1, 2]


def test_lost_record_does_not_cost_the_stream(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A claim that has to make the record again must not take the stream for a stranger's."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            await log.add("progress", percent=50)
            redis.delete(keys.record("1"))
            redis.zrem(keys.LEASES, "1")
            _, log = await worker.claim(element)
            await log.end("completed", None, result=None)

    run(test)
    assert names(redis) == ["started", "progress", "started", "completed"]


@pytest.mark.parametrize("emptied", ["trimmed", "deleted"])
def test_seq_goes_on_after_a_stream_was_emptied(emptied: str, url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            await log.add("progress", percent=50)
            if emptied == "trimmed":
                redis.xtrim(keys.stream("1"), maxlen=0)
            else:
                redis.xdel(keys.stream("1"), *[entry_id for entry_id, _ in redis.xrange(keys.stream("1"))])
            end_lease(queue, "1")
            await worker.claim(element)

    run(test)
    assert seqs(redis) == [3, 4]  # worker_lost, started


def test_start_whose_reply_was_lost_does_not_fence_its_own_worker(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})
    element, token = popped(redis), new_token()

    async def test() -> None:
        async with attempts(url) as worker:
            first, _ = await worker.claim(element, token)
            again, log = await worker.claim(element, token)
            assert (again.attempt, again.epoch, again.seq) == (first.attempt, first.epoch, first.seq)
            await log.end("completed", None, result=None)

    run(test)
    assert names(redis) == ["started", "completed"]


def test_started_that_was_deleted_before_its_claim_is_repeated_takes_no_seq_twice(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """The reply of a claim is lost, and somebody deletes the entry that it wrote: the log counts on."""
    queue.put({})
    token, element = new_token(), popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            await worker.claim(element, token)
            redis.xdel(keys.stream("1"), redis.xrange(keys.stream("1"))[0][0])
            _, log = await worker.claim(element, token)
            await log.add("progress", percent=50)

    run(test)
    assert seqs(redis) == [2]


def test_another_claim_in_the_same_millisecond_is_not_taken_for_a_repeated_one(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """The record is lost, and the same worker claims the task again, as attempt 1, while the clock stands still."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            task, _ = await worker.claim(element)
            await worker.log_of(task).add("progress", percent=50)
            redis.delete(keys.record("1"))
            redis.zrem(keys.LEASES, "1")
            ahead = int(task.epoch) + 100_000  # the claim draws the epoch that is in the stream already
            redis.xadd(
                keys.stream("1"), {"event": "started", "timestamp": "", "worker": "w", "attempt": "1"}, f"{ahead}-3"
            )
            redis.hset(keys.record("1"), mapping={"status": "waiting", "epoch": ahead - 1, "data": '{"n": 1}'})
            again, log = await worker.claim(element)
            assert int(again.epoch) > ahead
            await log.end("completed", None, result=None)

    run(test)
    assert seqs(redis) == [1, 2, 3, 4, 5]


def test_late_copy_of_a_claim_does_not_wake_a_task_that_rests(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Its worker has claimed it, and let it rest, before a first try of that claim arrives."""
    queue.put({"n": 1})
    element, token = popped(redis), new_token()

    async def test() -> None:
        async with attempts(url) as worker:
            task, _ = await worker.claim(element, token)
            assert await worker.claims.release(task, delay_seconds=60)
            assert await worker.claims.claim([(element, token)]) == []

    run(test)
    assert redis.hget(keys.record("1"), "status") == "retrying"
    assert seqs(redis) == [1]


def test_foreign_entry_behind_the_end_does_not_hide_it(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The worker dies between the terminal event and finish, and somebody adds an entry behind it."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            await worker.pipe.call("XADD", keys.stream("1"), f"{log.epoch}-2", "event", "completed", "result", "5")
            redis.xadd(keys.stream("1"), {"event": "hello"})
            end_lease(queue, "1")
            [again] = await worker.claims.claim([(element, new_token())])
            assert again.ended == "completed"

    run(test)


def test_task_whose_end_was_found_is_closed_even_if_its_claimer_dies(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The record was lost, the stream has its end, and the worker that finds it dies before it closes the record."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            redis.xadd(keys.stream("1"), {"event": "completed", "result": "5"}, id=f"{log.epoch}-2")
            redis.delete(keys.record("1"))
            redis.zrem(keys.LEASES, "1")
            assert (await worker.claim(element))[0].ended == "completed"
            end_lease(queue, "1")
            assert queue.recover() == 1
            task, _ = await worker.claim(popped(redis))
            assert task.ended == "completed"

    run(test)
    assert redis.hget(keys.record("1"), "losses") == "1"


def test_claim_that_is_repeated_keeps_the_problem(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The first reply, which said that the stream was spoilt, is lost: the task fails all the same."""
    queue.put({"n": 1})
    redis.set(keys.stream("1"), "not a stream")
    element, token = popped(redis), new_token()

    async def test() -> None:
        async with attempts(url) as worker:
            first, _ = await worker.claim(element, token)
            again, _ = await worker.claim(element, token)
            assert first.problem == again.problem != ""

    run(test)


# -- foreign entries --------------------------------------------------------------------------------------------


def test_foreign_entry_ends_the_attempt_and_the_next_one_goes_on_above_it(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            redis.xadd(keys.stream("1"), {"event": "hello"}, id=f"{int(log.epoch) + 100_000}-0")
            with pytest.raises(LeaseLost):
                await log.add("progress", percent=1)
            end_lease(queue, "1")
            _, log = await worker.claim(element)
            await log.end("completed", None, result=None)

    run(test)
    assert names(redis) == ["started", "hello", "worker_lost", "started", "completed"]
    assert seqs(redis) == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("what", ["a foreign entry", "the stream is deleted"])
def test_task_whose_stream_is_not_its_own_any_more_is_released_at_once(
    what: str, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """Its worker need not wait until the lease is over: the next attempt begins, and comes to its end."""
    queue.put({})

    async def handler(task: Task, log: TaskLog) -> str:
        if task.attempt == 1 and what == "a foreign entry":
            redis.xadd(keys.stream("1"), {"event": "hello"})
        elif task.attempt == 1:
            redis.delete(keys.stream("1"))
        await log.add("progress", percent=50)
        return "done"

    assert run(lambda: work(handler, url=url, burst=True, lease_seconds=3600)) == 0

    told = ["started", "progress", "completed"]
    begun = [] if what == "the stream is deleted" else ["started", "hello"]
    assert names(redis) == [*begun, "worker_lost", *told]
    assert redis.hmget(keys.record("1"), "attempts", "failures", "losses") == ["2", None, "1"]


@pytest.mark.parametrize("foreign", ["9007199254740993-7", "{later}-0"])
def test_foreign_entry_that_was_deleted_again_does_not_keep_the_next_attempt_out(
    foreign: str, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """The stream still refuses ids up to the deleted one's."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            entry_id = foreign.format(later=int(log.epoch) + 100_000)
            redis.xadd(keys.stream("1"), {"event": "hello"}, id=entry_id)
            redis.xdel(keys.stream("1"), entry_id)
            end_lease(queue, "1")
            _, log = await worker.claim(element)
            await log.end("completed", None, result=None)

    run(test)
    assert names(redis)[-2:] == ["started", "completed"]


@pytest.mark.parametrize("largest", [f"{LARGEST}-{LARGEST}", f"{2**53}-0", f"{2**53 + 1}-7", f"{{epoch}}-{LARGEST}"])
def test_absurd_foreign_id_gets_a_clear_end(largest: str, url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(element)
            its_id = largest.format(epoch=log.epoch)
            redis.xadd(keys.stream("1"), {"event": "hello"}, id=its_id)
            with pytest.raises(LeaseLost):
                await log.add("progress", percent=1)
            end_lease(queue, "1")
            task, log = await worker.claim(element)
            assert its_id in task.problem
            await log.end("failed", task.problem, error=task.problem, attempts=1)

    run(test)
    assert names(redis)[-1] == "failed"


def test_huge_number_of_a_foreign_entry_behind_which_another_stands_gets_a_clear_end(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """It has our epoch, so it counts; and numbers so large cannot be told apart."""
    queue.put({"n": 1})
    element = popped(redis)

    async def test() -> None:
        async with attempts(url) as worker:
            task, _ = await worker.claim(element)
            redis.xadd(keys.stream("1"), {"event": "hello"}, id=f"{task.epoch}-{2**60}")
            redis.xadd(keys.stream("1"), {"event": "hello"}, id=f"{int(task.epoch) + 1}-0")
            end_lease(queue, "1")
            task, _ = await worker.claim(element)
            assert task.problem

    run(test)


def test_task_whose_stream_is_something_else_fails_clearly(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Somebody has SET the key of its stream: the task has an end that says so, and the worker goes on."""
    redis.set(keys.stream("1"), "not a stream")
    queue.put_many([{}, {}])

    async def handler(_task: Task, _log: TaskLog) -> None:
        pass

    assert run(lambda: work(handler, url=url, burst=True)) == 0
    assert names(redis)[-1] == "failed" and names(redis, "2")[-1] == "completed"
    assert "it is a string" in str((queue.get("1") or {})["result"])


def test_burst_ends_although_a_record_is_spoilt(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put_many([{}, {}], delay_seconds=3600)
    redis.set(keys.record("1"), "not a hash")

    async def handler(_task: Task, _log: TaskLog) -> None:
        pass

    assert run(lambda: work(handler, url=url, burst=True)) == 0


# -- the log owns its appends -----------------------------------------------------------------------------------


def test_cancelled_coroutine_does_not_make_the_next_append_look_foreign(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """A coroutine is cancelled between XADD and its reply, a thousand times; each event is there once, in order."""
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            for n in range(1000):
                adding = asyncio.create_task(log.add("progress", percent=n))
                for _ in range(n % 4):
                    await asyncio.sleep(0)
                adding.cancel()
                await asyncio.wait([adding])
            await log.end("completed", None, result=None)

    run(test)
    events = LogReader("1", redis).read()
    assert [event.id.partition("-")[2] for event in events] == [str(n + 1) for n in range(len(events))]
    percents = [event.fields["percent"] for event in events if event.name == "progress"]
    assert percents == sorted(set(percents)) and events[-1].name == "completed"


def test_append_whose_reply_was_lost_is_written_once(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(url) as worker:
            task, _ = await worker.claim(popped(redis))
            seen: set[Any] = set()

            def lose(command: tuple[Any, ...]) -> bool:
                key = command[:8] if command[0] == "XADD" else command
                first = str(key) not in seen and command[0] in ("XADD", "SCRIPT")
                seen.add(str(key))
                return first

            losing = Attempts(LosingReplies(worker.pipe, lose), "w", 60)
            log = losing.log_of(task)
            ids = await asyncio.gather(*[log.add("progress", percent=n) for n in range(20)])
            assert len(set(ids)) == 20
            await log.end("completed", None, result=None)

    run(test)
    assert names(redis) == ["started", *["progress"] * 20, "completed"]
    assert seqs(redis) == list(range(1, 23))


def test_append_that_was_asked_for_before_the_end_is_not_written_behind_it(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """A handler starts a coroutine that adds an event, and returns without waiting for it."""
    queue.put({})
    added: list[asyncio.Task[str]] = []

    async def handler(_task: Task, log: TaskLog) -> None:
        added.append(asyncio.create_task(log.add("progress", percent=50)))
        await asyncio.sleep(0)

    async def test() -> None:
        await work(handler, url=url, burst=True)
        await asyncio.gather(*added, return_exceptions=True)

    run(test)
    assert names(redis)[-1] == "completed"


def test_coroutine_that_a_failed_attempt_left_writes_nothing_more(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The task rests until its next attempt: what the first one started is over, too."""
    queue.put({})
    stray: list[asyncio.Task[None]] = []

    async def add_for_ever(log: TaskLog) -> None:
        while True:
            await log.add("progress", percent=50)

    async def handler(task: Task, log: TaskLog) -> None:
        if task.attempt == 1:
            stray.append(asyncio.create_task(add_for_ever(log)))
            await log.add("processing", step="fail")
            raise RuntimeError("as told")

    async def test() -> None:
        await work(handler, url=url, burst=True, backoff_seconds=0.1)
        [error] = await asyncio.gather(*stray, return_exceptions=True)
        assert isinstance(error, StreamEnded)

    run(test)
    assert names(redis)[-2:] == ["started", "completed"]


def test_concurrent_coroutines_of_one_handler_queue(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            await asyncio.gather(*[log.add("progress", percent=n) for n in range(100)])
            await log.end("completed", None, result=None)
            with pytest.raises(StreamEnded):
                await log.add("progress", percent=100)

    run(test)
    assert [e.fields["percent"] for e in LogReader("1", redis).read()[1:-1]] == list(range(100))


def test_completed_that_is_refused_for_lack_of_memory_closes_nothing(url: str, queue: TaskQueue, redis: Redis) -> None:
    """No record says completed over a stream without an end; when there is memory again, both are written."""
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            redis.config_set("maxmemory", "1mb")
            ending = asyncio.create_task(log.end("completed", "done", result="done"))
            for _ in range(5):
                await worker.pipe.call("PING")
            assert not ending.done()
            assert redis.hget(keys.record("1"), "status") == "running"
            redis.config_set("maxmemory", "0")
            await asyncio.wait_for(ending, 60)

    run(test)
    assert names(redis) == ["started", "completed"]
    assert redis.hget(keys.record("1"), "status") == "completed"


# -- many at once -----------------------------------------------------------------------------------------------


def test_spoilt_record_among_a_hundred_stops_nobody_else(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put_many([{"n": n} for n in range(100)])
    redis.delete(keys.record("50"))
    redis.set(keys.record("50"), "spoilt")

    async def test() -> None:
        async with attempts(url) as worker:
            elements = [popped(redis) for _ in range(100)]
            tasks = await worker.claims.claim([(element, new_token()) for element in elements])
            assert len(tasks) == 99
            logs = [worker.log_of(task) for task in tasks]
            await asyncio.gather(*[log.end("completed", None, result=None) for log in logs])

    run(test)
    assert redis.hget(keys.TOTALS, "completed") == "99"


def test_put_repeated_after_its_task_has_ended_changes_nothing(url: str, queue: TaskQueue, redis: Redis) -> None:
    queue.put({"n": 1}, id="once")

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(redis))
            await log.end("completed", None, result=None)

    run(test)
    before = redis.hgetall(keys.record("once"))
    queue.put({"n": 1}, id="once")
    assert redis.hgetall(keys.record("once")) == before
    assert redis.llen(keys.QUEUE) == 0 and redis.zcard(keys.UNFINISHED) == 0


# -- readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_live", [False, True])
def test_reader_is_told_that_a_new_stream_stands_where_its_own_was(is_live: bool, redis: Redis) -> None:
    """It has read up to seq 5; the stream is lost, and a later attempt's grows to 9. Its reader must not go on at 6."""
    stream = keys.stream("1")
    for seq in range(1, 6):
        redis.xadd(stream, {"event": "progress"}, id=f"1000-{seq}")
    reader = LogReader("1", redis)
    events = reader.follow(timeout_seconds=60) if is_live else reader.follow("1000-5", timeout_seconds=60)
    before = [next(events).id for _ in range(5)] if is_live else []

    redis.delete(stream)
    for seq in range(1, 9):
        redis.xadd(stream, {"event": "progress"}, id=f"2000-{seq}")
    redis.xadd(stream, {"event": "completed"}, id="2000-9")

    seen = [event.name if event.name == "reset" else event.id for event in events]
    assert before == ([f"1000-{seq}" for seq in range(1, 6)] if is_live else [])
    assert seen == ["reset", *[f"2000-{seq}" for seq in range(1, 10)]]


# -- workers ----------------------------------------------------------------------------------------------------


def test_handler_never_acts_on_a_task_that_has_ended(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A worker died between the terminal event and finish. The next one only closes the record."""
    queue.put({"n": 1})
    called: list[Task] = []

    async def handler(task: Task, _log: TaskLog) -> None:
        called.append(task)

    async def test() -> None:
        async with attempts(url) as dying:
            _, log = await dying.claim(popped(redis))
            redis.xadd(keys.stream("1"), {"event": "completed", "result": "5"}, id=f"{log.epoch}-2")
        end_lease(queue, "1")
        await asyncio.wait_for(work(handler, url=url, burst=True), 60)

    run(test)
    assert called == []
    assert names(redis) == ["started", "completed"]
    assert (queue.get("1") or {})["result"] == 5


def test_stopping_and_cancelling_swallow_no_element(
    url: str, queue: TaskQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are stopped in the middle of BRPOP, tasks are cancelled; without any audit, each task reaches its end."""
    monkeypatch.setattr(TaskQueue, "recover", lambda _: 0)
    chance, ids = random.Random(1), list[str]()

    async def handler(_task: Task, log: TaskLog) -> None:
        await log.add("progress", percent=1)

    def put() -> None:
        for _ in range(20):
            ids.append(queue.put({}).id)
            if chance.random() < 0.2:
                cancel(chance.choice(ids))

    def cancel(task_id: str) -> None:
        try:
            queue.cancel(task_id, "not wanted")
        except ValueError:  # it has ended
            return

    async def test() -> None:
        for round_number in range(10):
            working = asyncio.create_task(work(handler, url=url, concurrency=3))
            putting = asyncio.create_task(asyncio.to_thread(put))
            while len(ids) < 20 * round_number + 10 or signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                await asyncio.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            await putting
            assert await asyncio.wait_for(working, 60) == 0
        await asyncio.wait_for(work(handler, url=url, burst=True, concurrency=3), 60)

    run(test)
    ends = [names(redis, task_id)[-1] for task_id in ids]
    assert len(ends) == 200 and set(ends) == {"completed", "cancelled"}


def test_connection_that_is_cut_under_brpop_and_rpop_loses_no_task(
    empty_valkey: Server, queue: TaskQueue, redis: Redis
) -> None:
    """Up to 16 elements are on their way when the connection is cut. The audit finds their tasks."""
    ids = [task.id for task in queue.put_many({} for _ in range(100))]

    async def handler(_task: Task, log: TaskLog) -> None:
        await log.add("progress", percent=1)

    with Proxy(empty_valkey.port, cut_before=b"task_queue") as proxy:
        run(lambda: asyncio.wait_for(work(handler, url=proxy.url, burst=True, concurrency=100), 60))

    assert proxy.cuts == 1
    assert [names(redis, task_id) for task_id in ids] == [["started", "progress", "completed"]] * 100


def test_lost_connections_cost_no_event(url: str, queue: TaskQueue, redis: Redis) -> None:
    """All connections are cut, again and again, under a worker with fifty tasks; each event is there once."""
    ids = [task.id for task in queue.put_many({} for _ in range(200))]

    async def handler(_task: Task, log: TaskLog) -> None:
        for percent in range(5):
            await log.add("progress", percent=percent)
            await asyncio.sleep(0.02)

    async def test() -> None:
        working = asyncio.create_task(work(handler, url=url, burst=True, concurrency=50))
        for count in range(0, 200, 40):
            while int(redis.hget(keys.TOTALS, "completed") or 0) < count:
                await asyncio.sleep(0.01)
            redis.client_kill_filter(_type="normal", skipme=True)
        await asyncio.wait_for(working, 60)

    run(test)
    for task_id in ids:
        seen = [event.fields["percent"] for event in LogReader(task_id, redis).read() if event.name == "progress"]
        assert seen[-5:] == list(range(5))
        assert names(redis, task_id)[-1] == "completed" and names(redis, task_id).count("completed") == 1
        assert seqs(redis, task_id) == list(range(1, len(seqs(redis, task_id)) + 1))


# -- the audit --------------------------------------------------------------------------------------------------


def test_audit_finds_a_lost_task_behind_ten_thousand_delayed_ones(
    queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at one page of the ledger after the other, and pushes the lost task, and none that is not due."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 0)
    monkeypatch.setattr(queue_module, "AUDIT_LIMIT", 4_000)
    queue.put_many(({} for _ in range(10_000)), delay_seconds=3600)
    lost = queue.put({})
    assert lost.id in popped(queue.redis).decode()  # … and the worker is killed here

    wait_until(lambda: queue.recover() == 1, "it is pushed again")

    assert queue.redis.llen(keys.QUEUE) == 1 and lost.id in popped(queue.redis).decode()


def test_audit_works_though_a_producers_clock_is_a_minute_behind(
    queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks neither hide a lost one nor look lost themselves: the times are the server's."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 0)
    right = time.time
    queue.put_many({} for _ in range(50))
    monkeypatch.setattr(time, "time", lambda: right() - 60)
    queue.put_many({} for _ in range(50))
    monkeypatch.setattr(time, "time", right)
    queue.put_many({} for _ in range(50))
    lost = popped(queue.redis)  # … and the worker is killed here
    before = queue.redis.lrange(keys.QUEUE, 0, -1)

    wait_until(lambda: queue.recover() == 1, "the lost task is found")

    assert [queue.recover() for _ in range(20)] == [0] * 20
    assert queue.redis.lrange(keys.QUEUE, 0, -1) == [*before, lost.decode()]


# -- in a Redis Cluster, where record and stream are on different nodes --------------------------------------------


def test_cluster_claims_above_an_entry_that_is_ahead_and_ends_once(cluster_of_one: str) -> None:
    """start.lua says `lost`, so the epoch is drawn again, above the stranger's entry."""
    client = connect(cluster_of_one)
    queue = TaskQueue(client)
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(cluster_of_one) as worker:
            element = popped(client)
            _, log = await worker.claim(element)
            await log.add("progress", percent=1)
            client.xadd(keys.stream("1"), {"event": "hello"}, id=f"{int(log.epoch) + 100_000}-0")
            end_lease(queue, "1")
            task, log = await worker.claim(element)
            assert task.attempt == 2
            await log.end("completed", "done", result="done")

    run(test)
    assert names(client) == ["started", "progress", "hello", "worker_lost", "started", "completed"]
    assert seqs(client) == [1, 2, 0, 3, 4, 5]
    assert (queue.get("1") or {})["status"] == "completed"
    assert client.ttl(keys.stream("1")) > 0


def test_cluster_closes_the_task_of_a_worker_that_died_behind_the_terminal_event(cluster_of_one: str) -> None:
    """It had neither set the stream's time to live nor closed the record."""
    client = connect(cluster_of_one)
    queue = TaskQueue(client)
    queue.put({"n": 1})

    async def test() -> None:
        async with attempts(cluster_of_one) as worker:
            element = popped(client)
            _, log = await worker.claim(element)
            client.xadd(keys.stream("1"), {"event": "completed", "result": "5"}, id=f"{log.epoch}-2")
            end_lease(queue, "1")
            [task] = await worker.claims.claim([(element, new_token())])
            assert task.ended == "completed"
            assert await worker.claims.finish(task, "completed", 5)

    run(test)
    assert names(client) == ["started", "completed"]
    assert (queue.get("1") or {})["result"] == 5
    assert client.ttl(keys.stream("1")) > 0


def test_error_of_one_stream_in_a_cluster_concerns_its_task_alone() -> None:
    """The record is claimed, but start.lua says no: the worker leaves that task to its lease and goes on."""
    steps = claim_steps([(Task("1", None, token="t"), "{}")], "w", 10, is_one_server=False)
    next(steps)
    steps.send([["claimed", 1, "5", "0", "0", 0, "", "", "", "5", "", ""]])
    with pytest.raises(StopIteration) as done:
        steps.send([ResponseError("ERR spoilt")])

    [problem] = done.value.value
    assert isinstance(problem, ResponseError)
