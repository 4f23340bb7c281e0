"""What the pages and the API say about tasks: lists, single tasks, workers; and what they ask for: put, cancel, retry.

Plain blocking code on TaskQueue, which web/api.py calls in threads. A list needs the status of the last 10,000
tasks; it is read at most every half second, whoever asks.
"""

import hashlib
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ailf.messaging.redis import from_json
from task_streams import LogReader, NoSuchTask, TaskQueue, keys
from task_streams.claims import Malformed, parse_element
from task_streams.consuming import WORKER_NAME
from task_streams.questions import question_in
from task_streams.queue import QUESTION_FIELDS

from .models import Answer, ListedTask, Message, Page, Question, WholeTask, Worker
from .replies import Conflict

SNAPSHOT_SECONDS = 0.5  # how old a list may be
LISTED = 200  # of the next elements, whose place in the queue is told
MOST_RUNNING = 1_000  # running tasks whose worker is looked up
PROGRESS_WITHIN = 20  # of a stream's last entries, among which the last progress is looked for
STATES = {
    "waiting": ("waiting", "retrying", "delayed", "parked"),
    "running": ("running",),
    "done": ("completed", "cancelled"),
    "failed": ("failed",),
}
STATUSES = tuple(status for group in STATES.values() for status in group)
SAMPLES = Path(__file__).resolve().parents[1] / "sample_data"


IN_LISTS = ("status", "attempts", "failures", "worker", "put_at", "started_at", "finished_at", "cancel")  # and `data`
LISTED_DATA_BYTES = 2_000  # of a task's data as JSON in lists; of larger data a list has the beginning
BEGINNING_CHARS = 300
MOST_BEGINNINGS = 10_000  # remembered, so that large data is read once and not with each list

T = TypeVar("T")


