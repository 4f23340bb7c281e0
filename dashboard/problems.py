"""Answers as JSON, and errors as application/problem+json (RFC 9457): {"type", "title", "status", "detail"}."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

LEVELS = 50  # of nesting that are kept of a value too deep for json.dumps


def dumps(value: Any) -> str:
    """Return JSON in ASCII: one line whatever it holds, and UTF-8 even where it holds a lone surrogate.

    What is nested too deep for Python to write it is cut off, so that one such task does not spoil a list.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except RecursionError:
        return json.dumps(_cut(value, LEVELS), allow_nan=False)


def _cut(value: Any, levels: int) -> Any:
    if isinstance(value, dict | list) and not levels:
        return "(nested too deep)"
    if isinstance(value, dict):
        return {name: _cut(one, levels - 1) for name, one in value.items()}
    return [_cut(one, levels - 1) for one in value] if isinstance(value, list) else value


class Json(JSONResponse):
    """An answer as JSON."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


class Problem(Exception):
    """Raised by a handler: an answer with this status, and why in words."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Json:
    """Return the answer for an error; `more` are members of one's own."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return Json(content, status, headers=dict(headers or {}), media_type="application/problem+json")
