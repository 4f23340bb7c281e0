"""The dashboard's HTTP interface, on the real program and a real server. What it promises: /openapi.json."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
import uvicorn
from attempts import attempt
from conftest import Server, wait_until
from dash import Dashboard, assert_problem, dashboard, status_of, valkey_server
from httpx_sse import EventSource, ServerSentEvent, connect_sse
from prometheus_client.parser import text_string_to_metric_families
from streams import Stream, finish, release, take

from ailf.messaging.redis import connect_async
from task_streams import Task, TaskLog, TaskQueue, keys
from task_streams.queue import MAX_DEPTH
from web import sse
from web.app import make_app
from web.metrics import LAG_BUCKETS
from web.tasks import Tasks


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def board(redis_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with dashboard(redis_server.url, tmp_path_factory.mktemp("dashboard")) as one:
        yield one


@pytest.fixture
def http(board: Dashboard) -> httpx.Client:
    return board.http


@pytest.fixture
def queue(redis_server: Server) -> Iterator[TaskQueue]:
    """The queue, whose list is empty: what a test puts is popped next."""
    queue = TaskQueue(redis_server.client())
    queue.redis.delete(keys.QUEUE)
    yield queue
    queue.close()


def claimed(queue: TaskQueue, data: Any = "work", worker: str = "here:1") -> tuple[Task, Stream]:
    """Put a task and claim it as a worker does; return it and its log."""
    queue.put(data)
    task = take(queue, worker=worker)
    assert task is not None
    return task, Stream(task.id, queue.redis, task.epoch)


def ended(queue: TaskQueue, outcome: Any = "completed", result: Any = None, events: int = 0) -> str:
    """Put a task and bring it to its end; return its id."""
    task, log = claimed(queue)
    for number in range(events):
        log.add("progress", percent=number, step="s")
    log.add(outcome, result=result)
    assert finish(queue, task, outcome, result)
    return task.id


def listed(http: httpx.Client, **query: Any) -> dict[str, Any]:
    response = http.get("/api/tasks", params=query)
    assert response.status_code == 200, response.text
    return dict(response.json())


def post_json(http: httpx.Client, path: str, body: Any, **headers: str) -> httpx.Response:
    """POST JSON in ASCII: httpx's own `json=` cannot send a lone surrogate."""
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json", **headers})


def described(http: httpx.Client, task_id: str) -> dict[str, Any]:
    response = http.get(f"/api/tasks/{task_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


# -- lists ------------------------------------------------------------------------------------------------------


def test_list_pages_through_all_tasks_while_new_ones_come(http: httpx.Client, queue: TaskQueue) -> None:
    """500 tasks come once each, the newest first, in pages of 37, and tasks that are put meanwhile shift nothing."""
    put = [task.id for task in queue.put_many(["page"] * 500)]

    seen, before = [], None
    while True:
        page = listed(http, limit=37, **({"before": before} if before else {}))
        seen += [task["id"] for task in page["tasks"]]
        queue.put("meanwhile")
        before = page["next"]
        if before is None:
            break

    ours = set(put)
    assert [task_id for task_id in seen if task_id in ours] == put[::-1]
    assert len(seen) == len(set(seen))


def test_list_orders_tasks_of_one_millisecond_by_number(http: httpx.Client, queue: TaskQueue) -> None:
    """Ten is newer than nine, also where both were put in the same millisecond, for which Redis sorts as text."""
    queue.redis.zadd(keys.RECENT, {f"same-{number}": 4 for number in range(1, 13)})
    for number in range(1, 13):
        queue.redis.hset(keys.record(f"same-{number}"), mapping={"status": "completed", "data": "1"})
    wait_until(lambda: listed(http, q="same-")["tasks"], "the list is read again")

    ids = [task["id"] for task in listed(http, q="same-")["tasks"]]

    assert ids == [f"same-{number}" for number in range(12, 0, -1)]


def test_list_shows_what_was_just_put(http: httpx.Client) -> None:
    """Whoever puts a task finds it in the next list, however young the last list is."""
    for _ in range(5):
        listed(http)
        task_id = http.post("/api/tasks", json={"type": "t"}).json()["id"]
        assert listed(http, limit=1)["tasks"][0]["id"] == task_id


def test_list_filters_by_state(http: httpx.Client, queue: TaskQueue) -> None:
    """Each state has its filter, and `done` has both completed and cancelled; a task that rests or is delayed waits."""
    resting, _ = claimed(queue)
    assert release(queue, resting, delay_seconds=3600)
    delayed = queue.put("later", delay_seconds=3600)
    ids = {
        "waiting": {resting.id, delayed.id},
        "running": {claimed(queue)[0].id},
        "done": {ended(queue), ended(queue, "cancelled")},
        "failed": {ended(queue, "failed", "why")},
    }
    ids["waiting"].add(queue.put("waits").id)
    newest = {task_id for group in ids.values() for task_id in group}
    wait_until(lambda: newest <= {task["id"] for task in listed(http)["tasks"]}, "the list is read again")

    for state, expected in ids.items():
        tasks = listed(http, state=state)["tasks"]
        assert {task["id"] for task in tasks} & newest == expected
        states = {"done": {"completed", "cancelled"}}.get(state, {state})
        assert {task["state"] for task in tasks} <= states
    assert described(http, resting.id)["status"] == "retrying"
    assert described(http, delayed.id)["status"] == "delayed"


def test_list_has_the_beginning_of_large_data(http: httpx.Client, queue: TaskQueue) -> None:
    """Two hundred tasks of a megabyte are a short list; the single task has all of its data."""
    large = {"type": "large", "payload": "x" * 900_000}
    small = {"type": "small", "payload": "x" * 1_900}
    ids = [queue.put(large).id for _ in range(20)]
    small_id = queue.put(small).id
    wait_until(
        lambda: small_id in [task["id"] for task in listed(http)["tasks"]],
        "the list, which may be half a second old, has the last of them",
    )

    response = http.get("/api/tasks", params={"limit": 200})
    tasks = {task["id"]: task for task in response.json()["tasks"]}

    assert len(response.content) < 500_000
    for task_id in ids:
        assert (tasks[task_id]["type"], tasks[task_id]["data_is_cut"]) == ("large", True)
        assert json.dumps(large).startswith(tasks[task_id]["data"]) and len(tasks[task_id]["data"]) == 300
        assert described(http, task_id)["data"] == large
    assert (tasks[small_id]["data"], tasks[small_id]["data_is_cut"]) == (small, False)
    assert "data_is_cut" not in described(http, small_id)


def test_list_finds_ids_by_prefix(http: httpx.Client, queue: TaskQueue) -> None:
    """q is the beginning of an id, taken literally; nothing found is an empty page."""
    for name in ("find-1", "find-2", "other-find"):
        queue.put("x", id=name)
    wait_until(lambda: listed(http, q="other-find")["tasks"], "the list is read again")

    assert {task["id"] for task in listed(http, q="find-")["tasks"]} == {"find-1", "find-2"}
    for strange in ("*", "f*d", "<script>", "\x00", "ünï", "'"):
        assert listed(http, q=strange)["tasks"] == []


def test_list_counts_tasks_and_the_queue(http: httpx.Client, queue: TaskQueue) -> None:
    """The counts follow what happens; queue_length is the list's."""
    before = Tasks(queue).page(None, "", None, 1).counts  # not asked by http: that list may be half a second old
    ended(queue)
    ended(queue, "failed", "why")
    claimed(queue)
    queue.put("waits")

    expected = {name: number + 1 for name, number in before.items()}
    wait_until(lambda: listed(http)["counts"] == expected, "the counts")

    assert listed(http)["queue_length"] == 1


@pytest.mark.parametrize(
    "query",
    [
        "state=odd",
        "state=waiting%00",
        "limit=0",
        "limit=201",
        "limit=-1",
        "limit=1.5",
        "limit=",
        "limit=x",
        "limit=%D9%A3",
        "limit=" + "9" * 5000,
        "state=%ED%A0%80",
        "state=%FF",
    ],
)
def test_list_refuses_what_it_cannot_read(http: httpx.Client, query: str) -> None:
    """A wrong filter or limit is 400, and not an empty list."""
    assert_problem(http.get(f"/api/tasks?{query}"), 400)


@pytest.mark.parametrize("before", ["nosuch", "a b", "%00", "x" * 129, "<script>", "%ED%A0%80"])
def test_list_after_an_unknown_task_is_404(http: httpx.Client, before: str) -> None:
    """A page after a task that is in no list would be the wrong page, so there is none."""
    assert_problem(http.get(f"/api/tasks?before={before}"), 404)


def test_list_tells_who_works_on_what(
    http: httpx.Client, queue: TaskQueue, redis_server: Server, script: Callable[..., Popen[str]]
) -> None:
    """A consumer.py that is connected is a worker, and a worker that has gone is told apart while its task runs."""
    task, _ = claimed(queue, worker="gone:7")
    consumer = script(redis_server.url, "consumer.py")

    def workers() -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in listed(http)["workers"]}

    wait_until(lambda: any(name.endswith(f":{consumer.pid}") for name in workers()), "the consumer is a worker")
    wait_until(lambda: task.id in workers().get("gone:7", {"tasks": []})["tasks"], "the list is read again")

    assert workers()["gone:7"]["alive"] is False
    task_id = http.post("/api/tasks", json={"type": "process_data", "payload": {"a": 1}}).json()["id"]
    wait_until(lambda: described(http, task_id)["state"] == "completed", "the consumer has done a task of ours")
    consumer.send_signal(signal.SIGTERM)
    consumer.wait(60)
    wait_until(lambda: not any(name.endswith(f":{consumer.pid}") for name in workers()), "it is none any more")


