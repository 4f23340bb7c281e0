"""POST /ag-ui: a run of the AG-UI protocol is a task; AG-UI's own client puts it, watches it, and comes back to it."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ag_ui_client import client_folder
from conftest import ROOT, Server, wait_until
from dash import Dashboard, assert_problem, dashboard
from httpx_sse import connect_sse
from streams import Stream, finish, take

from task_streams import Task, TaskQueue, keys

Told = list[dict[str, Any]]
INPUT = {"threadId": "thread", "runId": "run", "messages": [{"id": "1", "role": "user", "content": "Hello"}]}
SALES = {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}}


@pytest.fixture
def board(valkey: Server, tmp_path: Path) -> Iterator[Dashboard]:
    with dashboard(valkey.url, tmp_path) as one:
        yield one


@pytest.fixture
def queue(valkey: Server) -> Iterator[TaskQueue]:
    queue = TaskQueue(valkey.client())
    yield queue
    queue.close()


def run(board: Dashboard, thread: str, run_id: str, task: dict[str, Any] | None = None) -> "subprocess.Popen[str]":
    """Start AG-UI's client; it prints the events that it accepts."""
    more = [json.dumps(task)] if task else []
    command = ["node", "tests/ag_ui_run.mjs", str(client_folder()), f"{board.url}/ag-ui", thread, run_id, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(client: "subprocess.Popen[str]") -> Told:
    """Return what the client accepted, when it has ended well."""
    out, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]


def taken(queue: TaskQueue) -> tuple[Task, Stream]:
    """Claim the task that is put, as a worker does."""
    wait_until(lambda: queue.redis.llen(keys.QUEUE), "the task is put")
    task = take(queue)
    assert task is not None
    return task, Stream(task.id, queue.redis, task.epoch)


def end(queue: TaskQueue, task: Task, log: Stream, event: Any = "completed", **fields: Any) -> None:
    log.add(event, **fields)
    assert finish(queue, task, event, fields.get("result"))


def types(events: Told) -> list[str]:
    return [event["type"] for event in events]


# -- with AG-UI's own client ------------------------------------------------------------------------------------


