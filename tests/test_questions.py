"""Questions to people, and messages from them: a parked task costs nothing, and exactly one answer counts."""

import asyncio
import json
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from attempts import attempts, end_lease, names, popped, run
from conftest import Server, wait_until
from redis import Redis

import consumer
from ailf.messaging.redis import connect
from task_streams import (
    BlockingLog,
    InDoubt,
    LogReader,
    NoSuchTask,
    Parked,
    PermanentFailure,
    Task,
    TaskLog,
    TaskQueue,
    doubts,
    keys,
    run_worker,
)
from task_streams.questions import AGAIN, FAIL, HAPPENED, MAX_CHARS, MOST_MESSAGES, START_OVER

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def queue(redis: Redis) -> TaskQueue:
    """A queue with one task, 1."""
    queue = TaskQueue(redis)
    queue.put({"n": 1})
    return queue


async def ask(task: Task, log: TaskLog) -> Any:
    return await log.ask("Send it?", ["yes", "no"])


def last(queue: TaskQueue, task_id: str = "1") -> tuple[str, dict[str, Any]]:
    event = LogReader(task_id, queue.redis).read()[-1]
    return event.name, event.fields


def field(queue: TaskQueue, name: str, task_id: str = "1") -> Any:
    return queue.redis.hget(keys.record(task_id), name)


def park(url: str, queue: TaskQueue, handler: Any = ask) -> None:
    """Run a worker until all tasks are parked or have ended."""
    run_worker(handler, url=url, burst=True)


# -- asking and answering ---------------------------------------------------------------------------------------


def test_question_parks_the_task_and_its_answer_lets_it_go_on(url: str, queue: TaskQueue, redis: Redis) -> None:
    """No worker holds it meanwhile. The second attempt returns the answer, and is no failure."""
    park(url, queue)
    assert field(queue, "status") == "parked"
    assert redis.llen(keys.QUEUE) == 0
    [question] = queue.questions()
    assert (question["task"], question["number"], question["question"]) == ("1", 1, "Send it?")
    assert question["options"] == ["yes", "no"]

    assert queue.answer("1", " YES ", by="anna") == "yes"
    park(url, queue)

    assert names(redis) == ["started", "input_required", "started", "input_received", "completed"]
    history = LogReader("1", redis).read()
    assert history[1].fields["expires_at"] == question["expires_at"]
    assert (history[3].fields["answer"], history[3].fields["by"]) == ("yes", "anna")
    assert history[4].fields["result"] == "yes"
    assert (field(queue, "attempts"), field(queue, "failures")) == ("2", None)
    assert queue.questions() == []


def test_plain_handler_asks_too(url: str, queue: TaskQueue) -> None:
    def handle(task: Task, log: BlockingLog) -> Any:
        return [log.was_asked("How many?"), log.ask("How many?")]

    park(url, queue, handle)
    queue.answer("1", "three or four")
    park(url, queue, handle)

    assert last(queue)[1]["result"] == [True, "three or four"]


def test_consumer_parks_a_task_too(url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch, redis: Redis) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setattr(consumer, "handle", ask)
    asyncio.run(consumer.consume(10, burst=True))
    assert field(queue, "status") == "parked"
    queue.answer("1", "no")
    asyncio.run(consumer.consume(10, burst=True))

    assert last(queue)[1]["result"] == "no"
    assert "error" not in names(redis)


def test_questions_are_numbered_and_each_gets_its_own_answer(url: str, queue: TaskQueue, redis: Redis) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        return [await log.ask(f"Question {n}?") for n in range(3)]

    for n in range(3):
        park(url, queue, handle)
        assert [one["number"] for one in queue.questions()] == [n + 1]
        with pytest.raises(ValueError, match=f"asks question {n + 1} now, not {n}"):
            queue.answer("1", "late", number=n)
        queue.answer("1", f"answer {n}", number=n + 1)
    park(url, queue, handle)

    assert last(queue)[1]["result"] == ["answer 0", "answer 1", "answer 2"]
    assert names(redis).count("input_required") == 3


