"""What was promised and what came out, and the one checker that compares them.

Promised:  put() returned a task (Put); log.add() returned an entry id (Step "added", in a worker's journal)
Came out:  every task's stream and record, the dead letters, the ledger and the leases, what a watcher saw

check(history) returns violations; an empty list is what every scenario must end with. Its kinds:

    lost         a task that was put has no terminal event; an acknowledged event, or a malformed element, is nowhere
    duplicated   an event is there twice; seq is not 1, 2, 3 …; a task ended twice, ran after its end, or shares an id
    disordered   events of one run, or the attempts of one task, stand in another order than they were made in
    two holders  two runs of one task, each between its begin and its last acknowledged event, overlap
    two writers  an epoch has the events of two attempts, or of two runs
    strayed      an event, or the result, of one task (both begin with its mark) stands with another
    two ends     more than one terminal event, or an event after it that is not foreign
    left over    the record does not say how the stream ended; something is still waiting, leased, owed or without a TTL
    misread      a watcher saw other events than the stream holds, or in another order

What a fault may cost is said by the caller, as a Loss: the promises made in some span of time. An entry that somebody
else has added is said by the caller, too (`foreign`): it may stand anywhere, and it has no seq of ours.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ailf.messaging.redis import Client, decode, from_json
from task_streams import keys


@dataclass(frozen=True, slots=True)
class Put:
    """put() returned: the task's id, what its data say it is, and when (time.monotonic(), as everywhere here)."""

    id: str
    mark: str
    at: float


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a worker's journal: a run began, an event of it was acknowledged, or it ended."""

    what: str  # begin, added, end
    id: str
    attempt: int
    run: str  # the token of its claim: no two runs have the same
    at: float
    epoch: str = ""  # of its entries: no two runs have the same, either
    task: str = ""  # the mark in the task's data
    asked: float = 0.0  # when log.add() was called; it returned at `at`
    entry: str = ""  # the entry id that it returned
    mark: str = ""  # the event's own, <mark of the task>.<…>: no two events have the same


@dataclass(frozen=True, slots=True)
class Seen:
    """One event that a watcher was given."""

    entry: str
    at: float
    last: bool = False  # it was the terminal event, after which the watcher left


@dataclass(frozen=True, slots=True)
class Loss:
    """Promises made from `since` to `until` may be broken; until `settled`, runs may be in two minds about a lease."""

    since: float
    until: float
    settled: float


class Violation(NamedTuple):
    kind: str
    text: str


@dataclass
class History:
    puts: list[Put] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    malformed: int = 0  # elements pushed that are no tasks
    streams: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)  # id -> (entry id, fields)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    dead: list[dict[str, Any]] = field(default_factory=list)
    finished: list[tuple[str, str]] = field(default_factory=list)  # (id, status), of the stream for archivers
    left_over: list[str] = field(default_factory=list)  # what is in queue, leases and ledger; keys without a TTL
    watched: dict[str, list[Seen]] = field(default_factory=dict)  # id -> what a watcher saw, since its last `reset`
    foreign: set[tuple[str, str]] = field(default_factory=set)  # (id, entry id) of entries that no worker has added
    forgotten: set[str] = field(default_factory=set)  # ids of tasks whose record, or whole stream, somebody deleted

    def read_server(self, client: Client) -> "History":
        """Read what came out; `client` decodes. Commands on one key each, so that a cluster answers, too."""
        prefix = keys.stream("")
        for key in client.scan_iter(f"{prefix}*", count=1000):
            entries = client.xrange(key)
            self.streams[key.removeprefix(prefix)] = [
                (entry_id, {name: decode(text) for name, text in entry.items()}) for entry_id, entry in entries
            ]
        prefix = keys.record("")
        for key in client.scan_iter(f"{prefix}*", count=1000):
            self.records[key.removeprefix(prefix)] = client.hgetall(key)
        self.dead = [json.loads(letter) for letter in client.lrange(keys.DEAD, 0, -1)]
        self.finished = [(str(decode(entry["id"])), entry["status"]) for _, entry in client.xrange(keys.FINISHED)]
        self.left_over = [f"waiting: {element[:80]}" for element in client.lrange(keys.QUEUE, 0, -1)]
        self.left_over += [f"leased: {task_id}" for task_id in client.zrange(keys.LEASES, 0, -1)]
        self.left_over += [f"owed: {task_id}" for task_id in client.zrange(keys.UNFINISHED, 0, -1)]
        for key in client.scan_iter(count=1000):
            if key not in keys.FIXED and client.pttl(key) == -1:
                self.left_over.append(f"without a TTL: {key}")
        return self

    def read_journals(self, journals: Iterable[Path]) -> "History":
        for journal in journals:
            # subtle: without the last part: a line is torn where it is being written, or its worker was killed then
            self.steps += [Step(**json.loads(line)) for line in journal.read_text().split("\n")[:-1]]
        self.steps.sort(key=lambda step: step.at)
        return self