class Tasks:
    """A view of the queue. Thread-safe. redis-py's errors pass."""

    def __init__(self, queue: TaskQueue) -> None:
        self.queue = queue
        self._lock = threading.Lock()
        self._statuses: dict[str, str] = {}  # id -> status, the newest first
        self._beginning = lru_cache(MOST_BEGINNINGS)(self._read_beginning)
        self._read_at = -SNAPSHOT_SECONDS

    # -- looking ------------------------------------------------------------------------------------------------

    def statuses(self) -> dict[str, str]:
        """Return the status of the last 10,000 tasks, the newest first."""
        # With a timeout: while Redis is silent, those who wait here must not try it one after the other.
        if self._lock.acquire(timeout=SNAPSHOT_SECONDS):
            try:
                if time.monotonic() - self._read_at > SNAPSHOT_SECONDS:
                    self._statuses = self._read_statuses()
                    self._read_at = time.monotonic()
            finally:
                self._lock.release()
        return self._statuses

    def _read_statuses(self) -> dict[str, str]:
        recent = self.queue.redis.zrange(keys.RECENT, 0, -1, withscores=True)
        # of tasks that were put in the same millisecond, 10 is newer than 9
        recent.sort(key=lambda pair: (pair[1], len(pair[0]), pair[0]), reverse=True)
        found = self._records([task_id for task_id, _ in recent], "status")
        return {task_id: record["status"] for task_id, record in found.items() if record["status"]}

    def page(self, state: str | None, query: str, before: str | None, limit: int) -> Page:
        """Return one page of the list, the newest first, with counts and workers. Raises NoSuchTask for `before`."""
        statuses = self.statuses()
        wanted = STATES[state] if state else STATUSES
        ids = [task_id for task_id, status in statuses.items() if status in wanted and task_id.startswith(query)]
        if before is not None:
            order = list(statuses)
            if before not in statuses:
                raise NoSuchTask(before)
            newer = set(order[: order.index(before) + 1])
            ids = [task_id for task_id in ids if task_id not in newer]
        shown = ids[:limit]
        listed = self._listed() if any(statuses[task_id] == "waiting" for task_id in shown) else {}
        records = {task_id: record for task_id, record in self._records(shown, *IN_LISTS).items() if record["status"]}
        data = self._listed_data(records)
        running = [task_id for task_id, status in statuses.items() if status == "running"][:MOST_RUNNING]
        return Page(
            tasks=[ListedTask(**self._describe(one, record | data[one][0], listed) | data[one][1])
                   for one, record in records.items()],
            next=shown[-1] if len(ids) > limit else None,
            counts={name: sum(status in group for status in statuses.values()) for name, group in STATES.items()},
            queue_length=self.queue.redis.llen(keys.QUEUE),
            workers=self.workers(running),
        )  # fmt: skip

    def get(self, task_id: str) -> WholeTask:
        """Return all that is known of one task, its result too. Raises NoSuchTask."""
        record = self.queue.redis.hgetall(keys.record(task_id))
        if record.get("status") not in STATUSES:
            if not self.queue.is_listed(task_id):
                raise NoSuchTask(task_id)
            record = {"status": "waiting"}  # pushed by hand, and not claimed yet
        task = self._describe(task_id, record, self._listed() if record["status"] == "waiting" else {})
        return WholeTask(**task, result=_decoded(record).get("result"), question=_question(record))

    def workers(self, running: list[str]) -> list[Worker]:
        """Return the workers that are connected, by their connections' names, and what each works on."""
        clients = self.queue.redis.client_list()
        names = {one["name"].removeprefix(WORKER_NAME) for one in clients if one["name"].startswith(WORKER_NAME)}
        tasks: dict[str, list[str]] = {name: [] for name in sorted(names)}
        for task_id, record in self._records(running, "worker").items():
            tasks.setdefault(record["worker"] or "?", []).append(task_id)
        return [Worker(name=name, alive=name in names, tasks=ids) for name, ids in tasks.items()]

    def _records(self, ids: list[str], *fields: str) -> dict[str, dict[str, Any]]:
        """Return some fields of the records of tasks, in one round trip; None for what a record has not."""
        with self.queue.redis.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.hmget(keys.record(task_id), *fields)
            replies = pipe.execute()
        return {task_id: dict(zip(fields, reply, strict=True)) for task_id, reply in zip(ids, replies, strict=True)}

    def _listed_data(self, records: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
        """Return each task's `data` as lists have it: a record's field or, where it is large, what stands for it."""
        ids = list(records)
        with self.queue.redis.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.hstrlen(keys.record(task_id), "data")
            sizes = dict(zip(ids, pipe.execute(), strict=True))
        small = self._records([task_id for task_id in ids if sizes[task_id] <= LISTED_DATA_BYTES], "data")
        found: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}
        for task_id in ids:
            if task_id in small:
                text = small[task_id]["data"]
                found[task_id] = {} if text is None else {"data": text}, {"data_is_cut": False}
            else:
                kind, beginning = self._beginning(task_id, records[task_id]["put_at"], sizes[task_id])
                found[task_id] = {}, {"type": kind, "data": beginning, "data_is_cut": True}
        return found

    def _read_beginning(self, task_id: str, _put_at: str, _size: int) -> tuple[str | None, str]:
        """Return the type of a task with large data, and the beginning of its data as JSON."""
        text = self.queue.redis.hget(keys.record(task_id), "data") or ""
        try:
            data = from_json(text)
        except (RecursionError, ValueError):  # nested too deep; or not JSON, where somebody has spoilt it
            data = None
        kind = data.get("type") if isinstance(data, dict) else None
        return kind if isinstance(kind, str) else None, text[:BEGINNING_CHARS]

    def _listed(self) -> dict[str, int]:
        """Return how many are ahead of each of the next tasks in the queue."""
        places: dict[str, int] = {}
        for place, element in enumerate(reversed(self.queue.next_elements(LISTED))):
            try:
                places.setdefault(parse_element(element).id, place)
            except Malformed:
                continue  # whoever pops it will say so
        return places

    def _describe(self, task_id: str, record: dict[str, Any], listed: dict[str, int]) -> dict[str, Any]:
        values = _decoded(record)
        data = values.get("data")
        kind = data.get("type") if isinstance(data, dict) else None
        status = values["status"]
        percent, step = self._progress(task_id) if status == "running" else (None, None)
        return {
            "id": task_id,
            "state": "waiting" if status in STATES["waiting"] else status,
            "status": status,
            "type": kind if isinstance(kind, str) else None,
            "data": data,
            "attempts": values.get("attempts", 0),
            "failures": values.get("failures", 0),
            "worker": values.get("worker") if status == "running" else None,
            "put_at": values.get("put_at"),
            "started_at": values.get("started_at"),
            "finished_at": values.get("finished_at"),
            "ahead": listed.get(task_id) if status == "waiting" else None,
            "cancel": values.get("cancel"),
            "percent": percent,
            "step": step,
        }

    def _progress(self, task_id: str) -> tuple[float | None, str | None]:
        for event in LogReader(task_id, self.queue.redis).newest(PROGRESS_WITHIN):
            percent, step = event.fields.get("percent"), event.fields.get("step")
            if event.name == "progress" and isinstance(percent, int | float):
                return max(0, min(100, percent)), step if isinstance(step, str) else None
        return None, None

    # -- asking -------------------------------------------------------------------------------------------------

    def put(self, data: dict[str, Any], key: str | None) -> tuple[WholeTask, bool]:
        """Put a task; return it, and whether it is new. The same idempotency key gives the same task, and is new once,
        however many ask at once; Conflict if that was put with other data. Raises ValueError and TypeError as put()."""
        if key is None:
            return self.get(self._after(self.queue.put(data)).id), True
        task_id = f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        task = self._after(self.queue.put(data, task_id))
        if task.data != data:
            raise Conflict("that Idempotency-Key was used for another task")
        return self.get(task_id), task.is_new

    def put_run(self, task_id: str, data: dict[str, Any]) -> bool:
        """Put a task under an id of its own, and return whether it is new. Raises ValueError and TypeError as put()."""
        return self._after(self.queue.put(data, task_id)).is_new

    def cancel(self, task_id: str, reason: str) -> str:
        """Return "cancelled" or "requested". Raises NoSuchTask; Conflict where the task has ended."""
        try:
            return self._after(self.queue.cancel(task_id, reason))
        except ValueError as error:
            raise Conflict(str(error)) from error
        except NoSuchTask:
            self._refuse_unclaimed(task_id)
            raise

    def answer(self, task_id: str, how: Answer) -> str:
        """Answer a task's question; return what the task gets. Raises NoSuchTask; Conflict if it cannot count."""
        try:
            return self._after(self.queue.answer(task_id, how.answer, how.by, how.number))
        except ValueError as error:
            raise Conflict(str(error)) from error

    def tell(self, task_id: str, message: Message) -> None:
        """Put a message into a task's inbox. Raises NoSuchTask; Conflict if it has ended, or its inbox is full."""
        try:
            self.queue.tell(task_id, message.text, message.by)
        except ValueError as error:
            raise Conflict(str(error)) from error

    def retry(self, task_id: str) -> WholeTask:
        """Put a failed task again, and return the new one. Raises NoSuchTask; Conflict where it has not failed."""
        try:
            return self.get(self._after(self.queue.requeue(task_id)).id)
        except ValueError as error:
            raise Conflict(str(error)) from error
        except NoSuchTask:
            self._refuse_unclaimed(task_id)
            raise

    def _refuse_unclaimed(self, task_id: str) -> None:
        """Raise Conflict for a task that was pushed by hand: until a worker claims it, it is but an element of the
        list, and has no record that could say what is asked of it."""
        if self.queue.is_listed(task_id):
            raise Conflict(f"task {task_id} was pushed by hand and is not claimed yet: it can only be waited for")

    def _after(self, outcome: T) -> T:
        """Let the next list be read anew: whoever changes something sees it."""
        self._read_at = -SNAPSHOT_SECONDS
        return outcome

    @staticmethod
    def samples() -> list[str]:
        """Return the sample files, as a task names them."""
        files = (path for path in sorted(SAMPLES.iterdir()) if path.is_file() and path.name != "README.md")
        return [f"{SAMPLES.name}/{path.name}" for path in files]


def _question(record: dict[str, Any]) -> Question | None:
    found = question_in(*(record.get(name) for name in QUESTION_FIELDS))
    if found is None:
        return None
    try:
        return Question.model_validate({name: found.get(name) for name in Question.model_fields})
    except ValidationError:  # somebody has spoilt the record
        return None


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record's fields as values, without the data that is nested too deep to be read."""
    record = {name: text for name, text in record.items() if text is not None}
    try:
        return TaskQueue.decode_record(record)
    except RecursionError:
        return TaskQueue.decode_record({name: text for name, text in record.items() if name not in ("data", "result")})
