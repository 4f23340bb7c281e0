"""/openapi.json says what the server does: schemathesis asks all of it, and hostile values ask the streams."""

from collections.abc import Iterator

import httpx
import pytest
from conftest import Server
from dash import Dashboard, dashboard, status_of, valkey_server
from fakeredis import FakeAsyncRedis, FakeRedis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from streams import Stream, finish, take

from task_streams import TaskQueue
from web.app import make_app

EXAMPLES = 25  # of each operation
APP = make_app(TaskQueue(FakeRedis()), FakeAsyncRedis, frozenset())  # type: ignore[arg-type]
DESCRIPTION = APP.openapi()
DESCRIBED = [(path, method) for path, item in DESCRIPTION["paths"].items() for method in item]
BOUNDED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def board(redis_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard that has a task in each state; 1 has failed, and 2 waits."""
    queue = TaskQueue(redis_server.client())
    for outcome in ("failed", "completed", "cancelled"):
        queue.put(outcome)
        task = take(queue)
        assert task is not None
        Stream(task.id, queue.redis).add(outcome)
        finish(queue, task, outcome, None)  # type: ignore[arg-type]
    queue.put("waits")
    with dashboard(redis_server.url, tmp_path_factory.mktemp("dashboard")) as one:
        yield one
        assert "ERROR" not in one.stderr()


@pytest.mark.parametrize(("path", "method"), [one for one in DESCRIBED if not one[0].endswith(("/events", "/ag-ui"))])
def test_answers_are_as_described(board: Dashboard, path: str, method: str) -> None:
    """Whatever is sent, right or wrong: the status, the type, the headers and the body are those of the description.

    The streams are left out: they don't end.
    """
    import schemathesis  # here, and not as a plugin of pytest: it takes two seconds, and each process would load it

    @BOUNDED
    @given(schemathesis.openapi.from_dict(DESCRIPTION)[path][method].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=board.url, allow_redirects=False)

    ask()


def test_description_has_all_routes_and_is_served(board: Dashboard) -> None:
    """The server hands out what its own code says: each path, under each of its methods."""
    served = httpx.get(f"{board.url}/openapi.json")
    assert served.headers["content-type"] == "application/json" and served.json() == DESCRIPTION
    routes: dict[str, set[str]] = {}
    for route in APP.routes:
        if isinstance(route, Route) and route.methods and route.path != "/openapi.json":
            routes.setdefault(route.path, set()).update(route.methods - {"HEAD"})
    described = {path: {method.upper() for method in item} for path, item in DESCRIPTION["paths"].items()}
    assert described == routes


hostile = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)
cursors = (
    hostile
    | st.from_regex(r"[0-9]{1,25}(-[0-9]{1,25})?", fullmatch=True)
    | st.sampled_from(["$", "0", "2=$", "2=0,2=1-1"])
)


@settings(BOUNDED, max_examples=30)
@given(
    st.sampled_from(["/api/tasks/2/events", "/api/tasks/4/events", "/api/events"]),
    cursors,
    st.booleans(),
    st.booleans(),
)
def test_streams_survive_hostile_cursors(board: Dashboard, path: str, cursor: str, header: bool, ag_ui: bool) -> None:
    """A Last-Event-ID or ?since of any kind begins a stream, or is refused; it never fails."""
    query = {**({} if header else {"since": cursor}), **({"format": "ag-ui"} if ag_ui else {})}
    headers = {"Last-Event-ID": cursor.encode("latin-1")} if header else {}
    with httpx.stream("GET", board.url + path, params=query, headers=headers, timeout=60) as response:  # type: ignore[arg-type]
        assert response.status_code in (200, 204, 400), response.read()
        if response.status_code == 200:
            assert next(response.iter_raw()).startswith(b"retry: 1000\n")


@settings(BOUNDED, max_examples=30)
@given(
    st.sampled_from(
        ["/api/tasks/{}", "/api/tasks/{}/events", "/api/tasks?q={}", "/api/tasks?before={}", "/api/events?task={}"]
    ),
    st.binary(max_size=20),
)
def test_ids_of_any_bytes_survive(board: Dashboard, path: str, name: bytes) -> None:
    """An id of any bytes, escaped, is found or refused."""
    escaped = "".join(f"%{byte:02X}" for byte in name)
    assert status_of(board.ask(f"HEAD {path.format(escaped)}")) in (200, 204, 400, 404)