def check(history: History, losses: Sequence[Loss] = ()) -> list[Violation]:
    """Return every broken promise; none is the only good answer."""
    found = [Violation("left over", what) for what in history.left_over]
    found += _check_puts(history, losses)
    for task_id in sorted(history.streams.keys() | history.records.keys()):
        found += _check_task(history, task_id, losses)
    found += _check_steps(history, losses)
    found += _check_letters(history)
    found += _check_watched(history, losses)
    return found


def _may_be_lost(at: float, losses: Sequence[Loss]) -> bool:
    return any(loss.since <= at <= loss.until for loss in losses)


def _check_puts(history: History, losses: Sequence[Loss]) -> Iterable[Violation]:
    promised: dict[str, Put] = {}
    for put in history.puts:
        if _may_be_lost(put.at, losses) and _mark(history.records.get(put.id)) != put.mark:
            continue
        if put.id in promised and promised[put.id].mark != put.mark:
            yield Violation("duplicated", f"task {put.id}: put() returned this id twice")
        promised[put.id] = put
        ends = [end for _, fields in history.streams.get(put.id, []) if (end := fields.get("event")) in keys.TERMINAL]
        if not ends:
            yield Violation("lost", f"task {put.id}: {_names(history, put.id)}")
        if put.id in history.records and _mark(history.records[put.id]) != put.mark:
            yield Violation("lost", f"task {put.id}: another task has its id, {history.records[put.id]}")


def _mark(record: Mapping[str, Any] | None) -> str:
    data = from_json(record["data"]) if record and "data" in record else None
    return str(data.get("mark", "")) if isinstance(data, dict) else ""


def _names(history: History, task_id: str) -> str:
    events = [f"{fields.get('event')}#{entry_id}" for entry_id, fields in history.streams.get(task_id, [])]
    return f"stream {events}, record {history.records.get(task_id)}"


def epoch_of(entry_id: str) -> str:
    return entry_id.partition("-")[0]


def seq_of(entry_id: str) -> int:
    return int(entry_id.partition("-")[2])


def _check_task(history: History, task_id: str, losses: Sequence[Loss]) -> Iterable[Violation]:
    entries = [entry for entry in history.streams.get(task_id, []) if (task_id, entry[0]) not in history.foreign]
    events = [fields for _, fields in entries]
    text = f"task {task_id}: {_names(history, task_id)}"
    ours = {epoch_of(entry_id) for entry_id, _ in entries}
    # a stranger's `*` in the millisecond of an epoch takes the next seq
    counted = [entry_id for entry_id, _ in history.streams.get(task_id, []) if epoch_of(entry_id) in ours]
    yield from _check_ids(entries, counted, text, bool(losses), task_id in history.forgotten)
    marks = Counter(event["mark"] for event in events if "mark" in event)
    if twice := [mark for mark, times in marks.items() if times > 1]:
        yield Violation("duplicated", f"{text}: {twice}")
    if strayed := [mark for mark in marks if mark.split(".")[0] != _mark(history.records.get(task_id))]:
        yield Violation("strayed", f"{text}: {strayed}")
    record = history.records.get(task_id, {})
    if record.get("status") == "completed" and from_json(record["result"]) != _mark(record):
        yield Violation("strayed", f"{text}: the result of another task")
    ends = [event["event"] for event in events if event["event"] in keys.TERMINAL]
    if len(ends) > 1 or (ends and events[-1]["event"] != ends[0]):
        yield Violation("two ends", text)
    if (status := record.get("status")) != (ends[0] if ends else None):
        yield Violation("left over", f"{text}: the record says {status}")
    if (times := [finished for finished, _ in history.finished].count(task_id)) != bool(ends):
        yield Violation("duplicated" if times > 1 else "lost", f"{text}: {times} times in {keys.FINISHED}")


def _check_ids(
    entries: list[tuple[str, dict[str, Any]]], counted: list[str], text: str, has_losses: bool, is_forgotten: bool
) -> Iterable[Violation]:
    """Check that epochs and seq grow as they should. After a loss they may have jumped, and seq may begin again if all
    that knew it is gone."""
    is_broken = has_losses or is_forgotten
    if has_losses:  # an attempt whose claim was lost may go on behind the loss; the next attempt does not count it
        first_of = {epoch_of(entry_id): fields["event"] for entry_id, fields in reversed(entries)}
        counted = [one for one in counted if first_of[epoch_of(one)] in ("started", "worker_lost", "cancelled")]
    seqs = [seq_of(entry_id) for entry_id in counted]
    if not is_forgotten and seqs != (sorted(set(seqs)) if has_losses else list(range(1, len(seqs) + 1))):
        yield Violation("duplicated", f"{text}: seq {seqs}")
    ids = [tuple(map(int, entry_id.split("-"))) for entry_id, _ in entries]
    if ids != sorted(ids):
        yield Violation("disordered", f"{text}: ids {ids}")
    before = ""
    for (entry_id, fields), (previous, _) in zip(entries, [("", {}), *entries], strict=False):
        is_first = epoch_of(entry_id) != epoch_of(previous)
        before = "" if is_first else before
        begins = fields["event"] == "started" or fields["event"] == "worker_lost"
        if begins and not (is_first or (before == "worker_lost" and fields["event"] == "started")):
            yield Violation("two writers", f"{text}: {fields['event']} within the epoch of another attempt, {entry_id}")
        if is_first and not begins and not is_broken and fields["event"] != "cancelled":  # which may be all it writes
            yield Violation("two writers", f"{text}: an attempt that has not started wrote {entry_id}")
        before = fields["event"]
    attempts = [fields["attempt"] for _, fields in entries if fields["event"] == "started" and "attempt" in fields]
    if attempts != sorted(set(attempts)) and not is_broken:
        yield Violation("disordered", f"{text}: attempts {attempts}")


