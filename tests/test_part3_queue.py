"""The queue: part 3's specification. All of it on fakeredis; what breaks servers is in test_reliability.py."""

import json
from typing import Any

import pytest
from conftest import wait_until
from fakeredis import FakeRedis

from task_streams import NoSuchTask, Task, TaskQueue, keys
from task_streams import queue as queue_module
from task_streams.queue import MAX_DATA_BYTES, MAX_DEPTH, check_id, parse_element

TOO_LARGE = {"text": "x" * MAX_DATA_BYTES}


@pytest.fixture
def queue() -> TaskQueue:
    return TaskQueue(FakeRedis(decode_responses=True))


def elements(queue: TaskQueue) -> list[Any]:
    """Return the list's elements in the order in which they will be popped."""
    return [json.loads(element) for element in reversed(queue.redis.lrange(keys.QUEUE, 0, -1))]


def take(queue: TaskQueue, **options: Any) -> Task:
    task = queue.take(worker="w", **options)
    assert task is not None
    return task


def status(queue: TaskQueue, task_id: str) -> str:
    record = queue.get(task_id)
    assert record is not None
    return str(record["status"])


def end_lease(queue: TaskQueue, task: Task) -> None:
    queue.redis.zadd(keys.LEASES, {task.id: 1})


def nested(depth: int) -> list[Any]:
    """Return that many lists in each other. nested(2) -> [[]]"""
    return [nested(depth - 1)] if depth > 1 else []


# -- putting ----------------------------------------------------------------------------------------------------


def test_put_pushes_an_element_that_any_client_can_read(queue: TaskQueue) -> None:
    """LPUSH task_queue '{"id": 1, "data": …}', with a record, a place in the ledger and among the recent ones."""
    task = queue.put({"type": "process_data"})

    assert task.id == "1"
    assert queue.redis.lrange(keys.QUEUE, 0, -1) == ['{"id": 1, "data": {"type": "process_data"}}']
    record = queue.get("1")
    assert record is not None
    assert (record["data"], record["status"], record["attempts"]) == ({"type": "process_data"}, "waiting", 0)
    assert queue.redis.zscore(keys.UNFINISHED, "1") == queue.redis.zscore(keys.RECENT, "1") == record["put_at"]


def test_tasks_are_taken_in_the_order_of_putting(queue: TaskQueue) -> None:
    """First put, first taken; the ids count 1, 2, 3."""
    queue.put("a")
    queue.put_many(["b", "c"])

    taken = [take(queue) for _ in range(3)]

    assert [(task.id, task.data) for task in taken] == [("1", "a"), ("2", "b"), ("3", "c")]


def test_put_with_an_id_is_idempotent(queue: TaskQueue) -> None:
    """The second put of an id returns the first task, and queues no second copy."""
    first = queue.put({"n": 1}, id="order-42")

    second = queue.put({"n": 2}, id="order-42")

    assert first == second
    assert elements(queue) == [{"id": "order-42", "data": {"n": 1}}]


def test_put_with_the_id_of_a_finished_task_does_not_run_it_again(queue: TaskQueue) -> None:
    """Idempotent also means: what is done stays done."""
    queue.put(1, id="a")
    queue.finish(take(queue), "completed", None)

    queue.put(1, id="a")

    assert elements(queue) == []


def test_number_that_was_pushed_by_hand_is_not_lost(queue: TaskQueue) -> None:
    """Somebody pushed and ran {"id": 1} by hand; the counter's task 1 gets another number, and is not dropped."""
    queue.redis.lpush(keys.QUEUE, '{"id": 1, "data": "by hand"}')
    take(queue)

    one = queue.put("ours")
    queue.redis.set(keys.COUNTER, 0)
    many = queue.put_many(["a", "b", "c"])

    assert one.id == "2"
    assert sorted(element["data"] for element in elements(queue)) == ["a", "b", "c", "ours"]
    assert len({one.id, *(task.id for task in many), "1"}) == 5


