"""Durable steps: the next attempt does not repeat a completed step, and a step in doubt is never repeated silently."""

import asyncio
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attempts import Attempts, attempts, end_lease, names, popped, run
from conftest import Server, wait_until
from redis import Redis
from step_programs import QUESTION, STEPS, UNSAFE, Calls, make_handler

from task_streams import (
    BlockingLog,
    Cursor,
    Event,
    LeaseLost,
    LogReader,
    NothingHappened,
    Parked,
    PermanentFailure,
    Task,
    TaskLog,
    TaskQueue,
    keys,
    run_worker,
)
from task_streams import log as log_module
from task_streams import steps as steps_module
from task_streams.questions import AGAIN, FAIL, HAPPENED

Start = Callable[..., "subprocess.Popen[str]"]
WORKER = "tests/step_programs.py"


@pytest.fixture
def queue(redis: Redis) -> TaskQueue:
    """A queue with one task, 1."""
    queue = TaskQueue(redis)
    queue.put({"n": 1})
    return queue


class Doer:
    """Calls that count themselves, and do as told."""

    def __init__(self, *results: Any) -> None:
        self.results, self.arguments, self.keys = list(results), list[Any](), list[str]()

    async def __call__(self, *arguments: Any) -> Any:
        self.arguments.append(arguments)
        result = self.results.pop(0) if self.results else len(self.arguments)
        if isinstance(result, BaseException):
            raise result
        return result


class Again:
    """One task, attempt after attempt: `log = await again()`."""

    def __init__(self, worker: Attempts, queue: TaskQueue) -> None:
        self.worker, self.queue, self.element = worker, queue, popped(queue.redis)

    async def __call__(self) -> TaskLog:
        end_lease(self.queue, "1")
        _, log = await self.worker.claim(self.element)
        return log


def in_attempts(url: str, queue: TaskQueue, test: Callable[[Again], Awaitable[Any]]) -> Any:
    async def with_worker() -> Any:
        async with attempts(url) as worker:
            return await test(Again(worker, queue))

    return run(with_worker)


def events(redis: Redis, name: str = "") -> list[Event]:
    return [event for event in LogReader("1", redis).read() if name in ("", event.name)]


# -- a step, and its replay -------------------------------------------------------------------------------------


