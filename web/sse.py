"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): items of the hub as frames."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from ag_ui.core import BaseEvent

from task_streams import keys
from task_streams.claims import check_id

from .ag_ui import Mapper
from .hub import Hub
from .models import cursor_of
from .replies import dumps
from .watcher import Item

RETRY_MS = 1000  # how long a browser waits before it connects again
PING_SECONDS = 15  # between two comments, so that proxies keep an idle connection
MAX_CURSOR_TASKS = 100  # tasks whose cursors fit into one id
MAX_POSITION_DIGITS = 15  # of a time in ms


def frame(data: Mapping[str, Any], event: str, entry_id: str | None = None) -> bytes:
    """Return one event. frame({"n": 1}, "progress", "17-1") -> b'id: 17-1\\nevent: progress\\ndata: {"n": 1}\\n\\n'"""
    head = "" if entry_id is None else f"id: {entry_id}\n"
    return f"{head}event: {event}\ndata: {dumps(data)}\n\n".encode()


def frame_of(item: Item) -> bytes:
    """Return an item's event, made once for all who watch it."""
    if item.frame is None:
        event = item.event
        entry_id = None if item.is_notice and event.name == "reset" else event.id
        item.frame = frame(data_of(item), name_of(item), entry_id)
    return item.frame


def name_of(item: Item) -> str:
    """Return the name under which an item is sent: `message`, where no browser would listen for its own.

    An entry that somebody added by hand may say anything, also `gap`, `reset` or `redis`, which are the server's words.
    """
    return item.event.name if item.is_notice or item.event.name in keys.EVENTS else "message"


def data_of(item: Item) -> dict[str, Any]:
    """Return what an item's event says; a field that a handler called `task` or `id` does not pass for ours."""
    ours = {"task": item.task_id, "id": item.event.id, "event": item.event.name}
    return {**ours, **item.event.fields, **ours}


# subtle: each makes its watcher when the first frame is asked for. A HEAD, and a client that has gone by then, ask for
# none, and a watcher that nobody iterates would stay for ever.


async def frames_of_task(hub: Hub, task_id: str, cursor: str) -> AsyncIterator[bytes]:
    """Yield the frames of one task: the id is the stream's entry id."""
    yield f"retry: {RETRY_MS}\n\n".encode()
    async for item in hub.watch({task_id: cursor}):
        yield frame_of(item) if isinstance(item, Item) else frame_of_redis(item)


async def frames_of_ag_ui(hub: Hub, task_id: str, cursor: str, mapper: Mapper | None = None) -> AsyncIterator[bytes]:
    """Yield one task's events in the AG-UI protocol (web/ag_ui.py), which needs those up to the cursor, too.

    One entry becomes several frames, and only the last has its id: a client that resumes gets all of an entry or none.
    """
    mapper = mapper or Mapper(task_id, task_id)
    async for event in hub.history(task_id, cursor):
        mapper.events(event)
    yield f"retry: {RETRY_MS}\n\n".encode() + _ag_ui(mapper.prelude(), None)
    async for item in hub.watch({task_id: cursor}):
        if isinstance(item, Item):
            entry_id = None if item.is_notice and item.event.name == "reset" else item.event.id
            yield _ag_ui(mapper.events(item.event, item.is_notice), entry_id)
        else:
            yield _ag_ui(mapper.redis(item), None)


def _ag_ui(events: list[BaseEvent], entry_id: str | None) -> bytes:
    frames = [f"data: {event.model_dump_json(by_alias=True, exclude_none=True)}\n\n" for event in events]
    if frames and entry_id is not None:
        frames[-1] = f"id: {entry_id}\n{frames[-1]}"
    return "".join(frames).encode()


async def frames_of_tasks(
    hub: Hub, cursors: dict[str, str], since: int | None = None, put_at: Mapping[str, float] | None = None
) -> AsyncIterator[bytes]:
    """Yield the frames of several tasks: the id holds a cursor for each of them that has not ended.

    With `since` also of the tasks that were put after that time (ms); then the id holds such a position, too, and a
    first one comes at once: who is cut off before any event goes on from there. `put_at` says of tasks that the client
    did not name when they were put (ms): where an id cannot hold all cursors, its position is before theirs.
    """
    watcher = hub.watch(cursors, since, put_at)
    first = ""
    if since is not None and "$" not in cursors.values():
        first = f"id: {join_cursors(cursors, since, watcher.put_at)}\n"
    yield f"retry: {RETRY_MS}\n{first}\n".encode()
    async for item in watcher:
        if not isinstance(item, Item):
            yield frame_of_redis(item)
            continue
        # subtle: the item's own id last. While a `gap` is sent, the watcher's cursor is past the event that follows it.
        cursors = {**watcher.cursors, item.task_id: item.event.id}
        position = None if since is None else watcher.position
        yield frame(data_of(item), name_of(item), join_cursors(cursors, position, watcher.put_at))


def frame_of_redis(is_up: bool) -> bytes:
    return frame({"redis": "up" if is_up else "down"}, "redis")


def join_cursors(
    cursors: Mapping[str, str], position: int | None = None, put_at: Mapping[str, float] | None = None
) -> str | None:
    """Return a position and cursors as one event id. join_cursors({"7": "17-1"}, 1700) -> '@1700,7=17-1'

    Where there are too many cursors: without a position None; else those of the tasks that were put first, and the
    position is before all others, which come again from their starts, as does what was put after them.
    """
    if position is None:
        if len(cursors) > MAX_CURSOR_TASKS:
            return None
        return ",".join(f"{task_id}={cursor}" for task_id, cursor in cursors.items())
    when = put_at or {}
    by_age = (
        sorted(cursors, key=lambda task_id: when.get(task_id, 0)) if len(cursors) > MAX_CURSOR_TASKS else [*cursors]
    )
    rest = by_age[MAX_CURSOR_TASKS:]
    # subtle: what has just ended, and was named by the client before, is in no need of a place
    position = min([position, *[int(when[task_id]) - 1 for task_id in rest if task_id in when][:1]])
    return ",".join([f"@{position}", *(f"{task_id}={cursors[task_id]}" for task_id in by_age[:MAX_CURSOR_TASKS])])


def split_cursors(text: str) -> tuple[dict[str, str], int | None]:
    """Return the cursors and the position in an event id of several tasks. Raises ValueError."""
    parts = text.split(",") if text else []
    position = None
    if parts and parts[0].startswith("@"):
        digits = parts.pop(0)[1:]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= MAX_POSITION_DIGITS):
            raise ValueError(f"not a position in an event id: {digits[:50]!r}")
        position = int(digits)
    if len(parts) > MAX_CURSOR_TASKS:
        raise ValueError(f"an event id of more than {MAX_CURSOR_TASKS} tasks")
    pairs = [part.rpartition("=") for part in parts]
    return {check_id(task_id): cursor_of(cursor) for task_id, _, cursor in pairs}, position
