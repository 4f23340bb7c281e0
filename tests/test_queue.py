"""The queue: part 3's specification. What only puts and looks is on fakeredis; what claims is on a real server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from attempts import Hand, end_lease, names
from conftest import Server, wait_until
from fakeredis import FakeRedis
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import ResponseError

from task_streams import LogReader, NoSuchTask, TaskQueue, claims, keys
from task_streams import queue as queue_module
from task_streams.claims import MAX_DATA_BYTES, check_id, parse_element
from task_streams.errors import MAX_ERROR_CHARS
from task_streams.pipeline import run
from task_streams.queue import MAX_DEPTH

TOO_LARGE = {"text": "x" * MAX_DATA_BYTES}


@pytest.fixture
def fake() -> TaskQueue:
    return TaskQueue(FakeRedis(decode_responses=True))


@pytest.fixture
def queue(empty_valkey: Server) -> TaskQueue:
    return TaskQueue(empty_valkey.client())


@pytest.fixture
def worker(empty_valkey: Server) -> Iterator[Hand]:
    worker = Hand(empty_valkey.url)
    yield worker
    worker.close()


def elements(queue: TaskQueue) -> list[Any]:
    """Return the list's elements in the order in which they will be popped."""
    return [json.loads(element) for element in reversed(queue.redis.lrange(keys.QUEUE, 0, -1))]


def status(queue: TaskQueue, task_id: str) -> str:
    record = queue.get(task_id)
    assert record is not None
    return str(record["status"])


def nested(depth: int) -> list[Any]:
    """Return that many lists in each other. nested(2) -> [[]]"""
    return [nested(depth - 1)] if depth > 1 else []


# -- putting ----------------------------------------------------------------------------------------------------


def test_put_pushes_an_element_that_any_client_can_read(fake: TaskQueue) -> None:
    """LPUSH task_queue '{"id": 1, "data": …}', with a record, a place in the ledger and among the recent ones."""
    task = fake.put({"type": "process_data"})

    assert task.id == "1"
    assert fake.redis.lrange(keys.QUEUE, 0, -1) == ['{"id": 1, "data": {"type": "process_data"}}']
    record = fake.get("1")
    assert record is not None
    assert (record["data"], record["status"], record["attempts"]) == ({"type": "process_data"}, "waiting", 0)
    assert fake.redis.zscore(keys.UNFINISHED, "1") == fake.redis.zscore(keys.RECENT, "1") == record["put_at"]


def test_tasks_are_taken_in_the_order_of_putting(queue: TaskQueue, worker: Hand) -> None:
    """First put, first taken; the ids count 1, 2, 3."""
    queue.put("a")
    queue.put_many(["b", "c"])

    taken = [worker.take() for _ in range(3)]

    assert [(task.id, task.data) for task in taken] == [("1", "a"), ("2", "b"), ("3", "c")]


def test_put_with_an_id_is_idempotent(fake: TaskQueue) -> None:
    """The second put of an id returns the first task, and queues no second copy."""
    first = fake.put({"n": 1}, id="order-42")

    second = fake.put({"n": 2}, id="order-42")

    assert first == second
    assert elements(fake) == [{"id": "order-42", "data": {"n": 1}}]


def test_put_with_the_id_of_a_finished_task_does_not_run_it_again(queue: TaskQueue, worker: Hand) -> None:
    """Idempotent also means: what is done stays done."""
    queue.put(1, id="a")
    worker.finish(worker.take(), "completed", None)

    queue.put(1, id="a")

    assert elements(queue) == []


