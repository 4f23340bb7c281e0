"""The errors that handlers meet, and those that they raise."""

MAX_ERROR_CHARS = 2_000  # of an exception's message in an event


class LeaseLost(Exception):
    """This worker no longer holds the task: somebody else may. Stop working on it; nothing more is written."""


class StreamEnded(Exception):
    """The task has reached its terminal event already; the message names it."""


class TaskCancelled(Exception):
    """Somebody asked for this task's end, or its time is up; the message is the reason."""


class PermanentFailure(Exception):
    """Raised by a handler whose task can never succeed: it fails without another attempt."""


class InDoubt(PermanentFailure):
    """Nobody knows whether a step has happened, and it must not happen twice."""


class Parked(BaseException):
    """Raised by log.ask() to end the handler: the task goes on when somebody has answered. Let it pass."""


class NothingHappened(Exception):
    """Raised by the call of a step, itself or as a subclass: it failed before it did anything, so it may run again."""


def message_of(error: BaseException) -> str:
    """Return what an exception says, as events have it: cut, and as text that UTF-8 can hold."""
    try:
        return str(error)[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode() or repr(error)
    except Exception:  # an exception of somebody else's, whose __str__ fails
        return type(error).__name__
