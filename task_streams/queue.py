"""The queue's synchronous side: put tasks, keep leases, find lost ones, look. What a worker does is in claims.py.

    put        LPUSH, with a record and a place in the ledger of unfinished tasks (put.lua)
    heartbeat  renews leases (heartbeat.lua)
    recover    pushes tasks again whose lease is over, or that were popped but never claimed (audit.lua, recover.lua)

Every change is one script on keys of one slot, and repeating it changes nothing; so it is repeated when a connection is
lost. Only BRPOP cannot be repeated: if nobody claims a popped task, recover finds it in the ledger.
"""

import functools
import itertools
import logging
import re
import secrets
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from redis import RedisCluster
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as NotInTime

from ailf.messaging.redis import Client, blocking_client, connect, encode, from_json, is_transient, to_json

from . import keys
from .claims import (
    LEASE_SECONDS,
    MAX_DATA_BYTES,
    RECENT_TASKS,
    End,
    Malformed,
    Task,
    check_id,
    claim_steps,
    dead_letter,
    finish_call,
    id_json,
    new_token,
    parse_element,
)
from .errors import MAX_ERROR_CHARS
from .log import TTL_SECONDS
from .lua import load
from .pipeline import Call, first_transient, run
from .questions import MOST_MESSAGES, choose, question_in
from .reader import LogReader
from .retrying import repeat

logger = logging.getLogger(__name__)

MAX_DEPTH = 500  # lists and objects in each other; Python's parser has its limit at about 1,000, less what calls it
REQUEUE_PAGE = 100  # dead letters read at one time
BLOCK_SECONDS = 1.0  # of one BRPOP: short, so that Ctrl-C is noticed within a second
AUDIT_GRACE_MS = 1_000  # how long a popped task may stay unclaimed
AUDIT_LIMIT = 1_000  # of the ledger looked at in one audit
AUDIT_LIST = 10_000  # elements among which a suspected task is looked for
AUDIT_AGAIN_MS = 10_000  # how long a task that was found there is not suspected again
LONGEST_DELAY_SECONDS = 10_000_000  # four months
MAX_OWN_ID = 120  # characters; a requeued task's id needs some more
PUT_BATCH = 500  # tasks in one call of put.lua
PUT_BYTES = 4_000_000  # of data in one call: the server does nothing else meanwhile
MOST_IDS = 100  # drawn at one time for tasks that are put one by one
WAIT_MS = 1_000  # for replicas to have a put, before it is repeated; shorter than the socket waits
PATIENCE_SECONDS = 15.0  # how long a put or another change is repeated while Redis is away

OWNED_SECONDS = 2 * LONGEST_DELAY_SECONDS  # how long the list of an owner's tasks lives after the last put
OWNER = re.compile(r"[A-Za-z0-9._:@+-]{1,128}")
TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)  # w3.org/TR/trace-context
QUESTION_FIELDS = ("status", "question", "answer", "expires_at")

_REQUEUED = re.compile(r"\.r([0-9]+)$")  # the end of a requeued task's id