def test_completed_step_returns_its_result_in_the_next_attempt_and_does_not_run(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """The second attempt says how many steps it takes from the journal, and goes on behind them."""
    load, query = Doer({"rows": 3}), Doer("n")

    async def test(again: Again) -> list[Any]:
        log = await again()
        first = await log.step("data.load", load, "a.csv")
        log = await again()
        return [first, await log.step("data.load", load, "a.csv"), await log.step("data.query", query, 1)]

    assert in_attempts(url, queue, test) == [{"rows": 3}, {"rows": 3}, "n"]
    assert load.arguments == [("a.csv",)]
    assert names(redis) == [
        *("started", "tool_usage", "tool_usage"),
        *("worker_lost", "started", "resumed", "tool_usage", "tool_usage"),
    ]
    assert [event.fields["steps"] for event in events(redis, "resumed")] == [1]


def test_step_is_written_as_a_tools_two_entries(url: str, queue: TaskQueue, redis: Redis) -> None:
    """`started` has the arguments by name and whether it may be repeated, `completed` the result and the duration."""

    def query(sql: str, limit: int) -> list[int]:
        return [limit]

    async def test(again: Again) -> None:
        log = await again()
        await log.step("data.query", query, "SELECT 1", 5, safe_to_repeat=True, about={"call_id": "c1"})

    in_attempts(url, queue, test)
    first, second = (event.fields for event in events(redis, "tool_usage"))
    for fields in (first, second):
        assert (fields["tool"], fields["action"], fields["call_id"]) == ("data", "query", "c1")
        assert fields["key"] == "data.query#1"
        assert fields.keys() <= {"timestamp", *keys.EVENTS["tool_usage"]}
    assert (first["status"], first["arguments"]) == ("started", {"sql": "SELECT 1", "limit": 5})
    assert first["safe_to_repeat"] is True
    assert (second["status"], second["result"]) == ("completed", [5])
    assert first["digest"] == second["digest"]


def test_llm_step_is_written_as_call_and_response(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Text alone, or text with the calls that the LLM wants and its usage: each comes back as it was."""
    answer = {"response": "I load it.", "calls": [{"name": "load"}], "usage": None}
    llm = Doer("plain text", answer)

    async def test(again: Again) -> list[Any]:
        log = await again()
        for number in range(2):
            await log.step("llm", llm, number, about={"model": "mock"})
        log = await again()
        return [await log.step("llm", llm, number, about={"model": "mock"}) for number in range(2)]

    assert in_attempts(url, queue, test) == ["plain text", answer]
    call, response = events(redis, "llm_call")[1].fields, events(redis, "llm_response")[1].fields
    assert (call["model"], call["status"]) == ("mock", "started")
    assert (response["model"], response["response"], response["calls"]) == ("mock", "I load it.", [{"name": "load"}])
    assert call.keys() <= {"timestamp", *keys.EVENTS["llm_call"]}
    assert response.keys() <= {"timestamp", *keys.EVENTS["llm_response"]}


@pytest.mark.parametrize(
    ("result", "value"), [((1, 2), [1, 2]), ({1: "a"}, {"1": "a"}), ("7", "7"), (None, None), (0.1, 0.1)]
)
def test_value_is_the_same_in_every_attempt(result: Any, value: Any, url: str, queue: TaskQueue) -> None:
    """It is what JSON makes of it, the first time as well: a handler cannot come to depend on more."""
    doer = Doer(result)

    async def test(again: Again) -> list[Any]:
        log = await again()
        first = await log.step("x", doer)
        log = await again()
        return [first, await log.step("x", doer)]

    assert in_attempts(url, queue, test) == [value, value]
    assert len(doer.arguments) == 1


def test_steps_of_one_name_are_known_by_their_number_and_those_with_keys_by_their_keys(
    url: str, queue: TaskQueue
) -> None:
    """With keys the order may change, and they may run at the same time."""
    doer = Doer()

    async def test(again: Again) -> list[Any]:
        log = await again()
        first = [await log.step("x", doer) for _ in range(2)]
        first += await asyncio.gather(*(log.step("y", doer, one, key=one) for one in ("a", "b")))
        log = await again()
        second = await asyncio.gather(*(log.step("y", doer, one, key=one) for one in ("b", "a")))
        return [first, [await log.step("x", doer) for _ in range(2)] + second[::-1]]

    first, second = in_attempts(url, queue, test)
    assert first == second == [1, 2, 3, 4]
    assert len(doer.arguments) == 4


@pytest.mark.parametrize("in_replay", [False, True])
def test_two_steps_of_one_name_at_the_same_time_need_keys(in_replay: bool, url: str, queue: TaskQueue) -> None:
    """Their numbers would swap after a crash, so that is an error, and in a replay, too."""
    doer = Doer()

    async def test(again: Again) -> None:
        log = await again()
        if in_replay:
            await log.step("x", doer)
            await log.step("x", doer)
            log = await again()
        with pytest.raises(PermanentFailure, match="give each step x a key of its own"):
            await asyncio.gather(log.step("x", doer), log.step("x", doer))

    in_attempts(url, queue, test)


def test_key_that_is_used_twice_is_an_error(url: str, queue: TaskQueue) -> None:
    async def test(again: Again) -> None:
        log = await again()
        await log.step("x", Doer(), key="k")
        with pytest.raises(PermanentFailure, match="two steps k"):
            await log.step("x", Doer(), key="k")

    in_attempts(url, queue, test)


def test_idempotency_key_is_the_same_in_each_attempt_and_another_for_each_step(url: str, queue: TaskQueue) -> None:
    """A call that has the parameter gets it: the outside world can tell a repeated call by it."""
    got = list[str]()

    async def pay(amount: int, *, idempotency_key: str) -> None:
        got.append(idempotency_key)
        if len(got) == 1:
            raise OSError("away")

    async def test(again: Again) -> None:
        log = await again()
        with pytest.raises(OSError, match="away"):
            await log.step("pay", pay, 5, safe_to_repeat=True)
        log = await again()
        await log.step("pay", pay, 5, safe_to_repeat=True)
        await log.step("pay", pay, 5, safe_to_repeat=True)

    in_attempts(url, queue, test)
    assert got[0] == got[1] != got[2]
    assert got[0].startswith("task-1-")


def test_plain_functions_run_in_a_few_threads_and_keep_the_loop_free(
    url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps at once, two threads: two run at a time, none in the event loop's thread."""
    monkeypatch.setattr(steps_module, "THREADS", 2)
    lock, running, most, where = threading.Lock(), 0, 0, set[int]()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            where.add(threading.get_ident())
        time.sleep(0.02)
        with lock:
            running -= 1

    async def test(again: Again) -> None:
        log = await again()
        await asyncio.gather(*(log.step("x", work, key=str(number)) for number in range(10)))

    in_attempts(url, queue, test)
    assert most == 2
    assert threading.get_ident() not in where


def test_plain_handler_has_the_same_steps(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A handler that is a plain function: its second attempt takes the step from the journal."""
    calls = list[int]()

    def handle(task: Task, log: BlockingLog) -> Any:
        value = log.step("x", lambda: calls.append(1) or 7)  # type: ignore[func-returns-value]
        if task.attempt == 1:
            raise RuntimeError("once")
        return value

    run_worker(handle, url=url, burst=True, backoff_seconds=0.01)

    assert len(calls) == 1
    assert events(redis)[-1].fields["result"] == 7


def test_call_that_exits_does_not_end_the_worker(url: str, queue: TaskQueue, redis: Redis) -> None:
    """sys.exit() in the call of a plain handler's step is an error of that step."""

    def leave() -> None:
        raise SystemExit(3)

    def handle(task: Task, log: BlockingLog) -> None:
        log.step("x", leave, safe_to_repeat=True)

    assert run_worker(handle, url=url, burst=True, backoff_seconds=0.01) == 0
    assert events(redis)[-1].name == "failed"


def test_first_attempt_reads_nothing(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A step costs two XADD; the journal is read by a later attempt, once."""
    monitored = []

    async def test(again: Again) -> None:
        log = await again()
        for expected in ({"xadd": 6}, {"xadd": 1, "xrange": 1}):
            before = redis.info("commandstats")
            for number in range(3):
                await log.step("x", Doer(), number)
            after = redis.info("commandstats")
            done = {name[8:]: after[name]["calls"] - before.get(name, {"calls": 0})["calls"] for name in after}
            monitored.append(({k: n for k, n in done.items() if n and k != "info"}, expected))
            log = await again()

    in_attempts(url, queue, test)
    for found, expected in monitored:
        assert found == expected


# -- in doubt ---------------------------------------------------------------------------------------------------


def unfinished(log: TaskLog, doer: Callable[..., Any], **how: Any) -> "asyncio.Task[Any]":
    """Begin a step whose worker dies in the middle of the call."""
    return asyncio.create_task(log.step("x", doer, **how))


async def hang() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("is_safe", [True, False])
def test_step_that_was_started_and_not_completed_runs_again_only_if_it_is_safe(
    is_safe: bool, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """A safe one is repeated. Another one is in doubt: a person is asked, and no later step runs."""
    doer, other = Doer(), Doer()

    async def test(again: Again) -> None:
        log = await again()
        left = unfinished(log, hang, safe_to_repeat=is_safe)
        while names(redis)[-1:] != ["tool_usage"]:
            await asyncio.sleep(0.01)
        log = await again()
        if is_safe:
            assert await log.step("x", doer, safe_to_repeat=True) == 1
        else:
            with pytest.raises(Parked, match="x#1 is in doubt: it was started, and not completed"):
                await log.step("x", doer)
            with pytest.raises(Parked):
                await log.step("y", other)
        left.cancel()
        await asyncio.wait([left])

    in_attempts(url, queue, test)
    assert len(doer.arguments) == is_safe
    assert other.arguments == []
    assert [event.fields["step"] for event in events(redis, "in_doubt")] == ([] if is_safe else ["x#1"])


@pytest.mark.parametrize("how", ["its end was asked for", "its worker was lost too often"])
def test_task_that_ends_without_another_run_says_its_doubt(how: str, url: str, queue: TaskQueue, redis: Redis) -> None:
    """The handler does not run again, but everybody sees that the mail may have been sent."""

    async def test(again: Again) -> None:
        log = await again()
        left = unfinished(log, hang)
        while names(redis)[-1:] != ["tool_usage"]:
            await asyncio.sleep(0.01)
        left.cancel()
        log.is_lost = True  # as if its worker were dead: it can write no more
        await asyncio.wait([left])

    in_attempts(url, queue, test)
    redis.hset(keys.record("1"), mapping={"losses": 5} if how.startswith("its worker") else {"cancel": "not wanted"})
    end_lease(queue, "1")
    run_worker(lambda task, log: None, url=url, burst=True)

    assert names(redis)[-2:] == ["in_doubt", "failed" if how.startswith("its worker") else "cancelled"]


@pytest.mark.parametrize(("answer", "calls", "end"), [(HAPPENED, 1, None), (AGAIN, 2, "sent"), (FAIL, 1, "failed")])
def test_person_decides_about_an_unsafe_call_that_raised(
    answer: str, calls: int, end: str | None, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """It happened: the step returns None. Do it again. Or fail: without another attempt."""
    doer = Doer(TimeoutError("no answer"), "sent")

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.step("mail", doer, "bob")

    run_worker(handle, url=url, burst=True)
    assert names(redis) == ["started", "tool_usage", "tool_usage", "in_doubt", "input_required"]
    [question] = queue.questions()
    assert question["question"] == "mail#1 is in doubt: its call ended with TimeoutError: no answer."
    assert question["options"] == ["it happened", "do it again", "fail"]

    queue.answer("1", answer)
    run_worker(handle, url=url, burst=True)

    assert len(doer.arguments) == calls
    last = events(redis)[-1]
    if end == "failed":
        assert (last.name, last.fields["attempts"]) == ("failed", 2)
        assert "mail#1 is in doubt" in last.fields["error"]
    else:
        assert (last.name, last.fields["result"]) == ("completed", end)
    assert names(redis).count("in_doubt") == 1


def test_step_that_is_in_doubt_again_is_asked_about_again(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The first answer is not taken for the second question."""
    doer = Doer(TimeoutError("one"), TimeoutError("two"), "sent")

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.step("mail", doer)

    for _ in range(2):
        run_worker(handle, url=url, burst=True)
        queue.answer("1", AGAIN)
    run_worker(handle, url=url, burst=True)

    assert [event.fields["number"] for event in events(redis, "input_required")] == [1, 2]
    assert events(redis)[-1].fields["result"] == "sent"


def test_unsafe_call_that_raises_nothing_happened_runs_again(url: str, queue: TaskQueue) -> None:
    """Within the attempt, and in the next one; a number is not used up by it, so a replay counts the same."""

    class Refused(NothingHappened):
        pass

    doer = Doer(Refused("busy"), Refused("busy"), "sent")

    async def test(again: Again) -> Any:
        log = await again()
        with pytest.raises(Refused):
            await log.step("mail", doer, "bob")
        log = await again()
        with pytest.raises(Refused):
            await log.step("mail", doer, "bob")
        await log.step("mail", doer, "bob")
        log = await again()
        return await log.step("mail", doer, "bob")

    assert in_attempts(url, queue, test) == "sent"
    assert len(doer.arguments) == 3


def test_unsafe_step_that_is_cancelled_or_out_of_time_is_in_doubt(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A handler's own time-out around a step; or the worker's time limit: then its next attempt says so."""

    async def handle(task: Task, log: TaskLog) -> None:
        if task.data["n"] == 2:
            await log.step("mail", hang)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await log.step("mail", hang)
        await log.step("mail", Doer())

    queue.put({"n": 2})
    run_worker(handle, url=url, burst=True, time_limit_seconds=0.3, backoff_seconds=0.01)

    for task_id in ("1", "2"):
        assert names(redis, task_id).count("in_doubt") == 1
        assert names(redis, task_id)[-1] == "input_required"
        assert names(redis, task_id).count("tool_usage") == 2


def test_cancelled_task_in_the_middle_of_an_unsafe_step_is_cancelled_and_says_the_doubt(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    async def handle(task: Task, log: TaskLog) -> None:
        async def mail() -> None:
            await asyncio.to_thread(queue.cancel, "1", "not wanted")
            await hang()

        await log.step("mail", mail)

    run_worker(handle, url=url, burst=True)

    assert names(redis) == ["started", "tool_usage", "tool_usage", "in_doubt", "cancelled"]


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("result", [object(), "x" * 1_100_000])
def test_result_that_cannot_be_stored_is_completed_without_a_value(
    result: Any, is_safe: bool, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """This attempt has it. In the next one a safe step is repeated, another one is in doubt."""
    doer = Doer(result, "second")

    async def test(again: Again) -> None:
        log = await again()
        assert await log.step("x", doer, safe_to_repeat=is_safe) is result
        log = await again()
        if is_safe:
            assert await log.step("x", doer, safe_to_repeat=True) == "second"
        else:
            with pytest.raises(Parked, match="its result was not stored"):
                await log.step("x", doer)

    in_attempts(url, queue, test)
    completed = events(redis, "tool_usage")[1].fields
    assert completed["status"] == "completed"
    assert "result" not in completed
    assert completed["error"].startswith("the result was not stored: ")


# -- a journal that does not fit --------------------------------------------------------------------------------


def spoil_nothing(redis: Redis) -> None:
    """The handler has changed."""


def make_hole(redis: Redis) -> None:
    redis.xdel(keys.stream("1"), redis.xrange(keys.stream("1"))[2][0])


def trim(redis: Redis) -> None:
    redis.xtrim(keys.stream("1"), maxlen=2, approximate=False)


def lose_stream(redis: Redis) -> None:
    redis.delete(keys.stream("1"))


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("spoil", [spoil_nothing, make_hole, trim, lose_stream])
def test_journal_that_does_not_fit_is_never_silently_started_over(
    spoil: Callable[[Redis], None], is_safe: bool, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """Other arguments, a hole, its beginning or all of it gone. If all steps are safe the attempt starts over, and says
    so; otherwise a person is asked. The attempt after it does the same steps from its journal."""
    doer = Doer()

    async def test(again: Again) -> None:
        log = await again()
        for number in range(3):
            await log.step("x", doer, number, safe_to_repeat=is_safe)
        queue.redis.hset(keys.record("1"), "seq", log.seq)  # as a heartbeat does
        spoil(redis)
        log = await again()
        changed = 10 if spoil is spoil_nothing else 0
        if not is_safe:
            with pytest.raises(Parked):
                await log.step("x", doer, changed)
            [question] = queue.questions()
            # without any entry nobody knows whether there were steps: it asks about each one that is not safe
            assert ("start over" in question["options"]) == (spoil is not lose_stream)
            return
        values = [await log.step("x", doer, number + changed, safe_to_repeat=True) for number in range(3)]
        assert values == [4, 5, 6]
        log = await again()
        assert [await log.step("x", doer, number + changed, safe_to_repeat=True) for number in range(3)] == values

    in_attempts(url, queue, test)
    assert len(doer.arguments) == (6 if is_safe else 3)
    if is_safe:
        told = [(event.fields["steps"], "reason" in event.fields) for event in events(redis, "resumed")]
        assert told[-2:] == [(0, True), (3, False)]
    else:
        assert "in_doubt" in names(redis)


def test_unsafe_step_behind_a_journal_with_lost_entries_is_in_doubt(url: str, queue: TaskQueue, redis: Redis) -> None:
    """What is left is safe, but what was lost may have been this step."""
    mail, load = Doer(), Doer()

    async def test(again: Again) -> None:
        log = await again()
        await log.step("mail", mail)
        await log.step("load", load, safe_to_repeat=True)
        trim(redis)
        log = await again()
        await log.step("load", load, safe_to_repeat=True)
        with pytest.raises(Parked, match="it may have been among them"):
            await log.step("mail", mail)

    in_attempts(url, queue, test)
    assert len(mail.arguments) == 1


def test_lost_record_does_not_cost_the_journal(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The attempt counts from 1 again; the stream tells that there was one before."""
    doer = Doer()

    async def test(again: Again) -> int:
        log = await again()
        await log.step("x", doer)
        redis.delete(keys.record("1"))
        log = await again()
        return int(await log.step("x", doer))

    assert in_attempts(url, queue, test) == 1
    assert len(doer.arguments) == 1


def test_somebody_elses_entries_do_not_spoil_the_journal(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Also if they look like a step."""
    doer = Doer()

    async def test(again: Again) -> Any:
        log = await again()
        await log.step("x", doer)
        fake = {"event": "tool_usage", "status": "started", "key": "x#1", "digest": "0", "safe_to_repeat": "false"}
        for seq in (0, 1):  # as `XADD *` gives ids, in a millisecond of its own
            redis.xadd(keys.stream("1"), fake, id=f"{int(log.epoch) + 1}-{seq}")  # type: ignore[arg-type]
        log = await again()
        return await log.step("x", doer)

    assert in_attempts(url, queue, test) == 1
    assert len(doer.arguments) == 1


# -- room -------------------------------------------------------------------------------------------------------


def test_deltas_make_room_for_steps_and_no_reader_reports_a_gap(
    url: str, queue: TaskQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From half of MAXLEN on, words that a response repeats are dropped. All steps stay; a reader misses nothing."""
    monkeypatch.setattr(log_module, "MAXLEN", 300)

    async def test(again: Again) -> int:
        log = await again()

        async def ask(number: int) -> str:
            for _ in range(30):
                await log.add("llm_delta", text="word")
            return "word" * 30

        for number in range(40):
            await log.step("llm", ask, number, safe_to_repeat=True)
        most = redis.xlen(keys.stream("1"))
        log = await again()
        for number in range(45):  # five more
            await log.step("llm", ask, number, safe_to_repeat=True)
        return int(most)

    assert in_attempts(url, queue, test) < 300
    seen = events(redis)
    assert len([one for one in seen if one.name == "llm_response"]) == 45
    assert [one.fields["steps"] for one in seen if one.name == "resumed"] == [40]
    for place in range(len(seen)):  # wherever a reader was cut off
        told = list(Cursor(seen[place].id).take(seen[place + 1 :]))
        assert [one.name for one in told if one.name in ("gap", "reset")] == []
    assert [one.name for one in Cursor().take(seen)].count("gap") == 0


def test_gap_is_exact_beside_replaced_entries() -> None:
    """Entry 6 repeats entries 2 to 5. Anything else that is missing was lost."""
    response = Event("1-6", "llm_response", {"replaces": 4})
    for since, missed in (("0", 1), ("1-1", 0), ("1-3", 0), ("1-5", 0)):
        told = list(Cursor(since).take([response]))
        assert [one.fields["missed"] for one in told[:-1]] == ([missed] if missed else [])


def test_log_that_is_full_of_steps_fails_its_task(
    url: str, queue: TaskQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis would trim the oldest steps next: the task ends with a clear reason, and all of them are there."""
    monkeypatch.setattr(log_module, "MAXLEN", 50)

    async def handle(task: Task, log: TaskLog) -> None:
        for number in range(100):
            await log.step("x", Doer(), number)

    run_worker(handle, url=url, burst=True)

    last = events(redis)[-1]
    assert last.name == "failed"
    assert "the log is full: 50 entries" in last.fields["error"]
    assert events(redis)[0].name == "started"


# -- breaking it ------------------------------------------------------------------------------------------------


def check_calls(queue: TaskQueue, path: Path, ids: list[str]) -> None:
    """Check what must hold whatever was killed: by the streams, and by what was really called."""
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    called = Counter((task_id, name) for task_id, name, _ in lines)
    assert len({(task_id, name, key) for task_id, name, key in lines}) == len(called), "an idempotency key has changed"
    for task_id in ids:
        history = LogReader(task_id, queue.redis).read()
        told = [(event.name, event.fields.get("key"), event.fields.get("status")) for event in history]
        assert [event.is_terminal for event in history].count(True) == 1, told
        assert history[-1].is_terminal, told
        begun, done, doubted = Counter[Any](), set[Any](), set[Any]()
        for event in history:
            key, status = event.fields.get("key"), event.fields.get("status")
            if key and status == "started":
                assert key not in done, f"task {task_id}: the completed step {key} has begun again: {told}"
                begun[key] += 1
            elif key and status == "completed":
                done.add(key)
            elif event.name == "in_doubt":
                doubted.add(event.fields["step"])
        for number, name in enumerate(STEPS):
            is_llm = name == "llm"
            key = f"llm#{STEPS[: number + 1].count('llm')}" if is_llm else f"{name}#1"
            made = called[task_id, f"llm{number}" if is_llm else name]
            assert made <= begun[key], f"task {task_id}: {key} was called without a word: {told}"
            if name in UNSAFE:
                assert made <= 1, f"task {task_id}: {key} has happened {made} times"
                assert made == 1 or history[-1].name == "failed", f"task {task_id}: {key} did not happen"
                is_open = begun[key] > (key in done)  # one of its beginnings has no end
                assert (key in doubted) == is_open, f"task {task_id}: {key}: {told}"
        assert history[-1].name == "completed" or "its worker was lost" in history[-1].fields["error"], told


def answer_all(queue: TaskQueue, path: Path) -> None:
    """Answer each open question as a person who looks what has really happened."""
    lines = path.read_text().splitlines() if path.exists() else []
    for question in queue.questions():
        name = question["key"].removesuffix("#1 in doubt")
        has_happened = any(line.startswith(f"{question['task']} {name} ") for line in lines)
        answer = "yes" if question["question"] == QUESTION else HAPPENED if has_happened else AGAIN
        queue.answer(question["task"], answer, number=question["number"])


def all_ended(queue: TaskQueue, path: Path) -> bool:
    answer_all(queue, path)
    return not queue.owed()


# started, completed, progress; two llm_delta for each answer; the question, and behind it `resumed` and its answer
EVENTS_IN_ALL = 3 * len(STEPS) + 2 * STEPS.count("llm") + 3


def test_attempt_that_dies_at_any_event_boundary_repeats_no_completed_step(
    url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task for each boundary: the attempt goes no further than its nth entry, and another one takes over."""
    queue, calls = TaskQueue(redis), Calls(tmp_path / "calls")
    ids = [task.id for task in queue.put_many({"n": n} for n in range(EVENTS_IN_ALL + 1))]
    handle, write = make_handler(calls), TaskLog._write
    monkeypatch.setattr(steps_module, "THREADS", 100)  # those that stop keep theirs

    async def first_attempts() -> None:
        async with attempts(url) as worker:
            written: dict[str, int] = {}

            async def write_and_stop(self: TaskLog, *args: Any) -> str:
                if written.setdefault(self.task_id, 0) == self._task.data["n"]:
                    await hang()  # as if it were dead
                written[self.task_id] += 1
                return await write(self, *args)

            monkeypatch.setattr(TaskLog, "_write", write_and_stop)

            async def work() -> None:
                while True:
                    task, log = await worker.claim(popped(redis))
                    try:
                        return await handle(task, log)
                    except Parked:
                        queue.answer(task.id, "yes")
                        await worker.claims.release(task, until_answered=True)

            left = [asyncio.create_task(work()) for _ in ids]
            while any(written.get(one) != n for n, one in enumerate(ids) if n):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            monkeypatch.setattr(TaskLog, "_write", write)
            for one in ids:
                end_lease(queue, one)
            redis.close()
            for one in left:
                one.cancel()

    run(first_attempts)
    run_worker(handle, url=url, burst=True, concurrency=5)
    assert queue.questions(), "no step was in doubt"
    while queue.questions():
        answer_all(queue, tmp_path / "calls")
        run_worker(handle, url=url, burst=True, concurrency=5)

    check_calls(queue, tmp_path / "calls", ids)
    assert {names(redis, one)[-1] for one in ids} == {"completed"}


def run_and_kill(
    valkey: Server, script: Start, path: Path, tasks: int, kills: int, *options: str, seed: int = 1
) -> None:
    queue, chance = TaskQueue(valkey.client()), random.Random(seed)
    ids = [task.id for task in queue.put_many({"seconds": 0.02} for _ in range(tasks))]
    command = [WORKER, str(path), "--concurrency", "5", "--lease", "1", *options]
    workers = [script(valkey.url, *command, stderr=subprocess.DEVNULL) for _ in range(2)]
    for _ in range(kills):
        seen = len(path.read_text()) if path.exists() else 0
        more = chance.randrange(40, 600)
        wait_until(
            lambda seen=seen, more=more: (path.exists() and len(path.read_text()) > seen + more) or not queue.owed(),  # type: ignore[misc]
            "work is under way",
        )
        victim = chance.randrange(2)
        workers[victim].kill()
        workers[victim] = script(valkey.url, *command, stderr=subprocess.DEVNULL)
    wait_until(lambda: all_ended(queue, path), "all tasks ended", 300)
    check_calls(queue, path, ids)


@pytest.mark.parametrize("options", [(), ("--blocking",)], ids=["async", "blocking"])
def test_kill_9_at_random_repeats_no_completed_step(
    valkey: Server, script: Start, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """One of two workers is killed now and then: no completed step runs again, and every task ends."""
    run_and_kill(valkey, script, tmp_path / "calls", 15, 4, *options)


@pytest.mark.chaos
def test_kill_9_two_hundred_times_repeats_no_completed_step(valkey: Server, script: Start, tmp_path: Path) -> None:
    run_and_kill(valkey, script, tmp_path / "calls", 1_500, 200)


@pytest.mark.chaos
@pytest.mark.parametrize("is_asked", [False, True], ids=["before-the-question", "behind-it"])
@pytest.mark.parametrize("place", ["", "call "], ids=["events", "calls"])
def test_kill_9_at_every_event_boundary_and_in_every_call(
    place: str, is_asked: bool, valkey: Server, script: Start, tmp_path: Path
) -> None:
    """The process dies right after its nth entry, or in its nth call, before the task's question or behind it."""
    queue, path, ids = TaskQueue(valkey.client()), tmp_path / "calls", []
    command = [WORKER, str(path), "--lease", "1", "--burst"]

    def work(die_after: str = "") -> int:
        worker = script(valkey.url, *command, env={"TASK_STREAMS_DIE_AFTER": die_after})
        worker.communicate(timeout=60)
        return int(worker.returncode)

    died, n = True, 0
    while died:
        n += 1
        ids.append(queue.put({}).id)
        if is_asked:
            assert work() == 0
            answer_all(queue, path)
        died = work(f"{place}{n}") == -signal.SIGKILL
        end_lease(queue, ids[-1])
        while queue.owed():
            work()
            answer_all(queue, path)
    assert n > (1 if place else 5)
    check_calls(queue, path, ids)


def test_server_that_is_killed_and_restarted_costs_no_step(valkey: Server, script: Start, tmp_path: Path) -> None:
    """kill -9 of the server in the middle: the workers wait, and each call was made once."""
    valkey.client().config_set("appendfsync", "always")
    queue, path = TaskQueue(valkey.client()), tmp_path / "calls"
    ids = [task.id for task in queue.put_many({"seconds": 0.05} for _ in range(10))]
    script(valkey.url, WORKER, str(path), "--concurrency", "5", "--lease", "5", stderr=subprocess.DEVNULL)
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) > 20, "work is under way")
    valkey.stop(signal.SIGKILL)
    time.sleep(1)
    valkey.start()

    wait_until(lambda: all_ended(queue, path), "all tasks ended")

    check_calls(queue, path, ids)


def test_frozen_worker_that_wakes_up_calls_nothing_more(valkey: Server, script: Start, tmp_path: Path) -> None:
    """SIGSTOP past the lease, another worker goes on from the journal; woken up, the first one stops."""
    queue, path = TaskQueue(valkey.client()), tmp_path / "calls"
    ids = [task.id for task in queue.put_many({"seconds": 0.1} for _ in range(3))]
    command = [WORKER, str(path), "--concurrency", "3", "--lease", "1"]
    frozen = script(valkey.url, *command, stderr=subprocess.DEVNULL)
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) > 5, "work is under way")
    frozen.send_signal(signal.SIGSTOP)
    while queue.owed():
        script(valkey.url, *command, "--burst", stderr=subprocess.DEVNULL).communicate(timeout=60)
        answer_all(queue, path)
    before = path.read_text()
    histories = [LogReader(one, queue.redis).read() for one in ids]

    frozen.send_signal(signal.SIGCONT)
    time.sleep(1)
    frozen.terminate()
    frozen.communicate(timeout=60)

    assert path.read_text() == before
    assert [LogReader(one, queue.redis).read() for one in ids] == histories
    assert any("resumed" in names(queue.redis, one) for one in ids)
    check_calls(queue, path, ids)


def test_worker_that_has_lost_its_lease_gets_lease_lost_from_a_step(url: str, queue: TaskQueue) -> None:
    """It does not call: the lease is looked at before a call, by one's own clock, too."""
    doer = Doer()

    async def test(again: Again) -> None:
        old = await again()
        await again()
        with pytest.raises(LeaseLost):
            await old.step("x", doer)

    in_attempts(url, queue, test)
    assert doer.arguments == []
