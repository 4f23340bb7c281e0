"""examples/otel_export.py: the spans of tasks, as an in-memory exporter and a collector over HTTP get them."""

import gzip
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from conftest import ROOT
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis import Redis

from task_streams import Task, TaskLog, TaskQueue, keys, run_worker

sys.path.insert(0, str(ROOT / "examples"))

import otel_export

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def handle(task: Task, log: TaskLog) -> Any:
    """Load, ask the LLM; fail in the first attempt; ask a person in the second one."""
    await log.step("data.load", lambda: {"rows": 3}, safe_to_repeat=True)
    usage = {"input": 12, "output": 5}
    await log.step("llm", lambda: {"response": "hm", "calls": [], "usage": usage}, about={"model": "mock-llm-1"})
    if task.attempt == 1:
        await log.step("mail.send", fail, safe_to_repeat=True)
    return await log.ask("Send it?")


def fail() -> None:
    raise OSError("no network")


@pytest.fixture
def queue(redis: Redis, url: str) -> TaskQueue:
    """A queue with task 1, of a trace, and task 2, of none; both have finished."""
    queue = TaskQueue(redis)
    ids = [queue.put({}, traceparent=f"00-{TRACE}-{PARENT}-00").id, queue.put({}).id]
    run_worker(handle, url=url, burst=True, backoff_seconds=0.01)
    for task_id in ids:
        queue.answer(task_id, "yes")
    run_worker(handle, url=url, burst=True)
    return queue


def spans_of(queue: TaskQueue, task_id: str) -> list[ReadableSpan]:
    memory = InMemorySpanExporter()
    assert otel_export.Exporter(queue, memory).export({"id": task_id, "status": "completed"})
    return sorted(memory.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(name)


def test_task_with_a_retry_is_one_trace_below_the_request_that_put_it(queue: TaskQueue) -> None:
    """Attempts are children of the request, each linked to the one before; steps are children of their attempts."""
    spans = spans_of(queue, "1")
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    attempts = [span for span in spans if span.name == "invoke_agent agent"]
    assert [attribute(span, "task.attempt") for span in attempts] == [1, 2, 3]
    assert {f"{span.parent.span_id:016x}" for span in attempts if span.parent} == {PARENT}
    linked = [[link.context.span_id for link in span.links] for span in attempts]
    assert linked == [[], [attempts[0].context.span_id], [attempts[1].context.span_id]]
    steps = {span.name: span for span in spans if span not in attempts}
    assert steps.keys() == {"execute_tool data.load", "chat mock-llm-1", "execute_tool mail.send"}
    assert {span.parent.span_id for span in steps.values() if span.parent} == {attempts[0].context.span_id}


def test_spans_follow_the_genai_conventions(queue: TaskQueue) -> None:
    spans = {span.name: span for span in spans_of(queue, "1") if not span.name.startswith("invoke")}
    chat, load, mail = (spans[name] for name in ("chat mock-llm-1", "execute_tool data.load", "execute_tool mail.send"))
    assert attribute(chat, "gen_ai.operation.name") == "chat"
    assert attribute(chat, "gen_ai.request.model") == "mock-llm-1"
    assert (attribute(chat, "gen_ai.usage.input_tokens"), attribute(chat, "gen_ai.usage.output_tokens")) == (12, 5)
    assert attribute(load, "gen_ai.operation.name") == "execute_tool"
    assert attribute(load, "gen_ai.tool.name") == "data.load"
    assert load.status.is_ok
    assert not mail.status.is_ok
    assert attribute(mail, "error.type") == "_OTHER"
    [first] = [span for span in spans_of(queue, "1") if attribute(span, "task.attempt") == 1]
    assert attribute(first, "error.type") == "OSError"


def test_task_without_a_trace_gets_one_of_its_own(queue: TaskQueue) -> None:
    spans = spans_of(queue, "2")
    assert len({span.context.trace_id for span in spans}) == 1
    [root] = [span for span in spans if span.parent is None]
    assert root.name == "put task 2"


def test_exporting_twice_gives_the_same_spans(queue: TaskQueue) -> None:
    """A consumer group delivers at least once."""
    once, twice = ([span.context.span_id for span in spans_of(queue, "2")] for _ in range(2))
    assert once == twice
    assert len(set(once)) == len(once)


def test_log_that_has_expired_or_lost_its_beginning_gives_what_is_left(queue: TaskQueue) -> None:
    queue.redis.xtrim(keys.stream("1"), maxlen=3, approximate=False)
    assert all(span.end_time is not None for span in spans_of(queue, "1"))
    queue.redis.delete(keys.stream("1"))
    assert spans_of(queue, "1") == []


class Collector:
    """An OTLP collector over HTTP. It answers with `status` and keeps the names of the spans."""

    def __init__(self) -> None:
        self.status, self.names = 200, list[str]()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                if collector.status == 200:
                    for resource in request.resource_spans:
                        collector.names += [span.name for scope in resource.scope_spans for span in scope.spans]
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Any:
    collector = Collector()
    yield collector
    collector.close()


def test_program_exports_what_has_finished_once(
    queue: TaskQueue, url: str, script: Callable[..., Any], collector: Collector
) -> None:
    """What the collector refuses stays pending for the next run."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server.server_port}"}

    def export() -> str:
        process = script(url, "examples/otel_export.py", "--once", env=environment)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return str(err.splitlines()[-1])

    collector.status = 400
    assert export() == "0 finished task(s) exported"
    collector.status = 200
    assert export() == "2 finished task(s) exported"
    assert collector.names.count("invoke_agent agent") == 6
    assert export() == "0 finished task(s) exported"