def test_steps_before_a_question_do_not_run_again(url: str, queue: TaskQueue) -> None:
    ran = []

    async def handle(task: Task, log: TaskLog) -> Any:
        await log.step("load", lambda: ran.append(1))
        return await log.ask("Go on?")

    park(url, queue, handle)
    queue.answer("1", "yes")
    park(url, queue, handle)

    assert ran == [1]


def test_question_nobody_answers_in_time_returns_none(url: str, queue: TaskQueue) -> None:
    """The task goes on by itself. Then it is too late for an answer."""
    park(url, queue)
    queue.redis.hset(keys.record("1"), "expires_at", 1)  # as if a day were over
    end_lease(queue, "1")
    with pytest.raises(ValueError, match="has expired"):
        queue.answer("1", "yes")
    assert queue.recover() == 1
    park(url, queue)

    assert last(queue)[1]["result"] is None
    [received] = [event for event in LogReader("1", queue.redis).read() if event.name == "input_received"]
    assert received.fields["answer"] is None


def test_handler_that_catches_everything_is_parked_all_the_same(url: str, queue: TaskQueue) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        try:
            return await log.ask("Send it?")
        except BaseException:
            return "caught"

    park(url, queue, handle)
    assert field(queue, "status") == "parked"


def test_question_within_a_task_group_parks_the_task(url: str, queue: TaskQueue) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(log.ask("Send it?"))
        return asked.result()

    park(url, queue, handle)
    queue.answer("1", "yes")
    park(url, queue, handle)

    assert last(queue)[1]["result"] == "yes"


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "options", "expires"),
    [
        ("", None, 1),
        (" ", None, 1),
        ("x" * (MAX_CHARS + 1), None, 1),
        ("?", [], 1),
        ("?", "yes", 1),
        ("?", ["yes", ""], 1),
        ("?", ["yes", 1], 1),
        ("?", None, 0),
        ("?", None, float("nan")),
        ("?", None, 1e9),
    ],
)
def test_impossible_question_is_an_error(
    question: str, options: Any, expires: float, url: str, queue: TaskQueue
) -> None:
    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(queue.redis))
            with pytest.raises(ValueError):
                await log.ask(question, options, expires)

    run(test)
    assert field(queue, "question") is None


def test_question_while_a_step_runs_is_an_error(url: str, queue: TaskQueue) -> None:
    """Its step would go on in a task that nobody holds. The other way round as well."""

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(queue.redis))
            step = asyncio.create_task(log.step("x", asyncio.Event().wait))
            while "tool_usage" not in names(queue.redis):
                await asyncio.sleep(0.01)
            with pytest.raises(PermanentFailure, match=r"a question while a step is running: ask\(\)#1 and x#1"):
                await log.ask("Send it?")
            step.cancel()
            await asyncio.wait([step])

    run(test)


def test_no_step_runs_once_a_question_is_open(url: str, queue: TaskQueue) -> None:
    """A coroutine that the handler has left behind does nothing while a person thinks."""
    ran = []

    async def test() -> None:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(queue.redis))
            with pytest.raises(Parked):
                await log.ask("Send it?")
            for _ in range(2):
                with pytest.raises(Parked):
                    await log.step("x", lambda: ran.append(1))

    run(test)
    assert ran == []


def test_answer_that_cannot_count_gets_a_reason(url: str, queue: TaskQueue, redis: Redis) -> None:
    """An unknown task, one that asks nothing, a wrong option, a second answer, an ended task."""
    with pytest.raises(NoSuchTask):
        queue.answer("77", "yes")
    with pytest.raises(ValueError, match="task 1 asks nothing now"):
        queue.answer("1", "yes")
    park(url, queue)
    with pytest.raises(ValueError, match="'maybe' is not one of the answers: yes, no"):
        queue.answer("1", "maybe")
    with pytest.raises(ValueError, match="the answer is empty"):
        queue.answer("1", "  ")
    queue.answer("1", "no")
    with pytest.raises(ValueError, match="somebody has answered"):
        queue.answer("1", "yes")
    park(url, queue)
    with pytest.raises(ValueError, match=r"it has ended \(completed\)"):
        queue.answer("1", "yes")
    assert last(queue)[1]["result"] == "no"