def test_agent_of_the_project_is_an_agent_for_the_client(
    board: Dashboard, valkey: Server, script: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """The client names a task in forwardedProps, the real agent works on it, and the client sees it to its end."""
    script(valkey.url, "agent_consumer.py", "--llm-delay", "0", "--outbox", str(tmp_path))

    events = told(run(board, "thread", "run", SALES))

    assert events[0] == events[0] | {"type": "RUN_STARTED", "threadId": "thread", "runId": "run"}
    assert events[-1]["type"] == "RUN_FINISHED" and events[-1]["result"]["rows"] > 0
    assert events[-1]["usage"][0]["inputTokens"] > 0
    assert {"TOOL_CALL_RESULT", "TEXT_MESSAGE_CONTENT", "REASONING_MESSAGE_CONTENT"} <= set(types(events))


def test_client_that_comes_back_gets_the_same_run(board: Dashboard, queue: TaskQueue) -> None:
    """The same threadId and runId is the same task, while it runs and after its end, whoever asks and with what."""
    first = run(board, "thread", "run")
    task, log = taken(queue)
    log.add("llm_response", model="m", response="Hello", usage={"input": 3, "output": 1})
    second = run(board, "thread", "run", {"type": "something else"})
    wait_until(lambda: board.http.get("/metrics").text.count("dashboard_watchers 2.0"), "both watch")
    end(queue, task, log, result="done")

    events = told(first)

    assert told(second) == told(run(board, "thread", "run")) == events
    assert types(events) == [
        *["RUN_STARTED", "STATE_SNAPSHOT", "TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END"],
        "RUN_FINISHED",
    ]
    assert queue.redis.llen(keys.QUEUE) == 0 and queue.redis.zcard(keys.RECENT) == 1


def test_another_run_or_thread_is_another_task(board: Dashboard, queue: TaskQueue) -> None:
    """Threads do not share run ids."""
    clients = [run(board, *ids) for ids in (("a", "1"), ("a", "2"), ("b", "1"))]
    wait_until(lambda: queue.redis.llen(keys.QUEUE) == 3, "three tasks")
    for _ in clients:
        task, log = taken(queue)
        end(queue, task, log, result=None)
    assert [types(told(client))[-1] for client in clients] == ["RUN_FINISHED"] * 3


def test_cancelled_run_is_no_error_for_the_client(board: Dashboard, queue: TaskQueue) -> None:
    """Its outcome says so."""
    client = run(board, "thread", "run")
    wait_until(lambda: queue.redis.llen(keys.QUEUE), "the task is put")
    [task_id] = queue.redis.zrange(keys.RECENT, 0, -1)
    board.http.post(f"/api/tasks/{task_id}/cancel").raise_for_status()

    last = told(client)[-1]

    assert (last["type"], last["outcome"]) == ("RUN_FINISHED", {"type": "cancelled"})


# -- by hand ----------------------------------------------------------------------------------------------------


def test_run_without_a_task_is_a_chat(board: Dashboard, queue: TaskQueue) -> None:
    """The payload is the input; the task is listed as any other, and goes on when the client has gone."""
    given = {**INPUT, "state": {"a": [1]}, "context": [{"description": "d", "value": "v"}]}
    with connect_sse(board.http, "POST", "/ag-ui", json=given) as source:
        assert source.response.status_code == 200
        task, log = taken(queue)
    assert task.data == {"type": "chat", "payload": {name: given[name] for name in ("messages", "state", "context")}}
    end(queue, task, log, result="done")
    assert board.http.get(f"/api/tasks/{task.id}").json()["state"] == "completed"


def test_run_resumes_after_the_last_event_id(board: Dashboard, queue: TaskQueue) -> None:
    """A client that knows what it has seen gets the rest."""
    with connect_sse(board.http, "POST", "/ag-ui", json=INPUT):
        task, log = taken(queue)
    seen = log.add("progress", percent=50, step="half")
    last = log.add("progress", percent=60, step="more")
    end(queue, task, log, result=1)

    response = board.http.post("/ag-ui", json=INPUT, headers={"Last-Event-ID": seen})

    ids = re.findall("^id: (.*)$", response.text, re.M)
    assert (ids[0], len(ids)) == (last, 2)
    assert re.findall('"type":"([A-Z_]+)"', response.text) == [
        *["RUN_STARTED", "STATE_SNAPSHOT", "STATE_DELTA", "RUN_FINISHED"]
    ]


def test_run_whose_events_have_expired_is_gone(board: Dashboard, queue: TaskQueue) -> None:
    """It is not done again; its record tells how it ended."""
    with connect_sse(board.http, "POST", "/ag-ui", json=INPUT):
        task, log = taken(queue)
    end(queue, task, log, result=1)
    queue.redis.delete(keys.stream(task.id))

    assert task.id in assert_problem(board.http.post("/ag-ui", json=INPUT), 410)
    assert queue.redis.llen(keys.QUEUE) == 0


DEEP = '{"threadId": "t", "runId": "r", "messages": [], "state": ' + "[" * 600 + "]" * 600 + "}"
BAD = {
    "empty": ("", 422),
    "not JSON": ("{", 400),
    "a list": ("[]", 422),
    "no run": ('{"threadId": "t", "messages": []}', 422),
    "odd message": ('{"threadId": "t", "runId": "r", "messages": [{"role": "odd"}]}', 422),
    "surrogate": ('{"threadId": "\\ud800", "runId": "r", "messages": []}', 422),
    "deep": (DEEP, 422),
    "too large": (json.dumps({**INPUT, "state": "x" * 1_000_001}), 422),
    "an answer that nobody asked for": (
        json.dumps({**INPUT, "resume": [{"interruptId": "1", "status": "resolved", "payload": "yes"}]}),
        409,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_run_refuses_what_is_not_one(board: Dashboard, queue: TaskQueue, name: str) -> None:
    """And puts nothing."""
    body, status = BAD[name]
    with board.http.stream("POST", "/ag-ui", content=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status_code == status  # first: if it were taken, the response would not end
        response.read()
        assert assert_problem(response, status)
    assert queue.redis.llen(keys.QUEUE) == 0


def test_run_of_another_content_type_or_origin_is_refused(board: Dashboard) -> None:
    """As other writes are."""
    assert_problem(board.http.post("/ag-ui", content=json.dumps(INPUT), headers={"Content-Type": "text/plain"}), 415)
    assert_problem(httpx.post(f"{board.url}/ag-ui", json=INPUT, headers={"Origin": "https://evil.example"}), 403)