def test_ids_of_one_producer_have_no_gaps(queue: TaskQueue) -> None:
    """1, 2, 3 …, one by one or many at once."""
    ids = [queue.put(n).id for n in range(10)] + [task.id for task in queue.put_many(range(600))]

    assert ids == [str(n) for n in range(1, 611)]


def test_task_like_another_is_put_though_the_counter_gave_its_id_again(queue: TaskQueue) -> None:
    """The server has lost the counter, not the task: a task with the very same data gets another id, and is queued."""
    first = queue.put("the same")
    queue.redis.set(keys.COUNTER, 0)

    again = TaskQueue(queue.redis).put("the same")

    assert first.id != again.id
    assert len(elements(queue)) == 2


@pytest.mark.parametrize("bad", ["", "a b", "a{b}", "x" * 129, "é", "a\n", "7", "007"])
def test_id_that_would_spoil_a_key_is_refused(queue: TaskQueue, bad: str) -> None:
    """An own id is letters, digits and . _ : @ -, not a number (those are the counter's), 128 at most."""
    with pytest.raises(ValueError, match=r"not (a task id|an id of one's own)"):
        queue.put(1, id=bad)


@pytest.mark.parametrize("bad", [1.5, True, None, [1], {"a": 1}])
def test_id_of_another_type_is_refused(bad: object) -> None:
    """An id is text or a whole number."""
    with pytest.raises(ValueError, match="not a task id"):
        check_id(bad)


def test_data_over_the_limit_is_refused_at_put(queue: TaskQueue) -> None:
    """1 MB of JSON is the limit; the message says so, and nothing of the task is left."""
    for call in (lambda: queue.put(TOO_LARGE), lambda: queue.put_many([TOO_LARGE])):
        with pytest.raises(ValueError, match="the limit is 1,000,000"):
            call()

    assert queue.redis.keys() == []


def test_data_that_is_nested_too_deep_is_refused_at_put(queue: TaskQueue) -> None:
    """What a worker might not be able to parse is a ValueError for who puts it; the limit itself is taken."""
    queue.put([*nested(MAX_DEPTH), 1])
    assert take(queue).data == [*nested(MAX_DEPTH), 1]
    for call in (queue.put, lambda data: queue.put_many([data]), lambda data: queue.put([{"a": data}])):
        with pytest.raises(ValueError, match="the limit is 500"):
            call(nested(MAX_DEPTH + 1))

    assert elements(queue) == []


@pytest.mark.parametrize("bad", [float("nan"), b"bytes", object()])
def test_data_that_is_not_json_is_refused(queue: TaskQueue, bad: object) -> None:
    """As the codec says: ValueError or TypeError."""
    with pytest.raises((ValueError, TypeError)):
        queue.put(bad)


