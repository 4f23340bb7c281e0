"""The checker itself: in a good history it finds nothing, in a bad one what is bad."""

from copy import deepcopy
from typing import Any

import pytest
from attempts import attempts, popped, run
from history import History, Loss, Put, Seen, Step, check

from task_streams import TaskQueue
from task_streams import keys as names

Entry = tuple[str, dict[str, Any]]


def event(epoch: int, seq: int, name: str, mark: str = "", **fields: Any) -> Entry:
    return f"{epoch}-{seq}", {"event": name, **({"mark": mark} if mark else {}), **fields}


def added(epoch: int, at: float, entry: str, mark: str) -> Step:
    asked = at - 0.1
    return Step("added", "1", epoch // 1000, f"run {epoch}", at, str(epoch), "t1", asked=asked, entry=entry, mark=mark)


def begun(epoch: int, at: float, run: str = "") -> Step:
    return Step("begin", "1", epoch // 1000, run or f"run {epoch}", at, str(epoch), "t1")


def good() -> History:
    """One task: its first worker was killed after one event; the second completed it. And a watcher, and a failure."""
    return History(
        puts=[Put("1", "t1", 10.0), Put("2", "t2", 10.0)],
        steps=[
            begun(1000, 11.0),
            added(1000, 12.0, "1000-2", "t1.a"),
            begun(2000, 21.0),
            added(2000, 22.0, "2000-5", "t1.b"),
            added(2000, 22.5, "2000-6", "t1.c"),
            Step("end", "1", 2, "run 2000", 23.0, "2000", "t1"),
        ],
        malformed=1,
        streams={
            "1": [
                event(1000, 1, "started", attempt=1),
                event(1000, 2, "progress", "t1.a"),
                event(2000, 3, "worker_lost"),
                event(2000, 4, "started", attempt=2),
                event(2000, 5, "progress", "t1.b"),
                event(2000, 6, "progress", "t1.c"),
                event(2000, 7, "completed"),
            ],
            "2": [event(1000, 1, "started", attempt=1), event(1000, 2, "error"), event(1000, 3, "failed")],
        },
        records={
            "1": {"status": "completed", "data": '{"mark": "t1"}', "result": '"t1"'},
            "2": {"status": "failed", "data": '{"mark": "t2"}'},
        },
        dead=[{"id": "2", "reason": "as told"}, {"reason": "not JSON", "element": "nonsense"}],
        finished=[("1", "completed"), ("2", "failed")],
        watched={"2": [Seen(f"1000-{n}", 25.0, n == 3) for n in (1, 2, 3)]},
    )


def drop(place: int) -> Any:
    return lambda history: history.streams["1"].pop(place)


def insert(place: int, *entry: Any) -> Any:
    """Put one event more into the stream, and count on behind it."""

    def spoil(history: History) -> None:
        stream = history.streams["1"]
        stream.insert(place, event(*entry))
        stream[:] = [(f"{entry_id.split('-')[0]}-{n}", fields) for n, (entry_id, fields) in enumerate(stream, 1)]

    return spoil


def append(*entry: Any, **fields: Any) -> Any:
    return lambda history: history.streams["1"].append(event(*entry, **fields))


def foreign(place: int, entry_id: str, name: str) -> Any:
    def spoil(history: History) -> None:
        history.streams["1"].insert(place, (entry_id, {"event": name}))
        history.foreign.add(("1", entry_id))

    return spoil


def attempts_mixed(history: History) -> None:
    history.streams["1"][0][1]["attempt"], history.streams["1"][3][1]["attempt"] = 2, 1


def acknowledged_out_of_order(history: History) -> None:
    history.steps[3], history.steps[4] = history.steps[4], history.steps[3]


def another_holder_appends_late(history: History) -> None:
    history.steps[1] = added(1000, 22.0, "1000-2", "t1.a")


def lose_the_task(history: History) -> None:
    del history.streams["1"], history.records["1"], history.finished[0]


CASES = [
    ("strayed", insert(5, 2000, 6, "progress", "t2.x")),
    ("strayed", lambda history: history.records["1"].update(result='"t2"')),
    ("lost", lose_the_task),
    ("lost", drop(6)),
    ("lost", drop(4)),
    ("lost", lambda history: history.dead.pop(0)),
    ("lost", lambda history: history.dead.pop(1)),
    ("lost", lambda history: history.finished.pop(0)),
    ("lost", lambda history: history.records["1"].update(data='{"mark": "t9"}')),
    ("duplicated", drop(3)),
    ("duplicated", insert(6, 2000, 7, "progress", "t1.c")),
    ("duplicated", lambda history: history.steps.append(begun(3000, 30.0))),
    ("duplicated", lambda history: history.puts.append(Put("1", "t9", 11.0))),
    ("duplicated", lambda history: history.finished.append(("1", "completed"))),
    ("duplicated", lambda history: history.dead.append({"id": "2"})),
    ("duplicated", lambda history: history.dead.append({"reason": "not JSON", "element": "nonsense"})),
    ("disordered", attempts_mixed),
    ("disordered", acknowledged_out_of_order),
    ("two holders", another_holder_appends_late),
    ("two holders", lambda history: history.steps.append(begun(2000, 30.0))),
    ("two writers", lambda history: history.steps.append(begun(2000, 30.0, "run 3000"))),
    ("two writers", lambda history: history.steps.insert(3, added(2000, 21.5, "1000-2", "t1.a"))),
    ("two writers", insert(4, 2000, 5, "started")),
    ("two writers", insert(2, 1500, 3, "progress", "t1.x")),
    ("two ends", append(2000, 8, "completed")),
    ("two ends", append(2000, 8, "progress", "t1.d")),
    ("left over", lambda history: history.left_over.append("leased: 1")),
    ("left over", lambda history: history.records["1"].update(status="running")),
    ("misread", lambda history: history.watched["2"].pop(1)),
    ("misread", lambda history: history.watched["2"].append(Seen("1000-3", 26.0, True))),
    ("misread", lambda history: history.watched["2"].reverse()),
]


@pytest.mark.parametrize("spoil", [foreign(2, "1500-0", "hello"), foreign(7, "2500-0", "hello")])
def test_checker_lets_foreign_entries_stand_anywhere(spoil: Any) -> None:
    """Between ours, and behind the end."""
    history = good()
    spoil(history)

    assert check(history) == []


def test_checker_finds_nothing_in_a_good_history() -> None:
    """A task that was taken over and one that failed are no violations."""
    assert check(good()) == []


@pytest.mark.parametrize(("kind", "spoil"), CASES)
def test_checker_finds_what_is_bad(kind: str, spoil: Any) -> None:
    """Each way to break a promise is found, and named."""
    history = deepcopy(good())
    spoil(history)

    found = check(history)

    assert kind in {violation.kind for violation in found}, found


def test_checker_lets_a_worker_wake_up_that_adds_nothing() -> None:
    """The first attempt begins after the second one, as where it was frozen before its first line; it adds no event."""
    late = begun(1000, 21.5)
    history = good()
    history.steps[:2] = [late]
    with_event = good()
    with_event.steps[0] = late

    assert check(history) == []
    assert {violation.kind for violation in check(with_event)} == {"two holders"}


def test_loss_excuses_only_the_promises_of_its_span() -> None:
    """A task and an event that were promised within the span may be gone; a second before, they may not."""
    history = good()
    lose_the_task(history)

    excused = check(history, [Loss(since=9.5, until=22.6, settled=30.0)])
    not_excused = check(history, [Loss(since=10.5, until=22.6, settled=30.0)])

    assert excused == []
    assert {violation.kind for violation in not_excused} == {"lost"}


def test_loss_excuses_two_minds_about_a_lease_until_it_settles() -> None:
    """If the server forgot a claim, two runs may overlap; later they may not."""
    history = good()
    another_holder_appends_late(history)

    assert check(history, [Loss(since=10.0, until=10.5, settled=21.5)]) == []
    assert check(history, [Loss(since=10.0, until=10.5, settled=10.8)]) != []


def test_history_reads_what_a_server_holds(valkey: Any) -> None:
    """A task that is under way: it is leased and owed, and has not ended."""
    client = valkey.client()
    task = TaskQueue(client).put({"mark": "t1"})

    async def begin() -> None:
        async with attempts(valkey.url) as worker:
            _, log = await worker.claim(popped(client))
            await log.add("progress", mark="t1.a")

    run(begin)
    history = History(puts=[Put(task.id, "t1", 1.0)]).read_server(client)

    assert [fields.get("mark") for _, fields in history.streams[task.id]] == [None, "t1.a"]
    assert history.records[task.id]["status"] == "running"
    assert {what.split(":")[0] for what in history.left_over} == {"leased", "owed", "without a TTL"}
    assert names.record(task.id) in " ".join(history.left_over)
    assert {violation.kind for violation in check(history)} == {"lost", "left over"}