# -- one task ---------------------------------------------------------------------------------------------------


def test_task_is_told_from_beginning_to_end(http: httpx.Client, queue: TaskQueue) -> None:
    """A task says where it stands in the queue, then who works on it and how far it is, then its result."""
    first, second = queue.put({"type": "one", "payload": [1]}), queue.put("two")

    waiting = described(http, second.id)
    assert (waiting["state"], waiting["ahead"], waiting["type"], waiting["data"]) == ("waiting", 1, None, "two")
    assert waiting["worker"] is waiting["started_at"] is waiting["finished_at"] is waiting["percent"] is None
    assert waiting["attempts"] == waiting["failures"] == 0 and waiting["put_at"] > 1.6e12

    task = take(queue, worker="here:1")
    assert task is not None and task.id == first.id
    log = Stream(task.id, queue.redis)
    log.add("progress", percent=40, step="half-way")
    log.add("processing", step="another thing")
    running = described(http, first.id)
    assert (running["state"], running["worker"], running["attempts"]) == ("running", "here:1", 1)
    assert (running["percent"], running["step"], running["type"], running["ahead"]) == (40, "half-way", "one", None)

    log.add("progress", percent=9e9, step=["not text"])
    assert (described(http, first.id)["percent"], described(http, first.id)["step"]) == (100, None)

    log.add("completed", result={"rows": 3})
    finish(queue, task, "completed", {"rows": 3})
    done = described(http, first.id)
    assert (done["state"], done["result"], done["worker"], done["percent"]) == ("completed", {"rows": 3}, None, None)
    assert done["finished_at"] >= done["started_at"] >= done["put_at"]


def test_task_that_was_pushed_by_hand_waits(http: httpx.Client, queue: TaskQueue) -> None:
    """An element that somebody pushed with redis-cli is found before it is claimed, between malformed ones."""
    junk = ["nonsense", b"\xff\xfe", "{}", "[1]", '{"id": []}', '{"id": "x y", "data": 1}', "[" * 100_000]
    queue.redis.lpush(keys.QUEUE, *junk, '{"id": "by-hand", "data": {"type": "hello"}}', *junk)

    task = described(http, "by-hand")

    assert (task["state"], task["ahead"], task["result"]) == ("waiting", len(junk), None)
    page = listed(http)
    assert page["queue_length"] == 2 * len(junk) + 1
    with connect_sse(http, "GET", "/api/tasks/by-hand/events") as source:
        assert source.response.status_code == 200


def test_record_that_somebody_spoilt_is_no_task(http: httpx.Client, queue: TaskQueue) -> None:
    """A record without a status neither fails the list nor the task."""
    queue.redis.hset(keys.record("spoilt"), "foo", "bar")
    queue.redis.zadd(keys.RECENT, {"spoilt": 1})

    assert_problem(http.get("/api/tasks/spoilt"), 404)
    time.sleep(0.6)  # the list is that old at most, and "not in it" is no event
    assert listed(http, q="spoilt")["tasks"] == []


@pytest.mark.parametrize(
    "task_id",
    [
        "99999999",
        "no-such",
        "a:b@c.d_e-f",
        "%20",
        "%00",
        "a%2Fb",
        "..%2F..",
        "%22%3E%3Cscript%3E",
        "x" * 129,
        "%ED%A0%80",
        "%FF",
        "ünï",
        "{}",
        "*",
        "7%0D%0ASet-Cookie:%20a=b",
        "%D9%A3",
    ],
)
def test_unknown_and_odd_ids_are_404(http: httpx.Client, task_id: str) -> None:
    """An id that no task has, or that none can have, is 404 wherever it stands."""
    for path in ("", "/events", "/events?format=ag-ui"):
        assert_problem(http.get(f"/api/tasks/{task_id}{path}"), 404)
    for path in ("/cancel", "/retry"):
        assert_problem(http.post(f"/api/tasks/{task_id}{path}"), 404)


# -- putting ----------------------------------------------------------------------------------------------------


