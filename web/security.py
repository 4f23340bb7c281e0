"""Who may talk to the dashboard: hosts, origins, tokens, sizes; and what its pages may load.

Host      only names that the server was told: a page of somebody else cannot reach it by a name of its own
          (DNS rebinding)
Origin    a write must come from the dashboard's own pages, or from no page at all (curl)
token     with $DASHBOARD_TOKEN: `Authorization: Bearer …`, or the cookie that /login gives; in constant time. After
          MOST_FAILURES wrong tokens a minute no token of that address is looked at
size      request bodies over MAX_BODY_BYTES are refused before they are read; FastAPI counts those without a length
"""

import contextlib
import hashlib
import hmac
import math
import time
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .replies import Json, problem

MAX_BODY_BYTES = 1_100_000  # a task may have 1,000,000
MOST_FAILURES = 20  # wrong tokens of one address
FAILURE_SECONDS = 60.0  # within that time
MOST_ADDRESSES = 10_000  # whose failures are remembered
COOKIE = "dashboard"
OPEN_PATHS = ("/login", "/healthz", "/static/")  # without a token
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send `Origin: null` with the login form
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def session_of(token: str) -> str:
    """Return the cookie that proves that its bearer knows the token, without holding it."""
    return hmac.new(token.encode(), b"agent task streams: session", hashlib.sha256).hexdigest()


def is_token(given: str, token: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given.encode(), token.encode())


def address_of(request: HTTPConnection) -> str:
    """Return the address of a client; a proxy's own, where that does not tell."""
    return request.client.host if request.client else ""


class Failures:
    """Counts wrong tokens, by the address they came from."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}  # address -> when its last wrong tokens came

    def add(self, address: str) -> None:
        times = self._times.pop(address, deque(maxlen=MOST_FAILURES))
        times.append(time.monotonic())
        self._times[address] = times  # the last one now; the first one is forgotten first
        if len(self._times) > MOST_ADDRESSES:
            del self._times[next(iter(self._times))]

    def wait_seconds(self, address: str) -> float:
        """Return how long no token of an address is looked at."""
        times = self._times.get(address)
        if times is None or len(times) < MOST_FAILURES:
            return 0.0
        return max(0.0, times[0] + FAILURE_SECONDS - time.monotonic())

    def refusal(self, address: str) -> Json | None:
        """Return the answer to one who has to wait."""
        wait = math.ceil(self.wait_seconds(address))
        return (
            problem(429, f"too many wrong tokens; try again in {wait} s", {"Retry-After": str(wait)}) if wait else None
        )


class Guard:
    """The ASGI middleware that applies all of it."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str | None, failures: Failures) -> None:
        self.app, self.hosts, self.token, self.failures = app, hosts, token, failures
        self._session = session_of(token) if token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        with contextlib.suppress(ClientDisconnect):  # in the middle of a request's body: nobody waits for an answer
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        host = headers.get("host", "")
        if _hostname(host) not in self.hosts:
            return problem(421, f"this server is not known as {host[:100]!r} (see --allow-host)")
        if scope["method"] not in SAFE_METHODS:
            origin = headers.get("origin")
            ours = (None, f"http://{host}".lower(), f"https://{host}".lower())  # https: a proxy may do that for us
            if (origin and origin.lower()) not in ours or headers.get("sec-fetch-site") in (
                "cross-site",
                "same-site",
            ):
                return problem(403, "writes are accepted from this server's own pages only")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return problem(413, f"the body is over {MAX_BODY_BYTES:,} bytes")
        path = scope["path"]
        request = HTTPConnection(scope)
        if self.token and not path.startswith(OPEN_PATHS) and not self.knows(request):
            if too_many := self.failures.refusal(address_of(request)):
                return too_many
            if path.startswith("/api/") or path in ("/metrics", "/openapi.json"):
                return problem(401, "give the token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})
            return RedirectResponse("/login", 303)
        return None

    def knows(self, request: HTTPConnection) -> bool:
        """Say whether a request proves that it knows the token."""
        assert self.token is not None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and not self.failures.wait_seconds(address_of(request)):
            if is_token(_as_sent(given.strip()), self.token):
                return True
            self.failures.add(address_of(request))
        return hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self._session.encode())


def _as_sent(value: str) -> str:
    """Return a header's value, which was read as Latin-1, as the UTF-8 that curl sends, if it is that."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def _hostname(host: str) -> str:
    """Return a Host header's name, without its port. _hostname("[::1]:8000") -> '[::1]'"""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _with_headers(send: Send) -> Send:
    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return call