def test_parked_task_is_neither_claimed_nor_recovered(url: str, queue: TaskQueue, redis: Redis) -> None:
    """A stray copy of its element is dropped, and the audit finds nothing to do."""
    park(url, queue)
    redis.lpush(keys.QUEUE, '{"id": 1, "data": {"n": 1}}')
    park(url, queue, lambda task, log: "must not run")

    assert queue.recover() == 0
    assert (field(queue, "status"), field(queue, "attempts")) == ("parked", "1")


def test_parked_task_is_cancelled_at_once(url: str, queue: TaskQueue, redis: Redis) -> None:
    park(url, queue)
    assert queue.cancel("1", "not wanted") == "cancelled"

    assert names(redis)[-1] == "cancelled"
    with pytest.raises(ValueError, match="ended"):
        queue.answer("1", "yes")
    assert (queue.questions(), queue.owed()) == ([], 0)


# -- crashes and races ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", ["before the next attempt", "later"])
def test_worker_killed_between_question_and_parking_does_not_ask_twice(
    answered: str, url: str, queue: TaskQueue, redis: Redis
) -> None:
    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            with pytest.raises(Parked):
                await log.ask("Send it?")
            # here it dies
            if answered != "later":
                queue.answer("1", "yes")
            end_lease(queue, "1")
            task, log = await worker.claim(element)
            if answered == "later":
                with pytest.raises(Parked):
                    await log.ask("Send it?")
                assert await worker.claims.release(task, until_answered=True)
                queue.answer("1", "yes")
                _, log = await worker.claim(popped(redis))
            assert await log.ask("Send it?") == "yes"

    run(test)
    assert names(redis).count("input_required") == names(redis).count("input_received") == 1


def test_answer_that_comes_before_the_parking_pushes_the_task_then(url: str, queue: TaskQueue, redis: Redis) -> None:
    async def test() -> str | None:
        async with attempts(url) as worker:
            task, log = await worker.claim(popped(redis))
            with pytest.raises(Parked):
                await log.ask("Send it?")
            queue.answer("1", "yes")
            assert redis.llen(keys.QUEUE) == 0  # it is held
            assert await worker.claims.release(task, until_answered=True)
            _, log = await worker.claim(popped(redis))
            return await log.ask("Send it?")

    assert run(test) == "yes"


