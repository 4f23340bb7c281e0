"""The API: tasks as JSON, and their events as they happen. /openapi.json describes it.

Lists and single tasks come from web/tasks.py. Its calls block, so FastAPI runs these functions in threads. Events come
from web/hub.py, in the event loop.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from ag_ui.core import RunAgentInput
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import BeforeValidator
from redis.exceptions import ConnectionError as LostConnection
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from task_streams import keys
from task_streams.reader import START, order

from . import models
from .ag_ui import Mapper, task_of
from .hub import Hub
from .models import PROBLEMS, EntryId, TaskId, none_if_empty
from .replies import Conflict, Json, JsonRoute
from .security import MAX_BODY_BYTES
from .sse import frames_of_ag_ui, frames_of_task, frames_of_tasks, split_cursors
from .tasks import Tasks

LIMIT, MOST_LIMIT = 50, 200  # tasks a page
MOST_TASKS = 100  # named in one request for events
GRACE_SECONDS = 2  # for a stream to end by itself when the server stops
NO_STORE = {"Cache-Control": "no-store"}
KNOWN: dict[int | str, dict[str, Any]] = {
    200: {"model": models.WholeTask, "description": "That Idempotency-Key came before: the task that it put"}
}
OVER: dict[int | str, dict[str, Any]] = {204: {"description": "Nothing more will come: the last event was received"}}

router = APIRouter(route_class=JsonRoute, responses=PROBLEMS, max_body_size=MAX_BODY_BYTES)


async def tasks_of(request: Request) -> Tasks:
    tasks: Tasks = request.app.state.tasks
    return tasks


async def hub_of(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


TheTasks = Annotated[Tasks, Depends(tasks_of)]
TheHub = Annotated[Hub, Depends(hub_of)]


# -- tasks ------------------------------------------------------------------------------------------------------


@router.get("/api/tasks", response_model=models.Page, response_class=Json)
def list_tasks(
    tasks: TheTasks,
    state: Annotated[models.Group | None, BeforeValidator(none_if_empty)] = None,
    q: Annotated[str, Query(description="The beginning of an id")] = "",
    before: Annotated[TaskId | None, BeforeValidator(none_if_empty)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LIMIT)] = LIMIT,
) -> Json:
    """List tasks, the newest first, a page at a time."""
    return Json(tasks.page(state, q, before, limit), headers=NO_STORE)


@router.post("/api/tasks", response_model=models.WholeTask, response_class=Json, status_code=201, responses=KNOWN)
def put_task(
    new: models.NewTask,
    tasks: TheTasks,
    idempotency_key: Annotated[
        str | None,
        Header(pattern=r"^[\x21-\x7e][\x20-\x7e]{0,254}$", description="Sent again with the same key, it is one task"),
    ] = None,
) -> Json:
    """Put a task."""
    try:
        task, is_new = tasks.put({"type": new.type, "payload": new.payload}, idempotency_key)
    except (ValueError, TypeError) as error:  # too large, or nested too deep
        raise HTTPException(422, str(error)) from error
    return _located(task, 201 if is_new else 200)


@router.get("/api/tasks/{task_id}", response_model=models.WholeTask, response_class=Json)
def get_task(task_id: TaskId, tasks: TheTasks) -> Json:
    """Return all that is known of one task."""
    return Json(tasks.get(task_id), headers=NO_STORE)


@router.post("/api/tasks/{task_id}/cancel", response_model=models.Cancelled, response_class=Json, status_code=202)
def cancel_task(task_id: TaskId, tasks: TheTasks, how: models.Cancellation = models.CANCELLATION) -> Json:
    """Cancel a task."""
    return Json({"outcome": tasks.cancel(task_id, how.reason)}, 202)


@router.post("/api/tasks/{task_id}/answer", response_model=models.Answered, response_class=Json)
def answer_task(task_id: TaskId, tasks: TheTasks, how: models.Answer) -> Json:
    """Answer the question of a task. The first answer counts, and the task goes on."""
    return Json({"answer": tasks.answer(task_id, how)})


@router.post("/api/tasks/{task_id}/tell", status_code=204)
def tell_task(task_id: TaskId, tasks: TheTasks, message: models.Message) -> Response:
    """Put a message into the inbox of a task that has not ended. An agent reads it at its next step."""
    tasks.tell(task_id, message)
    return Response(status_code=204)


@router.post("/api/tasks/{task_id}/retry", response_model=models.WholeTask, response_class=Json, status_code=201)
def retry_task(task_id: TaskId, tasks: TheTasks) -> Json:
    """Put a failed task again, as a new one. The body is ignored."""
    return _located(tasks.retry(task_id), 201)


@router.get("/api/samples", response_model=models.Samples, response_class=Json)
def list_samples() -> Json:
    """List the sample files that a task may name."""
    return Json({"samples": Tasks.samples()})


def _located(task: models.WholeTask, status: int) -> Json:
    return Json(task, status, headers={"Location": f"/api/tasks/{task.id}"})


# -- events -----------------------------------------------------------------------------------------------------

# sse-starlette and not fastapi.sse, which would encode each event again for each watcher, has no way to answer HEAD
# without a stream, and fixes the comments' interval and `Cache-Control: no-cache`.


class EventStream(EventSourceResponse):
    """Server-sent events: `retry`, then one event an entry, and a comment every 15 s."""

    media_type = "text/event-stream"


LastEventId = Annotated[
    EntryId | None, BeforeValidator(none_if_empty), Header(alias="Last-Event-ID", description="The last id received")
]
Since = Annotated[EntryId | None, BeforeValidator(none_if_empty), Query(description="The same, as a parameter")]
OPAQUE = "The id of the last event received: opaque"


@router.get("/api/tasks/{task_id}/events", response_class=EventStream, responses=OVER)
async def watch_task(
    request: Request,
    task_id: TaskId,
    hub: TheHub,
    tasks: TheTasks,
    last_event_id: LastEventId = None,
    since: Since = None,
    format: Annotated[Literal["ag-ui"] | None, Query(description="Events of the AG-UI protocol")] = None,
) -> Response:
    """Watch one task: its events so far and those that come, until it ends.

    The id of each event is its entry id. Send the last one as `Last-Event-ID` or `since`, and you miss nothing. "0":
    from the start; "$": only what comes.
    """
    cursor = last_event_id or since or "0"
    if not await hub.ask("exists", keys.stream(task_id)):
        await run_in_threadpool(tasks.get, task_id)  # 404, unless it waits
    if await is_over(hub, task_id, cursor):
        return Response(status_code=204)
    if cursor == "$":  # resolved once: the AG-UI frames need it twice
        cursor, _ = await hub.newest(task_id)
    frames = frames_of_ag_ui if format else frames_of_task
    return event_source(request, frames(hub, task_id, cursor))


@router.get("/api/events", response_class=EventStream, responses=OVER)
async def watch_tasks(
    request: Request,
    hub: TheHub,
    task: Annotated[list[TaskId], Query(max_length=MOST_TASKS, description="Once for each task; none: all")] = [],  # noqa: B006
    last_event_id: Annotated[str, Header(alias="Last-Event-ID", description=OPAQUE)] = "",
    since: Annotated[str, Query(description="The same, as a parameter")] = "",
) -> Response:
    """Watch several tasks, or all that have not ended and those that come.

    Without `task`, an id holds a position among the tasks that were put, and a cursor for each task that has not ended.
    A client that resumes from it misses nothing: neither a task that was put and ended meanwhile, nor the end of one
    that ran. An id has room for 100 cursors. If more than 100 tasks run at once, the rest come again from their starts
    (know an event by `task` and `id`). Of those that ended meanwhile and were put before, GET /api/tasks/{task_id}
    tells how they ended. The list of the tasks that were put holds the last 10,000.
    """
    last = last_event_id or since
    try:
        cursors, position = split_cursors(last)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if task:  # those that a cursor leaves out have ended
        chosen = {one: cursors.get(one, "0") for one in task if not last or one in cursors}
        for one, cursor in chosen.items():
            if not await is_over(hub, one, cursor):
                return event_source(request, frames_of_tasks(hub, chosen))
        return Response(status_code=204)
    begin = hub.position if position is None else position
    if begin is None:
        raise LostConnection("Redis has not been asked yet")
    put_at: dict[str, float] = {}
    if position is None:  # a new client
        put_at = dict(await hub.ask("zrange", keys.UNFINISHED, "-inf", begin, byscore=True, withscores=True))
        cursors = {**dict.fromkeys(put_at, "0"), **cursors}
    return event_source(request, frames_of_tasks(hub, cursors, begin, put_at))


@router.post("/ag-ui", response_class=EventStream)
async def run_agent(
    request: Request, run: RunAgentInput, hub: TheHub, tasks: TheTasks, last_event_id: LastEventId = None
) -> Response:
    """Put a task for a run of the AG-UI protocol, and stream its events.

    `forwardedProps` may be {"type", "payload"}, as for POST /api/tasks. Otherwise the task has the type "chat", and its
    payload is the input. The same threadId and runId are the same task: a client that lost its connection gets the
    events again, or only those after its `Last-Event-ID`. The task goes on even if nobody listens.
    """
    if run.resume:
        raise Conflict("there is no open question that `resume` could answer")
    try:
        task_id, data = task_of(run)
        is_new = await run_in_threadpool(tasks.put_run, task_id, data)
    except (ValueError, TypeError) as error:
        raise HTTPException(422, str(error)) from error
    if not is_new and await hub.has_expired(task_id):
        raise HTTPException(410, f"the events of that run have expired; GET /api/tasks/{task_id} tells how it ended")
    mapper = Mapper(run.thread_id, run.run_id)
    return event_source(request, frames_of_ag_ui(hub, task_id, last_event_id or "0", mapper))


async def is_over(hub: Hub, task_id: str, cursor: str) -> bool:
    """Say whether nothing will come after a cursor. Then the answer is 204, and a browser does not connect again."""
    last, entry = await hub.newest(task_id)
    if last == START:  # not written yet, or expired
        return await hub.has_expired(task_id)
    return entry.get("event") in keys.TERMINAL and (cursor == "$" or order(cursor) == order(last))


def event_source(request: Request, frames: AsyncIterator[bytes]) -> Response:
    return EventStream(frames, ping=request.app.state.ping_seconds, shutdown_grace_period=GRACE_SECONDS)
