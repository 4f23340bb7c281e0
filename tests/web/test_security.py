"""Who may talk to the dashboard, and what its answers forbid browsers to do."""

import errno
import importlib.util
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from subprocess import Popen
from unittest import mock

import httpx
import pytest
from conftest import ROOT, Server
from dash import Dashboard, assert_problem, dashboard, status_of, valkey_server

from web import security

TOKEN = "correct horse"
PROTECTED = ["/api/tasks", "/api/tasks/7", "/api/tasks/7/events", "/api/events", "/api/samples", "/api/session"]
PROTECTED += ["/metrics", "/openapi.json", "/api/nosuch"]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def open_board(redis_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard without a token, as at a desk."""
    with dashboard(redis_server.url, tmp_path_factory.mktemp("open"), "--allow-host", "Board.Example") as one:
        yield one


@pytest.fixture(scope="module")
def board(redis_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard on all addresses, with a token."""
    directory, env = tmp_path_factory.mktemp("closed"), {"DASHBOARD_TOKEN": TOKEN}
    with dashboard(redis_server.url, directory, "--host", "0.0.0.0", env=env) as one:
        yield one


# -- starting ---------------------------------------------------------------------------------------------------


Start = Callable[..., "tuple[int, str]"]


@pytest.fixture
def start(redis_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Call main() of dashboard.py, which must refuse; return its exit code, and what it says: start("--port", "x")."""
    spec = importlib.util.spec_from_file_location("dashboard_program", ROOT / "dashboard.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def run(*options: str, token: str = "") -> tuple[int, str]:
        monkeypatch.setenv("REDIS_URL", redis_server.url)
        monkeypatch.setenv("DASHBOARD_TOKEN", token)
        monkeypatch.setattr(program.Server, "run", lambda *_: pytest.fail("it starts"))
        try:
            code = program.main(list(options))
        except SystemExit as usage:
            code = usage.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "", "example.org"])
def test_start_on_an_open_address_needs_a_token(start: Start, host: str) -> None:
    """Where others could reach it, it does not start without DASHBOARD_TOKEN, and says so in one line."""
    code, errors = start("--host", host)
    assert code == 1
    assert "DASHBOARD_TOKEN" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "-1", "65536", "x"])
def test_start_on_an_odd_port_is_refused(start: Start, port: str) -> None:
    """An invalid port is a usage error."""
    code, errors = start("--port", port)
    assert code == 2 and errors.startswith("usage: ")


def test_start_on_a_port_in_use_is_refused(redis_server: Server, script: Callable[..., "Popen[str]"]) -> None:
    """It says which port, and what to do; on one of the two addresses of localhost, too."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            process = script(redis_server.url, "dashboard.py", "--host", host, "--port", str(port))
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 1 and errors.count("\n") == 1, errors
            assert all(text in errors for text in (f"{host}:{port}", "Address already in use", "--port")), errors


@pytest.mark.parametrize(
    ("host", "why"),
    [("192.0.2.1", "Cannot assign"), ("2001:db8::1", "[2001:db8::1]:8000"), ("no-such-host.invalid", "--host")],
)
def test_start_on_an_address_of_another_machine_is_refused(start: Start, host: str, why: str) -> None:
    """Nor does it start under a name that nobody knows."""
    code, errors = start("--host", host, token=TOKEN)
    assert code == 1 and errors.startswith("dashboard.py: cannot listen on") and why in errors


def test_start_on_a_privileged_port_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system does not allow is one line, too."""
    monkeypatch.setattr(socket, "create_server", mock.Mock(side_effect=PermissionError(errno.EACCES, "no")))
    code, errors = start("--port", "80")
    assert code == 1
    assert errors.startswith("dashboard.py: cannot listen on 127.0.0.1:80 (Permission denied).")


@pytest.mark.parametrize("token", ["\udcff\udcfe", "a\nb"])
def test_start_with_an_odd_token_is_refused(start: Start, token: str) -> None:
    """A token that no header and no form could bring is refused at the start."""
    code, errors = start(token=token)
    assert (code, errors) == (1, "dashboard.py: DASHBOARD_TOKEN must be printable UTF-8\n")


# -- the token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROTECTED)
def test_api_without_the_token_is_401(board: Dashboard, path: str) -> None:
    """Nothing but the login, its files and /healthz is for everybody."""
    response = httpx.get(board.url + path)
    assert_problem(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_write_without_the_token_is_401(board: Dashboard) -> None:
    """Nor does anything write."""
    for path in ("/api/tasks", "/api/tasks/7/cancel", "/api/tasks/7/retry"):
        assert_problem(httpx.post(board.url + path, json={"type": "t"}), 401)


@pytest.mark.parametrize(
    "value",
    [
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        "Bearer ünï",
        "",
    ],
)
def test_wrong_token_is_401(board: Dashboard, value: str) -> None:
    """A wrong token is no token, whatever it holds."""
    assert status_of(board.ask("GET /api/tasks", f"Authorization: {value}")) == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_bearer_token_opens_the_api(board: Dashboard, scheme: str) -> None:
    """A program sends the token with each request."""
    assert httpx.get(f"{board.url}/api/session", headers={"Authorization": f"{scheme} {TOKEN}"}).json()["login"] is True


def test_pages_without_the_token_lead_to_the_login(board: Dashboard) -> None:
    """A browser is sent to the login page, which it may see, with all that the page loads."""
    for path in ("/", "/tasks/7", "/nosuch"):
        response = httpx.get(board.url + path)
        assert (response.status_code, response.headers["location"]) == (303, "/login")
    assert "<form" in httpx.get(f"{board.url}/login").text
    assert httpx.get(f"{board.url}/login?failed=1").status_code == httpx.head(f"{board.url}/login").status_code == 200
    assert (
        httpx.get(f"{board.url}/static/style.css").status_code == httpx.get(f"{board.url}/healthz").status_code == 200
    )


def test_login_gives_a_cookie_that_opens_all(board: Dashboard) -> None:
    """The right token gives a cookie that scripts cannot read, other sites cannot send, and that is not the token."""
    with httpx.Client(base_url=board.url) as browser:
        response = browser.post("/login", data={"token": TOKEN}, headers={"Origin": board.url})
        assert (response.status_code, response.headers["location"]) == (303, "/")
        cookie = response.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "path=/" in cookie and TOKEN not in cookie
        assert browser.get("/").status_code == browser.get("/api/tasks").status_code == 200


@pytest.mark.parametrize("form", ["token=wrong", "token=", "", "x=y", "token=%FF%ED%A0%80", "token", "\x00"])
def test_login_with_a_wrong_token_says_so(board: Dashboard, form: str) -> None:
    """A wrong token leads back to the form, and gives no cookie."""
    response = httpx.post(f"{board.url}/login", content=form)
    assert (response.status_code, response.headers["location"]) == (303, "/login?failed=1")
    assert "set-cookie" not in response.headers


def test_login_with_an_odd_form_is_400(board: Dashboard) -> None:
    """A form of a thousand fields is refused, not an error of the server."""
    assert_problem(httpx.post(f"{board.url}/login", content="a=1&" * 1000), 400)


def test_login_redirects_nowhere_else(board: Dashboard, open_board: Dashboard) -> None:
    """No parameter names where a login leads; where none is needed it leads home."""
    for query in ("?next=//evil.example", "?url=https://evil.example", "//evil.example"):
        response = httpx.post(f"{board.url}/login{query}", data={"token": TOKEN})
        assert response.headers.get("location", "/") in ("/", "/login")
    assert httpx.get(f"{open_board.url}/login").headers["location"] == "/"


@pytest.mark.parametrize("cookie", ["x", "", TOKEN, "0" * 64, "é", '"'])
def test_wrong_cookie_is_401(board: Dashboard, cookie: str) -> None:
    """A cookie that the login did not give opens nothing."""
    assert status_of(board.ask("GET /api/tasks", f"Cookie: {security.COOKIE}={cookie}")) == 401


def test_token_of_any_script_opens_all(redis_server: Server, tmp_path: Path) -> None:
    """A token that is not ASCII works as a bearer token, as curl or as Python sends it, and in the form."""
    token = "grün 🔑"
    with dashboard(redis_server.url, tmp_path, env={"DASHBOARD_TOKEN": token}) as one:
        answer = one.raw(
            f"GET /api/session HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        assert status_of(answer) == 200
        for wrong in ("grün", "gr\xfcn", "\xff\xfe"):
            assert status_of(one.ask("GET /api/session", f"Authorization: Bearer {wrong}")) == 401
        with httpx.Client(base_url=one.url) as browser:
            assert browser.post("/login", data={"token": token}).headers["location"] == "/"
            assert browser.get("/api/session").status_code == 200
    with dashboard(redis_server.url, tmp_path, env={"DASHBOARD_TOKEN": "grün"}) as one:
        assert status_of(one.ask("GET /api/session", "Authorization: Bearer gr\xfcn")) == 200  # in Latin-1


def test_many_wrong_tokens_are_not_looked_at(board: Dashboard) -> None:
    """After so many of one address within a minute not even the right one is; who is logged in, and others, go on."""
    hostile = httpx.HTTPTransport(local_address="127.0.0.9")  # all of 127/8 is this machine
    with httpx.Client(base_url=board.url, transport=hostile) as client:
        client.cookies.set(security.COOKIE, security.session_of(TOKEN))
        right, wrong = ({"Authorization": f"Bearer {token}"} for token in (TOKEN, "wrong"))
        for n in range(security.MOST_FAILURES):
            if n % 2:
                assert client.post("/login", data={"token": "wrong"}).status_code == 303
            else:
                assert client.get("/api/session", headers=wrong).status_code == 200  # by its cookie
        for _ in range(3):
            refused = client.post("/login", data={"token": TOKEN})
            assert "too many" in assert_problem(refused, 429)
            assert 0 < int(refused.headers["retry-after"]) <= security.FAILURE_SECONDS
        assert client.get("/api/session").status_code == 200
        client.cookies.clear()
        assert_problem(client.get("/api/session", headers=right), 429)
    assert httpx.get(f"{board.url}/api/session", headers=right).status_code == 200


def test_failures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute; and no flood of addresses fills the memory."""
    monkeypatch.setattr(security, "MOST_ADDRESSES", 3)
    clock = mock.Mock(monotonic=mock.Mock(return_value=1000.0))
    monkeypatch.setattr(security, "time", clock)
    failures = security.Failures()
    for _ in range(security.MOST_FAILURES):
        assert failures.wait_seconds("a") == 0
        failures.add("a")
    assert failures.wait_seconds("a") == security.FAILURE_SECONDS
    clock.monotonic.return_value += security.FAILURE_SECONDS + 1
    assert failures.wait_seconds("a") == 0
    for address in "bcd":
        failures.add(address)
    assert list(failures._times) == ["b", "c", "d"]


def test_secrets_are_compared_in_constant_time() -> None:
    """Token and cookie go through hmac.compare_digest, whose time does not tell how much of them is right."""
    guard = security.Guard(mock.Mock(), frozenset(), TOKEN, security.Failures())
    headers = [(b"authorization", b"Bearer wrong"), (b"cookie", b"dashboard=wrong")]
    with mock.patch.object(security.hmac, "compare_digest", return_value=False) as compare:
        assert not guard.knows(security.HTTPConnection({"type": "http", "headers": headers}))
    assert compare.call_args_list == [mock.call(b"wrong", TOKEN.encode()), mock.call(b"wrong", guard._session.encode())]


# -- Host and Origin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "board.example", "BOARD.example:1"]
)
def test_known_hosts_are_served(open_board: Dashboard, host: str) -> None:
    """A name that the server was told is served, with any port: a proxy may stand before it."""
    assert status_of(open_board.ask("GET /healthz", f"Host: {host}")) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "127.1",
        "0x7f.1",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "localhost:80:80",
        "localhost:x",
        "localhost:",
        "127.0.0.1,evil.example",
        "",
        "[",
        "::1",
        "evil.example#localhost",
        "localhost.",
        "0.0.0.0",
        "localh\xf6st",
    ],
)
def test_unknown_hosts_are_refused(open_board: Dashboard, host: str) -> None:
    """DNS rebinding: a page of another name gets nothing, also where that name leads here."""
    for path in ("/", "/api/tasks", "/static/style.css", "/healthz"):
        assert status_of(open_board.ask(f"GET {path}", f"Host: {host}")) in (400, 421)


