"""The check of part 5's exercise: lines as a server would send them, without a server."""

from collections.abc import Iterable, Iterator

from part5_event_source import event_source

STARTED = ["id: 10-1", "event: started", 'data: {"n": 1}', ""]
PROGRESS = ["id: 10-2", "event: progress", 'data: {"n": 2}', ""]
COMPLETED = ["id: 10-3", "event: completed", 'data: {"n": 3}', ""]
ALL = [("started", '{"n": 1}'), ("progress", '{"n": 2}'), ("completed", '{"n": 3}')]


class Server:
    """Gives one answer after the other, then 204; keeps the ids that it was asked with."""

    def __init__(self, *answers: Iterable[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def connect(self, last_event_id: str) -> Iterable[str] | None:
        self.asked.append(last_event_id)
        return self.answers.pop(0) if self.answers else None


def test_events_come_until_the_server_says_204() -> None:
    """All events come, and then it asks once more, with the last id, and ends."""
    server = Server(["retry: 1000", "", *STARTED, ": ping", "", *PROGRESS, *COMPLETED])

    assert list(event_source(server.connect)) == ALL
    assert server.asked == ["", "10-3"]


def test_an_event_that_was_cut_off_comes_whole() -> None:
    """Half an event does not count, and neither does its id: it is asked for again."""
    server = Server([*STARTED, *PROGRESS[:2]], [*PROGRESS, *COMPLETED])

    assert list(event_source(server.connect)) == ALL
    assert server.asked == ["", "10-1", "10-3"]


def test_a_lost_connection_loses_nothing() -> None:
    """An error while reading is a connection to make again, from the last id on."""

    def lost() -> Iterator[str]:
        yield from STARTED
        raise ConnectionResetError("as told")

    server = Server(lost(), [*PROGRESS, *COMPLETED])

    assert list(event_source(server.connect)) == ALL
    assert server.asked == ["", "10-1", "10-3"]