def test_recent_and_dead_are_bounded(queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ids for lists the last ones stay, and of the dead letters the last ones."""
    monkeypatch.setattr(queue_module, "RECENT_TASKS", 3)
    monkeypatch.setattr(queue_module, "DEAD_LETTERS", 2)

    queue.put_many(range(5))
    for task in [take(queue) for _ in range(5)]:
        queue.finish(task, "failed", "no")
    for n in range(3):
        queue.bury({"reason": n})

    assert queue.redis.zrange(keys.RECENT, 0, -1) == ["3", "4", "5"]
    assert [json.loads(letter)["reason"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)] == [2, 1]


# -- claiming ---------------------------------------------------------------------------------------------------


def test_claim_gives_a_lease_and_a_token(queue: TaskQueue) -> None:
    """The record says who works, the lease ends in the future, and the token proves it."""
    queue.put("a")

    task = take(queue, lease_seconds=60)

    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["worker"], record["token"], record["attempts"]) == ("running", "w", task.token, 1)
    assert queue.redis.zscore(keys.LEASES, task.id) == pytest.approx(record["started_at"] + 60_000)
    assert task.attempt == 1


def test_take_returns_none_where_nothing_waits(queue: TaskQueue) -> None:
    """It blocks for the given time, then says so."""
    assert queue.take(0.05) is None


def test_second_copy_of_a_running_or_finished_task_is_dropped(queue: TaskQueue) -> None:
    """However often an element stands in the list, the task runs once."""
    queue.put("a")
    copy = queue.redis.lindex(keys.QUEUE, 0)
    task = take(queue)
    queue.redis.lpush(keys.QUEUE, copy)

    while_running = queue.take(0.05)
    queue.finish(task, "completed", None)
    queue.redis.lpush(keys.QUEUE, copy)
    when_finished = queue.take(0.05)

    assert while_running is when_finished is None
    assert queue.redis.llen(keys.QUEUE) == 0


def test_repeated_claim_counts_once(queue: TaskQueue) -> None:
    """A claim whose reply was lost is sent again with the same token: the same attempt."""
    queue.put("a")
    element = queue.pop(0.1)
    assert element is not None

    claims = [queue.claim(element, worker="w", token="t") for _ in range(3)]

    assert [claim.attempt for claim in claims if claim] == [1, 1, 1]
    assert queue.claim(element, worker="other") is None


def test_task_pushed_by_hand_has_a_record_from_its_first_claim(queue: TaskQueue) -> None:
    """Any client in any language may push one, in any spelling of JSON."""
    queue.redis.lpush(keys.QUEUE, '{ "data" : {"n":1} , "id" : "by-hand" }')
    assert queue.is_listed("by-hand")

    task = take(queue)

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
def test_malformed_element_goes_to_dead_with_the_reason(queue: TaskQueue, reason: str, element: bytes) -> None:
    """Nothing in the list stops a worker; the dead letter holds the element, or its first million bytes."""
    queue.redis.lpush(keys.QUEUE, element)

    assert queue.take(0.05) is None

    [letter] = map(json.loads, queue.redis.lrange(keys.DEAD, 0, -1))
    assert reason in letter["reason"]
    assert letter["element"] == element[:1_000_000].decode(errors="backslashreplace")
    assert letter["bytes"] == len(element)


# -- heartbeat, finish, retry, release --------------------------------------------------------------------------


def test_heartbeat_renews_what_is_held_and_tells_what_is_lost(queue: TaskQueue) -> None:
    """1: renewed; 2: renewed, and to be cancelled; 0: its lease is over, was taken over, or it has ended."""
    queue.put_many("abcde")
    held, cancelled, expired, taken, ended = tasks = [take(queue) for _ in range(5)]
    queue.request_cancel(cancelled.id, "not wanted")
    end_lease(queue, expired)
    queue.redis.hset(keys.record(taken.id), "token", "somebody else")
    queue.finish(ended, "completed", None)
    queue.redis.zincrby(keys.LEASES, -5_000, held.id)
    before = queue.redis.zscore(keys.LEASES, held.id)

    replies = queue.heartbeat(tasks, 60)

    assert replies == [1, 2, 0, 0, 0]
    assert queue.redis.zscore(keys.LEASES, held.id) > before + 50_000


def test_finish_closes_the_record(queue: TaskQueue) -> None:
    """Status and result stay readable for a while; ledger and leases let go of it."""
    queue.put("a")
    task = take(queue)

    assert queue.finish(task, "completed", {"rows": 3})
    assert queue.finish(task, "completed", {"rows": 3}), "repeating it is harmless"

    record = queue.get(task.id)
    assert record is not None
    assert (record["status"], record["result"]) == ("completed", {"rows": 3})
    assert 0 < queue.redis.ttl(keys.record(task.id)) <= queue_module.RECORD_TTL_SECONDS
    assert queue.owed() == queue.redis.zcard(keys.LEASES) == 0
    assert [key for key in queue.redis.scan_iter() if queue.redis.ttl(key) < 0 and key not in keys.FIXED] == []


def test_who_lost_the_lease_can_change_nothing(queue: TaskQueue) -> None:
    """After a takeover, finish, retry and release of the former holder are refused."""
    queue.put("a")
    old = take(queue)
    end_lease(queue, old)
    queue.recover()
    new = take(queue)

    refused = [queue.finish(old, "completed", None), queue.retry(old, 0), *queue.release([old])]

    assert refused == [False, False, False]
    assert (new.attempt, new.lost_worker) == (2, "w")
    assert status(queue, new.id) == "running"


def test_retry_rests_then_comes_back(queue: TaskQueue) -> None:
    """A resting task is not in the list and cannot be claimed; when it is due, recover pushes it."""
    queue.put("a")
    task = take(queue)
    assert queue.retry(task, 60)
    assert queue.retry(task, 60), "repeating it is harmless"
    assert (queue.recover(), status(queue, task.id)) == (0, "retrying")

    end_lease(queue, task)
    pushed = queue.recover()

    again = take(queue)
    assert pushed == 1
    assert (again.attempt, again.failures, again.lost_worker) == (2, 1, "")


def test_released_task_is_the_next_and_counts_no_failure(queue: TaskQueue) -> None:
    """Handed back, it stands before all that waited longer."""
    queue.put_many(["a", "b"])
    task = take(queue)

    assert queue.release([task]) == [True]

    again = take(queue)
    assert (again.id, again.attempt, again.failures) == (task.id, 2, 0)


def test_released_tasks_are_popped_in_the_order_in_which_they_were_popped_before(queue: TaskQueue) -> None:
    """Four of six are handed back: 1, 2, 3, 4 stand before 5 and 6 again."""
    queue.put_many("abcdef")
    held = [take(queue) for _ in range(4)]

    assert queue.release(held) == [True] * 4

    assert [take(queue).id for _ in range(6)] == ["1", "2", "3", "4", "5", "6"]


# -- recover ----------------------------------------------------------------------------------------------------


def test_recover_pushes_what_a_dead_worker_held(queue: TaskQueue) -> None:
    """Its lease is over: it is the next to be popped, one failure more, and the lost worker is named."""
    queue.put_many(["a", "b"])
    task = take(queue)
    end_lease(queue, task)

    pushed = queue.recover()

    assert pushed == 1
    again = take(queue)
    assert (again.id, again.failures, again.lost_worker) == (task.id, 1, "w")


@pytest.mark.parametrize("waiting", [0, 3, 20])
def test_recover_finds_what_was_popped_but_never_claimed(
    queue: TaskQueue, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    """The element is gone, nobody holds a lease: the audit finds the task in the ledger, however long the list is."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 20)
    lost = queue.put("lost")
    wait_until(
        lambda: queue.redis.time()[1] // 1000 != queue.redis.zscore(keys.UNFINISHED, lost.id) % 1000, "a ms later"
    )
    queue.put_many(range(waiting))
    assert queue.pop(0.1) is not None  # … and the worker is killed here

    wait_until(lambda: queue.recover() == 1, "it is found")

    assert [element["data"] for element in elements(queue)] == ["lost", *range(waiting)]
    assert take(queue).failures == 0


def test_recover_finds_what_was_put_in_the_same_millisecond_as_the_oldest_that_waits(
    queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stand at one place in the ledger, and the list, longer than the audit's window, does not move."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 20)
    tasks = queue.put_many(range(10))
    queue.redis.zadd(keys.UNFINISHED, {task.id: 1_700_000_000_000 for task in tasks})
    assert queue.pop(0.1) is not None  # … and the worker is killed here

    wait_until(lambda: queue.recover() == 1, "it is found")

    assert [element["data"] for element in elements(queue)] == list(range(10))


def test_false_suspicion_costs_nothing(queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that only wait are neither pushed again nor changed, however often the audit looks."""
    monkeypatch.setattr(queue_module, "AUDIT_GRACE_MS", 0)
    queue.put_many(range(30))

    pushed = [queue.recover() for _ in range(20)]

    assert sum(pushed) == 0
    assert len(elements(queue)) == 30
    assert [take(queue).data for _ in range(30)] == list(range(30))


def test_recover_forgets_what_has_no_record(queue: TaskQueue) -> None:
    """A ledger entry whose record somebody deleted does not come up again and again."""
    queue.put("a")
    task = take(queue)
    queue.redis.delete(keys.record(task.id))
    end_lease(queue, task)

    assert queue.recover() == 0

    assert queue.owed() == queue.redis.zcard(keys.LEASES) == 0


# -- cancelling, dead letters, looking --------------------------------------------------------------------------


def test_cancelling_a_waiting_task_claims_it(queue: TaskQueue) -> None:
    """Whoever cancels gets the task, to end its stream; its element will be dropped."""
    task = queue.put("a")

    claimed = queue.request_cancel(task.id, "not wanted")

    assert claimed is not None
    assert claimed.cancel_reason == "not wanted"
    assert queue.take(0.05) is None


def test_cancelling_a_running_or_resting_task_marks_it(queue: TaskQueue) -> None:
    """The heartbeat tells the worker; a resting one is due at once, and its next claim knows."""
    queue.put_many("ab")
    running, resting = take(queue), take(queue)
    queue.retry(resting, 60)

    replies = [queue.request_cancel(task.id, "not wanted") for task in (running, resting)]

    assert replies == [None, None]
    assert queue.heartbeat([running]) == [2]
    assert queue.recover() == 1
    assert take(queue).cancel_reason == "not wanted"


def test_cancelling_what_has_ended_or_never_was_is_an_error(queue: TaskQueue) -> None:
    """The message says which of the two."""
    queue.put("a")
    queue.finish(take(queue), "failed", "no")

    with pytest.raises(ValueError, match="has ended already: failed"):
        queue.request_cancel("1", "too late")
    with pytest.raises(NoSuchTask, match="no task nobody"):
        queue.request_cancel("nobody", "who?")


def test_dead_tasks_are_put_again_under_a_derived_id(queue: TaskQueue) -> None:
    """7 becomes 7.r2, then 7.r3; letters that hold no task stay where they are."""
    queue.put({"n": 1})
    queue.bury({"reason": "not JSON", "element": "nonsense"})
    queue.finish(take(queue), "failed", "no")

    first, others = queue.requeue_dead()
    queue.finish(take(queue), "failed", "no again")
    second, _ = queue.requeue_dead()

    assert [(old, task.id, task.data) for old, task in first] == [("1", "1.r2", {"n": 1})]
    assert [(old, task.id) for old, task in second] == [("1.r2", "1.r3")]
    assert others == 1
    assert queue.redis.llen(keys.DEAD) == 1


def test_dead_task_is_not_mistaken_for_another_one(queue: TaskQueue) -> None:
    """Ids of one's own that end in a number, numbers pushed by hand, and very long ids are requeued, too."""
    queue.put({"n": 1}, id="report.1")
    queue.put({"n": 2}, id="report.2")
    queue.finish(take(queue), "failed", "no")
    queue.redis.lpush(keys.DEAD, json.dumps({"id": "x" * 120, "data": 3}), json.dumps({"id": "9", "data": "new"}))
    queue.redis.lpush(keys.QUEUE, '{"id": "9.r2", "data": "by hand"}')
    while queue.take(0.05) is not None:
        pass

    pairs, others = queue.requeue_dead()

    assert [(old, task.id, task.data) for old, task in pairs] == [
        ("report.1", "report.1.r2", {"n": 1}),
        ("x" * 120, "x" * 120 + ".r2", 3),
        ("9", "9.r3", "new"),
    ]
    assert (others, queue.redis.llen(keys.DEAD), queue.redis.llen(keys.QUEUE)) == (0, 0, 3)


@pytest.mark.parametrize("task_id", ["a.r2", "x" * 121])
def test_ids_of_requeued_tasks_are_kept_free(queue: TaskQueue, task_id: str) -> None:
    """An id of one's own leaves room for a requeued task's."""
    with pytest.raises(ValueError, match="not an id of one's own"):
        queue.put({}, id=task_id)


def test_one_dead_task_is_put_again(queue: TaskQueue) -> None:
    """It leaves the dead letters, the others stay; what has not failed or never was is refused."""
    queue.put_many([{"n": 1.50}, {"n": 2}, {"n": 3}])
    for outcome in ("failed", "failed", "completed"):
        queue.finish(take(queue), outcome, "no")

    task = queue.requeue("1")

    assert (task.id, task.data) == ("1.r2", {"n": 1.5})
    assert [json.loads(letter)["id"] for letter in queue.redis.lrange(keys.DEAD, 0, -1)] == ["2"]
    with pytest.raises(ValueError, match="has not failed: completed"):
        queue.requeue("3")
    with pytest.raises(NoSuchTask):
        queue.requeue("4")


def test_ends_are_counted_once(queue: TaskQueue) -> None:
    """By outcome, whatever is repeated; the counts outlive the records."""
    queue.put_many("abc")
    for outcome in ("failed", "completed", "completed"):
        task = take(queue)
        queue.finish(task, outcome, None)
        queue.finish(task, outcome, None)

    assert queue.redis.hgetall(keys.TOTALS) == {"failed": "1", "completed": "2"}


def test_many_dead_letters_are_read_in_pages(queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are put again, in the order in which they failed, and letters that hold no task are passed over."""
    monkeypatch.setattr(queue_module, "REQUEUE_PAGE", 3)
    for n in range(10):
        queue.bury({"id": f"t{n}", "data": n} if n % 4 else {"reason": "nonsense"})

    pairs, others = queue.requeue_dead()

    assert [task.data for _, task in pairs] == [1, 2, 3, 5, 6, 7, 9]
    assert (others, queue.redis.llen(keys.DEAD)) == (3, 3)


def test_each_task_that_ends_stands_once_in_finished(queue: TaskQueue) -> None:
    """Whatever its outcome, and however often finish is repeated; so a consumer group gets each of them."""
    queue.put_many("ab")
    first, second = take(queue), take(queue)
    queue.finish(first, "completed", None)
    queue.finish(first, "completed", None)
    queue.finish(second, "failed", "no")

    entries = [fields for _, fields in queue.redis.xrange(keys.FINISHED)]

    assert entries == [{"id": '"1"', "status": "completed"}, {"id": '"2"', "status": "failed"}]


def test_requeue_that_was_killed_half_way_puts_nothing_twice(queue: TaskQueue) -> None:
    """The task was put, its letter not yet removed: doing it again removes the letter and queues no copy."""
    queue.put("a")
    queue.finish(take(queue), "failed", "no")
    [letter] = queue.redis.lrange(keys.DEAD, 0, -1)
    queue.requeue_dead()
    queue.redis.lpush(keys.DEAD, letter)

    queue.requeue_dead()

    assert [element["id"] for element in elements(queue)] == ["1.r2"]
    assert queue.redis.llen(keys.DEAD) == 0


def test_ahead_counts_the_tasks_before(queue: TaskQueue) -> None:
    """0 is the next to be popped; a task that is not in the list has no place."""
    queue.put_many("abc")

    assert [queue.ahead(task_id) for task_id in ("1", "2", "3")] == [0, 1, 2]
    take(queue)
    assert [queue.ahead(task_id) for task_id in ("1", "2", "3", "unknown")] == [None, 0, 1, None]


def test_element_of_an_own_id_is_quoted(queue: TaskQueue) -> None:
    """Numbers stand bare, all other ids as text, also those that begin with a zero."""
    queue.put(1, id="a.1")

    assert parse_element(b'{"id": 7, "data": 1}').id == parse_element(b'{"id": "7", "data": 1}').id == "7"
    assert queue.redis.lindex(keys.QUEUE, 0) == '{"id": "a.1", "data": 1}'
    assert queue.ahead("a.1") == 0
