"""The queue: put, take, heartbeat, finish, recover. A Redis list with leases beside it.

    put       LPUSH, with a record and a place in the ledger of unfinished tasks (put.lua)
    take      BRPOP, then a claim: a lease of some seconds and a token that proves it (claim.lua)
    heartbeat renews leases (heartbeat.lua); release, retry and finish end them
    recover   pushes tasks again whose lease is over, or that were popped but never claimed (audit.lua, recover.lua)

Every change is one script on keys of one slot, and repeating it changes nothing; so it is repeated when a connection is
lost. Only BRPOP cannot be: what it popped in vain, recover finds in the ledger.
"""

import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

from redis import RedisCluster
from redis.exceptions import TimeoutError as NotInTime

from ailf.messaging.redis import Client, blocking_client, connect, encode, from_json, to_json

from . import keys
from .batching import Call, run, run_many, send
from .lua import load
from .retrying import repeat

logger = logging.getLogger(__name__)

MAX_DATA_BYTES = 1_000_000  # of a task's data as JSON; larger things belong in a file that the task names
MAX_DEPTH = 500  # lists and objects in each other; Python's parser has its limit at about 1,000, less what calls it
RECENT_TASKS = 10_000  # ids kept for lists
DEAD_LETTERS = 10_000  # kept in `dead`; older ones go
FINISHED_TASKS = 10_000  # entries kept of `finished`, approximately
REQUEUE_PAGE = 100  # dead letters read at one time
RECORD_TTL_SECONDS = 48 * 3600  # twice the stream's, so that "expired" is not mistaken for "never started"
LEASE_SECONDS = 10.0  # a killed worker's tasks run again within 15 s; a frozen server of 6.5 s is survived
BLOCK_SECONDS = 1.0  # of one BRPOP: short, so that Ctrl-C is noticed within a second
AUDIT_GRACE_MS = 1_000  # how long a popped task may stay unclaimed
AUDIT_LIMIT = 1_000  # of the ledger looked at in one audit
AUDIT_LIST = 10_000  # elements among which a suspected task is looked for
AUDIT_AGAIN_MS = 10_000  # how long a task that was found there is not suspected again
MAX_OWN_ID = 120  # characters; a requeued task's id needs some more
PUT_BATCH = 500  # tasks per pipeline
MOST_IDS = 100  # drawn at one time for tasks that are put one by one
WAIT_MS = 1_000  # for replicas to have a put, before it is repeated; shorter than the socket waits
PATIENCE_SECONDS = 15.0  # how long a put or another change is repeated while Redis is away

DROPPED = {"held": "it runs or waits for its retry", "done": "a task of that id has ended"}
_REQUEUED = re.compile(r"\.r[0-9]+$")  # the end of a requeued task's id
_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
Outcome = Literal["completed", "failed", "cancelled"]


class NoSuchTask(LookupError):
    """No task of that id is known: it was never put, or it finished long ago."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task; from a claim on also with the proof of it (token) and its history."""

    id: str
    data: Any
    attempt: int = 0  # claims so far; grows with each, so it is the fencing token of the task's stream
    token: str = ""
    failures: int = 0  # attempts that ended with an error or a lost worker
    lost_worker: str = ""  # who held the lease before, if it ran out
    cancel_reason: str = ""  # not empty: its cancellation was asked for

    def __str__(self) -> str:
        return self.id


class Malformed(ValueError):
    """An element of the list is no task; the message says why."""


def parse_element(element: bytes, token: str = "") -> Task:
    """Return the task in a list element, b'{"id": 7, "data": …}'. Raises Malformed with the reason."""
    if len(element) > MAX_DATA_BYTES + 1_000:  # id and punctuation have room in the rest
        raise Malformed(f"the element has {len(element):,} bytes; the limit is {MAX_DATA_BYTES:,}")
    try:
        value = from_json(element.decode())
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed("nested too deep") from error
    except ValueError as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed("not a JSON object")
    if "id" not in value or "data" not in value:
        raise Malformed(f'has no "{"data" if "id" in value else "id"}"')
    try:
        return Task(check_id(value["id"]), value["data"], token=token)
    except ValueError as error:
        raise Malformed(str(error)) from error