def test_put_answers_with_the_task(http: httpx.Client, queue: TaskQueue) -> None:
    """POST puts a task that a worker gets, and says where it is."""
    body = {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}}

    response = http.post("/api/tasks", json=body)

    assert response.status_code == 201
    task = response.json()
    assert response.headers["location"] == f"/api/tasks/{task['id']}"
    assert (task["state"], task["type"], task["data"]) == ("waiting", "process_data", body)
    assert described(http, task["id"]) == task
    taken = take(queue)
    assert taken is not None and (taken.id, taken.data) == (task["id"], body)


def test_put_without_payload_has_an_empty_one(http: httpx.Client) -> None:
    """A payload may be left out."""
    assert http.post("/api/tasks", json={"type": "t"}).json()["data"] == {"type": "t", "payload": {}}


PAYLOADS = [
    "<script>alert(1)</script>",
    "\"'`</textarea>",
    "\ud800",
    "\udfff\ud83d",
    "\x00\x01\x7f\u2028\u2029",
    "𝄞 ünï",
    None,
    [],
    7,
    -0.5,
    10**300,
    {"": {"id": "x", "__proto__": 1}},
    "null",
    {"\ud800": "\udc00"},
    True,
    "a" * 900_000,
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda value: ascii(value)[:25])
def test_put_keeps_any_payload(http: httpx.Client, payload: Any) -> None:
    """What goes in comes out: of the answer, the task and, where it is small, the list."""
    response = post_json(http, "/api/tasks", {"type": "t", "payload": payload})

    assert response.status_code == 201, response.text[:300]
    assert response.json()["data"]["payload"] == payload
    assert described(http, response.json()["id"])["data"]["payload"] == payload
    in_list = listed(http, limit=1)["tasks"][0]
    assert in_list["data_is_cut"] or in_list["data"]["payload"] == payload


@pytest.mark.parametrize("depth", [100, 499, 500, 850, 1000, 100_000])
def test_put_of_deep_nesting_spoils_no_list(http: httpx.Client, queue: TaskQueue, depth: int) -> None:
    """A payload is put or refused, whatever its depth; and the list can be read after that."""
    body = '{"type": "deep", "payload": ' + "[" * depth + "]" * depth + "}"

    response = http.post("/api/tasks", content=body, headers={"Content-Type": "application/json"})

    assert http.get("/api/tasks").status_code == 200
    if response.status_code == 201:
        location = response.headers["location"]
        assert http.get(location).status_code == 200
        queue.redis.zrem(keys.RECENT, location.rpartition("/")[2])
        assert depth < MAX_DEPTH  # beside it, the data themselves are an object
    else:
        assert_problem(response, 422 if depth < 970 else 400)  # too deep for a task, or for the parser
        assert depth >= MAX_DEPTH


def test_hand_made_deep_nesting_spoils_no_list(http: httpx.Client, queue: TaskQueue) -> None:
    """Data, result and events that nest deeper than Python can handle are cut off or left out; nothing fails."""
    for depth in (900, 950, 970, 980, 990, 5000):
        deep, name = "[" * depth + "]" * depth, f"deep-{depth}"
        record = {"status": "running", "data": deep, "result": deep, "put_at": 1, "attempts": 1, "worker": "w"}
        queue.redis.hset(keys.record(name), mapping=record)
        queue.redis.zadd(keys.RECENT, {name: 5})
        queue.redis.xadd(keys.stream(name), {"event": "progress", "percent": deep, "step": deep})
        assert f'"id": "{name}"' in http.get(f"/api/tasks/{name}").text  # which this process may not be able to parse
        for path in (f"/api/tasks/{name}/events", f"/api/events?task={name}"):
            event = one_event(http, path)
            assert event.event == "progress" and f'"task": "{name}"' in event.data
    wait_until(lambda: http.get("/api/tasks?q=deep-").text.count('"id": "deep-') == 6, "the list is read again")
    queue.redis.zremrangebyscore(keys.RECENT, 5, 5)


BAD_BODIES = {
    "not JSON": (b"{", 400),
    "NaN": (b'{"type": "t", "payload": NaN}', 400),
    "infinite": (b'{"type": "t", "payload": 1e999}', 400),
    "not UTF-8": (b'{"type": "\xff"}', 400),
    "UTF-16": ('{"type": "t"}'.encode("utf-16"), 400),
    "BOM": (b"\xef\xbb\xbf{}", 400),
    "long number": (b'{"type": "t", "payload": ' + b"1" * 5000 + b"}", 400),
    "two": (b'{"type": "t"}{}', 400),
    "empty": (b"", 422),
    "list": (b"[]", 422),
    "null": (b"null", 422),
    "text": (b'"t"', 422),
    "no type": (b'{"payload": 1}', 422),
    "type is a number": (b'{"type": 7}', 422),
    "type is empty": (b'{"type": ""}', 422),
    "unknown field": (b'{"type": "t", "id": "7"}', 422),
    "unknown surrogate": (b'{"type": "t", "\\ud800": 1}', 422),
    "too large": (b'{"type": "' + b"x" * 1_000_001 + b'"}', 422),
    "over the limit": (b'{"type": "' + b"x" * 1_100_000 + b'"}', 413),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_put_refuses_a_bad_body(http: httpx.Client, name: str) -> None:
    """What is no task is refused, and says what is wrong with it."""
    body, status = BAD_BODIES[name]
    assert assert_problem(http.post("/api/tasks", content=body, headers={"Content-Type": "application/json"}), status)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "ünï", None]
)
def test_put_refuses_another_content_type(board: Dashboard, kind: str | None) -> None:
    """JSON that does not say so, as a form of another site could send it, is 415."""
    headers = [] if kind is None else [f"Content-Type: {kind}"]
    assert status_of(board.ask("POST /api/tasks", *headers, "Content-Length: 13", body=b'{"type": "t"}')) == 415