def test_request_without_host_is_refused(open_board: Dashboard) -> None:
    """HTTP/1.0 may leave the Host out; here it must not."""
    assert status_of(open_board.raw(b"GET /healthz HTTP/1.0\r\n\r\n")) == 421


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://[", "http://localhost", "http://127.0.0.1:1", "x", "file://", "\xfc"],
)
def test_writes_of_other_origins_are_403(open_board: Dashboard, origin: str) -> None:
    """A page of another site, or of another port, cannot put, cancel, retry or log in."""
    for path in ("/api/tasks", "/api/tasks/7/cancel", "/api/tasks/7/retry", "/login"):
        assert status_of(open_board.ask(f"POST {path}", f"Origin: {origin}", "Content-Length: 0")) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_writes_that_browsers_call_foreign_are_403(open_board: Dashboard, site: str) -> None:
    """Sec-Fetch-Site tells it also where no Origin is sent."""
    assert_problem(httpx.post(f"{open_board.url}/api/tasks", json={"type": "t"}, headers={"Sec-Fetch-Site": site}), 403)


def test_writes_of_the_own_pages_and_of_programs_are_taken(open_board: Dashboard) -> None:
    """The own page sends its origin, curl sends none."""
    url = f"{open_board.url}/api/tasks"
    own = {"Origin": open_board.url, "Sec-Fetch-Site": "same-origin"}
    for headers in (own, {}, {"Sec-Fetch-Site": "none"}):
        assert httpx.post(url, json={"type": "t"}, headers=headers).status_code == 201


