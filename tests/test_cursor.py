"""Cursor: what it says of a stream that was trimmed or rewritten, and that it says nothing of any other."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_streams.reader import START, Cursor, Event, order

MAX = f"{2**64 - 1}-{2**64 - 1}"


def read(cursor: Cursor, stream: list[str]) -> Iterator[str]:
    """Yield what a reader sees that reads a stream to its end: entry ids, and its notices as "gap 3" and "reset"."""
    for _ in range(len(stream) + 4):
        events = [Event(entry_id, "", {}) for entry_id in stream if order(entry_id) > order(cursor.id)]
        for told in cursor.take(events):
            yield told.id if told.name == "" else f"{told.name} {told.fields.get('missed', '')}".strip()
        if not events:
            if cursor.check_end(stream[-1] if stream else START) is None:
                return
            yield "reset"
    pytest.fail("it reads again and again")


@pytest.mark.parametrize(
    ("since", "stream", "expected"),
    [
        # nothing to say
        ("0", "", ""),
        ("0", "10-1 10-2 20-3", "10-1 10-2 20-3"),
        ("10-2", "10-1 10-2 20-3", "20-3"),
        ("20-3", "10-1 10-2 20-3", ""),
        ("10-2", "20-3 20-4", "20-3 20-4"),  # the cursor's own entry was trimmed
        # trimmed
        ("0", "20-4 20-5", "gap 3 20-4 20-5"),
        ("10-2", "20-4 30-8", "gap 1 20-4 gap 3 30-8"),
        ("15", "20-4 20-5", "20-4 20-5"),  # a time: nobody knows what was before it
        # rewritten
        ("30-3", "", "reset"),
        ("30-3", "10-1 10-2", "reset 10-1 10-2"),  # lower ids
        ("30-3", "40-1 40-2", "reset 40-1 40-2"),  # higher ids, lower seq
        ("30-3", "10-1 10-2 40-3 40-4", "reset 10-1 10-2 40-3 40-4"),  # a failover, and it has grown since
        ("30-3", "40-2", "reset gap 1 40-2"),  # … and was trimmed
        ("30", "20-1", "reset 20-1"),
        # somebody's own XADD
        ("0", "10-1 15-0 20-2", "10-1 15-0 20-2"),
        ("20-7", "30-0 30-1 30-2 40-8 50-0 50-1 60-9", "30-0 30-1 30-2 40-8 50-0 50-1 60-9"),  # some in a millisecond
        ("30-0", "30-1 30-2 40-8", "30-1 30-2 40-8"),
        ("20-7", "30-0 30-8 30-9 40-10", "30-0 30-8 30-9 40-10"),  # ours, in a millisecond that began with theirs
        ("20-7", "30-0", "30-0"),
        # strange ids: wrong for once, and right again behind them
        ("0", "15-0 15-1 20-1 20-2", "15-0 15-1 reset 15-0 15-1 20-1 20-2"),
        ("0", "10-1 10-2 15-1 20-3 20-4", "10-1 10-2 reset 10-1 10-2 15-1 20-3 20-4"),
        ("0", "10-1 15-99 20-2 20-3", "10-1 gap 97 15-99 reset 10-1 gap 97 15-99 20-2 20-3"),
        ("0", f"10-1 {2**64 - 1}-0", f"10-1 {2**64 - 1}-0"),
        ("0", f"10-1 {MAX}", f"10-1 gap {2**64 - 3} {MAX}"),
        (MAX, "10-1 10-2", "reset 10-1 10-2"),
        (MAX, MAX, ""),
    ],
)
def test_reader_is_told_of_gaps_and_resets(since: str, stream: str, expected: str) -> None:
    """From a cursor, through a stream, to its end."""
    assert " ".join(read(Cursor(since), stream.split())) == expected


def test_notices_say_where_to_go_on() -> None:
    """A gap has the id of the last entry before it, a reset that of the cursor: resumed there, it is told again."""
    cursor = Cursor("10-2")

    assert cursor.step("20-5") == Event("10-2", "gap", {"missed": 2})
    assert cursor.step("30-3") == Event("20-5", "reset", {"cursor": "20-5", "last": "30-3"})
    assert (cursor.id, cursor.seq) == (START, 0)
    assert cursor.check_end(START) is None


def test_stream_that_is_rewritten_twice_is_told_twice() -> None:
    """A reset silences only what it rereads."""
    cursor = Cursor("30-3")
    assert cursor.step("90-1") is not None
    assert list(read(cursor, ["10-1", "10-2"])) == ["10-1", "10-2"]  # it was rewritten again before it was reread

    assert list(read(cursor, ["40-1", "40-2"])) == ["reset", "40-1", "40-2"]
    assert list(read(cursor, ["50-1"])) == ["reset", "50-1"]
    assert list(read(cursor, [])) == ["reset"]
    assert list(read(cursor, ["5-1"])) == ["5-1"]


@st.composite
def histories(draw: st.DrawFn) -> list[str]:
    """A task's stream as its workers write it: epochs grow, seq counts, and now and then somebody uses XADD *."""
    epoch, seq, entry_ids = 1000, 0, []
    for who in draw(st.lists(st.sampled_from(["same attempt", "next attempt", "somebody"]), max_size=30)):
        if who == "somebody":
            epoch += 1
            entry_ids.append(f"{epoch}-0")
        if who != "same attempt":  # somebody's entry fences the attempt off
            epoch += draw(st.integers(1, 1000))
        if who != "somebody":
            seq += 1
            entry_ids.append(f"{epoch}-{seq}")
    return entry_ids


