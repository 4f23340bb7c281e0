"""Turn the log of each finished task into OpenTelemetry spans, by the GenAI conventions, and send them to a collector.

Usage:   python -m pip install 'opentelemetry-sdk>=1.45,<2' 'opentelemetry-exporter-otlp-proto-http>=1.45,<2'
         OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/otel_export.py [--once]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server; a collector that speaks OTLP over HTTP
Keys:    reads {task_queue}:finished in the consumer group `otel`, the tasks' records, and task_logs:<id>
See:     https://opentelemetry.io/docs/specs/semconv/gen-ai/

    put task 7                         the span of the request that put it, if it gave put() its traceparent
    ├── invoke_agent agent             one for each attempt; a retry is linked to the attempt before it
    │   ├── chat mock-llm-1            one for each step that asked the LLM
    │   └── execute_tool data.load     one for each step that called a tool
    └── invoke_agent agent

A consumer group delivers at least once. The ids of the spans are derived from those of the entries, so exporting a
task twice gives the same spans.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from ailf.messaging.redis import RedisStream
from task_streams import Event, LogReader, TaskQueue
from task_streams.cli import run
from task_streams.keys import FINISHED, TERMINAL

GROUP, CONSUMER = "otel", "exporter"
STALE_MS = 30_000  # after this a task whose export failed is tried again


class DerivedIds(IdGenerator):
    """Ids made of texts: the same text gives the same id."""

    def __init__(self) -> None:
        self.text = ""

    def generate_span_id(self) -> int:
        return int.from_bytes(hashlib.sha256(f"span {self.text}".encode()).digest()[:8]) or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(hashlib.sha256(f"trace {self.text}".encode()).digest()[:16]) or 1


class Exporter:
    """Makes the spans of tasks, and sends them with `sender`."""

    def __init__(self, queue: TaskQueue, sender: SpanExporter) -> None:
        self.queue, self.sender = queue, sender
        self.ids, self.made = DerivedIds(), InMemorySpanExporter()
        # all spans, also of a request that was not sampled: it is the collector that samples
        provider = TracerProvider(
            sampler=ALWAYS_ON, id_generator=self.ids, resource=Resource.create({"service.name": "task_streams"})
        )
        provider.add_span_processor(SimpleSpanProcessor(self.made))
        self.tracer = provider.get_tracer("task_streams")

    def export(self, finished: dict[str, Any]) -> bool:
        """Send the spans of a task that has finished, {"id", "status"}. False: the collector refused them."""
        task_id = str(finished["id"])
        self.made.clear()
        self.make_spans(task_id, self.queue.get(task_id) or {}, LogReader(task_id, self.queue.redis).read())
        spans = self.made.get_finished_spans()
        return not spans or self.sender.export(spans) is SpanExportResult.SUCCESS

    def make_spans(self, task_id: str, record: dict[str, Any], events: list[Event]) -> None:
        """Make the spans of one task from its log, which may have lost its beginning."""
        if not events:  # it has expired
            return
        context = extract({"traceparent": record.get("traceparent", "")})
        if not trace.get_current_span(context).get_span_context().is_valid:
            put_ns = record.get("put_at", 0) * 1_000_000 or nanoseconds(events[0])
            put = self.start(f"put task {task_id}", f"{task_id} {put_ns}", put_ns, Context(), SpanKind.PRODUCER)
            put.end(put_ns)
            context = trace.set_span_in_context(put)
        attempts = Attempts(self, task_id, context)
        for event in events:
            attempts.see(event)

    def start(
        self, name: str, text: str, start_ns: int, context: Context, kind: SpanKind, links: Iterable[Link] = ()
    ) -> Span:
        self.ids.text = text
        return self.tracer.start_span(name, context, kind, links=list(links), start_time=start_ns)


class Attempts:
    """The attempts of one task, event by event: the span of the present one, and the spans of its open steps."""

    def __init__(self, exporter: Exporter, task_id: str, parent: Context) -> None:
        self.exporter, self.task_id, self.parent = exporter, task_id, parent
        self.attempt: Span | None = None
        self.before: list[Link] = []  # to the attempt before this one
        self.steps: dict[str, Span] = {}
        self.last_ns = 0  # when something happened last

    def see(self, event: Event) -> None:
        now_ns, fields = nanoseconds(event) or self.last_ns, event.fields
        if event.name in ("started", "worker_lost"):
            self.end(self.last_ns, "the worker was lost" if self.attempt else "")
        if event.name == "started":
            self.begin(event, now_ns)
        elif event.name in ("llm_call", "llm_response", "tool_usage"):
            self.see_step(event, now_ns)
        elif event.name == "error":
            self.end(now_ns, str(fields.get("error")), str(fields.get("error_type")))
        elif event.name == "input_required":  # the task is parked until somebody has answered
            self.end(now_ns)
        elif event.name in TERMINAL:
            self.end(now_ns, "" if event.name == "completed" else str(fields.get("error") or fields.get("reason")))
        self.last_ns = now_ns

    def begin(self, event: Event, now_ns: int) -> None:
        text = f"{self.task_id} {event.id}"
        self.attempt = self.exporter.start(
            "invoke_agent agent", text, now_ns, self.parent, SpanKind.INTERNAL, self.before
        )
        self.attempt.set_attributes(
            {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.agent.name": "agent",
                "gen_ai.conversation.id": self.task_id,
                "task.attempt": int(event.fields.get("attempt", 0)),
                "task.worker": str(event.fields.get("worker", "")),
            }
        )
        self.before = [Link(self.attempt.get_span_context(), {"task.link": "attempt before"})]

    def see_step(self, event: Event, now_ns: int) -> None:
        """Begin or end a step. It is known by its key, or else by the id of the call."""
        fields, key = event.fields, str(event.fields.get("key") or event.fields.get("call_id"))
        if fields.get("status") == "started" and self.attempt is not None:
            is_llm = event.name == "llm_call"
            what = str(fields.get("model")) if is_llm else f"{fields.get('tool')}.{fields.get('action')}"
            operation, kind = ("chat", SpanKind.CLIENT) if is_llm else ("execute_tool", SpanKind.INTERNAL)
            context = trace.set_span_in_context(self.attempt)
            span = self.exporter.start(f"{operation} {what}", f"{self.task_id} {event.id}", now_ns, context, kind)
            span.set_attribute("gen_ai.operation.name", operation)
            span.set_attribute("gen_ai.request.model" if is_llm else "gen_ai.tool.name", what)
            if not is_llm:
                span.set_attribute("gen_ai.tool.call.id", str(fields.get("call_id")))
            self.steps[key] = span
        elif key in self.steps:
            span, usage = self.steps.pop(key), fields.get("usage")
            for name in ("input", "output"):
                if isinstance(usage, dict) and isinstance(usage.get(name), int):
                    span.set_attribute(f"gen_ai.usage.{name}_tokens", usage[name])
            finish(span, now_ns, str(fields.get("error") or "failed") if fields.get("status") == "failed" else "")

    def end(self, now_ns: int, error: str = "", error_type: str = "_OTHER") -> None:
        """End the present attempt, if there is one, and its open steps."""
        for span in self.steps.values():
            finish(span, now_ns, error or "the attempt ended")
        self.steps.clear()
        if self.attempt is not None:
            finish(self.attempt, now_ns, error, error_type)
            self.attempt = None


def finish(span: Span, now_ns: int, error: str, error_type: str = "_OTHER") -> None:
    if error:
        span.set_status(StatusCode.ERROR, error)
        span.set_attribute("error.type", error_type)
    span.end(now_ns)


def nanoseconds(event: Event) -> int:
    """Return when an event happened, since 1970; 0 if it does not say so, as somebody's own entry."""
    try:
        return round(datetime.fromisoformat(str(event.fields["timestamp"])).timestamp() * 1000) * 1_000_000
    except (KeyError, ValueError):
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Send the spans of each finished task to an OpenTelemetry collector.")
    parser.add_argument("--once", action="store_true", help="export what has finished by now, then exit")
    args = parser.parse_args()
    stream = RedisStream(FINISHED, stale_ms=STALE_MS)
    stream.create_consumer_group(GROUP, CONSUMER)
    exporter = Exporter(TaskQueue(), OTLPSpanExporter())
    count = stream.process_messages(exporter.export, burst=args.once)
    print(f"{count} finished task(s) exported", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
