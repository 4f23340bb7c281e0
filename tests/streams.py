"""What tests of readers need of a worker, without its loop: claims, streams written by the rules, and ends."""

import time
from dataclasses import replace
from typing import Any

from redis import Redis

from ailf.messaging.redis import to_json
from task_streams import LogReader, Task, TaskQueue, keys
from task_streams.claims import End, claim_steps, finish_call, new_token, parse_element, release_call
from task_streams.log import TTL_SECONDS, entry_fields
from task_streams.pipeline import run
from task_streams.reader import order


class Stream(LogReader):
    """Append events to a task's stream and read them back. `epoch`: of the attempt; the present time by default.

    If somebody else has written in between, as with `XADD … *`, it goes on as the next attempt does: in a later epoch.
    """

    def __init__(self, task_id: str | int, redis: Redis, epoch: int | str = 0) -> None:
        super().__init__(task_id, redis)
        self.epoch, self.seq = int(epoch) or int(time.time() * 1000), 0

    def add(self, event: str, /, **fields: Any) -> str:
        """Append one event (XADD <epoch>-<seq>), and return its entry id."""
        newest = self.redis.xrevrange(keys.stream(self.task_id), count=1)
        ms, seq = order(newest[0][0]) if newest else (0, 0)
        if ms > self.epoch:
            self.epoch, seq = ms + 1, max(seq, self.seq)
        self.seq = seq + 1
        pairs = entry_fields(event, fields)
        entry = dict(zip(pairs[::2], pairs[1::2], strict=True))
        entry_id = self.redis.xadd(keys.stream(self.task_id), entry, id=f"{self.epoch}-{self.seq}")
        if event in keys.TERMINAL:
            self.redis.expire(keys.stream(self.task_id), TTL_SECONDS)
        return str(entry_id)


def take(queue: TaskQueue, worker: str = "w", lease_seconds: float = 60, newest: bool = False) -> Task | None:
    """Pop and claim the next task; its stream is left to the test. None if nothing waits, or the element is dropped."""
    element = queue.redis.lpop(keys.QUEUE) if newest else queue.redis.rpop(keys.QUEUE)
    if element is None:
        return None
    task = parse_element(element.encode(), new_token())
    steps = claim_steps([(task, to_json(task.data))], worker, lease_seconds, is_one_server=False)
    [reply] = run(queue.redis, next(steps))
    return replace(task, attempt=reply[1], epoch=reply[2]) if reply[0] == "claimed" else None


def finish(queue: TaskQueue, task: Task, outcome: str, result: Any = None) -> bool:
    """Close a task's record after its stream has ended."""
    [reply] = run(queue.redis, finish_call([End(task, outcome, result)], is_one_server=False))
    return bool(reply)


def release(queue: TaskQueue, task: Task, delay_seconds: float) -> bool:
    """Count a failure, and let a task rest until its next attempt."""
    return bool(run(queue.redis, release_call(task, delay_seconds)))
