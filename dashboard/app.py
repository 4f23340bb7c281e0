"""The dashboard's HTTP interface: pages, tasks as JSON, events as they happen, health and metrics.

Where data comes from: dashboard/tasks.py (lists and single tasks, in threads), dashboard/hub.py (events). What it
looks like: dashboard/static/. Who may: dashboard/security.py. The interface is described in dashboard/openapi.json.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisClusterException, RedisError
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ailf.messaging.redis import Client, RedisMessagingError, from_json, reason_of
from task_streams import NoSuchTask, TaskQueue, keys
from task_streams.claims import check_id
from task_streams.reader import order

from .hub import Hub
from .metrics import Metrics
from .problems import Json, Problem, problem
from .security import COOKIE, HEADERS, Failures, Guard, address_of, is_token, session_of
from .sse import PING_SECONDS, cursor_of, frames_of_ag_ui, frames_of_task, frames_of_tasks, split_cursors
from .tasks import STATES, Conflict, Tasks

HERE = Path(__file__).parent
LIMIT, MOST_LIMIT = 50, 200  # tasks a page
MOST_TASKS = 100  # named in one request for events
SESSION_SECONDS = 7 * 24 * 3600  # how long a login lasts
MAX_REASON_CHARS = 200
GRACE_SECONDS = 2  # for a stream to end by itself when the server stops
_KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")  # an Idempotency-Key

Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    queue: TaskQueue,
    connect: Callable[[], Awaitable[Client]],
    hosts: frozenset[str],
    token: str | None = None,
    ping_seconds: int = PING_SECONDS,
) -> Starlette:
    """Return the app. `connect` gives the redis.asyncio client for events, in the app's own event loop."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aclosing(await connect()) as redis, Hub(redis) as hub:
            app.state.hub, app.state.metrics = hub, Metrics(queue, hub)
            yield

    routes = [
        Route("/", page("index.html")),
        Route("/tasks/{task_id}", page("task.html")),
        Route("/login", login, methods=["GET", "POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
        Route("/api/tasks", all_tasks, methods=["GET", "POST"]),
        Route("/api/tasks/{task_id}", get_task),
        Route("/api/tasks/{task_id}/cancel", cancel_task, methods=["POST"]),
        Route("/api/tasks/{task_id}/retry", retry_task, methods=["POST"]),
        Route("/api/tasks/{task_id}/events", events_of_task),
        Route("/api/events", events_of_tasks),
        Route("/api/samples", samples),
        Route("/api/session", session),
        Route("/openapi.json", openapi),
        Route("/healthz", health),
        Route("/metrics", metrics),
    ]
    handlers: dict[Any, Any] = {
        HTTPException: lambda request, error: problem(error.status_code, error.detail, error.headers),
        Problem: lambda request, error: problem(error.status, error.detail),
        NoSuchTask: lambda request, error: problem(404, str(error)),
        Conflict: lambda request, error: problem(409, str(error)),
        RedisError: unavailable,
        RedisClusterException: unavailable,
        RedisMessagingError: unavailable,
        Exception: failed,
    }
    failures = Failures()
    guard = Middleware(Guard, hosts=hosts, token=token, failures=failures)
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[guard], lifespan=lifespan)
    app.router.redirect_slashes = False  # a path with a slash more is another path, and has nothing
    app.state.tasks, app.state.token, app.state.failures = Tasks(queue), token, failures
    app.state.ping_seconds = ping_seconds
    return app


def unavailable(_request: Request, error: Exception) -> Response:
    return problem(
        503, f"Redis does not serve ({reason_of(error.__cause__ or error)}); try again", {"Retry-After": "1"}
    )


def failed(_request: Request, _error: Exception) -> Response:
    """Answer for what nobody foresaw; the traceback goes to the log. Starlette sends this from outside the Guard."""
    return problem(500, "the server failed; its log says why", HEADERS)


# -- pages ------------------------------------------------------------------------------------------------------


def page(name: str) -> Handler:
    async def answer(_request: Request) -> Response:
        return FileResponse(HERE / "static" / name, headers={"Cache-Control": "no-cache"})

    return answer


async def login(request: Request) -> Response:
    token = request.app.state.token
    if token is None:
        return RedirectResponse("/", 303)
    if request.method != "POST":
        return await page("login.html")(request)
    try:
        form = parse_qs((await request.body()).decode(errors="replace"), max_num_fields=10)
    except ValueError as error:
        raise Problem(400, "the form has a token, and nothing else") from error
    failures: Failures = request.app.state.failures
    if too_many := failures.refusal(address_of(request)):
        return too_many
    if not is_token(form.get("token", [""])[0].strip(), token):
        failures.add(address_of(request))
        return RedirectResponse("/login?failed=1", 303)
    response = RedirectResponse("/", 303)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, session_of(token), SESSION_SECONDS, httponly=True, samesite="strict", secure=secure)
    return response


