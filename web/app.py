"""The dashboard's web application: the API (web/api.py), the pages (web/static/), the login, health and metrics.

web/security.py says who may do what.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from redis.exceptions import RedisClusterException, RedisError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from ailf.messaging.redis import REDIS_ERRORS, Client, RedisMessagingError
from task_streams import NoSuchTask, TaskQueue, keys

from . import api, models, replies
from .cluster import hub_of
from .metrics import Metrics
from .models import PROBLEMS
from .replies import Json, problem
from .security import COOKIE, HEADERS, MAX_BODY_BYTES, Failures, Guard, address_of, is_token, session_of
from .sse import PING_SECONDS
from .tasks import Tasks

STATIC = Path(__file__).parent / "static"
SESSION_SECONDS = 7 * 24 * 3600  # how long a login lasts
FORM = {
    "application/x-www-form-urlencoded": {"schema": {"type": "object", "properties": {"token": {"type": "string"}}}}
}

router = APIRouter(responses=PROBLEMS, max_body_size=MAX_BODY_BYTES)


def make_app(
    queue: TaskQueue,
    connect: Callable[[], Awaitable[Client]],
    hosts: frozenset[str],
    token: str | None = None,
    ping_seconds: int = PING_SECONDS,
) -> FastAPI:
    """Return the app. `connect` gives the redis.asyncio client for events, in the app's own event loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aclosing(await connect()) as redis, hub_of(redis) as hub:
            app.state.hub, app.state.metrics = hub, Metrics(queue, hub)
            yield

    handlers: dict[Any, Any] = {
        RequestValidationError: replies.invalid,
        HTTPException: replies.refused,
        NoSuchTask: replies.no_such_task,
        replies.Conflict: replies.conflict,
        RedisError: replies.unavailable,
        RedisClusterException: replies.unavailable,
        RedisMessagingError: replies.unavailable,
        Exception: failed,
    }
    failures = Failures()
    app = FastAPI(
        docs_url=None, redoc_url=None, redirect_slashes=False,
        routes=ROUTES, exception_handlers=handlers, lifespan=lifespan,
        middleware=[Middleware(Guard, hosts=hosts, token=token, failures=failures)],
    )  # fmt: skip
    app.mount("/static", StaticFiles(directory=STATIC))
    app.state.tasks, app.state.token, app.state.failures = Tasks(queue), token, failures
    app.state.ping_seconds = ping_seconds
    app.openapi = lambda: DESCRIPTION  # type: ignore[method-assign]
    return app


def failed(_request: Request, _error: Exception) -> Response:
    """Answer for what nobody expected; the traceback goes to the log. Starlette sends this from outside the Guard."""
    return problem(500, "the server failed; its log says why", HEADERS)


# -- pages ------------------------------------------------------------------------------------------------------


def page(name: str) -> FileResponse:
    return FileResponse(STATIC / name, headers={"Cache-Control": "no-cache"})


@router.get("/", response_class=HTMLResponse)
async def list_page() -> Response:
    """The list of tasks."""
    return page("index.html")


@router.get("/tasks/{task_id}", response_class=HTMLResponse)
async def task_page(task_id: str) -> Response:
    """One task's story."""
    return page("task.html")


@router.get("/login", response_class=HTMLResponse, responses={303: {"description": "There is no token"}})
async def login_page(request: Request) -> Response:
    """The login, if the dashboard has a token."""
    return RedirectResponse("/", 303) if request.app.state.token is None else page("login.html")


@router.post("/login", status_code=303, response_class=RedirectResponse, openapi_extra=FORM)
async def login(request: Request) -> Response:
    """Log in: to / with a cookie, or to /login?failed=1."""
    token = request.app.state.token
    if token is None:
        return RedirectResponse("/", 303)
    try:
        form = parse_qs((await request.body()).decode(errors="replace"), max_num_fields=10)
    except ValueError as error:
        raise HTTPException(400, "the form has a token, and nothing else") from error
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


# -- the rest ---------------------------------------------------------------------------------------------------


@router.get("/api/session", response_model=models.Session, response_class=Json)
async def session(request: Request) -> Response:
    """Say whether Redis answers, and whether people log in here."""
    up = await is_up(request)
    return Json({"redis": "up" if up else "down", "login": request.app.state.token is not None})


@router.get("/healthz", response_model=models.Health, response_class=Json)
async def health(request: Request) -> Response:
    """Say whether Redis answers: 200 or 503."""
    return Json({"redis": "up"}) if await is_up(request) else problem(503, "Redis does not answer", redis="down")


async def is_up(request: Request) -> bool:
    """Ask Redis, and not the hub, which only knows while somebody watches."""
    try:
        await request.app.state.hub.ask("exists", keys.RECENT)
    except REDIS_ERRORS:
        return False
    return True


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# -- all of it --------------------------------------------------------------------------------------------------

ROUTES = [*router.routes, *api.router.routes]
DESCRIPTION = get_openapi(title="Agent Task Streams", version="1", routes=ROUTES)  # GET /openapi.json
DESCRIPTION["components"]["schemas"]["Problem"] = models.Problem.model_json_schema()
for _route in ROUTES:
    if isinstance(_route, APIRoute) and _route.methods and "GET" in _route.methods:
        _route.methods.add("HEAD")  # subtle: only now, or the description would list HEAD as operations of its own