def _check_steps(history: History, losses: Sequence[Loss]) -> Iterable[Violation]:
    marks = {
        (task_id, entry_id): fields.get("mark")
        for task_id, entries in history.streams.items()
        for entry_id, fields in entries
    }
    last_epoch = {
        task_id: int(epoch_of(entry_id))
        for task_id, entries in history.streams.items()
        for entry_id, fields in entries
        if fields.get("event") in keys.TERMINAL
    }
    epochs: dict[tuple[str, str], str] = {}  # task and epoch -> its run
    runs: dict[tuple[str, str], dict[str, list[Step]]] = defaultdict(dict)  # task -> run -> its steps
    for step in history.steps:
        of_task = runs[step.id, step.task]
        if step.what == "begin" and step.run in of_task:
            yield Violation("two holders", f"task {step.id}: attempt {step.attempt} was begun twice, {step.run}")
        if epochs.setdefault((step.id, step.epoch), step.run) != step.run:
            yield Violation("two writers", f"task {step.id}: two runs have the epoch {step.epoch}")
        of_task.setdefault(step.run, []).append(step)
        ran_late = step.what == "begin" and int(step.epoch) > last_epoch.get(step.id, int(step.epoch))
        if ran_late and not _may_be_lost(step.at, losses):
            yield Violation("duplicated", f"task {step.id}: ran after its end, attempt {step.attempt}")
        missing = step.what == "added" and marks.get((step.id, step.entry)) != step.mark
        if missing and not _may_be_lost(step.at, losses):
            there = marks.get((step.id, step.entry), "nothing")
            yield Violation("lost", f"task {step.id}: {step.mark} was acknowledged as {step.entry}; {there} is there")
    for (task_id, _), of_task in runs.items():
        spans = []
        for run, steps in of_task.items():
            added = [step for step in steps if step.what == "added"]
            ids = [tuple(map(int, step.entry.split("-"))) for step in added]
            if ids != sorted(ids):
                yield Violation("disordered", f"task {task_id}: run {run} was told {ids}")
            begin = steps[0]
            if others := [step.entry for step in added if epoch_of(step.entry) != begin.epoch]:
                yield Violation("two writers", f"task {task_id}: run {run} of epoch {begin.epoch} was told {others}")
            # a worker that was frozen between its last look at the lease and the handler's first line: it adds nothing
            is_woken = not added and any(
                int(s[0].epoch) > int(begin.epoch) and s[0].at < begin.at for s in of_task.values()
            )
            if not is_woken:
                spans.append((begin.at, max([begin.at, *(step.asked for step in added)]), int(begin.epoch), run))
        spans.sort()
        for one, other in pairwise(spans):
            undecided = any(loss.since <= one[0] <= loss.settled for loss in losses)
            if (one[1] > other[0] or one[2] >= other[2]) and not undecided:
                yield Violation("two holders", f"task {task_id}: (begin, last append, epoch, run) {one} and {other}")


def _check_watched(history: History, losses: Sequence[Loss]) -> Iterable[Violation]:
    for task_id, events in history.watched.items():
        seen = [event.entry for event in events]
        there = [entry_id for entry_id, _ in history.streams.get(task_id, [])]
        left_before_the_loss = events and events[-1].last and _may_be_lost(events[-1].at, losses)
        if seen != there and not left_before_the_loss:
            yield Violation("misread", f"task {task_id}: a watcher saw {seen}, the stream has {there}")


def _check_letters(history: History) -> Iterable[Violation]:
    letters = Counter(str(letter["id"]) for letter in history.dead if "id" in letter)
    failed = {task_id for task_id, record in history.records.items() if record.get("status") == "failed"}
    for task_id in failed - letters.keys():
        yield Violation("lost", f"task {task_id} failed and is not in {keys.DEAD}")
    for task_id, times in letters.items():
        if times > 1 or task_id not in failed:
            yield Violation(
                "duplicated", f"task {task_id} is {times} times in {keys.DEAD}, failed: {task_id in failed}"
            )
    malformed = sum("element" in letter for letter in history.dead)
    if malformed != history.malformed:
        kind = "lost" if malformed < history.malformed else "duplicated"
        yield Violation(kind, f"{history.malformed} malformed elements were pushed, {malformed} are in {keys.DEAD}")
