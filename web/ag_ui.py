"""Map the entries of one task's stream to events of the AG-UI protocol, so that any AG-UI front end shows the task.

A task is one thread with one run, however many attempts it takes:
    started                        RUN_STARTED and STATE_SNAPSHOT the first time, and each time CUSTOM (attempt, worker)
    processing, chain_of_thought   STEP_FINISHED of the step before, STEP_STARTED, and REASONING_* around the thought
    llm_delta, llm_response        TEXT_MESSAGE_START, _CONTENT …, TEXT_MESSAGE_END; its tokens add to the run's usage
    tool_usage                     TOOL_CALL_START, _ARGS, _END; when it returns TOOL_CALL_RESULT
    progress                       STATE_DELTA of {"percent", "step"}
    completed                      RUN_FINISHED
    cancelled                      RUN_FINISHED with the outcome `cancelled`, and the reason in its metadata
    failed                         RUN_ERROR
    all others                     CUSTOM, with the entry's name (`message` if it is one of the server's) and fields

What the server itself says is CUSTOM, too: gap and reset (see docs/events.md), and redis, when that went or came.

The rules are those of `verifyEvents` in the npm package @ag-ui/client. No entry may break them: a worker can be killed
at any point, a gap can hide any entry, and a handler may log whatever it likes.
"""

import hashlib
from typing import Any

from ag_ui import core
from pydantic_core import to_json as pydantic_json

from ailf.messaging.redis import to_json
from task_streams import Event

MOST_TOKENS = 2**53 - 1  # the largest number that JSON is sure to keep
FIRST_STATE = {"percent": 0, "step": ""}  # of each attempt
CHAT = "chat"  # the type of a task whose input does not name one
NOTICES = ("gap", "reset", "redis")  # what the server says itself
NO_RESULT = "no result was seen: the attempt ended first, or the entry was trimmed away"


def task_of(run: core.RunAgentInput) -> tuple[str, dict[str, Any]]:
    """Return the id and the data of the task for a run: the same id for the same threadId and runId.

    `forwardedProps` may be a task, {"type", "payload"}. Otherwise the type is "chat", and the payload is the input:
    messages, state, context and tools.
    """
    names = f"{len(run.thread_id)} {run.thread_id} {run.run_id}"
    digest = hashlib.sha256(names.encode()).hexdigest()  # UnicodeError, a ValueError, for what no answer could say
    props = run.forwarded_props
    if isinstance(props, dict) and isinstance(props.get("type"), str) and props["type"]:
        data = {"type": props["type"], "payload": props.get("payload", {})}
    else:
        told = run.model_dump(mode="json", by_alias=True, include={"messages", "state", "context", "tools"})
        data = {"type": CHAT, "payload": told}
    return f"run-{digest[:32]}", data