def test_put_reads_no_more_than_the_limit_of_a_chunked_body(board: Dashboard) -> None:
    """A body without a Content-Length is cut off at the limit, with 413, while it is still being sent."""
    with closing(socket.create_connection(("127.0.0.1", board.port), timeout=60)) as connection:
        connection.sendall(
            b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(12):
            connection.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")  # and no end
        answer = connection.recv(65536)

    assert status_of(answer) == 413 and b"application/problem+json" in answer


def test_client_that_leaves_in_the_middle_of_a_body_leaves_no_traceback(board: Dashboard) -> None:
    """Whoever hangs up while it sends is nobody's error."""
    with closing(socket.create_connection(("127.0.0.1", board.port))) as connection:
        connection.sendall(
            b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        connection.shutdown(socket.SHUT_RDWR)

    assert board.http.get("/healthz").status_code == 200
    assert "Traceback" not in board.stderr()


# -- idempotency ------------------------------------------------------------------------------------------------


def test_put_with_the_same_key_is_one_task(http: httpx.Client, queue: TaskQueue) -> None:
    """A repeated POST gets the first task, and nothing more is queued; the same key with other data is 409."""
    key = {"Idempotency-Key": "order 17"}

    first, again = (post_json(http, "/api/tasks", {"type": "t", "payload": "\ud800"}, **key) for _ in range(2))
    other = post_json(http, "/api/tasks", {"type": "t", "payload": 2}, **key)

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json() and first.headers["location"] == again.headers["location"]
    assert_problem(other, 409)
    assert queue.redis.llen(keys.QUEUE) == 1
    assert http.post("/api/tasks", json={"type": "t"}, headers={"Idempotency-Key": "order 18"}).status_code == 201


def test_put_with_the_same_key_at_once_is_one_task(board: Dashboard, queue: TaskQueue) -> None:
    """Twenty POSTs of one key at the same time put one task; one of them is told that it is new."""

    def post(_: int) -> tuple[int, str]:
        answer = httpx.post(f"{board.url}/api/tasks", json={"type": "t"}, headers={"Idempotency-Key": "at-once"})
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(post, range(20)))

    assert len({task_id for _, task_id in answers}) == 1
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    assert queue.redis.llen(keys.QUEUE) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "ünï", "a\tb"])
def test_put_refuses_an_odd_key(board: Dashboard, key: str) -> None:
    """A key that cannot be compared safely is 400, not another task."""
    answer = board.ask(
        "POST /api/tasks",
        f"Idempotency-Key: {key}",
        "Content-Type: application/json",
        "Content-Length: 13",
        body=b'{"type": "t"}',
    )
    assert status_of(answer) == 400


# -- cancel and retry -------------------------------------------------------------------------------------------


def test_cancel_ends_a_waiting_task(http: httpx.Client, queue: TaskQueue) -> None:
    """A task that waits is cancelled at once, with the reason; then it has ended, which is 409."""
    task_id = queue.put("x").id

    response = post_json(http, f"/api/tasks/{task_id}/cancel", {"reason": "not <b>needed</b> \ud800"})

    assert (response.status_code, response.json()) == (202, {"outcome": "cancelled"})
    assert described(http, task_id)["state"] == "cancelled"
    assert described(http, task_id)["result"] == "not <b>needed</b> ?"
    assert task_id in assert_problem(http.post(f"/api/tasks/{task_id}/cancel"), 409)


def test_cancel_asks_a_running_task_to_end(http: httpx.Client, queue: TaskQueue) -> None:
    """A task that runs is ended by its worker; until then it says why it was asked for."""
    task, _ = claimed(queue)

    response = http.post(f"/api/tasks/{task.id}/cancel")

    assert (response.status_code, response.json()) == (202, {"outcome": "requested"})
    assert described(http, task.id)["cancel"] == "cancelled in the dashboard"
    assert described(http, task.id)["state"] == "running"


def test_cancel_of_an_ended_task_is_409(http: httpx.Client, queue: TaskQueue) -> None:
    """What has ended cannot be cancelled."""
    for outcome in ("completed", "failed"):
        assert outcome in assert_problem(http.post(f"/api/tasks/{ended(queue, outcome, 'x')}/cancel"), 409)


def test_task_pushed_by_hand_cannot_be_steered_before_its_claim(http: httpx.Client, queue: TaskQueue) -> None:
    """It waits, so it is not unknown; but nothing can be asked of what is only an element of the list: 409 says why."""
    queue.redis.lpush(keys.QUEUE, '{"id": "by-hand-2", "data": 1}')
    assert described(http, "by-hand-2")["state"] == "waiting"

    for path in ("cancel", "retry"):
        assert "pushed by hand" in assert_problem(http.post(f"/api/tasks/by-hand-2/{path}"), 409)
        assert_problem(http.post(f"/api/tasks/by-hand-3/{path}"), 404)

    assert queue.redis.llen(keys.QUEUE) == 1 and not queue.redis.exists(keys.record("by-hand-2"))


@pytest.mark.parametrize("reason", ["", "x" * 201, 7, None, [], {}])
def test_cancel_refuses_an_odd_reason(http: httpx.Client, queue: TaskQueue, reason: Any) -> None:
    """A reason is a line of text; with another one nothing is cancelled."""
    task_id = queue.put("x").id
    assert_problem(http.post(f"/api/tasks/{task_id}/cancel", json={"reason": reason}), 422)
    assert described(http, task_id)["state"] == "waiting"


def test_retry_puts_a_dead_task_again(http: httpx.Client, queue: TaskQueue) -> None:
    """A failed task becomes a new one, once, however often it is asked for."""
    dead = ended(queue, "failed", "why")
    assert any(json.loads(letter)["id"] == dead for letter in queue.redis.lrange(keys.DEAD, 0, -1))

    response, again = (http.post(f"/api/tasks/{dead}/retry") for _ in range(2))

    assert response.status_code == again.status_code == 201
    assert response.headers["location"] == f"/api/tasks/{dead}.r2"
    assert response.json()["id"] == again.json()["id"] == f"{dead}.r2"
    assert (response.json()["state"], response.json()["data"]) == ("waiting", "work")
    assert queue.redis.llen(keys.QUEUE) == 1
    assert not any(json.loads(letter)["id"] == dead for letter in queue.redis.lrange(keys.DEAD, 0, -1))


def test_retry_of_a_task_that_is_not_dead_is_409(http: httpx.Client, queue: TaskQueue) -> None:
    """Only what has failed is put again."""
    for task_id in (ended(queue), claimed(queue)[0].id, queue.put("x").id):
        assert_problem(http.post(f"/api/tasks/{task_id}/retry"), 409)


# -- the rest ---------------------------------------------------------------------------------------------------


async def ask(task: Task, log: TaskLog) -> Any:
    return [await log.ask("Send it?", ["yes", "no"]), await log.inbox()]