# -- tasks ------------------------------------------------------------------------------------------------------


async def all_tasks(request: Request) -> Response:
    return await (put_task if request.method == "POST" else list_tasks)(request)


async def list_tasks(request: Request) -> Response:
    query = request.query_params
    state = query.get("state") or None
    if state is not None and state not in STATES:
        raise Problem(400, f"state must be one of {', '.join(STATES)}, not {state[:50]!r}")
    limit = query.get("limit", str(LIMIT))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 10 and 1 <= int(limit) <= MOST_LIMIT):
        raise Problem(400, f"limit must be between 1 and {MOST_LIMIT}, not {limit[:50]!r}")
    before = task_id_of(query["before"]) if query.get("before") else None
    tasks: Tasks = request.app.state.tasks
    found = await run_in_threadpool(tasks.page, state, query.get("q", ""), before, int(limit))
    return Json(found, headers={"Cache-Control": "no-store"})


async def put_task(request: Request) -> Response:
    body = await json_body(request)
    if not isinstance(body.get("type"), str) or not body["type"]:
        raise Problem(422, 'a task is {"type": "…", "payload": …}, and its type is text')
    if unknown := body.keys() - {"type", "payload"}:
        raise Problem(422, f"a task has a type and a payload; unknown: {', '.join(sorted(unknown))[:200]}")
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise Problem(400, "an Idempotency-Key has 1 to 255 printable ASCII characters")
    data = {"type": body["type"], "payload": body.get("payload", {})}
    tasks: Tasks = request.app.state.tasks
    try:
        task, is_new = await run_in_threadpool(tasks.put, data, key)
    except (ValueError, TypeError) as error:  # too large, or not JSON
        raise Problem(422, str(error)) from error
    return Json(task, 201 if is_new else 200, headers={"Location": f"/api/tasks/{task['id']}"})


async def get_task(request: Request) -> Response:
    tasks: Tasks = request.app.state.tasks
    task = await run_in_threadpool(tasks.get, task_id_of(request.path_params["task_id"]))
    return Json(task, headers={"Cache-Control": "no-store"})


async def cancel_task(request: Request) -> Response:
    body = await json_body(request)
    reason = body.get("reason", "cancelled in the dashboard")
    if not isinstance(reason, str) or not reason or len(reason) > MAX_REASON_CHARS:
        raise Problem(422, f"reason must be text of 1 to {MAX_REASON_CHARS} characters")
    tasks: Tasks = request.app.state.tasks
    reason = reason.encode(errors="replace").decode()  # Redis takes UTF-8, which has no lone surrogates
    outcome = await run_in_threadpool(tasks.cancel, task_id_of(request.path_params["task_id"]), reason)
    return Json({"outcome": outcome}, 202)


async def retry_task(request: Request) -> Response:
    tasks: Tasks = request.app.state.tasks
    task = await run_in_threadpool(tasks.retry, task_id_of(request.path_params["task_id"]))
    return Json(task, 201, headers={"Location": f"/api/tasks/{task['id']}"})


async def samples(_request: Request) -> Response:
    return Json({"samples": await run_in_threadpool(Tasks.samples)})


def task_id_of(text: str) -> str:
    """Return a task's id from a URL; 404 where it cannot be one."""
    try:
        return check_id(text)
    except ValueError as error:
        raise Problem(404, str(error)) from error


