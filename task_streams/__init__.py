"""The helper that the scripts share: a queue says what to do, a stream per task says what is happening."""

from .log import Event, LeaseLost, StreamEnded, TaskCancelled, TaskLog
from .queue import NoSuchTask, Task, TaskQueue
from .worker import PermanentFailure, run_worker

__all__ = [
    "Event",
    "LeaseLost",
    "NoSuchTask",
    "PermanentFailure",
    "StreamEnded",
    "Task",
    "TaskCancelled",
    "TaskLog",
    "TaskQueue",
    "run_worker",
]