def test_worker_killed_before_the_question_is_in_the_stream_asks_it_then(
    url: str, queue: TaskQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has it, and even an answer: the stream gets both, in their order."""

    async def test() -> str | None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            with monkeypatch.context() as dying:
                dying.setattr(TaskLog, "add", asyncio.Event().wait)
                with pytest.raises(TypeError):
                    await log.ask("Send it?")
            queue.answer("1", "yes")
            end_lease(queue, "1")
            _, log = await worker.claim(element)
            return await log.ask("Send it?")

    assert run(test) == "yes"
    assert names(redis)[-2:] == ["input_required", "input_received"]


def test_repeated_answer_whose_reply_was_lost_is_the_same_answer(
    url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    park(url, queue)
    run_call, lost = queue._run, []

    def twice(call: Any) -> Any:
        lost.append(run_call(call))
        return run_call(call)

    monkeypatch.setattr(queue, "_run", twice)
    queue.answer("1", "yes")
    assert lost == ["answered"]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Call functions in threads at the same time; return their results, or the errors that they raised."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def call(number: int) -> None:
        start.wait()
        try:
            results[number] = calls[number]()
        except ValueError as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_exactly_one_of_several_answers_counts(url: str, redis: Redis) -> None:
    queue = TaskQueue(redis)
    ids = [task.id for task in queue.put_many(range(30))]
    run_worker(ask, url=url, burst=True, concurrency=30)
    people = [TaskQueue(connect(url)) for _ in range(3)]
    taken = {}
    for one in ids:
        told = at_once(*(lambda p=p, one=one: p.answer(one, random.choice(["yes", "no"])) for p in people))  # type: ignore[misc]
        [taken[one]] = [answer for answer in told if isinstance(answer, str)]
    run_worker(ask, url=url, burst=True, concurrency=30)

    assert {one: last(queue, one)[1]["result"] for one in ids} == taken


def test_answer_against_cancellation_gives_one_end(url: str, redis: Redis) -> None:
    """Whichever comes first: the task ends once, and nothing is left over."""
    queue = TaskQueue(redis)
    ids = [task.id for task in queue.put_many(range(30))]
    run_worker(ask, url=url, burst=True, concurrency=30)
    one_person, other = TaskQueue(connect(url)), TaskQueue(connect(url))
    for one in ids:
        at_once(lambda one=one: one_person.answer(one, "yes"), lambda one=one: other.cancel(one, "stop"))  # type: ignore[misc]
    run_worker(ask, url=url, burst=True, concurrency=30)

    for one in ids:
        ends = [name for name in names(redis, one) if name in keys.TERMINAL]
        assert ends == ["cancelled"], one
    assert (queue.owed(), redis.llen(keys.QUEUE)) == (0, 0)


def test_answer_against_expiry_is_either_taken_or_refused(url: str, redis: Redis) -> None:
    """If answer() returned, the task has got the answer; if it was refused, the task has got None."""
    queue = TaskQueue(redis)
    ids = [task.id for task in queue.put_many(range(60))]

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.ask("Quick?", expires_seconds=0.4)

    run_worker(handle, url=url, burst=True, concurrency=60)
    taken = {}
    for one in ids * 3:
        try:
            if one not in taken and random.random() < 0.5:
                taken[one] = queue.answer(one, "yes")
        except ValueError:
            taken[one] = None
    wait_until(lambda: queue.recover() or not queue.redis.zcard(keys.LEASES), "all have expired")
    run_worker(handle, url=url, burst=True, concurrency=60)
    wait_until(lambda: queue.recover() or not queue.redis.zcard(keys.LEASES), "all have expired")
    run_worker(handle, url=url, burst=True, concurrency=60)

    assert {one: last(queue, one)[1]["result"] for one in ids} == {one: taken.get(one) for one in ids}


def test_question_works_in_a_cluster(cluster_of_one: str) -> None:
    queue = TaskQueue(connect(cluster_of_one))
    queue.put({"n": 1})
    park(cluster_of_one, queue)
    queue.tell("1", "hello")
    [question] = queue.questions()
    queue.answer("1", "yes", number=question["number"])
    park(cluster_of_one, queue)

    assert last(queue)[1]["result"] == "yes"


@pytest.mark.chaos
def test_ten_thousand_parked_tasks_hold_nothing_and_survive_a_restart(valkey: Server, script: Start) -> None:
    """No slot, no process, no connection; recover finds nothing to do; after kill -9 of the server all are answered."""
    valkey.client().config_set("appendfsync", "always")
    queue = TaskQueue(valkey.client())
    ids = [task.id for task in queue.put_many(range(10_000))]
    run_worker(ask, url=valkey.url, burst=True, concurrency=200)

    assert queue.redis.zcard(keys.LEASES) == len(queue.questions()) == len(ids)
    assert [one["name"] for one in queue.redis.client_list() if one["name"].startswith("worker:")] == []
    assert [queue.recover() for _ in range(20)] == [0] * 20
    valkey.stop(signal.SIGKILL)
    valkey.start()
    wait_until(lambda: not valkey.is_loading(), "the server has its data back")
    assert len(queue.questions()) == len(ids)
    for one in ids:
        queue.answer(one, "yes")
    run_worker(ask, url=valkey.url, burst=True, concurrency=200)

    assert queue.owed() == 0
    assert {last(queue, one)[1].get("result") for one in ids} == {"yes"}


# -- messages ---------------------------------------------------------------------------------------------------


def test_messages_reach_the_handler_once_and_in_every_attempt_at_the_same_place(
    url: str, queue: TaskQueue, redis: Redis
) -> None:
    """What comes while an attempt replays its steps is read behind them."""

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            queue.tell("1", "first", by="anna")
            queue.tell("1", "second")
            assert await log.inbox() == ["first", "second"]
            await log.step("x", lambda: 1)
            assert await log.inbox() == []
            await log.step("y", lambda: 1)
            end_lease(queue, "1")
            queue.tell("1", "third")
            _, log = await worker.claim(element)
            assert await log.inbox() == ["first", "second"]
            await log.step("x", lambda: 1)
            assert await log.resuming()
            assert await log.inbox() == []
            await log.step("y", lambda: 1)
            assert not await log.resuming()
            assert await log.inbox() == ["third"]

    run(test)
    steered = [event.fields for event in LogReader("1", redis).read() if event.name == "steered"]
    assert [(one["text"], one["by"]) for one in steered] == [("first", "anna"), ("second", ""), ("third", "")]


def test_inbox_is_bounded_and_closed_once_the_task_has_ended(url: str, queue: TaskQueue) -> None:
    with pytest.raises(NoSuchTask):
        queue.tell("77", "hello")
    with pytest.raises(ValueError, match="over 20,000 characters"):
        queue.tell("1", "x" * (MAX_CHARS + 1))
    for n in range(MOST_MESSAGES):
        queue.tell("1", f"message {n}")
    with pytest.raises(ValueError, match="which is the limit"):
        queue.tell("1", "one more")

    async def handle(task: Task, log: TaskLog) -> Any:
        return len(await log.inbox())

    park(url, queue, handle)
    assert last(queue)[1]["result"] == MOST_MESSAGES
    with pytest.raises(ValueError, match="has ended already: completed"):
        queue.tell("1", "too late")


def test_expected_exception_is_a_result_of_its_step(url: str, queue: TaskQueue, redis: Redis) -> None:
    """Even of an unsafe step: it is not in doubt, and the next attempt raises it again without a call."""
    calls = []

    def load(file: str) -> None:
        calls.append(file)
        raise FileNotFoundError(f"no file {file}")

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            for _ in range(2):
                _, log = await worker.claim(element)
                for _ in range(2):
                    with pytest.raises(FileNotFoundError, match=r"no file a\.csv"):
                        await log.step("data.load", load, "a.csv", expected=(FileNotFoundError, KeyError))
                assert not await log.resuming()
                end_lease(queue, "1")

    run(test)
    assert calls == ["a.csv"] * 2
    failed = [event.fields for event in LogReader("1", redis).read() if event.fields.get("status") == "failed"]
    assert [one["key"] for one in failed] == ["data.load#1", "data.load#2"]
    assert (failed[0]["error"], failed[0]["is_result"]) == ("no file a.csv", "FileNotFoundError")


# -- what is in doubt -------------------------------------------------------------------------------------------


class Mail:
    """An unsafe call that fails in the given way for its first calls, and counts them."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors, self.calls = list(errors), list[Any]()

    async def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return "sent"


def test_answer_about_a_step_is_none_about_other_arguments(url: str, queue: TaskQueue, redis: Redis) -> None:
    """It happened; then the handler comes with other arguments, and a person is asked about that, too."""
    mail = Mail(TimeoutError("?"))

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.step("mail", mail, f"attempt {task.attempt}")

    park(url, queue, handle)
    queue.answer("1", HAPPENED)
    park(url, queue, handle)
    assert len(mail.calls) == 1
    [question] = queue.questions()
    assert question["options"] == [START_OVER, FAIL]
    queue.answer("1", FAIL)
    park(url, queue, handle)
    assert (last(queue)[0], len(mail.calls)) == ("failed", 1)


def test_two_steps_in_doubt_at_once_are_asked_about_one_after_the_other(url: str, queue: TaskQueue) -> None:
    mail = Mail(TimeoutError("1"), TimeoutError("2"))

    async def handle(task: Task, log: TaskLog) -> Any:
        return await asyncio.gather(log.step("mail", mail, "a", key="a"), log.step("mail", mail, "b", key="b"))

    for number in (1, 2):
        park(url, queue, handle)
        assert [one["number"] for one in queue.questions()] == [number]
        queue.answer("1", HAPPENED, number=number)
    park(url, queue, handle)

    assert last(queue)[1]["result"] == [None, None]
    assert len(mail.calls) == 2


def test_question_that_has_changed_is_asked_as_another_one(url: str, queue: TaskQueue, redis: Redis) -> None:
    """The answer to the old one is logged, and is none to the new one."""

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.ask("Refund 1 EUR?" if task.attempt == 1 else "Refund 2 EUR?", ["yes", "no"])

    park(url, queue, handle)
    queue.answer("1", "no", number=1)
    park(url, queue, handle)
    assert [(one["number"], one["question"]) for one in queue.questions()] == [(2, "Refund 2 EUR?")]
    with pytest.raises(ValueError, match="asks question 2 now, not 1"):
        queue.answer("1", "yes", number=1)
    queue.answer("1", "yes", number=2)
    park(url, queue, handle)

    assert last(queue)[1]["result"] == "yes"
    assert [one for one in names(redis) if one.startswith("input")] == ["input_required", "input_received"] * 2


def test_task_that_asks_for_ever_fails(url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "MOST_QUESTIONS", 3)

    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.ask(f"Now {task.attempt}?")

    for _ in range(3):
        park(url, queue, handle)
        queue.answer("1", "yes")
    park(url, queue, handle)

    assert "has asked 3 questions" in last(queue)[1]["error"]


def test_task_cancelled_between_its_question_and_the_parking_ends(url: str, queue: TaskQueue, redis: Redis) -> None:
    async def test() -> None:
        async with attempts(url) as worker:
            task, log = await worker.claim(popped(redis))
            with pytest.raises(Parked):
                await log.ask("Send it?")
            assert queue.cancel("1", "not wanted") == "requested"
            assert await worker.claims.release(task, until_answered=True)

    run(test)
    park(url, queue)
    assert (names(redis)[-1], queue.owed()) == ("cancelled", 0)


@pytest.mark.parametrize("answer", [FAIL, AGAIN, None])
def test_decision_of_an_attempt_that_died_then_holds(
    answer: str | None, url: str, queue: TaskQueue, redis: Redis
) -> None:
    """Nobody is asked a second time."""

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(redis)
            _, log = await worker.claim(element)
            with pytest.raises(Parked):
                await log.step("mail", Mail(TimeoutError("?")))
            if answer is None:
                redis.hset(keys.record("1"), "expires_at", 1)
            else:
                queue.answer("1", answer)
            for _ in range(2):  # the first of them dies right behind `input_received`
                end_lease(queue, "1")
                _, log = await worker.claim(element)
                if answer == AGAIN:
                    await log.resuming()
                else:
                    with pytest.raises(InDoubt):
                        await log.step("mail", Mail())
            if answer == AGAIN:
                assert await log.step("mail", Mail()) == "sent"

    run(test)
    assert names(redis).count("input_required") == names(redis).count("input_received") == 1


def test_attempt_that_starts_over_keeps_what_people_have_answered(url: str, queue: TaskQueue, redis: Redis) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        first = await log.ask("A?")
        await log.step("stamp", lambda attempt: attempt, task.attempt, safe_to_repeat=True)
        return [first, await log.ask("B?")]

    for answer in ("a", "b"):
        park(url, queue, handle)
        queue.answer("1", answer)
    park(url, queue, handle)

    assert last(queue)[1]["result"] == ["a", "b"]
    assert names(redis).count("input_required") == 2


def test_step_that_runs_beside_one_in_doubt_ends_before_the_task_is_parked(url: str, queue: TaskQueue) -> None:
    """Otherwise nobody would hold the task that it works for, and its result would be lost."""
    mail, slow = Mail(TimeoutError("?")), []

    async def slowly() -> str:
        while not queue.redis.hget(keys.record("1"), "question"):
            await asyncio.sleep(0.01)
        slow.append(1)
        return "slow"

    async def handle(task: Task, log: TaskLog) -> Any:
        return await asyncio.gather(log.step("mail", mail), log.step("slow", slowly))

    park(url, queue, handle)
    queue.answer("1", HAPPENED)
    park(url, queue, handle)

    assert last(queue)[1]["result"] == [None, "slow"]
    assert (len(mail.calls), slow) == (1, [1])


def test_step_that_the_handler_gave_up_is_asked_about_before_the_next_one(url: str, queue: TaskQueue) -> None:
    ran = []

    async def handle(task: Task, log: TaskLog) -> Any:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await log.step("mail", asyncio.Event().wait)
        await log.step("next", lambda: ran.append(1))

    park(url, queue, handle)
    assert [one["key"] for one in queue.questions()] == ["mail#1 in doubt"]
    assert ran == []
    queue.answer("1", HAPPENED)
    park(url, queue, handle)
    assert (last(queue)[0], ran) == ("completed", [1])


def test_handler_cannot_turn_a_failed_doubt_into_success(
    url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in run_worker nor in consumer.py."""
    queue.put({"n": 2})

    async def handle(task: Task, log: TaskLog) -> Any:
        with suppress(Exception):
            await log.step("mail", Mail(TimeoutError("?")))

    park(url, queue, handle)
    queue.answer("1", FAIL)
    park(url, queue, handle)
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setattr(consumer, "handle", handle)
    queue.answer("2", FAIL)
    asyncio.run(consumer.consume(10, burst=True))

    assert last(queue, "1")[0] == last(queue, "2")[0] == "failed"


def test_question_inside_a_step_is_the_handlers_error_and_no_doubt(url: str, queue: TaskQueue, redis: Redis) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        return await log.step("mail", lambda_of(log.ask, "Send it?"))

    park(url, queue, handle)
    assert last(queue)[0] == "failed"
    assert "a question while a step is running" in last(queue)[1]["error"]
    assert "input_required" not in names(redis)


def lambda_of(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    async def made() -> Any:
        return await call(*arguments)

    return made


def test_consumer_parks_a_task_that_asks_within_a_task_group(
    url: str, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(task: Task, log: TaskLog) -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(log.ask("Send it?"))

    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setattr(consumer, "handle", handle)
    asyncio.run(consumer.consume(10, burst=True))
    assert field(queue, "status") == "parked"


def test_two_looks_into_the_inbox_at_once_share_the_messages(url: str, queue: TaskQueue) -> None:
    async def test() -> list[list[str]]:
        async with attempts(url) as worker:
            _, log = await worker.claim(popped(queue.redis))
            queue.tell("1", "first")
            found = await asyncio.gather(log.inbox(), log.inbox())
            queue.tell("1", "second")
            return [*found, await log.inbox()]

    assert run(test) == [["first"], [], ["second"]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("no file"), OSError),
        (KeyError("x"), KeyError),
        (json.JSONDecodeError("bad", "{", 1), json.JSONDecodeError),
        (ValueError("x" * 2_000_000), ValueError),
    ],
)
def test_expected_exception_is_raised_again_as_it_was_expected(
    error: Exception, expected: type[Exception], url: str, queue: TaskQueue
) -> None:
    raised = []

    async def test() -> None:
        async with attempts(url) as worker:
            element = popped(queue.redis)
            for _ in range(3):
                _, log = await worker.claim(element)
                with pytest.raises(expected) as caught:
                    await log.step("load", Mail(error), expected=(expected,))
                raised.append(str(caught.value)[:100])
                end_lease(queue, "1")

    run(test)
    assert raised[1] == raised[2]
    if len(error.args) == 1 and len(str(error)) < 100:
        assert raised[0] == raised[1]
