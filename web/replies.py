"""How requests are read and answers written: JSON by this project's rules, and errors as application/problem+json."""

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ailf.messaging.redis import from_json, reason_of

from .models import problem_of

LEVELS = 50  # of nesting that are kept of a value too deep for json.dumps


def dumps(value: Any) -> str:
    """Return JSON in ASCII: one line whatever it holds, and valid UTF-8 even if it holds a lone surrogate.

    A value that is nested too deep for Python to write is cut off, so that one such task does not spoil a list.
    """
    try:
        return json.dumps(value, allow_nan=False, default=dict)
    except RecursionError:
        return json.dumps(_cut(value, LEVELS), allow_nan=False)


def _cut(value: Any, levels: int) -> Any:
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict | list) and not levels:
        return "(nested too deep)"
    if isinstance(value, dict):
        return {name: _cut(one, levels - 1) for name, one in value.items()}
    return [_cut(one, levels - 1) for one in value] if isinstance(value, list) else value


class Json(JSONResponse):
    """A model or another value as JSON. pydantic's own writer refuses surrogates and nesting, which tasks may have."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Json:
    """Return the answer for an error; `more` are members of one's own."""
    content = problem_of(status, detail, **more)
    return Json(content, status, headers=dict(headers or {}), media_type="application/problem+json")


class Conflict(Exception):
    """The task is not in a state in which that can be done; the message says why."""


# -- reading ----------------------------------------------------------------------------------------------------


class JsonRequest(Request):
    """A request whose body is a JSON object in UTF-8, with neither NaN nor infinity, which no task can hold."""

    async def json(self) -> Any:
        try:
            value = from_json((await self.body()).decode())
        except RecursionError as error:
            raise HTTPException(400, "the body is nested too deep") from error
        except ValueError as error:  # also UnicodeDecodeError
            raise HTTPException(400, f"the body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise HTTPException(422, "the body must be a JSON object")
        return value


class JsonRoute(APIRoute):
    """Reads the body with JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


# -- errors -----------------------------------------------------------------------------------------------------


def invalid(_request: Request, error: Any) -> Response:
    """Answer a request that does not fit its models: 404 for an id, 422 for a body, else 400."""
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):  # FastAPI reads no JSON from another content type
        return problem(415, "the body must be application/json")
    first = error.errors()[0]
    where, *names = map(str, first["loc"])
    status = {"path": 404, "body": 422}.get(where, 400)
    return problem(status, f"{'.'.join(names) or where}: {first['msg']}"[:500])


def refused(request: Request, error: Any) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # one path may have several routes, and each knows its own methods only
        routes = [one for one in request.app.routes if isinstance(one, Route) and one.matches(request.scope)[0].value]
        methods = {method for route in routes for method in route.methods or ()}
        headers |= {"Allow": ", ".join(sorted(methods))} if methods else {}
    return problem(error.status_code, error.detail, headers)


def unavailable(_request: Request, error: Exception) -> Response:
    why = reason_of(error.__cause__ or error)
    return problem(503, f"Redis does not serve ({why}); try again", {"Retry-After": "1"})


def no_such_task(_request: Request, error: Exception) -> Response:
    return problem(404, str(error))


def conflict(_request: Request, error: Exception) -> Response:
    return problem(409, str(error))