def test_repeated_put_after_a_lost_reply_queues_once(fake: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script ran, its answer was lost, it is sent again: one element, and the caller gets its task."""
    replies = []

    def lose_the_first(*args: Any) -> Any:
        replies.append(run(*args))
        if len(replies) == 1:
            raise LostConnection("its answer was lost")
        return replies[-1]

    monkeypatch.setattr(queue_module, "run", lose_the_first)

    task = fake.put({"n": 1})

    assert replies == [[""], [""]]
    assert elements(fake) == [{"id": 1, "data": {"n": 1}}]
    assert (task.id, task.data) == ("1", {"n": 1})


def test_number_that_was_pushed_by_hand_is_not_lost(queue: TaskQueue, worker: Hand) -> None:
    """Somebody pushed and ran {"id": 1} by hand; the counter's task 1 gets another number, and is not dropped."""
    queue.redis.lpush(keys.QUEUE, '{"id": 1, "data": "by hand"}')
    worker.take()

    one = queue.put("ours")
    queue.redis.set(keys.COUNTER, 0)
    many = queue.put_many(["a", "b", "c"])

    assert one.id == "2"
    assert sorted(element["data"] for element in elements(queue)) == ["a", "b", "c", "ours"]
    assert len({one.id, *(task.id for task in many), "1"}) == 5


def test_ids_of_one_producer_have_no_gaps(fake: TaskQueue) -> None:
    """1, 2, 3 …, one by one or many at once."""
    ids = [fake.put(n).id for n in range(10)] + [task.id for task in fake.put_many(range(600))]

    assert ids == [str(n) for n in range(1, 611)]


def test_task_like_another_is_put_though_the_counter_gave_its_id_again(fake: TaskQueue) -> None:
    """The server has lost the counter, not the task: a task with the very same data gets another id, and is queued."""
    first = fake.put("the same")
    fake.redis.set(keys.COUNTER, 0)

    again = TaskQueue(fake.redis).put("the same")

    assert first.id != again.id
    assert len(elements(fake)) == 2


@pytest.mark.parametrize("bad", ["", "a b", "a{b}", "x" * 129, "é", "a\n", "7", "007"])
def test_id_that_would_spoil_a_key_is_refused(fake: TaskQueue, bad: str) -> None:
    """An own id is letters, digits and . _ : @ -, not a number (those are the counter's), 128 at most."""
    with pytest.raises(ValueError, match=r"(not a task id|cannot be an id of your own)"):
        fake.put(1, id=bad)


@pytest.mark.parametrize("bad", [1.5, True, None, [1], {"a": 1}])
def test_id_of_another_type_is_refused(bad: object) -> None:
    """An id is text or a whole number."""
    with pytest.raises(ValueError, match="not a task id"):
        check_id(bad)


def test_data_over_the_limit_is_refused_at_put(fake: TaskQueue) -> None:
    """1 MB of JSON is the limit; the message says so, and nothing of the task is left."""
    for call in (lambda: fake.put(TOO_LARGE), lambda: fake.put_many([TOO_LARGE])):
        with pytest.raises(ValueError, match="the limit is 1,000,000"):
            call()

    assert fake.redis.keys() == []


def test_data_that_is_nested_too_deep_is_refused_at_put(queue: TaskQueue, worker: Hand) -> None:
    """What a worker might not be able to parse is a ValueError for who puts it; the limit itself is taken."""
    queue.put([*nested(MAX_DEPTH), 1])
    assert worker.take().data == [*nested(MAX_DEPTH), 1]
    for call in (queue.put, lambda data: queue.put_many([data]), lambda data: queue.put([{"a": data}])):
        with pytest.raises(ValueError, match="the limit is 500"):
            call(nested(MAX_DEPTH + 1))

    assert elements(queue) == []


@pytest.mark.parametrize("bad", [float("nan"), b"bytes", object()])
def test_data_that_is_not_json_is_refused(fake: TaskQueue, bad: object) -> None:
    """As the codec says: ValueError or TypeError."""
    with pytest.raises((ValueError, TypeError)):
        fake.put(bad)


def test_recent_and_dead_are_bounded(queue: TaskQueue, worker: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ids for lists the last ones stay, and of the dead letters the last ones."""
    monkeypatch.setattr(queue_module, "RECENT_TASKS", 3)
    monkeypatch.setattr(claims, "DEAD_LETTERS", 2)

    queue.put_many(range(5))
    for task in [worker.take() for _ in range(5)]:
        worker.finish(task, "failed", "no")
    failed = [json.loads(letter)["id"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)]
    for n in range(3):
        assert worker.claim(f"nonsense {n}".encode()) is None

    assert queue.redis.zrange(keys.RECENT, 0, -1) == ["3", "4", "5"]
    assert failed == ["5", "4"]
    assert [json.loads(letter)["element"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)] == [
        "nonsense 2",
        "nonsense 1",
    ]


# -- claiming ---------------------------------------------------------------------------------------------------


def test_claim_gives_a_lease_and_a_token(queue: TaskQueue, worker: Hand) -> None:
    """The record says who works, the lease ends in the future, and the token proves it."""
    queue.put("a")

    task = worker.take()

    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["worker"], record["token"], record["attempts"]) == ("running", "w", task.token, 1)
    assert queue.redis.zscore(keys.LEASES, task.id) == pytest.approx(record["started_at"] + 60_000)
    assert task.attempt == 1


def test_second_copy_of_a_running_or_finished_task_is_dropped(queue: TaskQueue, worker: Hand) -> None:
    """However often an element stands in the list, the task runs once."""
    queue.put("a")
    copy = queue.redis.lindex(keys.QUEUE, 0)
    task = worker.take()
    queue.redis.lpush(keys.QUEUE, copy)

    while_running = worker.try_to_take()
    worker.finish(task, "completed", None)
    queue.redis.lpush(keys.QUEUE, copy)
    when_finished = worker.try_to_take()

    assert while_running is when_finished is None
    assert queue.redis.llen(keys.QUEUE) == 0


def test_repeated_claim_counts_once(queue: TaskQueue, worker: Hand) -> None:
    """A claim whose reply was lost is sent again with the same token: the same attempt."""
    queue.put("a")
    element = worker.pop()
    assert element is not None

    tasks = [worker.claim(element, token="t") for _ in range(3)]

    assert [task.attempt for task in tasks if task] == [1, 1, 1]
    assert worker.claim(element, token="other") is None
    assert names(queue.redis) == ["started"]


def test_task_pushed_by_hand_has_a_record_from_its_first_claim(queue: TaskQueue, worker: Hand) -> None:
    """Any client in any language may push one, in any spelling of JSON."""
    queue.redis.lpush(keys.QUEUE, '{ "data" : {"n":1} , "id" : "by-hand" }')
    assert queue.is_listed("by-hand")

    task = worker.take()

    assert (task.id, task.data, task.attempt) == ("by-hand", {"n": 1}, 1)
    assert queue.redis.zscore(keys.UNFINISHED, "by-hand") is not None
    assert not queue.is_listed("by-hand")


MALFORMED = {
    "not JSON": b"nonsense",
    "not JSON: NaN": b'{"id": 1, "data": NaN}',
    "not UTF-8": b'{"id": "\xff"}',
    "not a JSON object": b"[1]",
    'has no "id"': b'{"data": 1}',
    'has no "data"': b'{"id": 1}',
    "not JSON: 1e999": b'{"id": 1, "data": 1e999}',
    "not a task id: '1.5'": b'{"id": 1.5, "data": 1}',
    "not a task id: 'True'": b'{"id": true, "data": 1}',
    "not a task id: 'None'": b'{"id": null, "data": 1}',
    "not a task id: 'a b'": b'{"id": "a b", "data": 1}',
    "nested too deep": b'{"id": 1, "data": ' + b"[" * 100_000,
    "the limit is 1,000,000": json.dumps({"id": 1, "data": "x" * 2_000_000}).encode(),
}


@pytest.mark.parametrize(("reason", "element"), MALFORMED.items(), ids=MALFORMED)
def test_malformed_element_goes_to_dead_with_the_reason(
    queue: TaskQueue, worker: Hand, reason: str, element: bytes
) -> None:
    """Nothing in the list stops a worker; the dead letter holds the element, or its first million bytes."""
    queue.redis.lpush(keys.QUEUE, element)

    assert worker.try_to_take() is None

    [letter] = map(json.loads, queue.redis.lrange(keys.DEAD, 0, -1))
    assert reason in letter["reason"]
    assert letter["element"] == element[:1_000_000].decode(errors="backslashreplace")
    assert letter["bytes"] == len(element)


# -- heartbeat, finish, retry, release --------------------------------------------------------------------------


def test_heartbeat_renews_what_is_held_and_tells_what_is_lost(queue: TaskQueue, worker: Hand) -> None:
    """1: renewed; a text: renewed, and to be cancelled for that reason; 0: its lease is over, or it has ended."""
    queue.put_many("abcde")
    held, cancelled, expired, taken, ended = tasks = [worker.take() for _ in range(5)]
    assert queue.cancel(cancelled.id, "not wanted") == "requested"
    end_lease(queue, expired.id)
    queue.redis.hset(keys.record(taken.id), "token", "somebody else")
    worker.finish(ended, "completed", None)
    before = queue.redis.zscore(keys.LEASES, held.id)

    replies = queue.heartbeat([(task, 7) for task in tasks], lease_seconds=600)

    assert replies == [1, "not wanted", 0, 0, 0]
    assert [(queue.get(task.id) or {}).get("seq") for task in tasks] == [7, 7, 1, 1, 1]
    assert queue.redis.zscore(keys.LEASES, held.id) > before + 50_000


def test_finish_closes_the_record(queue: TaskQueue, worker: Hand) -> None:
    """Status and result stay readable for a while; ledger and leases let go of it."""
    queue.put("a")
    task = worker.take()

    assert worker.finish(task, "completed", {"rows": 3})
    assert worker.finish(task, "completed", {"rows": 3}), "repeating it is harmless"

    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["result"]) == ("completed", {"rows": 3})
    assert 0 < queue.redis.ttl(keys.record(task.id)) <= claims.RECORD_TTL_SECONDS
    assert queue.owed() == queue.redis.zcard(keys.LEASES) == 0
    assert [key for key in queue.redis.scan_iter() if queue.redis.ttl(key) < 0 and key not in keys.FIXED] == []


def test_who_lost_the_lease_can_change_nothing(queue: TaskQueue, worker: Hand) -> None:
    """After a takeover, finish, retry and release of the former holder are refused."""
    queue.put("a")
    old = worker.take()
    end_lease(queue, old.id)
    queue.recover()
    new = worker.take()

    refused = [worker.finish(old, "completed", None), worker.release(old, 0), worker.release(old)]

    assert refused == [False, False, False]
    assert (new.attempt, new.losses) == (2, 1)
    assert status(queue, new.id) == "running"


def test_retry_rests_then_comes_back(queue: TaskQueue, worker: Hand) -> None:
    """A resting task is not in the list and cannot be claimed; when it is due, recover pushes it."""
    queue.put("a")
    task = worker.take()
    assert worker.release(task, 60)
    assert worker.release(task, 60), "repeating it is harmless"
    assert (queue.recover(), status(queue, task.id)) == (0, "retrying")

    end_lease(queue, task.id)
    pushed = queue.recover()

    again = worker.take()
    assert pushed == 1
    assert (again.attempt, again.failures, again.losses) == (2, 1, 0)


def test_released_task_is_the_next_and_counts_no_failure(queue: TaskQueue, worker: Hand) -> None:
    """Handed back, it stands before all that waited longer."""
    queue.put_many(["a", "b"])
    task = worker.take()

    assert worker.release(task)

    again = worker.take()
    assert (again.id, again.attempt, again.failures) == (task.id, 2, 0)


def test_released_tasks_are_popped_in_the_order_in_which_they_were_popped_before(
    queue: TaskQueue, worker: Hand
) -> None:
    """Four of six are handed back: 1, 2, 3, 4 stand before 5 and 6 again."""
    queue.put_many("abcdef")
    held = [worker.take() for _ in range(4)]

    for task in reversed(held):
        assert worker.release(task)

    assert [worker.take().id for _ in range(6)] == ["1", "2", "3", "4", "5", "6"]


# -- recover ----------------------------------------------------------------------------------------------------


def test_recover_pushes_what_a_dead_worker_held(queue: TaskQueue, worker: Hand) -> None:
    """Its lease is over: it is the next to be popped, one loss more, and no failure."""
    queue.put_many(["a", "b"])
    task = worker.take()
    end_lease(queue, task.id)

    pushed = queue.recover()

    assert pushed == 1
    again = worker.take()
    assert (again.id, again.failures, again.losses) == (task.id, 0, 1)


@pytest.mark.parametrize("waiting", [0, 3, 20])
def test_recover_finds_what_was_popped_but_never_claimed(
    queue: TaskQueue, worker: Hand, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    """The element is gone, nobody holds a lease: the audit finds the task in the ledger, however long the list is."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 20)
    lost = queue.put("lost")
    wait_until(
        lambda: queue.redis.time()[1] // 1000 != queue.redis.zscore(keys.UNFINISHED, lost.id) % 1000, "a ms later"
    )
    queue.put_many(range(waiting))
    assert worker.pop() is not None  # … and the worker is killed here

    wait_until(lambda: queue.recover() == 1, "it is found")

    assert [element["data"] for element in elements(queue)] == ["lost", *range(waiting)]
    assert worker.take().failures == 0


def test_recover_finds_what_was_put_in_the_same_millisecond_as_the_oldest_that_waits(
    queue: TaskQueue, worker: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stand at one place in the ledger, and the list, longer than the audit's window, does not move."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 20)
    tasks = queue.put_many(range(10))
    queue.redis.zadd(keys.UNFINISHED, {task.id: 1_700_000_000_000 for task in tasks})
    assert worker.pop() is not None  # … and the worker is killed here

    wait_until(lambda: queue.recover() == 1, "it is found")

    assert [element["data"] for element in elements(queue)] == list(range(10))


def test_false_suspicion_costs_nothing(queue: TaskQueue, worker: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that only wait are neither pushed again nor changed, however often the audit looks."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 0)
    queue.put_many(range(30))

    pushed = [queue.recover() for _ in range(20)]

    assert sum(pushed) == 0
    assert len(elements(queue)) == 30
    assert [worker.take().data for _ in range(30)] == list(range(30))


def test_put_goes_on_behind_a_thousand_ids_that_are_taken(queue: TaskQueue) -> None:
    """The counter was lost, and the records were not."""
    with queue.redis.pipeline() as pipe:
        for number in range(1, 1_101):
            pipe.hset(keys.record(str(number)), "data", "1")
        pipe.execute()

    assert int(queue.put("new").id) > 1_100


def test_put_whose_reply_was_lost_says_that_the_task_is_new(queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([LostConnection("the reply was lost")])

    def run_and_lose(client: Any, call: Any) -> Any:
        reply = run(client, call)
        for error in replies:
            raise error
        return reply

    monkeypatch.setattr(queue_module, "run", run_and_lose)

    assert queue.put("mine", "own").is_new
    assert not queue.put("mine", "own").is_new


def test_reason_of_a_megabyte_is_cut(queue: TaskQueue, worker: Hand) -> None:
    task = queue.put("a")

    assert queue.cancel(task.id, "x" * 2_000_000) == "cancelled"
    assert len(LogReader(task.id, queue.redis).read()[-1].fields["reason"]) == MAX_ERROR_CHARS


def test_recover_forgets_what_has_no_record(queue: TaskQueue, worker: Hand) -> None:
    """A ledger entry whose record somebody deleted does not come up again and again."""
    queue.put("a")
    task = worker.take()
    queue.redis.delete(keys.record(task.id))
    end_lease(queue, task.id)

    assert queue.recover() == 0

    assert queue.owed() == queue.redis.zcard(keys.LEASES) == 0


# -- cancelling, dead letters, looking --------------------------------------------------------------------------


def test_cancelling_what_does_not_run_ends_it(queue: TaskQueue, worker: Hand) -> None:
    """A task that waits, is delayed or rests: its stream ends, its record is closed, its element is gone."""
    resting = queue.put("a")
    worker.release(worker.take(), 60)
    waiting, delayed = queue.put("b"), queue.put("c", delay_seconds=60)

    outcomes = [queue.cancel(task.id, "not wanted") for task in (waiting, delayed, resting)]

    assert outcomes == ["cancelled"] * 3
    assert [names(queue.redis, task.id)[-1] for task in (waiting, delayed, resting)] == ["cancelled"] * 3
    assert [status(queue, task.id) for task in (waiting, delayed, resting)] == ["cancelled"] * 3
    assert queue.owed() == queue.redis.zcard(keys.LEASES) == 0


def test_cancelling_a_running_task_tells_its_worker(queue: TaskQueue, worker: Hand) -> None:
    """The next heartbeat tells its worker. If that worker is lost, the next worker to claim the task is told."""
    queue.put("a")
    task = worker.take()

    assert queue.cancel(task.id, "not wanted") == "requested"

    assert queue.heartbeat([(task, 1)]) == ["not wanted"]
    end_lease(queue, task.id)
    assert queue.recover() == 1
    assert worker.take().cancel_reason == "not wanted"


def test_cancelling_what_has_ended_or_never_was_is_an_error(queue: TaskQueue, worker: Hand) -> None:
    """The message says which of the two."""
    queue.put("a")
    worker.finish(worker.take(), "failed", "no")

    with pytest.raises(ValueError, match="has ended already: failed"):
        queue.cancel("1", "too late")
    with pytest.raises(NoSuchTask, match="no task nobody"):
        queue.cancel("nobody", "who?")


def test_delayed_task_comes_when_it_is_due(queue: TaskQueue, worker: Hand) -> None:
    """Until then it is not in the list, and no stray element of it is claimed."""
    task = queue.put("later", delay_seconds=60)
    assert (queue.recover(), status(queue, task.id), elements(queue)) == (0, "delayed", [])
    assert worker.claim(b'{"id": 1, "data": "later"}') is None

    end_lease(queue, task.id)

    assert queue.recover() == 1
    assert worker.take().data == "later"


def test_spoilt_record_costs_the_others_nothing(queue: TaskQueue, worker: Hand) -> None:
    """Somebody has given one a wrong type: the other's lease is renewed, and it is recovered."""
    queue.put_many("ab")
    spoilt, held = tasks = worker.take(), worker.take()
    queue.redis.delete(keys.record(spoilt.id))
    queue.redis.set(keys.record(spoilt.id), "spoilt")

    error, renewed = queue.heartbeat([(task, 1) for task in tasks])
    end_lease(queue, spoilt.id)
    end_lease(queue, held.id)

    assert isinstance(error, Exception) and renewed == 1
    assert queue.recover() == 1
    assert worker.take().id == held.id


def test_cancelled_task_is_taken_out_of_the_list(fake: TaskQueue) -> None:
    """Its element is found among others, as put.lua writes it."""
    fake.put_many("abc")

    fake.cancel("2", "not wanted")

    assert [element["data"] for element in elements(fake)] == ["a", "c"]


def test_dead_tasks_are_put_again_under_a_derived_id(queue: TaskQueue, worker: Hand) -> None:
    """7 becomes 7.r2, then 7.r3; letters that hold no task stay where they are."""
    queue.put({"n": 1})
    worker.claim(b"nonsense")
    worker.finish(worker.take(), "failed", "no")

    first, others = queue.requeue_dead()
    worker.finish(worker.take(), "failed", "no again")
    second, _ = queue.requeue_dead()

    assert [(old, task.id, task.data) for old, task in first] == [("1", "1.r2", {"n": 1})]
    assert [(old, task.id) for old, task in second] == [("1.r2", "1.r3")]
    assert others == 1
    assert queue.redis.llen(keys.DEAD) == 1


def test_dead_task_is_not_mistaken_for_another_one(queue: TaskQueue, worker: Hand) -> None:
    """Ids of one's own that end in a number, numbers pushed by hand, and very long ids are requeued, too."""
    queue.put({"n": 1}, id="report.1")
    queue.put({"n": 2}, id="report.2")
    worker.finish(worker.take(), "failed", "no")
    queue.redis.lpush(keys.DEAD, json.dumps({"id": "x" * 120, "data": 3}), json.dumps({"id": "9", "data": "new"}))
    queue.redis.lpush(keys.QUEUE, '{"id": "9.r2", "data": "by hand"}')
    while worker.try_to_take() is not None:
        pass

    pairs, others = queue.requeue_dead()

    assert [(old, task.id, task.data) for old, task in pairs] == [
        ("report.1", "report.1.r2", {"n": 1}),
        ("x" * 120, "x" * 120 + ".r2", 3),
        ("9", "9.r3", "new"),
    ]
    assert (others, queue.redis.llen(keys.DEAD), queue.redis.llen(keys.QUEUE)) == (0, 0, 3)


@pytest.mark.parametrize("task_id", ["a.r2", "x" * 121])
def test_ids_of_requeued_tasks_are_kept_free(fake: TaskQueue, task_id: str) -> None:
    """An id of one's own leaves room for a requeued task's."""
    with pytest.raises(ValueError, match="cannot be an id of your own"):
        fake.put({}, id=task_id)


def test_one_dead_task_is_put_again(queue: TaskQueue, worker: Hand) -> None:
    """It leaves the dead letters, the others stay; what has not failed or never was is refused."""
    queue.put_many([{"n": 1.50}, {"n": 2}, {"n": 3}])
    for outcome in ("failed", "failed", "completed"):
        worker.finish(worker.take(), outcome, "no")

    task = queue.requeue("1")

    assert (task.id, task.data) == ("1.r2", {"n": 1.5})
    assert [json.loads(letter)["id"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)] == ["2"]
    with pytest.raises(ValueError, match="has not failed: completed"):
        queue.requeue("3")
    with pytest.raises(NoSuchTask):
        queue.requeue("4")


def test_ends_are_counted_once(queue: TaskQueue, worker: Hand) -> None:
    """By outcome, whatever is repeated; the counts outlive the records."""
    queue.put_many("abc")
    for outcome in ("failed", "completed", "completed"):
        task = worker.take()
        worker.finish(task, outcome, None)
        worker.finish(task, outcome, None)

    assert queue.redis.hgetall(keys.TOTALS) == {"failed": "1", "completed": "2"}


def test_many_dead_letters_are_read_in_pages(fake: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are put again, in the order in which they failed, and letters that hold no task are passed over."""
    monkeypatch.setattr(queue_module, "REQUEUE_PAGE", 3)
    for n in range(10):
        letter = {"id": f"t{n}", "data": n} if n % 4 else {"reason": "nonsense"}
        fake.redis.lpush(keys.DEAD, json.dumps(letter))

    pairs, others = fake.requeue_dead()

    assert [task.data for _, task in pairs] == [1, 2, 3, 5, 6, 7, 9]
    assert (others, fake.redis.llen(keys.DEAD)) == (3, 3)


def test_each_task_that_ends_stands_once_in_finished(queue: TaskQueue, worker: Hand) -> None:
    """Whatever its outcome, and however often finish is repeated; so a consumer group gets each of them."""
    queue.put_many("ab")
    first, second = worker.take(), worker.take()
    worker.finish(first, "completed", None)
    worker.finish(first, "completed", None)
    worker.finish(second, "failed", "no")

    entries = [fields for _, fields in queue.redis.xrange(keys.FINISHED)]

    assert entries == [{"id": '"1"', "status": "completed"}, {"id": '"2"', "status": "failed"}]


def test_requeue_that_was_killed_half_way_puts_nothing_twice(queue: TaskQueue, worker: Hand) -> None:
    """The task was put, its letter not yet removed: doing it again removes the letter and queues no copy."""
    queue.put("a")
    worker.finish(worker.take(), "failed", "no")
    [letter] = queue.redis.lrange(keys.DEAD, 0, -1)
    queue.requeue_dead()
    queue.redis.lpush(keys.DEAD, letter)

    queue.requeue_dead()

    assert [element["id"] for element in elements(queue)] == ["1.r2"]
    assert queue.redis.llen(keys.DEAD) == 0


def test_element_of_an_own_id_is_quoted(fake: TaskQueue) -> None:
    """Numbers stand bare, all other ids as text, also those that begin with a zero."""
    fake.put(1, id="a.1")

    assert parse_element(b'{"id": 7, "data": 1}').id == parse_element(b'{"id": "7", "data": 1}').id == "7"
    assert fake.redis.lindex(keys.QUEUE, 0) == '{"id": "a.1", "data": 1}'
    assert fake.is_listed("a.1")


def test_put_over_a_spoilt_record_raises_or_takes_another_number(queue: TaskQueue) -> None:
    """Somebody has SET the keys of two records: no put pretends to have put its task."""
    for task_id in ("own", "1"):
        queue.redis.set(keys.record(task_id), "not a hash")

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        queue.put("a", id="own")
    assert queue.put("b").id == "2"

    assert [element["data"] for element in elements(queue)] == ["b"]


# -- owners and traces ------------------------------------------------------------------------------------------

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_owner_and_trace_are_in_the_record_and_the_owner_has_a_list(queue: TaskQueue) -> None:
    """The newest first. A task without an owner is in nobody's list, and a put that is repeated in only one."""
    mine = [queue.put({}, owner="anna@example.org", traceparent=TRACE).id, queue.put({}, owner="anna@example.org").id]
    queue.put({})
    other = queue.put({}, id="a1", owner="bob").id
    queue.put({}, id="a1", owner="bob")

    record = queue.get(mine[0])
    assert record is not None
    assert (record["owner"], record["traceparent"]) == ("anna@example.org", TRACE)
    assert queue.owned("anna@example.org", 10) == mine[::-1]
    assert queue.owned("anna@example.org", 1) == mine[1:]
    assert queue.owned("bob", 10) == [other]
    assert queue.owned("carol", 10) == []
    assert queue.redis.ttl(keys.owned("bob")) > 0


def test_id_that_somebody_else_has_put_stays_in_their_list_alone(queue: TaskQueue) -> None:
    queue.put({}, id="a1", owner="anna")
    assert not queue.put({}, id="a1", owner="bob").is_new
    assert (queue.owned("anna", 10), queue.owned("bob", 10)) == (["a1"], [])


def test_requeued_task_keeps_its_owner_and_its_trace(queue: TaskQueue, worker: Hand) -> None:
    task = queue.put({}, owner="anna", traceparent=TRACE)
    worker.finish(worker.take(), "failed", "no")
    again = queue.requeue(task.id)

    record = queue.get(again.id)
    assert record is not None
    assert (record["owner"], record["traceparent"]) == ("anna", TRACE)
    assert queue.owned("anna", 10) == [again.id, task.id]


@pytest.mark.parametrize("owner", ["a b", "a/b", "x" * 129, "é", "a\n"])
def test_impossible_owner_is_refused(queue: TaskQueue, owner: str) -> None:
    with pytest.raises(ValueError, match="not an owner"):
        queue.put({}, owner=owner)


@pytest.mark.parametrize(
    "traceparent",
    ["x", TRACE.upper(), TRACE.replace("00-", "ff-"), f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01"],
)
def test_impossible_traceparent_is_refused(queue: TaskQueue, traceparent: str) -> None:
    with pytest.raises(ValueError, match="not a W3C traceparent"):
        queue.put({}, traceparent=traceparent)
