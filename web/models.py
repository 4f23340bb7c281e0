"""What the HTTP interface takes and returns, as pydantic models: they check requests, and openapi.json shows them."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from task_streams import NoSuchTask
from task_streams.claims import check_id
from task_streams.reader import check_cursor, order

MAX_REASON_CHARS = 200
ID_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9._:@-]{1,128}$", "example": "1"}
ENTRY_ID_SCHEMA = {"type": "string", "pattern": r"^(\$|[0-9]{1,19}(-[0-9]{1,19})?)$"}


def known_id(text: str) -> str:
    """Return a task's id. Raises NoSuchTask, which is a 404, if no task can have it."""
    try:
        return check_id(text)
    except ValueError:
        raise NoSuchTask(text[:80]) from None


def cursor_of(text: str) -> str:
    """Return an entry id as Redis writes it, and "$" as it is. Raises ValueError. cursor_of("017") -> '17-0'"""
    if check_cursor(text) == "$":
        return text
    ms, seq = order(text)
    return f"{ms}-{seq}"


def printable(value: Any) -> Any:
    """Replace the surrogates in text, which UTF-8 cannot hold: printable("\\ud800") -> '?'"""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def none_if_empty(value: Any) -> Any:
    return value if value != "" else None


TaskId = Annotated[str, AfterValidator(known_id), WithJsonSchema(ID_SCHEMA)]
EntryId = Annotated[str, AfterValidator(cursor_of), WithJsonSchema(ENTRY_ID_SCHEMA)]
Text = Annotated[str, BeforeValidator(printable)]
Time = Annotated[int | None, BeforeValidator(lambda value: value if isinstance(value, int) else None)]
Count = Annotated[int, BeforeValidator(lambda value: value if isinstance(value, int) else 0), Field(ge=0)]
State = Literal["waiting", "running", "completed", "failed", "cancelled"]
Status = Literal["waiting", "running", "retrying", "delayed", "parked", "completed", "failed", "cancelled"]
Group = Literal["waiting", "running", "done", "failed"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewTask(Model):
    type: str = Field(min_length=1)
    payload: Any = Field({}, description="Any JSON value; as JSON, the task may have 1,000,000 bytes")


class Cancellation(Model):
    reason: Annotated[Text, Field(min_length=1, max_length=MAX_REASON_CHARS)] = "cancelled in the dashboard"


class Answer(Model):
    answer: Text = Field(min_length=1, description="One of the question's options, or any text if it has none")
    number: int | None = Field(None, ge=1, description="Only if the task still asks its question of that number")
    by: Annotated[Text, Field(max_length=MAX_REASON_CHARS)] = Field("", description="Who says it, for the log")


class Answered(Model):
    answer: Text = Field(description="As the task gets it")


class Message(Model):
    text: Text = Field(min_length=1, description="What the task's agent reads at its next step")
    by: Annotated[Text, Field(max_length=MAX_REASON_CHARS)] = Field("", description="Who says it, for the log")


class Question(Model):
    number: int = Field(ge=1, description="1 for the task's first question")
    question: Text
    options: list[Text] | None = Field(description="null: any text will do")
    expires_at: int = Field(description="Milliseconds since 1970; nobody can answer it then")


CANCELLATION = Cancellation()  # if no body says otherwise


class Cancelled(Model):
    outcome: Literal["cancelled", "requested"] = Field(
        description="cancelled: it waited, and has ended; requested: its worker will end it"
    )


class Task(Model):
    id: Annotated[str, WithJsonSchema(ID_SCHEMA)]
    state: State
    status: Status = Field(
        description="Like state, but `retrying`, `delayed` until it is due, or `parked` until somebody answers"
    )
    type: Text | None
    data: Any = Field(description="What was put: any JSON value")
    attempts: Count
    failures: Count
    worker: Text | None = Field(description="host:pid, while it runs")
    put_at: Time = Field(description="Milliseconds since 1970")
    started_at: Time
    finished_at: Time
    ahead: int | None = Field(ge=0, description="How many are popped before it, while it waits")
    cancel: Text | None = Field(description="Why somebody asked for its end")
    percent: float | None = Field(ge=0, le=100)
    step: Text | None


class ListedTask(Task):
    data_is_cut: bool = Field(description="true: data is only the beginning of the JSON, as text")


class WholeTask(Task):
    question: Question | None = Field(description="What the task asks now")
    result: Any = Field(description="Any JSON value; of a failed task the error, of a cancelled one the reason")


class Worker(Model):
    name: Text = Field(description="host:pid")
    alive: bool = Field(description="false: it has gone, and its tasks run again when their leases are over")
    tasks: list[str]


class Page(Model):
    tasks: list[ListedTask]
    next: str | None = Field(description="The `before` of the next page; null: this is the last")
    counts: dict[str, int] = Field(description="Tasks by group: waiting, running, done, failed")
    queue_length: int = Field(ge=0)
    workers: list[Worker]


class Samples(Model):
    samples: list[str]


class Health(Model):
    redis: Literal["up", "down"]


class Session(Health):
    login: bool = Field(description="Whether people log in here, with $DASHBOARD_TOKEN")


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str


REFUSED = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is refused; `detail` says why", "content": REFUSED},
    "5XX": {"description": "The server failed, or Redis does not serve now", "content": REFUSED},
}


def problem_of(status: int, detail: str, **more: Any) -> dict[str, Any]:
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