def test_question_is_told_and_answered(http: httpx.Client, queue: TaskQueue, redis_server: Server) -> None:
    """A parked task waits, with its question; after the answer it goes on, and its log names the person."""
    task_id = queue.put({"type": "asks"}).id
    attempt(redis_server.url, queue.redis, ask)

    task = http.get(f"/api/tasks/{task_id}").json()
    assert (task["state"], task["status"]) == ("waiting", "parked")
    assert {**task["question"], "expires_at": 0} == {
        "number": 1,
        "question": "Send it?",
        "options": ["yes", "no"],
        "expires_at": 0,
    }
    assert task_id in [one["id"] for one in listed(http, state="waiting")["tasks"]]

    assert post_json(http, f"/api/tasks/{task_id}/tell", {"text": "be quick", "by": "bob"}).status_code == 204
    answer = post_json(http, f"/api/tasks/{task_id}/answer", {"answer": "YES", "number": 1, "by": "ann"})
    assert (answer.status_code, answer.json()) == (200, {"answer": "yes"})
    attempt(redis_server.url, queue.redis, ask)

    task = http.get(f"/api/tasks/{task_id}").json()
    assert (task["state"], task["question"], task["result"]) == ("completed", None, ["yes", ["be quick"]])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("answer", {"answer": "maybe"}, 409),
        ("answer", {"answer": "yes", "number": 2}, 409),
        ("answer", {"answer": ""}, 422),
        ("answer", {"text": "yes"}, 422),
        ("tell", {"text": ""}, 422),
        ("tell", {"text": "x" * 20_001}, 409),
    ],
)
def test_answer_or_message_that_cannot_count_is_refused(
    http: httpx.Client, queue: TaskQueue, redis_server: Server, path: str, body: Any, status: int
) -> None:
    task_id = queue.put({"type": "asks"}).id
    attempt(redis_server.url, queue.redis, ask)
    assert_problem(post_json(http, f"/api/tasks/{task_id}/{path}", body), status)
    queue.cancel(task_id, "enough")
    assert_problem(post_json(http, f"/api/tasks/{task_id}/answer", {"answer": "yes"}), 409)
    assert_problem(post_json(http, "/api/tasks/7777/answer", {"answer": "yes"}), 404)
    assert_problem(post_json(http, "/api/tasks/7777/tell", {"text": "hello"}), 404)


def test_question_that_somebody_has_spoilt_is_none(http: httpx.Client, queue: TaskQueue, redis_server: Server) -> None:
    task_id = queue.put({"type": "asks"}).id
    attempt(redis_server.url, queue.redis, ask)
    for spoilt in ("no JSON", "[]", "{}"):
        queue.redis.hset(keys.record(task_id), "question", spoilt)
        assert http.get(f"/api/tasks/{task_id}").json()["question"] is None


def test_samples_can_be_put(http: httpx.Client) -> None:
    """The samples are files of the project, as a task names them."""
    samples = http.get("/api/samples").json()["samples"]
    assert "sample_data/sales.csv" in samples
    assert all((Path(__file__).parents[2] / sample).is_file() for sample in samples)


def test_session_and_health_say_how_it_is(http: httpx.Client) -> None:
    """Redis is up, and nobody needs to log in here."""
    assert http.get("/api/session").json() == {"redis": "up", "login": False}
    assert (http.get("/healthz").status_code, http.get("/healthz").json()) == (200, {"redis": "up"})


def metrics_of(http: httpx.Client) -> dict[str, float]:
    response = http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {sample.name + "".join(sorted(sample.labels.values())): sample.value for sample in samples}


def test_metrics_follow_what_happens(http: httpx.Client, queue: TaskQueue) -> None:
    """Prometheus reads the queue, its ends by outcome, and the watchers and events of this process."""
    before = metrics_of(http)
    for outcome in ("completed", "failed", "cancelled"):
        ended(queue, outcome, "x")
    task, log = claimed(queue)
    queue.put("waits")

    with connect_sse(http, "GET", f"/api/tasks/{task.id}/events") as source:
        events = events_of(source)
        log.add("processing", step="history, or live")
        next(events)
        log.add("processing", step="live")
        next(events)
        watched = metrics_of(http)
        assert watched["dashboard_watchers"] == before["dashboard_watchers"] + 1
        assert watched["dashboard_streams"] == before["dashboard_streams"] + 1

    wait_until(lambda: metrics_of(http)["dashboard_watchers"] == before["dashboard_watchers"], "the watcher has gone")
    after = metrics_of(http)
    assert after["task_queue_length"] == 1
    assert after["task_queue_oldest_age_seconds"] >= 0
    for name in ("tasks_ended_totalcompleted", "tasks_ended_totalfailed", "tasks_ended_totalcancelled"):
        assert after[name] == before[name] + 1
    assert after["task_queue_oldest_waiting_age_seconds"] > 0
    assert after["task_queue_running"] == before["task_queue_running"] + 1
    assert after["task_queue_resting"] == before["task_queue_resting"]
    assert after["task_queue_dead"] == before["task_queue_dead"] + 1
    assert after["dashboard_events_total"] > before["dashboard_events_total"]
    assert after["dashboard_lag_seconds_count"] == after["dashboard_events_total"]
    assert f"dashboard_lag_seconds_bucket{float(LAG_BUCKETS[0])}" in after


PATHS = [
    "/",
    "/tasks/7",
    "/api/tasks",
    "/api/samples",
    "/api/session",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/static/style.css",
]


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    """HEAD has GET's status and type, and no body."""
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b"" and head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
@pytest.mark.parametrize("path", [*PATHS, "/api/tasks/7", "/api/tasks/7/cancel", "/api/events", "/login"])
def test_another_method_is_405(http: httpx.Client, method: str, path: str) -> None:
    """405 says which methods there are."""
    response = http.request(method, path)
    assert_problem(response, 405)
    allowed = set(re.split(", *", response.headers["allow"]))
    assert method not in allowed
    assert allowed == (
        {"POST"}
        if path.endswith("cancel")
        else {"GET", "HEAD"} | ({"POST"} if path in ("/api/tasks", "/login") else set())
    )


@pytest.mark.parametrize(
    "path", ["/api", "/api/", "/api/tasks/", "/tasks", "/nosuch", "//evil.example/", "/api/tasks/7/x"]
)
def test_unknown_paths_are_404(http: httpx.Client, path: str) -> None:
    """What is not there is 404, and no redirect."""
    assert_problem(http.get(http.base_url.copy_with(path=path)), 404)


def test_pipelined_requests_are_answered_in_order(board: Dashboard) -> None:
    """Three requests sent at once on one connection get three answers, in order; the last closes it."""
    host = b"Host: localhost\r\n"
    answer = board.raw(
        b"GET /healthz HTTP/1.1\r\n" + host + b"\r\n"
        b"POST /api/tasks HTTP/1.1\r\n" + host + b"Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
        b"GET /api/samples HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n"
    )
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"422", b"200"]
    assert answer.index(b'{"redis"') < answer.index(b"Unprocessable") < answer.index(b"samples")


def test_connection_is_kept_alive_after_an_error(board: Dashboard) -> None:
    """An error does not cost the connection."""
    with closing(HTTPConnection("127.0.0.1", board.port, timeout=60)) as connection:
        connection.connect()
        opened = connection.sock
        for path, status in (("/nosuch", 404), ("/healthz", 200), ("/api/tasks?limit=0", 400), ("/healthz", 200)):
            connection.request("GET", path)
            with connection.getresponse() as response:
                assert response.status == status and response.read()
        assert connection.sock is opened


# -- server-sent events -----------------------------------------------------------------------------------------


def events_of(source: EventSource) -> Iterator[ServerSentEvent]:
    """Yield the events as a browser has them: httpx-sse makes one of a mere `retry:`, too."""
    return (event for event in source.iter_sse() if event.data)