def test_referrer_policy_lets_the_login_form_name_its_origin(board: Dashboard) -> None:
    """With `no-referrer` a browser sends `Origin: null` with a form, and the login would be refused as foreign."""
    assert httpx.get(f"{board.url}/login").headers["referrer-policy"] == "same-origin"


# -- headers ----------------------------------------------------------------------------------------------------

CSP = (
    "default-src 'self'; connect-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


def assert_safe(response: httpx.Response) -> None:
    assert response.headers["content-security-policy"] == CSP
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (
        response.headers["cross-origin-opener-policy"]
        == response.headers["cross-origin-resource-policy"]
        == "same-origin"
    )
    assert "access-control-allow-origin" not in response.headers


def test_every_answer_has_the_headers(open_board: Dashboard, board: Dashboard) -> None:
    """Pages, files, data, redirects and errors alike."""
    for path in ("/", "/tasks/7", "/static/style.css", "/api/tasks", "/metrics", "/healthz", "/openapi.json", "/nosuch",
                 "/static/nosuch", "/api/tasks?limit=0", "/login"):  # fmt: skip
        assert_safe(httpx.get(open_board.url + path))
        assert_safe(httpx.get(board.url + path))
    assert_safe(httpx.post(f"{open_board.url}/api/tasks", content=b"x" * 1_100_001))
    assert_safe(httpx.get(open_board.url, headers={"Host": "evil.example"}))
    assert_safe(httpx.put(open_board.url))
    with httpx.stream("GET", f"{open_board.url}/api/events") as response:
        assert_safe(response)


def test_pages_need_nothing_that_the_policy_forbids(open_board: Dashboard) -> None:
    """No page has a script or a style within, or loads from elsewhere."""
    for page in ("index.html", "task.html", "login.html"):
        text = (ROOT / "web" / "static" / page).read_text()
        assert "style=" not in text and "<style" not in text and " on" + "click=" not in text and "://" not in text
        assert text.count("<script") == text.count('<script type="module" src="/static/')


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/../../README.md",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2f%2e%2e%2fREADME.md",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..%5capp.py",
        "/static/style.css%00.js",
        "/static/",
        "/static",
        "/static/....//app.py",
        "/static/" + "x" * 5000,
        "/../app.py",
        "/tasks/../../web/app.py",
        "http://evil.example/static/../app.py",
    ],
)
def test_static_files_are_only_those(open_board: Dashboard, path: str) -> None:
    """No path leads out of web/static/."""
    answer = open_board.ask(f"GET {path}")
    assert status_of(answer) == 404 and b"application/problem+json" in answer


def test_large_bodies_are_refused_before_they_are_read(open_board: Dashboard) -> None:
    """A Content-Length over the limit is 413 at once, wherever it is sent."""
    for line in ("POST /api/tasks", "POST /api/tasks/7/cancel", "POST /login", "GET /api/tasks"):
        with closing(socket.create_connection(("127.0.0.1", open_board.port), timeout=60)) as connection:
            connection.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1100001\r\n\r\n".encode())
            assert status_of(connection.recv(65536)) == 413


def test_servers_left_no_traceback(open_board: Dashboard, board: Dashboard) -> None:
    """None of all that made the servers fail (the last test of this module)."""
    for one in (open_board, board):
        assert "Traceback" not in one.stderr() and "ERROR" not in one.stderr()