def is_ours(entry_id: str) -> bool:
    return not entry_id.endswith("-0")


@settings(deadline=None)  # the machine may be busy
@given(histories(), st.data())
def test_history_by_the_rules_has_no_false_notice(history: list[str], data: st.DataObject) -> None:
    """Wherever a reader is cut off and resumes, and whatever is trimmed meanwhile: no reset, and each gap is exact."""
    cursor, trimmed = Cursor(), 0
    after: int | None = 0  # the place behind the last entry that counts; None: resumed at somebody's own entry
    for written in sorted(data.draw(st.lists(st.integers(0, len(history)), max_size=5))):
        trimmed = data.draw(st.integers(trimmed, written))
        if data.draw(st.booleans()):
            after = after if is_ours(cursor.id) or cursor.id == START else None
            cursor = Cursor(cursor.id)
        for place in range(trimmed, written):
            if order(history[place]) <= order(cursor.id):
                continue
            missed = 0 if after is None else sum(map(is_ours, history[after:place]))
            notice = cursor.step(history[place])
            if is_ours(history[place]):
                assert (notice.name, notice.fields) == ("gap", {"missed": missed}) if missed else notice is None
                after = place + 1
            else:
                assert notice is None
            assert cursor.id == history[place]
        last = history[written - 1] if written > trimmed else cursor.id
        assert cursor.check_end(last) is None


numbers = st.one_of(st.integers(0, 9), st.sampled_from([2**53, 2**64 - 1]))
strange = st.lists(st.tuples(numbers, numbers), max_size=20, unique=True).map(
    lambda ids: [f"{ms}-{seq}" for ms, seq in sorted(ids) if (ms, seq) != (0, 0)]
)


@settings(deadline=None)
@given(st.tuples(numbers, numbers), strange)
def test_reading_ends_whatever_stands_in_a_stream(since: tuple[int, int], stream: list[str]) -> None:
    """There are no more resets than entries and one, and after the last comes every entry once, in order."""
    told = list(read(Cursor(f"{since[0]}-{since[1]}"), stream))

    assert told.count("reset") <= len(stream) + 1
    if "reset" in told:
        told, since = told[len(told) - told[::-1].index("reset") :], (0, 0)
    assert [one for one in told if "-" in one] == [entry_id for entry_id in stream if order(entry_id) > since]