def one_event(http: httpx.Client, path: str, **headers: str) -> ServerSentEvent:
    with connect_sse(http, "GET", path, headers=headers) as source:
        return next(events_of(source))


def all_events(http: httpx.Client, path: str, **headers: str) -> list[ServerSentEvent]:
    """Return the events until the server closes the stream."""
    with connect_sse(http, "GET", path, headers=headers) as source:
        assert source.response.status_code == 200
        return list(events_of(source))


def test_events_are_sent_by_the_rules(http: httpx.Client, queue: TaskQueue) -> None:
    """The headers keep proxies from holding events back; retry comes first; an event is id, event and one data line."""
    task, log = claimed(queue)
    log.add("processing", step='two\nlines\r\n\u2028 "quoted" <script> \ud800')
    log.add("progress", percent=1, step="s", id="not ours", task="nor this")
    log.add("completed", result=1)
    entries = queue.redis.xrange(keys.stream(task.id))

    response = http.get(f"/api/tasks/{task.id}/events")

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    assert response.text.isascii() and "\r" not in response.text
    first, *blocks, rest = response.text.split("\n\n")
    assert first == "retry: 1000" and rest == "" and len(blocks) == len(entries)
    for block, (entry_id, fields) in zip(blocks, entries, strict=True):
        id_line, event_line, data_line = block.split("\n")
        assert id_line == f"id: {entry_id}" and event_line == f"event: {fields['event']}"
        data = json.loads(data_line.removeprefix("data: "))
        assert (data["task"], data["id"], data["event"]) == (task.id, entry_id, fields["event"])
        assert data["timestamp"] == fields["timestamp"]
    assert json.loads(blocks[0].split("data: ")[1])["step"] == 'two\nlines\r\n\u2028 "quoted" <script> \ud800'


def test_events_of_an_odd_name_come_as_message(http: httpx.Client, queue: TaskQueue) -> None:
    """An entry that somebody added by hand cannot break out of its frame."""
    queue.put("x", id="odd-name")
    queue.redis.xadd(keys.stream("odd-name"), {"event": "a\nid: 9-9\ndata: {}", "x": "y"})

    event = one_event(http, "/api/tasks/odd-name/events")

    assert event.event == "message" and event.json()["event"] == "a\nid: 9-9\ndata: {}"


@pytest.mark.parametrize("name", ["made_up", "gap", "reset", "redis", "", "message", "open"])
def test_events_of_names_that_nobody_listens_for_come_as_message(
    http: httpx.Client, queue: TaskQueue, name: str
) -> None:
    """EventSource can only listen for names that it knows; and nobody's entry passes for the server's own words."""
    task_id = f"named-{name}"
    queue.put("x", id=task_id)
    entry_id = queue.redis.xadd(keys.stream(task_id), {"event": name, "missed": 7})

    for path in (f"/api/tasks/{task_id}/events", f"/api/events?task={task_id}"):
        event = one_event(http, path)
        assert (event.event, event.json()["event"], event.json()["id"]) == ("message", name, entry_id)
        assert event.id.endswith(entry_id)  # a real reset has none
    with connect_sse(http, "GET", f"/api/tasks/{task_id}/events?format=ag-ui") as source:
        kinds = [next(events).json() for events in [events_of(source)] for _ in range(3)]
    own = "message" if name in ("gap", "reset", "redis") else name
    assert [kind["type"] for kind in kinds] == ["RUN_STARTED", "STATE_SNAPSHOT", "CUSTOM"]
    assert kinds[2]["name"] == own


def test_events_resume_after_exactly_the_cursor(http: httpx.Client, queue: TaskQueue) -> None:
    """?since and Last-Event-ID go on after that entry, in both protocols' own ways; the header counts more."""
    task_id = ended(queue, events=5)
    path = f"/api/tasks/{task_id}/events"
    ids = [event.id for event in all_events(http, path)]
    assert ids == [entry_id for entry_id, _ in queue.redis.xrange(keys.stream(task_id))] and len(ids) == 6

    for place, cursor in enumerate(ids[:-1]):
        assert [event.id for event in all_events(http, f"{path}?since={cursor}")] == ids[place + 1 :]
        assert [event.id for event in all_events(http, path, **{"Last-Event-ID": cursor})] == ids[place + 1 :]
        several = f"/api/events?task={task_id}&since={task_id}={cursor}"
        assert [event.json()["id"] for event in all_events(http, several)] == ids[place + 1 :]
    assert [e.id for e in all_events(http, f"{path}?since=$", **{"Last-Event-ID": ids[0]})] == ids[1:]
    assert [e.id for e in all_events(http, f"{path}?since={'0' * 300}")] == ids  # more digits than Redis would read


def test_events_after_the_end_are_204(http: httpx.Client, queue: TaskQueue) -> None:
    """A reconnect after the terminal event is told to stop; so is one to a stream that has expired."""
    task_id = ended(queue, events=1)
    path = f"/api/tasks/{task_id}/events"
    last = all_events(http, path)[-1].id
    several = all_events(http, f"/api/events?task={task_id}")[-1].id

    assert http.get(path, headers={"Last-Event-ID": last}).status_code == 204
    assert http.get(f"{path}?since={last}").status_code == 204
    assert http.get(f"{path}?since=$").status_code == 204
    assert http.get(f"{path}?format=ag-ui", headers={"Last-Event-ID": last}).status_code == 204
    assert http.get(f"/api/events?task={task_id}", headers={"Last-Event-ID": several}).status_code == 204
    assert http.get(f"/api/events?task={task_id}&since=gone=1-1").status_code == 204

    queue.redis.delete(keys.stream(task_id))
    assert http.get(path).status_code == http.get(f"/api/events?task={task_id}").status_code == 204


CURSORS = [
    "x",
    "1-",
    "-1",
    "1-2-3",
    "1-x",
    "+1",
    "1 - 1",
    "0x1",
    "1.5",
    "1e3",
    "18446744073709551616-0",
    "0-18446744073709551616",
    "9" * 5000,
    "$$",
    "(1-1",
    "-",
    "+",
    "*",
    ">",
    "null",
    "ünï",
    "1-1,2-2",
    "7=1-1",
    "\x7f",
]


@pytest.mark.parametrize("cursor", CURSORS, ids=lambda text: ascii(text)[:20])
def test_events_refuse_a_malformed_cursor(board: Dashboard, queue: TaskQueue, cursor: str) -> None:
    """A Last-Event-ID that is none is 400, wherever it is sent."""
    queue.put("x", id="cursors")
    for path in ("/api/tasks/cursors/events", "/api/tasks/cursors/events?format=ag-ui"):
        assert status_of(board.ask(f"GET {path}", f"Last-Event-ID: {cursor}")) == 400
    if cursor != "7=1-1":
        for path in ("/api/events", "/api/events?task=cursors"):
            assert status_of(board.ask(f"GET {path}", f"Last-Event-ID: {cursor}")) == 400
            assert status_of(board.ask(f"GET {path}", f"Last-Event-ID: cursors={cursor}")) == 400
    assert_problem(board.http.get("/api/tasks/cursors/events", params={"since": cursor}), 400)