async def json_body(request: Request) -> dict[str, Any]:
    """Return the body's JSON object; {} where there is no body."""
    body = await request.body()
    if not body:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "the body must be application/json")
    try:
        value = from_json(body.decode())
    except RecursionError as error:
        raise Problem(400, "the body is nested too deep") from error
    except ValueError as error:  # not UTF-8, too
        raise Problem(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem(422, "the body must be a JSON object")
    return value


# -- events -----------------------------------------------------------------------------------------------------


async def events_of_task(request: Request) -> Response:
    hub: Hub = request.app.state.hub
    task_id = task_id_of(request.path_params["task_id"])
    try:
        cursor = cursor_of(request.headers.get("last-event-id") or request.query_params.get("since") or "0")
    except ValueError as error:
        raise Problem(400, str(error)) from error
    if request.query_params.get("format", "ag-ui") != "ag-ui":
        raise Problem(400, "format must be ag-ui, or left out")
    if not await hub.redis.exists(keys.stream(task_id)):
        await get_task(request)  # 404, unless it waits
    if await is_over(hub, task_id, cursor):
        return Response(status_code=204)
    if cursor == "$":  # resolved once: the AG-UI frames need it twice
        newest = await hub.redis.xrevrange(keys.stream(task_id), count=1)
        cursor = newest[0][0] if newest else "0-0"
    of = frames_of_ag_ui if request.query_params.get("format") else frames_of_task
    return event_source(request, of(hub, task_id, cursor))


async def events_of_tasks(request: Request) -> Response:
    hub: Hub = request.app.state.hub
    named = [task_id_of(task_id) for task_id in request.query_params.getlist("task")]
    if len(named) > MOST_TASKS:
        raise Problem(400, f"name {MOST_TASKS} tasks at most, or none for all")
    last = request.headers.get("last-event-id") or request.query_params.get("since") or ""
    try:
        cursors, position = split_cursors(last)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    if named:  # those that a cursor leaves out have ended
        chosen = {task_id: cursors.get(task_id, "0") for task_id in named if not last or task_id in cursors}
        for task_id, cursor in chosen.items():
            if not await is_over(hub, task_id, cursor):
                return event_source(request, frames_of_tasks(hub, chosen))
        return Response(status_code=204)
    since = hub.position if position is None else position
    if since is None:
        raise LostConnection("Redis has not been asked yet")
    put_at: dict[str, float] = {}
    if position is None:  # a new client
        put_at = dict(await hub.redis.zrange(keys.UNFINISHED, "-inf", since, byscore=True, withscores=True))
        cursors = {**dict.fromkeys(put_at, "0"), **cursors}
    return event_source(request, frames_of_tasks(hub, cursors, since, put_at))


async def is_over(hub: Hub, task_id: str, cursor: str) -> bool:
    """Say whether nothing will come after a cursor: then the answer is 204, and a browser does not connect again."""
    newest = await hub.redis.xrevrange(keys.stream(task_id), count=1)
    if not newest:  # not written yet, or expired
        return await hub.has_expired(task_id)
    entry_id, entry = newest[0]
    return entry.get("event") in keys.TERMINAL and (cursor == "$" or order(cursor) == order(entry_id))


def event_source(request: Request, frames: AsyncIterator[bytes]) -> Response:
    return EventSourceResponse(frames, ping=request.app.state.ping_seconds, shutdown_grace_period=GRACE_SECONDS)


# -- the rest ---------------------------------------------------------------------------------------------------


async def session(request: Request) -> Response:
    up = await is_up(request)
    return Json({"redis": "up" if up else "down", "login": request.app.state.token is not None})


async def health(request: Request) -> Response:
    if not await is_up(request):
        return problem(503, "Redis does not answer", redis="down")
    return Json({"redis": "up"})


async def is_up(request: Request) -> bool:
    """Ask Redis, and not the hub, which knows only while somebody watches."""
    try:
        await request.app.state.hub.redis.exists(keys.RECENT)
    except (RedisError, RedisClusterException):
        return False
    return True


async def metrics(request: Request) -> Response:
    text = await run_in_threadpool(request.app.state.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(_request: Request) -> Response:
    return Response((HERE / "openapi.json").read_bytes(), media_type="application/json")