class Mapper:
    """Turn the entries of one task, in their order, into AG-UI events.

    What is open is kept as the very event that opened it, so that a resumed client is told the same again. Ids are
    made of entry ids and call ids: the same entry gives the same events, whoever asks and however often.
    """

    def __init__(self, thread_id: str, run_id: str) -> None:
        self.thread_id, self.run_id = thread_id, run_id
        self.usage: dict[str, tuple[int, int]] = {}  # model -> tokens that its calls read, and wrote
        self.run: core.RunStartedEvent | None = None
        self.state: dict[str, Any] = FIRST_STATE
        self.step: core.StepStartedEvent | None = None
        self.message: core.TextMessageStartEvent | None = None
        self.parent_id: str | None = None  # of tool calls: the last message, which asked for them
        self.calls: dict[str, core.ToolCallStartEvent] = {}  # those without a result

    def events(self, entry: Event, is_notice: bool = False) -> list[core.BaseEvent]:
        """Return an entry's events; none for an empty delta. `is_notice`: a `gap` or `reset` that no entry says."""
        opening: list[core.BaseEvent] = []
        if self.run is None:  # at any first entry: it is `cancelled` if a task was still waiting
            version = core.PROTOCOL_VERSION
            self.run = core.RunStartedEvent(thread_id=self.thread_id, run_id=self.run_id, protocol_version=version)
            self.state = FIRST_STATE
            opening = [self.run, core.StateSnapshotEvent(snapshot=self.state)]
        events = [*opening, *(self._take_notice(entry) if is_notice else self._translate(entry))]
        if not is_notice:  # whose id is the reader's cursor, not a time
            for event in events:
                event.timestamp = int(entry.id.partition("-")[0])
        return events

    def prelude(self) -> list[core.BaseEvent]:
        """Return the events that open again what is open now, for a client that resumes after this entry.

        None before the first entry and after the end. To a client that has seen them they add nothing.
        """
        if self.run is None:
            return []
        events: list[core.BaseEvent] = [self.run, core.StateSnapshotEvent(snapshot=self.state)]
        events += [event for event in (self.step, self.message) if event]
        for call_id, start in self.calls.items():  # without its arguments: a client would append them a second time
            events += [start, core.ToolCallEndEvent(tool_call_id=call_id)]
        return events

    def redis(self, is_up: bool) -> list[core.BaseEvent]:
        """Return the events that tell that Redis went or came; none before the first entry and after the end."""
        event = core.CustomEvent(name="redis", value={"redis": "up" if is_up else "down"})
        return [event] if self.run is not None else []

    def _take_notice(self, notice: Event) -> list[core.BaseEvent]:
        custom = core.CustomEvent(name=notice.name, value=_value(notice.fields))
        if notice.name == "gap":  # what was missed may be the end of a message, and a result may still come
            return [*self._end_step(), custom]
        # reset: the story is told again from its start. What clients have must go, or it would be told twice.
        self.usage = {}
        return [*self._end_attempt(notice), custom, core.MessagesSnapshotEvent(messages=[])]

    def _translate(self, entry: Event) -> list[core.BaseEvent]:
        fields = entry.fields
        match entry.name:
            case "started":  # a worker that hands its task back leaves things open, and writes nothing
                closing, again = self._end_attempt(entry), self.state != FIRST_STATE
                self.state = FIRST_STATE
                return [*closing, *([core.StateSnapshotEvent(snapshot=self.state)] if again else []), _custom(entry)]
            case "processing" | "chain_of_thought":
                return self._take_step(entry)
            case "llm_delta":
                return self._say(entry, _text(fields.get("text")))
            case "llm_response":
                self._count_tokens(entry)
                whole = [] if self.message else self._say(entry, _text(fields.get("response")))
                return [*whole, *self._end_message()]
            case "tool_usage" if fields.get("status") in ("started", "completed", "failed"):
                return self._use_tool(entry)
            case "progress":
                self.state = {name: _value(fields.get(name)) for name in FIRST_STATE}
                patch = [{"op": "replace", "path": f"/{name}", "value": value} for name, value in self.state.items()]
                return [core.StateDeltaEvent.model_validate({"delta": patch})]
            case "error" | "worker_lost":
                return [*self._end_attempt(entry), _custom(entry)]
            case "completed":
                return self._end_run(entry, self._finished(result=_value(fields.get("result"))))
            case "cancelled":
                outcome = core.RunFinishedCancelledOutcome()
                return self._end_run(
                    entry, self._finished(outcome=outcome, metadata={"reason": _text(fields.get("reason"))})
                )
            case "failed":
                message = _text(fields.get("error")) or entry.name
                return self._end_run(entry, core.RunErrorEvent(message=message, code=entry.name, usage=self._usage()))
            case _:
                return [_custom(entry)]

    def _take_step(self, entry: Event) -> list[core.BaseEvent]:
        """A step lasts until the next one begins or the attempt ends: so a front end sees what took long."""
        finished: list[core.BaseEvent] = [core.StepFinishedEvent(step_name=self.step.step_name)] if self.step else []
        self.step = core.StepStartedEvent(step_name=_text(entry.fields.get("step")) or entry.name)
        thought = _text(entry.fields.get("thought")) or _text(entry.fields.get("prompt"))
        reasoning: list[core.BaseEvent] = [
            core.ReasoningStartEvent(message_id=entry.id),
            core.ReasoningMessageStartEvent(message_id=entry.id),
            core.ReasoningMessageContentEvent(message_id=entry.id, delta=thought),
            core.ReasoningMessageEndEvent(message_id=entry.id),
            core.ReasoningEndEvent(message_id=entry.id),
        ]
        return [*finished, self.step, *(reasoning if thought else [])]

    def _say(self, entry: Event, text: str) -> list[core.BaseEvent]:
        if not text:
            return []
        opening: list[core.BaseEvent] = []
        if self.message is None:
            self.message, self.parent_id = core.TextMessageStartEvent(message_id=entry.id), entry.id
            opening = [self.message]
        return [*opening, core.TextMessageContentEvent(message_id=self.message.message_id, delta=text)]

    def _use_tool(self, entry: Event) -> list[core.BaseEvent]:
        fields = entry.fields
        call_id, status = _text(fields.get("call_id")) or entry.id, fields["status"]
        opening: list[core.BaseEvent] = []
        if status == "started" or call_id not in self.calls:  # a gap may have hidden that it was started
            name = ".".join(filter(None, (_text(fields.get("tool")), _text(fields.get("action"))))) or "tool"
            start = core.ToolCallStartEvent(tool_call_id=call_id, tool_call_name=name, parent_message_id=self.parent_id)
            self.calls[call_id] = start
            opening = [start, core.ToolCallEndEvent(tool_call_id=call_id)]
            if "arguments" in fields:
                opening.insert(1, core.ToolCallArgsEvent(tool_call_id=call_id, delta=_json(fields["arguments"])))
        if status == "started":
            return opening
        metadata: dict[str, Any] = {name: _value(fields[name]) for name in ("status", "duration_ms") if name in fields}
        return [*opening, self._result(entry, call_id, _text(fields.get("result")), metadata)]

    def _result(self, entry: Event, call_id: str, content: str, metadata: dict[str, Any]) -> core.BaseEvent:
        del self.calls[call_id]
        message_id = f"{entry.id}:{call_id}"  # one entry may answer several calls
        return core.ToolCallResultEvent(message_id=message_id, tool_call_id=call_id, content=content, metadata=metadata)

    # -- usage --------------------------------------------------------------------------------------------------

    def _count_tokens(self, entry: Event) -> None:
        used, model = entry.fields.get("usage"), _text(entry.fields.get("model"))
        if isinstance(used, dict):
            counts = (used.get(name) for name in ("input", "output"))
            new = [count if isinstance(count, int) and count > 0 else 0 for count in counts]
            before = self.usage.get(model, (0, 0))
            self.usage[model] = min(before[0] + new[0], MOST_TOKENS), min(before[1] + new[1], MOST_TOKENS)

    def _usage(self) -> list[core.TokenUsage] | None:
        """Return the tokens of all attempts, by model; None if no call told."""
        found = [core.TokenUsage(model=model, input_tokens=read, output_tokens=written)
                 for model, (read, written) in self.usage.items()]  # fmt: skip
        return found or None

    def _finished(self, **more: Any) -> core.BaseEvent:
        return core.RunFinishedEvent(thread_id=self.thread_id, run_id=self.run_id, usage=self._usage(), **more)

    # -- closing ------------------------------------------------------------------------------------------------

    def _end_message(self) -> list[core.BaseEvent]:
        message, self.message = self.message, None
        return [core.TextMessageEndEvent(message_id=message.message_id)] if message else []

    def _end_step(self) -> list[core.BaseEvent]:
        events, step = self._end_message(), self.step
        self.step = self.parent_id = None
        return [*events, core.StepFinishedEvent(step_name=step.step_name)] if step else events

    def _end_attempt(self, entry: Event) -> list[core.BaseEvent]:
        # subtle: clients take a call without a result for one that the front end itself is to answer.
        unanswered = [self._result(entry, call_id, NO_RESULT, {"status": "lost"}) for call_id in list(self.calls)]
        return [*unanswered, *self._end_step()]

    def _end_run(self, entry: Event, end: core.BaseEvent) -> list[core.BaseEvent]:
        self.run, self.usage = None, {}
        return [*self._end_attempt(entry), end]


def _custom(entry: Event) -> core.BaseEvent:
    name = "message" if entry.name in NOTICES else _text(entry.name)  # somebody's entry of that name is not ours
    return core.CustomEvent(name=name, value=_value(entry.fields))


def _text(value: Any) -> str:
    """Return text as it is, nothing as "", and anything else as JSON; what UTF-8 cannot hold becomes "?"."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return "" if value is None else _json(value)


def _json(value: Any) -> str:
    try:
        return to_json(value)
    except ValueError:  # it was parsed, but cannot be written: at the edge of Python's recursion limit
        return '"(nested too deep)"'


def _value(value: Any) -> Any:
    """Return a JSON value as it is; but as JSON text where pydantic could not write it (surrogates, deep nesting)."""
    try:
        pydantic_json([[[[value]]]])  # subtle: its limit counts the event around the value, too
    except ValueError:
        return _json(value)
    return value
