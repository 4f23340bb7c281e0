"""Exercise of part 5: what the EventSource of a browser does, in Python.

Check:   python -m pytest tutorial/exercises/test_part5_event_source.py
"""

from collections.abc import Callable, Iterable, Iterator

# Given the last event id ("" at first): the lines of the answer, or None, for 204: nothing will come any more.
Connect = Callable[[str], Iterable[str] | None]


def event_source(connect: Connect) -> Iterator[tuple[str, str]]:
    """Yield (event, data) of every event, once and in order, however often the connection is lost.

    A line is `id: …`, `event: …` or `data: …`; an empty line ends an event; one that begins with ":" is a comment. When
    the lines end, or reading them raises ConnectionError, connect again with the id of the last event that was whole.
    """
    raise NotImplementedError("your code: a loop around connect(), and in it one over the lines")
    yield  # a function with a yield in it is a generator
