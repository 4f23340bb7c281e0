"""The checker itself: in a good history it finds nothing, in a bad one what is bad."""

from copy import deepcopy
from typing import Any

import pytest
from history import History, Loss, Put, Seen, Step, check

from task_streams import TaskLog, TaskQueue
from task_streams import keys as names


def event(seq: int, name: str, attempt: int, mark: str = "") -> tuple[str, dict[str, Any]]:
    fields = {"event": name, "attempt": attempt, "seq": seq}
    return f"1000-{seq}", {**fields, "mark": mark} if mark else fields


def good() -> History:
    """One task: its first worker was killed after one event; the second completed it. And a watcher, and a failure."""
    return History(
        puts=[Put("1", "t1", 10.0), Put("2", "t2", 10.0)],
        steps=[
            Step("begin", "1", 1, "run 100", 11.0, "t1"),
            Step("added", "1", 1, "run 100", 12.0, "t1", asked=11.9, entry="1000-2", mark="t1.a"),
            Step("begin", "1", 2, "run 200", 21.0, "t1"),
            Step("added", "1", 2, "run 200", 22.0, "t1", asked=21.9, entry="1000-5", mark="t1.b"),
            Step("added", "1", 2, "run 200", 22.5, "t1", asked=22.4, entry="1000-6", mark="t1.c"),
            Step("end", "1", 2, "run 200", 23.0, "t1"),
        ],
        malformed=1,
        streams={
            "1": [
                event(1, "started", 1),
                event(2, "progress", 1, "t1.a"),
                event(3, "worker_lost", 2),
                event(4, "started", 2),
                event(5, "progress", 2, "t1.b"),
                event(6, "progress", 2, "t1.c"),
                event(7, "completed", 2),
            ],
            "2": [event(1, "started", 1), event(2, "error", 1), event(3, "failed", 1)],
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


def renumber(history: History) -> None:
    history.streams["1"] = [(f"1000-{n}", {**f, "seq": n}) for n, (_, f) in enumerate(history.streams["1"], 1)]


def append_after_end(history: History) -> None:
    history.streams["1"].append(event(8, "progress", 2, "t1.d"))


def end_twice(history: History) -> None:
    history.streams["1"].append(event(8, "completed", 2))


def event_twice(history: History) -> None:
    history.streams["1"].insert(6, event(7, "progress", 2, "t1.c"))
    renumber(history)


def attempts_mixed(history: History) -> None:
    history.streams["1"][2][1]["attempt"], history.streams["1"][1][1]["attempt"] = 1, 2


def start_twice(history: History) -> None:
    history.streams["1"].insert(4, event(5, "started", 2))
    renumber(history)


def acknowledged_out_of_order(history: History) -> None:
    history.steps[3], history.steps[4] = history.steps[4], history.steps[3]


def another_holder_appends_late(history: History) -> None:
    history.steps[1] = Step("added", "1", 1, "run 100", 22.0, "t1", asked=21.5, entry="1000-2", mark="t1.a")


def same_attempt_twice(history: History) -> None:
    history.steps.append(Step("begin", "1", 2, "run 300", 30.0, "t1"))


def run_after_the_end(history: History) -> None:
    history.steps.append(Step("begin", "1", 3, "run 300", 30.0, "t1"))


def lose_the_task(history: History) -> None:
    del history.streams["1"], history.records["1"], history.finished[0]


def id_given_twice(history: History) -> None:
    history.puts.append(Put("1", "t9", 11.0))


def another_tasks_data(history: History) -> None:
    history.records["1"]["data"] = '{"mark": "t9"}'


def events_of_another_task(history: History) -> None:
    history.streams["1"].insert(5, event(6, "progress", 2, "t2.x"))
    renumber(history)


CASES = [
    ("strayed", events_of_another_task),
    ("strayed", lambda history: history.records["1"].update(result='"t2"')),
    ("lost", lose_the_task),
    ("lost", drop(6)),
    ("lost", drop(4)),
    ("lost", lambda history: history.dead.pop(0)),
    ("lost", lambda history: history.dead.pop(1)),
    ("lost", lambda history: history.finished.pop(0)),
    ("lost", another_tasks_data),
    ("duplicated", drop(3)),
    ("duplicated", event_twice),
    ("duplicated", start_twice),
    ("duplicated", run_after_the_end),
    ("duplicated", id_given_twice),
    ("duplicated", lambda history: history.finished.append(("1", "completed"))),
    ("duplicated", lambda history: history.dead.append({"id": "2"})),
    ("duplicated", lambda history: history.dead.append({"reason": "not JSON", "element": "nonsense"})),
    ("disordered", attempts_mixed),
    ("disordered", acknowledged_out_of_order),
    ("two holders", another_holder_appends_late),
    ("two holders", same_attempt_twice),
    ("two holders", lambda history: history.steps.append(Step("begin", "1", 2, "run 200", 30.0, "t1"))),
    ("two ends", end_twice),
    ("two ends", append_after_end),
    ("left over", lambda history: history.left_over.append("leased: 1")),
    ("left over", lambda history: history.records["1"].update(status="running")),
    ("misread", lambda history: history.watched["2"].pop(1)),
    ("misread", lambda history: history.watched["2"].append(Seen("1000-3", 26.0, True))),
    ("misread", lambda history: history.watched["2"].reverse()),
]


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
    late = Step("begin", "1", 1, "run 100", 21.5, "t1")
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
    """Where the server forgot a claim, the same attempt may be made twice; later it may not."""
    history = good()
    same_attempt_twice(history)

    assert check(history, [Loss(since=20.0, until=20.5, settled=21.5)]) == []
    assert check(history, [Loss(since=19.0, until=20.0, settled=20.5)]) != []


def test_history_reads_what_a_server_holds(valkey: Any) -> None:
    """A task that was put and nothing more: it is waiting and owed, and has not ended."""
    client = valkey.client()
    task = TaskQueue(client).put({"mark": "t1"})
    TaskLog(task.id, client).add("progress", mark="t1.a")

    history = History(puts=[Put(task.id, "t1", 1.0)]).read_server(client)

    assert [fields["mark"] for _, fields in history.streams[task.id]] == ["t1.a"]
    assert history.records[task.id]["status"] == "waiting"
    assert {what.split(":")[0] for what in history.left_over} == {"waiting", "owed", "without a TTL"}
    assert names.record(task.id) in " ".join(history.left_over)
    assert {violation.kind for violation in check(history)} == {"lost", "left over"}