def test_events_refuse_what_they_cannot_watch(http: httpx.Client) -> None:
    """Another format, too many tasks and ids that are none are refused before a stream begins."""
    assert_problem(http.get("/api/tasks/7/events?format=xml"), 400)
    assert_problem(http.get("/api/events?" + "&".join(f"task={n}" for n in range(101))), 400)
    assert_problem(http.get("/api/events?since=" + ",".join(f"{n}=1-1" for n in range(101))), 400)
    assert_problem(http.get("/api/events?task=a%20b"), 404)


def test_events_tell_of_a_gap(http: httpx.Client, queue: TaskQueue) -> None:
    """Where trimming has passed the cursor, a gap tells how many were missed, and its id loses none of the rest."""
    task_id = ended(queue, events=9)
    stream = keys.stream(task_id)
    ids = [entry_id for entry_id, _ in queue.redis.xrange(stream)]
    queue.redis.xtrim(stream, minid=ids[6], approximate=False)

    events = all_events(http, f"/api/tasks/{task_id}/events?since={ids[1]}")
    assert [event.event for event in events] == ["gap", "progress", "progress", "progress", "completed"]
    assert events[0].json()["missed"] == 4 and events[0].json()["task"] == task_id

    several = all_events(http, f"/api/events?task={task_id}&since={task_id}={ids[1]}")
    assert [event.event for event in several] == ["gap", "progress", "progress", "progress", "completed"]
    resumed = all_events(http, f"/api/events?task={task_id}", **{"Last-Event-ID": several[0].id})
    assert [event.json()["id"] for event in resumed if event.event != "gap"] == ids[6:]


def test_events_tell_of_a_reset(http: httpx.Client, queue: TaskQueue) -> None:
    """A cursor that is ahead of the stream gets a reset, and all that there is."""
    task_id = ended(queue, events=2)

    events = all_events(http, f"/api/tasks/{task_id}/events?since=18446744073709551615-18446744073709551615")

    assert [event.event for event in events] == ["reset", "progress", "progress", "completed"]
    assert events[0].json()["cursor"] == "18446744073709551615-18446744073709551615"


def test_events_of_all_tasks_have_those_that_come(http: httpx.Client, queue: TaskQueue) -> None:
    """/api/events begins with what has not ended, and takes up each task that is put."""
    running, log = claimed(queue)
    log.add("processing", step="before")
    seen: dict[str, list[str]] = {}

    with connect_sse(http, "GET", "/api/events") as source:
        assert source.response.headers["cache-control"] == "no-store"
        events = events_of(source)
        while running.id not in seen:
            data = next(events).json()
            seen.setdefault(data["task"], []).append(data["event"])
        new, new_log = claimed(queue)
        new_log.add("processing", step="new")
        new_log.add("completed", result=1)
        finish(queue, new, "completed", 1)
        while "completed" not in seen.get(new.id, []):
            data = next(events).json()
            seen.setdefault(data["task"], []).append(data["event"])

    assert seen[running.id] == ["processing"] and seen[new.id] == ["processing", "completed"]


def test_events_of_several_tasks_end_with_the_last(http: httpx.Client, queue: TaskQueue) -> None:
    """One connection has several tasks and closes when all have ended; cut anywhere, it resumes without loss."""
    tasks = [ended(queue, events=3) for _ in range(3)]
    path = "/api/events?" + "&".join(f"task={task_id}" for task_id in tasks)

    events = all_events(http, path)

    wanted = {(task_id, entry_id) for task_id in tasks for entry_id, _ in queue.redis.xrange(keys.stream(task_id))}
    assert {(event.json()["task"], event.json()["id"]) for event in events} == wanted and len(events) == len(wanted)
    for cut in range(len(events) - 1):
        seen = events[: cut + 1] + all_events(http, path, **{"Last-Event-ID": events[cut].id})
        assert {(event.json()["task"], event.json()["id"]) for event in seen} == wanted


def test_events_in_the_ag_ui_protocol(http: httpx.Client, queue: TaskQueue) -> None:
    """?format=ag-ui tells the same task as AG-UI events, an entry's id on the last of its frames."""
    task_id = ended(queue, events=2)
    ids = [entry_id for entry_id, _ in queue.redis.xrange(keys.stream(task_id))]

    response = http.get(f"/api/tasks/{task_id}/events?format=ag-ui")

    kinds = re.findall('"type":"([A-Z_]+)"', response.text)
    assert kinds[0] == "RUN_STARTED" and kinds[-1] == "RUN_FINISHED" and kinds.count("STATE_DELTA") == 2
    assert re.findall("^id: (.*)$", response.text, re.M) == ids
    resumed = http.get(f"/api/tasks/{task_id}/events?format=ag-ui", headers={"Last-Event-ID": ids[1]})
    assert re.findall("^id: (.*)$", resumed.text, re.M) == ids[2:]


def test_head_of_events_opens_no_stream(http: httpx.Client, queue: TaskQueue) -> None:
    """HEAD has the headers of a stream, ends, and leaves no watcher behind."""
    queue.put("x", id="head")
    before = metrics_of(http)["dashboard_watchers"]
    for path in ("/api/events", "/api/tasks/head/events", "/api/tasks/head/events?format=ag-ui"):
        response = http.head(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    wait_until(lambda: metrics_of(http)["dashboard_watchers"] == before, "no watcher is left")


def test_clients_that_leave_leave_no_watcher(board: Dashboard, http: httpx.Client, queue: TaskQueue) -> None:
    """Whoever hangs up, at once or in the middle, is forgotten."""
    _, log = claimed(queue)
    log.add("processing", step="x")
    before = metrics_of(http)["dashboard_watchers"]
    for path in ("/api/events", f"/api/tasks/{log.task_id}/events", f"/api/events?task={log.task_id}"):
        for wait in (False, True):
            with closing(socket.create_connection(("127.0.0.1", board.port), timeout=60)) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                if wait:
                    assert status_of(connection.recv(65536)) == 200
    wait_until(lambda: metrics_of(http)["dashboard_watchers"] == before, "they are forgotten")


def test_comments_keep_an_idle_stream_open(redis_server: Server, queue: TaskQueue) -> None:
    """A proxy closes what is silent for a minute or less, so a comment comes every 15 s; here each second."""
    assert sse.PING_SECONDS == 15
    queue.put("x", id="idle")
    app = make_app(queue, lambda: connect_async(redis_server.url), frozenset({"127.0.0.1"}), ping_seconds=1)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/tasks/idle/events"
            with httpx.stream("GET", url, timeout=60) as response:
                lines = response.iter_lines()
                found = [next(lines) for _ in range(6)]
        finally:
            server.should_exit = True
            thread.join(60)
    assert found[:2] == ["retry: 1000", ""] and found[2].startswith(": ") and found[4].startswith(": ")


# -- what breaks ------------------------------------------------------------------------------------------------


@pytest.fixture
def own(valkey: Server, tmp_path: Path) -> Iterator[Dashboard]:
    """A dashboard on a server of its own, to break."""
    with dashboard(valkey.url, tmp_path) as one:
        yield one


REQUESTS = [
    ("GET", "/api/tasks"),
    ("GET", "/api/tasks/7"),
    ("POST", "/api/tasks"),
    ("POST", "/api/tasks/7/cancel"),
    ("POST", "/api/tasks/7/retry"),
    ("GET", "/api/tasks/7/events"),
    ("GET", "/api/events"),
    ("GET", "/healthz"),
    ("GET", "/metrics"),
]


def ask_all(one: Dashboard, times: int = 1) -> list[tuple[str, httpx.Response]]:
    """Send all requests that need Redis, at the same time; return each answer."""

    def ask(request: tuple[str, str]) -> tuple[str, httpx.Response]:
        body = {"json": {"type": "t"}} if request == ("POST", "/api/tasks") else {}
        response = client.request(request[0], request[1], **body)  # type: ignore[arg-type]
        return " ".join(request), response

    count = len(REQUESTS) * times
    with httpx.Client(base_url=one.url, timeout=60) as client, ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, REQUESTS * times))


