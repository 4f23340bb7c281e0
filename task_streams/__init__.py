"""The helper that the scripts share: a queue says what to do, a stream per task says what is happening."""

from .claims import Task
from .errors import InDoubt, LeaseLost, NothingHappened, Parked, PermanentFailure, StreamEnded, TaskCancelled
from .log import BlockingLog, TaskLog
from .queue import NoSuchTask, TaskQueue
from .reader import Cursor, Event, LogReader
from .worker import run_worker, work

__all__ = [
    "BlockingLog",
    "Cursor",
    "Event",
    "InDoubt",
    "LeaseLost",
    "LogReader",
    "NoSuchTask",
    "NothingHappened",
    "Parked",
    "PermanentFailure",
    "StreamEnded",
    "Task",
    "TaskCancelled",
    "TaskLog",
    "TaskQueue",
    "run_worker",
    "work",
]