class NoSuchTask(LookupError):
    """No task of that id is known: it was never put, or it finished long ago."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id}: it was never put, or it finished long ago")


class TaskQueue:
    """The queue `task_queue` and its companions. Thread-safe. Without a client it connects by the policy.

    A change is repeated for patience_seconds while Redis is away; then redis-py's error is raised. With wait_replicas a
    put returns when so many replicas have it, too (WAIT), so that a failover does not lose it. Not on a cluster.
    """

    def __init__(
        self, client: Client | None = None, *, patience_seconds: float = PATIENCE_SECONDS, wait_replicas: int = 0
    ) -> None:
        self.redis = connect() if client is None else client
        self.patience_seconds, self.wait_replicas = patience_seconds, wait_replicas
        if wait_replicas and isinstance(self.redis, RedisCluster):
            raise ValueError("wait_replicas is for one master and its replicas, not for a cluster")
        self._ids: deque[str] = deque()  # drawn from the counter, and not used yet
        self._drawn = 0

    @cached_property
    def _raw(self) -> Client:
        # subtle: bytes, because an element that is not UTF-8 must not break reading the list
        return blocking_client(self.redis, 0, decode_responses=False)

    def _run(self, call: Call) -> Any:
        return repeat(lambda: run(self.redis, call), self.patience_seconds)

    def close(self) -> None:
        """Close the connections. The queue connects again when it is used again."""
        if "_raw" in self.__dict__:
            self._raw.close()
        self.redis.close()

    @staticmethod
    def check(data: Any) -> None:
        """Raise what put() would raise for this data: ValueError or TypeError."""
        _check_data(data)

    # -- putting ------------------------------------------------------------------------------------------------

    def put(
        self, data: Any, id: str | None = None, delay_seconds: float = 0, owner: str = "", traceparent: str = ""
    ) -> Task:
        """Put a task: when this returns, the task will reach a terminal event. Atomic.

        With an id of one's own the put is idempotent: a second put of that id returns the first task, whose `is_new` is
        False, and queues nothing. Ids of digits only belong to the counter. With a delay the task waits in the leases
        until it is due. An owner is a user's name: the dashboard shows a task to its owner alone. `traceparent` is the
        W3C trace that the task belongs to. Both are kept in the record.

        Raises ValueError or TypeError if data is not JSON or over MAX_DATA_BYTES, ValueError for an impossible delay,
        owner or traceparent, and redis-py's errors if Redis stays away.
        """
        [task] = self.put_many([data], delay_seconds, None if id is None else [_check_own_id(id)], owner, traceparent)
        return task

    def put_many(
        self,
        items: Iterable[Any],
        delay_seconds: float = 0,
        ids: Sequence[str] | None = None,
        owner: str = "",
        traceparent: str = "",
    ) -> list[Task]:
        """Put tasks, PUT_BATCH in one call, with one INCRBY for their ids; return them in the order of the queue.

        Each task is put as a whole, the batch is not: if an error is raised, the tasks before it may have been put.
        """
        if not 0 <= delay_seconds <= LONGEST_DELAY_SECONDS:
            raise ValueError(f"a delay of {delay_seconds:g} s is not between 0 and {LONGEST_DELAY_SECONDS:,}")
        if owner and not OWNER.fullmatch(owner):
            raise ValueError(f"not an owner: {owner[:80]!r} (letters, digits and . _ : @ + - only, 128 at most)")
        if traceparent and not TRACEPARENT.fullmatch(traceparent):
            raise ValueError(f"not a W3C traceparent: {traceparent[:80]!r} (expected 00-<32 hex>-<16 hex>-<2 hex>)")
        send = self._run_and_wait if self.wait_replicas else functools.partial(run, self.redis)
        own = None if ids is None else map(check_id, ids)
        tasks: list[Task] = []
        for batch in _batches(map(_check_data, items)):
            while batch:
                names = self._draw_ids(len(batch)) if own is None else list(itertools.islice(own, len(batch)))
                script_keys = [keys.QUEUE, keys.LEASES, keys.UNFINISHED, keys.RECENT, keys.owned(owner)]
                script_keys += map(keys.record, names)
                args: list[Any] = [RECENT_TASKS, int(delay_seconds * 1000), secrets.token_hex(8)]
                args += (owner, traceparent, OWNED_SECONDS)
                for task_id, data in zip(names, batch, strict=True):
                    args += (task_id, id_json(task_id), data)
                put = load("put"), script_keys, args
                known = repeat(functools.partial(send, put), self.patience_seconds)
                replies, batch = list(zip(names, batch, known, strict=True)), []
                for task_id, data, found in replies:
                    if isinstance(found, Exception) and ids:
                        raise found
                    if found == "" or ids:
                        tasks.append(Task(task_id, from_json(found or data), is_new=found == ""))
                    else:  # somebody pushed that number by hand, or the counter was lost: take another one
                        batch.append(data)
                        self._ids.clear()
        return tasks

    def _draw_ids(self, count: int) -> list[str]:
        """Draw ids from the counter, with one INCRBY for many. Single puts draw a block of ids ahead.

        A block is a tenth of what this queue has put before, so that gaps in the numbers stay rare.
        """
        self._drawn += count
        if count == 1:
            with suppress(IndexError):
                return [self._ids.popleft()]  # subtle: a deque is thread-safe
        block = max(count, min(self._drawn // 10, MOST_IDS))
        last = int(repeat(lambda: self.redis.incrby(keys.COUNTER, block), self.patience_seconds))
        ids = [str(number) for number in range(last - block + 1, last + 1)]
        self._ids += ids[count:]
        return ids[:count]

    def _run_and_wait(self, call: Call) -> Any:
        script, script_keys, args = call
        with self.redis.pipeline(transaction=False) as pipe:  # WAIT is for what its own connection has written
            pipe.eval(script.source, len(script_keys), *script_keys, *args)
            pipe.incrby(keys.COUNTER, 0)  # subtle: a repeated put writes nothing, so WAIT would wait for nothing
            pipe.wait(self.wait_replicas, WAIT_MS)
            reply, _, replicas = pipe.execute()
        if replicas < self.wait_replicas:
            raise NotInTime(f"{replicas} of {self.wait_replicas} replicas have the task")
        return reply

    # -- keeping ------------------------------------------------------------------------------------------------

    def heartbeat(self, tasks: Sequence[tuple[Task, int]], lease_seconds: float = LEASE_SECONDS) -> list[Any]:
        """Renew the leases of tasks, and note the last seq of each one's log. Not repeated.

        Returns for each 1 (renewed), the reason of a cancellation as text (renewed too), 0 (the lease is lost), or an
        error that concerns it alone.
        """
        args: list[Any] = [int(lease_seconds * 1000)]
        for task, seq in tasks:
            args += (task.id, task.token, seq)
        script_keys = [keys.LEASES, *(keys.record(task.id) for task, _ in tasks)]
        replies = run(self.redis, (load("heartbeat"), script_keys, args))
        first_transient(replies)
        return list(replies)

    def recover(self, at_most_every_ms: int = 0) -> int:
        """Push tasks again that are owed but not worked on, 100 at most; return how many. Any worker may call it.

        With at_most_every_ms it does nothing if anybody has looked so recently: one worker's look is enough for all.
        """
        script_keys = [keys.QUEUE, keys.LEASES, keys.UNFINISHED, keys.AUDITED]
        pushed = 0
        for task_id in self._run((load("audit"), script_keys, [AUDIT_GRACE_MS, AUDIT_LIMIT, at_most_every_ms])):
            task_keys = [keys.QUEUE, keys.record(task_id), keys.LEASES, keys.UNFINISHED]
            try:
                pushed += self._run(
                    (load("recover"), task_keys, [task_id, id_json(task_id), AUDIT_LIST, AUDIT_AGAIN_MS])
                )
            except ResponseError as error:
                if is_transient(error):
                    raise
                logger.error("task %s was left as it is: %s", task_id, error)  # its keys are spoilt; others go on
        return pushed

    # -- steering and looking -----------------------------------------------------------------------------------

    def cancel(self, task_id: str, reason: str) -> str:
        """Cancel a task and return "cancelled" (it did not run, and has ended) or "requested" (its worker ends it).

        Raises NoSuchTask, or ValueError if the task has ended.
        """
        reason = (reason or "cancelled")[:MAX_ERROR_CHARS]
        status = self._run(
            (load("cancel"), [keys.record(task_id), keys.LEASES], [task_id, reason, keys.CANCEL_CHANNEL])
        )
        if status is None:
            raise NoSuchTask(task_id)
        if status == "running":
            return "requested"
        if status not in keys.TERMINAL:
            first = ("cancelled", "reason", encode(reason))
            is_one_server = not isinstance(self.redis, RedisCluster)
            steps = claim_steps([(Task(task_id, None, token=new_token()), "")], "", LEASE_SECONDS, is_one_server, first)
            call = next(steps)
            try:
                while True:
                    call = steps.send(self._run(call))
            except StopIteration as done:
                [task] = done.value
            if isinstance(task, Exception):
                raise task
            if task is None:  # a worker was quicker; it finds in the record that the end was asked for
                return "requested"
            status, result = ending_of(LogReader(task_id, self.redis)) or ("cancelled", reason)
            self.redis.pexpire(keys.stream(task_id), TTL_SECONDS * 1000)
            self._run(finish_call([End(task, status, result)], is_one_server=False))
            if data := self.redis.hget(keys.record(task_id), "data"):  # subtle: its element must not outlive the record
                self.redis.lrem(keys.QUEUE, -1, f'{{"id": {id_json(task_id)}, "data": {data}}}')
            if status == "cancelled":
                return "cancelled"
        raise ValueError(f"task {task_id} has ended already: {status}")

    def questions(self) -> list[dict[str, Any]]:
        """Return the questions that can be answered now, the next one to expire first.

        Each is {"task", "number", "question", "options" (None: any text will do), "expires_at" (ms)}.
        """
        found = []
        for start in itertools.count(0, AUDIT_LIMIT):
            ids = self.redis.zrange(keys.LEASES, start, start + AUDIT_LIMIT - 1)
            with self.redis.pipeline(transaction=False) as pipe:
                for task_id in ids:
                    pipe.hmget(keys.record(task_id), *QUESTION_FIELDS)
                replies = pipe.execute(raise_on_error=False)  # a spoilt record asks nothing
            first_transient(replies)
            for task_id, reply in zip(ids, replies, strict=True):
                if not isinstance(reply, Exception) and (question := question_in(*reply)):
                    found.append({"task": task_id, **question})
            if len(ids) < AUDIT_LIMIT:
                break
        return found

    def answer(self, task_id: str, text: str, by: str = "", number: int | None = None) -> str:
        """Answer the question that a task has asked; return the answer as the task gets it. The first answer counts.

        With a number, only if that is still the question that is open. Raises NoSuchTask; and ValueError, with a reason
        for the person who answers, if the answer is not one of the options, comes too late, or nothing is asked.
        """
        fields = self.redis.hmget(keys.record(task_id), *QUESTION_FIELDS)
        if fields[0] is None:
            raise NoSuchTask(task_id)
        question = question_in(*fields)
        if question is None:
            if fields[0] in keys.TERMINAL:
                raise ValueError(f"task {task_id} asks nothing now: it has ended ({fields[0]})")
            if fields[2] is not None:
                raise ValueError(f"somebody has answered task {task_id} already")
            raise ValueError(f"task {task_id} asks nothing now")
        if number not in (None, question["number"]):
            raise ValueError(f"task {task_id} asks question {question['number']} now, not {number}")
        text = choose(text, question["options"])
        answer = to_json({"text": text, "by": by[:MAX_OWN_ID], "id": secrets.token_hex(8)})
        script_keys = [keys.QUEUE, keys.LEASES, keys.record(task_id)]
        reply = self._run((load("answer"), script_keys, [task_id, id_json(task_id), fields[1], answer]))
        if reply == "expired":
            raise ValueError(f"the question of task {task_id} has expired: nobody answered in time")
        if reply != "answered":
            raise ValueError(f"the question of task {task_id} is closed: somebody has answered, or the task has ended")
        return text

    def tell(self, task_id: str, text: str, by: str = "") -> None:
        """Put a message into the inbox of a task that has not ended; its handler reads it with log.inbox().

        Raises NoSuchTask, or ValueError if the task has ended, its inbox is full, or the text is not fit.
        """
        message = to_json({"text": choose(text, None, "message"), "by": by[:MAX_OWN_ID], "id": secrets.token_hex(8)})
        reply = self._run((load("tell"), [keys.record(task_id)], [message, MOST_MESSAGES]))
        if reply is None:
            raise NoSuchTask(task_id)
        if reply == "full":
            raise ValueError(f"task {task_id} was told {MOST_MESSAGES} messages already, which is the limit")
        if reply != "told":
            raise ValueError(f"task {task_id} has ended already: {reply}")

    def requeue_dead(self, only: Collection[str] | None = None) -> tuple[list[tuple[str, Task]], int]:
        """Put every dead task again, or `only` those of some ids. Return the pairs (old id, new task), and how many
        letters hold no task that can be put.

        The new id is derived from the old (7 -> 7.r2 -> 7.r3), so that doing it twice, or being killed half-way, puts
        no task twice. A letter is removed after its task was put.
        """
        pairs: list[tuple[str, Task]] = []
        left = others = 0  # letters that stay
        for _ in range(-(-self.redis.llen(keys.DEAD) // REQUEUE_PAGE)):
            for letter in reversed(self._raw.lrange(keys.DEAD, -REQUEUE_PAGE - left, -1 - left)):
                try:
                    content = from_json(letter.decode())
                    task_id, data = check_id(content["id"]), content["data"]
                    if only is not None and task_id not in only:
                        left += 1
                        continue
                    pairs.append((task_id, self._put_again(task_id, data)))
                except (ValueError, TypeError, KeyError, RecursionError, ResponseError) as error:
                    if is_transient(error):
                        raise
                    # anybody can LPUSH anything, and spoil any record
                    left, others = left + 1, others + 1
                    continue
                self.redis.lrem(keys.DEAD, -1, letter)
        return pairs, others

    def requeue(self, task_id: str) -> Task:
        """Put one dead task again, as requeue_dead() does. Raises NoSuchTask, or ValueError if it has not failed."""
        record = self.get(task_id)
        if record is None:
            raise NoSuchTask(task_id)
        if record["status"] != "failed":
            raise ValueError(f"task {task_id} has not failed: {record['status']}")
        task = self._put_again(task_id, record["data"])
        self.redis.lrem(keys.DEAD, -1, dead_letter(task_id, record["data"], record["result"], record["attempts"]))
        return task

    def _put_again(self, old: str, data: Any) -> Task:
        owner, traceparent = self.redis.hmget(keys.record(old), "owner", "traceparent")
        base, number = (old[: found.start()], int(found[1])) if (found := _REQUEUED.search(old)) else (old, 1)
        while True:
            number += 1
            [task] = self.put_many([data], ids=[f"{base}.r{number}"], owner=owner or "", traceparent=traceparent or "")
            if task.is_new or task.data == data:  # else somebody pushed that id by hand
                return task

    def get(self, task_id: str) -> dict[str, Any] | None:
        """Return a task's record, decoded: data, status, attempts, failures, worker, put_at (ms) …; None if none."""
        record = self.redis.hgetall(keys.record(task_id))
        return self.decode_record(record) if record else None

    @staticmethod
    def decode_record(record: dict[str, str]) -> dict[str, Any]:
        """Return a record's fields as values."""
        numbers = ("attempts", "failures", "losses", "seq", "put_at", "started_at", "finished_at")
        values: dict[str, Any] = {"attempts": 0, "failures": 0, "losses": 0}
        values.update({name: int(text) if name in numbers else text for name, text in record.items()})
        values.update({name: from_json(record[name]) for name in ("data", "result") if name in record})
        return values

    def is_listed(self, task_id: str, within: int = 1_000) -> bool:
        """Say whether one of the next `within` elements has that id: this finds tasks that were pushed by hand."""
        for element in self.next_elements(within):
            with suppress(Malformed):  # the worker that pops it reports it
                if parse_element(element).id == task_id:
                    return True
        return False

    def owned(self, owner: str, count: int) -> list[str]:
        """Return the ids of an owner's last tasks, 10,000 at most are known; the newest first."""
        return list(self.redis.zrange(keys.owned(owner), 0, count - 1, desc=True))

    def next_elements(self, count: int) -> list[bytes]:
        """Return the next `count` elements of the list, undecoded; the last one is popped first."""
        return list(self._raw.lrange(keys.QUEUE, -count, -1))

    def owed(self) -> int:
        """Return how many tasks are waiting, running or resting."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.llen(keys.QUEUE)
            pipe.zcard(keys.UNFINISHED)
            return int(max(pipe.execute()))

    def has_work(self) -> bool:
        """Say whether a task waits, runs or rests until its next attempt. Delayed tasks don't count."""
        if self.redis.llen(keys.QUEUE):
            return True
        for start in itertools.count(0, AUDIT_LIMIT):
            ids = self.redis.zrange(keys.UNFINISHED, start, start + AUDIT_LIMIT - 1)
            with self.redis.pipeline(transaction=False) as pipe:
                for task_id in ids:
                    pipe.hget(keys.record(task_id), "status")
                statuses = pipe.execute(raise_on_error=False)  # a spoilt record is no work
            first_transient(statuses)
            if any(status in ("waiting", "running", "retrying") for status in statuses):
                return True
            if len(ids) < AUDIT_LIMIT:
                break
        return False


