"""The helper that the scripts share: a queue says what to do, a stream per task says what is happening."""

from .claims import Task
from .log import BlockingLog, LeaseLost, StreamEnded, TaskCancelled, TaskLog
from .queue import NoSuchTask, TaskQueue
from .reader import Cursor, Event, LogReader
from .worker import PermanentFailure, run_worker, work

__all__ = [
    "BlockingLog",
    "Cursor",
    "Event",
    "LeaseLost",
    "LogReader",
    "NoSuchTask",
    "PermanentFailure",
    "StreamEnded",
    "Task",
    "TaskCancelled",
    "TaskLog",
    "TaskQueue",
    "run_worker",
    "work",
]