def check_id(task_id: object) -> str:
    """Return a task's id as text. check_id(7) -> '7'. Raises ValueError where it cannot be one."""
    text = str(task_id) if isinstance(task_id, int | str) and not isinstance(task_id, bool) else ""
    if not _ID.fullmatch(text):
        raise ValueError(f"not a task id: {str(task_id)[:80]!r} (letters, digits and . _ : @ - only, 128 at most)")
    return text


def _id_json(task_id: str) -> str:
    return task_id if task_id.isascii() and task_id.isdigit() and task_id[0] != "0" else f'"{task_id}"'


class TaskQueue:
    """The queue `task_queue` and its companions. Thread-safe. Without a client it connects by the policy.

    A change is repeated for patience_seconds while Redis is away; then redis-py's error is raised. With wait_replicas a
    put returns when so many replicas have it, too (WAIT), so that a failover does not lose it. Not on a cluster.
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        name: str | None = None,
        wait_replicas: int = 0,
    ) -> None:
        self.redis = connect() if client is None else client
        self._name = name  # of the connection that blocks, in CLIENT LIST
        self.patience_seconds, self.wait_replicas = patience_seconds, wait_replicas
        if wait_replicas and isinstance(self.redis, RedisCluster):
            raise ValueError("wait_replicas is for one master and its replicas, not for a cluster")
        names = ("put", "claim", "heartbeat", "finish", "retry", "release", "recover", "audit", "cancel")
        self._scripts = {name: load(self.redis, name) for name in names}
        self._ledger_offset = 0
        self._ids: deque[str] = deque()  # drawn from the counter, and not used yet
        self._ids_lock = threading.Lock()
        self._put_before = 0  # tasks without an id of one's own

    @cached_property
    def _blocking(self) -> Client:
        # subtle: bytes, because a decoding error after BRPOP would lose the element
        return blocking_client(self.redis, BLOCK_SECONDS, decode_responses=False, client_name=self._name)

    def _run(self, name: str, script_keys: Sequence[str], args: Sequence[Any]) -> Any:
        return repeat(partial(run, self.redis, (self._scripts[name], script_keys, args)), self.patience_seconds)

    def _run_many(self, name: str, calls: Sequence[tuple[list[str], list[Any]]]) -> list[Any]:
        """Run a script once for each (keys, args), in one round trip; an error that concerns one is its reply."""
        return run_many(self.redis, [(self._scripts[name], *call) for call in calls])

    def close(self) -> None:
        """Close the connections. The queue connects again when it is used again."""
        if "_blocking" in self.__dict__:
            self._blocking.close()
        self.redis.close()

    @staticmethod
    def check(data: Any) -> None:
        """Raise what put() would raise for this data: ValueError or TypeError."""
        _check_data(data)

    # -- putting ------------------------------------------------------------------------------------------------

    def put(self, data: Any, id: str | None = None) -> Task:
        """Put a task: when this returns, the task will reach a terminal event. Atomic.

        With an id of one's own the put is idempotent: a second put of that id returns the first task and queues
        nothing. Ids of digits only belong to the counter. Raises ValueError or TypeError where data is not JSON or
        over MAX_DATA_BYTES, and redis-py's errors where Redis stays away.
        """
        return self._put_new([_check_data(data)])[0] if id is None else self.put_once(data, id)[0]

    def put_once(self, data: Any, id: str) -> tuple[Task, bool]:
        """Put a task with an id of one's own, as put() does; return the task of that id, and whether it is new."""
        return self._put_as(_check_own_id(id), _check_data(data))

    def put_many(self, items: Iterable[Any]) -> list[Task]:
        """Put tasks in order, in pipelines of PUT_BATCH with one INCRBY each. Each task is put as a whole, the batch is
        not: where an error is raised, the tasks before it may have been put."""
        tasks: list[Task] = []
        iterator = iter(items)
        while batch := [_check_data(data) for data in islice(iterator, PUT_BATCH)]:
            tasks += self._put_new(batch)
        return tasks

    def _put_new(self, batch: list[str]) -> list[Task]:
        ids = self._draw_ids(len(batch))
        calls = [(_put_keys(task_id), _put_args(task_id, data)) for task_id, data in zip(ids, batch, strict=True)]
        created, tries = self._run_put(calls)
        tasks = []
        for task_id, data, new in zip(ids, batch, created, strict=True):
            if new or (tries > 1 and self._is_put(task_id, data)):  # or it was put by a try whose reply was lost
                tasks.append(Task(task_id, from_json(data)))
            else:  # somebody pushed that number by hand, or the counter was lost
                self._ids.clear()
                tasks += self._put_new([data])
        return tasks

    def _draw_ids(self, count: int) -> list[str]:
        """Draw ids from the counter: by one INCRBY for many, and for who puts one after the other, in blocks.

        A block is a tenth of what this queue has put before, so that gaps in the numbers stay rare.
        """
        with self._ids_lock:
            self._put_before += count
            if len(self._ids) >= count:
                return [self._ids.popleft() for _ in range(count)]
            drawn = max(count, min(self._put_before // 10, MOST_IDS) if count == 1 else 0)
        # subtle: without the lock, since others must not wait one after the other while Redis is silent
        last = int(repeat(lambda: self.redis.incrby(keys.COUNTER, drawn), self.patience_seconds))
        ids = [str(number) for number in range(last - drawn + 1, last + 1)]
        with self._ids_lock:
            self._ids += ids[count:]
        return ids[:count]

    def _is_put(self, task_id: str, data: str) -> bool:
        return bool(repeat(lambda: self.redis.hget(keys.record(task_id), "data"), self.patience_seconds) == data)

    def _put_as(self, task_id: str, data: str) -> tuple[Task, bool]:
        """Put under an id; return the task of that id, and whether it is new."""
        if self._run_put([(_put_keys(task_id), _put_args(task_id, data))])[0][0]:
            return Task(task_id, from_json(data)), True
        first = repeat(lambda: self.redis.hget(keys.record(task_id), "data"), self.patience_seconds)
        if first is None:  # it expired between the two commands
            return self._put_as(task_id, data)
        return Task(task_id, from_json(first)), False

    def _run_put(self, calls: list[tuple[list[str], list[Any]]]) -> tuple[list[int], int]:
        """Run put.lua for each; return the replies, and how many tries it took."""
        tries = 0

        def put() -> list[int]:
            nonlocal tries
            tries += 1
            replies = self._run_many("put", calls) if not self.wait_replicas else self._put_and_wait(calls)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

        return repeat(put, self.patience_seconds), tries

    def _put_and_wait(self, calls: list[tuple[list[str], list[Any]]]) -> list[int]:
        with self.redis.pipeline(transaction=False) as pipe:  # WAIT is for what its own connection has written
            for script_keys, args in calls:
                self._scripts["put"](keys=script_keys, args=args, client=pipe)
            pipe.incrby(keys.COUNTER, 0)  # subtle: a repeated put writes nothing, so WAIT would wait for nothing
            pipe.wait(self.wait_replicas, WAIT_MS)
            created: list[int]
            *created, _, replicas = pipe.execute()
        if replicas < self.wait_replicas:
            raise NotInTime(f"{replicas} of {self.wait_replicas} replicas have the task")
        return created

    # -- taking -------------------------------------------------------------------------------------------------

    def pop(self, block_seconds: float = BLOCK_SECONDS) -> bytes | None:
        """BRPOP one element; None after block_seconds (BLOCK_SECONDS at most) without one. Never repeated."""
        return next(iter(self.pop_many(1, block_seconds)), None)

    def pop_many(self, count: int, block_seconds: float = BLOCK_SECONDS) -> list[bytes]:
        """BRPOP one element as pop() does, and RPOP up to count - 1 others that wait, in the same round trip."""
        block_seconds = min(block_seconds, BLOCK_SECONDS)
        if isinstance(self._blocking, RedisCluster):
            first: Any = self._blocking.brpop([keys.QUEUE], timeout=block_seconds)
            return list(first or [])[1:]
        commands = [("BRPOP", keys.QUEUE, block_seconds), ("RPOP", keys.QUEUE, count - 1)]
        replies = send(self._blocking, commands[:count])
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if len(refused) == len(replies):
            raise refused[0]
        # subtle: where only one was refused, as in the moment when memory is full, what the other popped counts
        first, *others = ([] if isinstance(reply, Exception) else reply or [] for reply in replies)
        return [*first[1:], *(element for reply in others for element in reply)]

    def claim(
        self, element: bytes, *, worker: str, lease_seconds: float = LEASE_SECONDS, token: str = ""
    ) -> Task | None:
        """Claim the task of a popped element. None where it is dropped: a copy of a task that is held or has ended, or
        a malformed element, which goes to `dead` with the reason. Pass a token of your own to repeat a claim."""
        token = token or secrets.token_hex(16)
        call = partial(self.claim_many, [(element, token)], worker=worker, lease_seconds=lease_seconds)
        [(task, _)] = repeat(call, self.patience_seconds)
        if isinstance(task, Exception):
            raise task
        return task

    def claim_many(
        self,
        elements: Sequence[tuple[bytes, str]],
        *,
        worker: str,
        lease_seconds: float = LEASE_SECONDS,
        then: Callable[[Task], list[Call]] = lambda task: [],
    ) -> list[tuple[Task | Exception | None, Any]]:
        """Claim the tasks of popped elements, each with a token, in one round trip: each as claim() does.

        `then` may name one call, given id and token, that follows its claim; its reply comes beside the task, or None.
        An error that concerns one task only takes its place. Raises redis-py's errors where Redis is away or refuses
        for a while: then repeat all of them.
        """
        found = [_parsed(element, token) for element, token in elements]
        calls = []
        for task in found:
            if isinstance(task, Task):
                claim = self._claim_call(task.id, to_json(task.data), worker, lease_seconds, task.token)
                calls.append([claim, *then(task)])
        replies = iter(run_many(self.redis, [call for pair in calls for call in pair]))
        claimed: list[tuple[Task | Exception | None, Any]] = []
        for (element, token), task in zip(elements, found, strict=True):
            if isinstance(task, Task):
                reply = next(replies)
                followed = next(replies) if len(calls[0]) > 1 else None
                claimed.append((reply if isinstance(reply, Exception) else _claimed(task.id, token, reply), followed))
                continue
            logger.warning("an element of %s is no task: %s; it is in %s now", keys.QUEUE, task, keys.DEAD)
            text = element[:MAX_DATA_BYTES].decode(errors="backslashreplace")
            self.bury({"reason": str(task), "element": text, "bytes": len(element)})
            claimed.append((None, None))
        return claimed

    def _claim_call(self, task_id: str, data: str, worker: str, lease_seconds: float, token: str) -> Call:
        script_keys = [keys.record(task_id), keys.LEASES, keys.UNFINISHED, keys.RECENT]
        args = [task_id, token, worker, int(lease_seconds * 1000), data, RECENT_TASKS]
        return self._scripts["claim"], script_keys, args

    def take(
        self, block_seconds: float = BLOCK_SECONDS, *, worker: str = "anonymous", lease_seconds: float = LEASE_SECONDS
    ) -> Task | None:
        """Pop and claim the next task; None after block_seconds without one, or where an element was dropped."""
        element = self.pop(block_seconds)
        return None if element is None else self.claim(element, worker=worker, lease_seconds=lease_seconds)

    def heartbeat(self, tasks: Sequence[Task], lease_seconds: float = LEASE_SECONDS) -> list[int | Exception]:
        """Renew leases in one round trip; for each task 1 (renewed), 2 (and to be cancelled), 0 (lost) or an error that
        concerns it only."""
        lease_ms = int(lease_seconds * 1000)
        calls = [([keys.LEASES, keys.record(task.id)], [task.id, task.token, lease_ms]) for task in tasks]
        return self._run_many("heartbeat", calls)

    def finish(self, task: Task, outcome: Outcome, result: Any = None) -> bool:
        """Close the record after the task's stream has ended; a failed task goes to `dead` too. False: lease lost."""
        _, *call = self.finish_call(task, outcome, result)
        return bool(self._run("finish", *call))

    def finish_call(self, task: Task, outcome: Outcome, result: Any, *more_keys: str) -> Call:
        """Return the call that finish() makes, to be sent with others (finish.lua says what a further key is for)."""
        letter = _letter(task.id, task.data, result, task.attempt) if outcome == "failed" else ""
        args = [task.id, task.token, outcome, to_json(result), RECORD_TTL_SECONDS * 1000, letter, DEAD_LETTERS]
        script_keys = [keys.record(task.id), keys.LEASES, keys.UNFINISHED, keys.DEAD, keys.FINISHED, keys.TOTALS]
        return self._scripts["finish"], [*script_keys, *more_keys], [*args, FINISHED_TASKS, encode(task.id)]

    def retry(self, task: Task, delay_seconds: float) -> bool:
        """Count a failure and let the task rest; recover pushes it again after delay_seconds. False: lease lost."""
        args = [task.id, task.token, int(delay_seconds * 1000)]
        return bool(self._run("retry", [keys.record(task.id), keys.LEASES], args))

    def release(self, tasks: Sequence[Task]) -> list[bool]:
        """Hand tasks back, in one round trip: they are popped next, and nothing is counted. False: lease lost."""
        calls = [
            ([keys.QUEUE, keys.record(task.id), keys.LEASES], [task.id, task.token, _id_json(task.id)])
            for task in reversed(tasks)  # the last one that is pushed is the first to be popped
        ]
        replies = repeat(lambda: self._run_many("release", calls), self.patience_seconds)
        return [_is_done(reply) for reply in reversed(replies)]

    def put_back(self, elements: Sequence[tuple[bytes, str]]) -> None:
        """Put popped elements back, as the next to be popped, each with the token of a claim whose reply was lost, or
        that was never sent. Repeated, it adds copies, which the claim drops."""
        found = [_parsed(element, token) for element, token in elements]
        tasks = [task for task in found if isinstance(task, Task)]
        released = {task.token for task, was_claimed in zip(tasks, self.release(tasks), strict=True) if was_claimed}
        if others := [element for element, token in reversed(elements) if token not in released]:
            repeat(lambda: self._blocking.rpush(keys.QUEUE, *others), self.patience_seconds)

    def recover(self) -> int:
        """Push again what is owed and nobody works on (100 tasks at most); return how many. Any worker may call it."""
        ids, looked_at = self._run(
            "audit",
            [keys.QUEUE, keys.LEASES, keys.UNFINISHED],
            [AUDIT_GRACE_MS, self._ledger_offset, AUDIT_LIMIT],
        )
        # a thousand long tasks may stand before a lost one: go on from there next time, else start again
        self._ledger_offset = self._ledger_offset + looked_at if looked_at == AUDIT_LIMIT else 0
        calls = [
            (
                [keys.QUEUE, keys.record(task_id), keys.LEASES, keys.UNFINISHED],
                [task_id, _id_json(task_id), AUDIT_LIST, AUDIT_AGAIN_MS],
            )
            for task_id in ids
        ]
        return sum(map(_is_done, self._run_many("recover", calls)))

    def bury(self, letter: dict[str, Any]) -> None:
        """Put a letter in `dead`, which keeps the last DEAD_LETTERS."""
        with self.redis.pipeline() as pipe:
            pipe.lpush(keys.DEAD, to_json(letter))
            pipe.ltrim(keys.DEAD, 0, DEAD_LETTERS - 1)
            pipe.execute()

    # -- steering and looking -----------------------------------------------------------------------------------

    def request_cancel(self, task_id: str, reason: str) -> Task | None:
        """Ask for a task's end. A waiting task is claimed at once and returned, for the caller to end its stream; one
        that runs or rests is marked, and its worker ends it: then None. Raises NoSuchTask; ValueError if it has ended.
        """
        status = self._run("cancel", [keys.record(task_id), keys.LEASES], [task_id, reason])
        if status is None:
            raise NoSuchTask(f"no task {task_id}: it was never put, or it finished long ago")
        if status in keys.TERMINAL:
            raise ValueError(f"task {task_id} has ended already: {status}")
        if status != "waiting":
            return None
        token = secrets.token_hex(16)
        _, *call = self._claim_call(task_id, "", "cancel", LEASE_SECONDS, token)
        return _claimed(task_id, token, self._run("claim", *call))

    def requeue_dead(self, only: Collection[str] | None = None) -> tuple[list[tuple[str, Task]], int]:
        """Put every dead task again, or `only` those of some ids. Return the pairs (old id, new task), and how many
        letters hold no task that can be put.

        The new id is derived from the old (7 -> 7.r2 -> 7.r3), so that doing it twice, or being killed half-way, puts
        no task twice. A letter is removed after its task was put.
        """
        pairs: list[tuple[str, Task]] = []
        left = others = 0  # letters that stay
        for _ in range(-(-self.redis.llen(keys.DEAD) // REQUEUE_PAGE)):
            for letter in reversed(self._blocking.lrange(keys.DEAD, -REQUEUE_PAGE - left, -1 - left)):
                try:
                    task_id, data = _task_in(letter)
                    if only is not None and task_id not in only:
                        left += 1
                        continue
                    pairs.append((task_id, self._put_again(task_id, data)))
                except (ValueError, TypeError, KeyError, RecursionError):  # anybody can LPUSH anything
                    left, others = left + 1, others + 1
                    continue
                self.redis.lrem(keys.DEAD, -1, letter)
        return pairs, others

    def requeue(self, task_id: str) -> Task:
        """Put one dead task again, as requeue_dead() does. Raises NoSuchTask, or ValueError where it has not failed."""
        record = self.get(task_id)
        if record is None:
            raise NoSuchTask(f"no task {task_id}: it was never put, or it finished long ago")
        if record["status"] != "failed":
            raise ValueError(f"task {task_id} has not failed: {record['status']}")
        task = self._put_again(task_id, record["data"])
        self.redis.lrem(keys.DEAD, -1, _letter(task_id, record["data"], record["result"], record["attempts"]))
        return task

    def _put_again(self, old: str, data: Any) -> Task:
        run = _REQUEUED.search(old)
        base, number = (old[: run.start()], int(run[0][2:]) + 1) if run else (old, 2)
        task, new = self._put_as(check_id(f"{base}.r{number}"), _check_data(data))
        while not new and task.data != data:  # somebody pushed that id by hand
            number += 1
            task, new = self._put_as(f"{base}.r{number}", _check_data(data))
        return task

    def get(self, task_id: str) -> dict[str, Any] | None:
        """Return a task's record, decoded: data, status, attempts, failures, worker, put_at (ms) …; None if none."""
        record = self.redis.hgetall(keys.record(task_id))
        return self.decode_record(record) if record else None

    @staticmethod
    def decode_record(record: dict[str, str]) -> dict[str, Any]:
        """Return a record's fields as values."""
        numbers = ("attempts", "failures", "put_at", "started_at", "finished_at")
        values: dict[str, Any] = {name: int(text) if name in numbers else text for name, text in record.items()}
        values.update({name: from_json(record[name]) for name in ("data", "result") if name in record})
        return values

    def ahead(self, task_id: str, within: int = 10_000) -> int | None:
        """Return how many waiting tasks are popped before this one; None where it is not among the next `within`."""
        element = self._element(task_id)
        place = self.redis.lpos(keys.QUEUE, element, rank=-1, maxlen=within) if element else None
        return None if place is None else int(self.redis.llen(keys.QUEUE)) - 1 - int(place)

    def _element(self, task_id: str) -> str | None:
        """Return the list element of a task that was put, as put.lua writes it."""
        data = self.redis.hget(keys.record(task_id), "data")
        return None if data is None else f'{{"id": {_id_json(task_id)}, "data": {data}}}'

    def unlist(self, task_id: str) -> bool:
        """Remove the element of a task that ended while it waited: it must not outlive the task's record. O(length)."""
        element = self._element(task_id)
        return bool(element and self.redis.lrem(keys.QUEUE, -1, element))

    def is_listed(self, task_id: str, within: int = 1_000) -> bool:
        """Say whether one of the next `within` elements has that id: so is found what was pushed by hand."""
        for element in self.next_elements(within):
            try:
                if parse_element(element).id == task_id:
                    return True
            except Malformed:
                continue  # whoever pops it will say so
        return False

    def next_elements(self, count: int) -> list[bytes]:
        """Return the next `count` elements of the list, undecoded; the last one is popped first."""
        return list(self._blocking.lrange(keys.QUEUE, -count, -1))

    def owed(self) -> int:
        """Return how many tasks are waiting, running or resting."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.llen(keys.QUEUE)
            pipe.zcard(keys.UNFINISHED)
            return int(max(pipe.execute()))


def _is_done(reply: int | Exception) -> bool:
    if isinstance(reply, Exception):  # somebody has spoilt the keys of one task: the others need not suffer
        logger.error("a task was left as it is: %s", reply)
    return reply == 1


def _parsed(element: bytes, token: str) -> Task | Malformed:
    try:
        return parse_element(element, token)
    except Malformed as error:
        return error


def _claimed(task_id: str, token: str, reply: list[str]) -> Task | None:
    if reply[0] != "claimed":
        logger.info("task %s: dropped an element with its id (%s)", task_id, DROPPED.get(reply[0], reply[0]))
        return None
    _, data, attempt, failures, lost, cancel = reply
    return Task(task_id, from_json(data), int(attempt), token, int(failures), lost, cancel)


def _check_own_id(task_id: str) -> str:
    if check_id(task_id).isdigit():
        raise ValueError(f"not an id of one's own: {task_id!r} (numbers belong to {keys.COUNTER}; add a letter)")
    if _REQUEUED.search(task_id) or len(task_id) > MAX_OWN_ID:
        raise ValueError(f"not an id of one's own: {task_id!r} ({MAX_OWN_ID} characters at most, no .r2 at the end)")
    return task_id


def _check_data(data: Any) -> str:
    text = to_json(data)
    size = len(text.encode())
    if size > MAX_DATA_BYTES:
        raise ValueError(
            f"the task's data has {size:,} bytes; the limit is {MAX_DATA_BYTES:,} (put them in a file that it names)"
        )
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(data):
        raise ValueError(f"the task's data is nested too deep; the limit is {MAX_DEPTH}")
    return text


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list | tuple)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, dict | list | tuple) for value in level)


def _letter(task_id: str, data: Any, reason: Any, attempts: int) -> str:
    return to_json({"id": task_id, "data": data, "reason": reason, "attempts": attempts})


def _task_in(letter: bytes) -> tuple[str, Any]:
    """Return id and data of the task in a dead letter. Raises one of several errors if it holds none."""
    content = from_json(letter.decode())
    return check_id(content["id"]), content["data"]


def _put_keys(task_id: str) -> list[str]:
    return [keys.QUEUE, keys.record(task_id), keys.UNFINISHED, keys.RECENT]


def _put_args(task_id: str, data: str) -> list[Any]:
    return [task_id, _id_json(task_id), data, RECENT_TASKS]
