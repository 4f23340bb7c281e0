"""A solution of part 5's exercise."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

Connect = Callable[[str], Iterable[str] | None]


def event_source(connect: Connect) -> Iterator[tuple[str, str]]:
    """Yield (event, data) of every event, once and in order, however often the connection is lost."""
    last = ""
    while (lines := connect(last)) is not None:
        fields: dict[str, str] = {}
        with suppress(ConnectionError):
            for line in lines:
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                    continue
                if "data" in fields:
                    last = fields.get("id", last)
                    yield fields.get("event", "message"), fields["data"]
                fields = {}