@pytest.mark.parametrize("how", ["stopped", "silent"])
def test_requests_while_redis_is_away_are_503(own: Dashboard, valkey: Server, how: str) -> None:
    """Redis that is gone, or gives no answer, is 503 for all who ask; when it is back, all is well."""
    own.http.get("/api/tasks")  # so that connections are open
    own.http.get("/metrics")
    valkey.stop() if how == "stopped" else valkey.send(signal.SIGSTOP)

    for request, response in ask_all(own, times=2):
        assert_problem(response, 503)
        if "healthz" in request:
            assert response.json()["redis"] == "down"
    assert own.http.get("/").status_code == own.http.get("/static/style.css").status_code == 200
    assert own.http.get("/api/session").json() == {"redis": "down", "login": False}

    valkey.start() if how == "stopped" else valkey.send(signal.SIGCONT)
    wait_until(lambda: own.http.get("/healthz").status_code == 200, "it recovers by itself")
    assert own.http.get("/api/tasks").status_code == own.http.get("/metrics").status_code == 200
    assert own.http.post("/api/tasks", json={"type": "t"}).status_code == 201


def test_stream_goes_on_after_redis_was_away(own: Dashboard, valkey: Server) -> None:
    """A watcher is told that Redis went and came, and gets what was written since, once."""
    queue = TaskQueue(valkey.client())
    task, log = claimed(queue)
    log.add("processing", step="1")
    with connect_sse(own.http, "GET", f"/api/tasks/{task.id}/events") as source:
        events = events_of(source)
        assert next(events).json()["step"] == "1"
        valkey.stop()
        down = next(events)
        assert (down.event, down.json()) == ("redis", {"redis": "down"})
        valkey.start()
        up = next(events)
        assert (up.event, up.json()) == ("redis", {"redis": "up"})
        last = log.add("completed", result=2)
        assert [(event.event, event.id) for event in events] == [("completed", last)]


def test_sigterm_closes_the_streams_cleanly(valkey: Server, tmp_path: Path) -> None:
    """Watchers' streams end as HTTP has it, not by a cut connection; the program ends with exit code 0."""
    queue = TaskQueue(valkey.client())
    task, log = claimed(queue)
    log.add("processing", step="x" * 100)
    errors: list[Exception] = []
    with dashboard(valkey.url, tmp_path) as one:
        opened = threading.Barrier(10)

        def watch(path: str) -> None:
            try:
                with httpx.stream("GET", one.url + path, timeout=60) as response:
                    chunks = response.iter_raw()
                    next(chunks)
                    opened.wait(60)
                    for _ in chunks:
                        pass
            except Exception as error:
                errors.append(error)

        paths = [f"/api/tasks/{task.id}/events", "/api/events", f"/api/tasks/{task.id}/events?format=ag-ui"] * 3
        threads = [threading.Thread(target=watch, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        opened.wait(60)

        assert one.stop() == 0
        for thread in threads:
            thread.join(60)

    assert errors == []
    assert "Traceback" not in one.stderr() and "ERROR" not in one.stderr()


def test_sigterm_does_not_wait_for_a_client_that_does_not_read(valkey: Server, tmp_path: Path) -> None:
    """A watcher that has stopped reading, and Redis that is silent, hold nothing up: the program goes."""
    queue = TaskQueue(valkey.client())
    task, log = claimed(queue)
    for _ in range(20):
        log.add("processing", step="x" * 500_000)
    one = Dashboard(valkey.url, tmp_path)
    with closing(socket.create_connection(("127.0.0.1", one.port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"GET /api/tasks/{task.id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert status_of(connection.recv(1000)) == 200
        valkey.send(signal.SIGSTOP)
        assert one.stop() == 0
    assert "Traceback" not in one.stderr()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_cleanly(valkey: Server, tmp_path: Path, number: int) -> None:
    """Ctrl-C ends it as SIGTERM does, also while somebody watches: exit code 0, and nothing more is said."""
    one = Dashboard(valkey.url, tmp_path)
    with httpx.stream("GET", f"{one.url}/api/events", timeout=60) as response:
        chunks = response.iter_raw()
        next(chunks)
        one.process.send_signal(number)
        assert list(chunks) == []
    assert one.process.wait(60) == 0
    assert one.stderr().count("\n") == 1


def test_ag_ui_is_told_that_redis_was_away(own: Dashboard, valkey: Server) -> None:
    """As a CUSTOM event; then the stream goes on."""
    task, log = claimed(TaskQueue(valkey.client()))
    log.add("processing", step="1")
    with connect_sse(own.http, "GET", f"/api/tasks/{task.id}/events?format=ag-ui") as source:
        events = (event.json() for event in events_of(source))
        wait_until(lambda: next(events)["type"] == "STEP_STARTED", "the first entry")
        valkey.stop()
        down = next(events)
        valkey.start()
        up = next(events)
        log.add("completed", result=2)
        last = list(events)[-1]
    assert [(one["type"], one["name"], one["value"]) for one in (down, up)] == [
        ("CUSTOM", "redis", {"redis": "down"}),
        ("CUSTOM", "redis", {"redis": "up"}),
    ]
    assert last["type"] == "RUN_FINISHED"


def test_module_left_no_traceback(board: Dashboard) -> None:
    """None of all the above has made the server say more than that it runs (the last test of this module)."""
    assert "Traceback" not in board.stderr() and "ERROR" not in board.stderr()