def ending_of(log: LogReader) -> tuple[str, Any] | None:
    """Return a stream's terminal event and the result to keep in the record; None if the stream has not ended."""
    for event in log.newest(10):
        if event.is_terminal:
            kept = [event.fields[name] for name in ("result", "error", "reason") if name in event.fields]
            return event.name, next(iter(kept), None)
    return None


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Split data into batches of PUT_BATCH tasks and PUT_BYTES characters at most."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == PUT_BATCH or size + len(text) > PUT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _check_own_id(task_id: str) -> str:
    if check_id(task_id).isdigit():
        raise ValueError(f"{task_id!r} cannot be an id of your own: the queue gives plain numbers itself; add a letter")
    if _REQUEUED.search(task_id) or len(task_id) > MAX_OWN_ID:
        raise ValueError(
            f"{task_id!r} cannot be an id of your own: {MAX_OWN_ID} characters at most, and no .r2 at the end"
        )
    return task_id


def _check_data(data: Any) -> str:
    text = to_json(data)
    size = len(text.encode())
    if size > MAX_DATA_BYTES:
        raise ValueError(
            f"the task's data has {size:,} bytes; the limit is {MAX_DATA_BYTES:,} (put them in a file that it names)"
        )
    if text.count("[") + text.count("{") > MAX_DEPTH:
        brackets = re.sub(r'"(?:[^"\\]|\\.)*"|[^][{}]', "", text)  # without texts, which may hold brackets
        if max(itertools.accumulate(1 if one in "[{" else -1 for one in brackets)) > MAX_DEPTH:
            raise ValueError(f"the task's data is nested too deep; the limit is {MAX_DEPTH}")
    return text
