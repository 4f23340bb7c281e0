"""What can go wrong between a program and Redis, and how it is told: exceptions, and one line for a person."""

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis import exceptions as errors

from .topologies import url_of

REDIS_ERRORS = (errors.RedisError, errors.RedisClusterException)  # all of redis-py's: the second isn't a RedisError


class RedisMessagingError(Exception):
    """The base of all errors of ailf.messaging.redis that are not the caller's mistake."""


class RedisUnavailable(RedisMessagingError):
    """Redis cannot be reached or cannot serve now. The message is one line: what, where, what to do."""


class LockNotOwned(RedisMessagingError):
    """The lock is not held, or no longer: it expired, and somebody else may hold it now."""


def translate(error: Exception, client: Any) -> Exception:
    """Return the error of this package that tells of one of redis-py's; TypeError or ValueError for the caller's."""
    if isinstance(error, errors.DataError):  # redis-py refused an argument: the caller's mistake, and nothing was sent
        of_type = "type" in str(error) or isinstance(error.__context__, TypeError)  # hiredis says it the second way
        return TypeError(str(error)) if of_type else ValueError(str(error))
    if isinstance(error, errors.LockError):
        return LockNotOwned(str(error))
    if re.match("invalid (stream id|expire time)", str(error), re.IGNORECASE):
        return ValueError(str(error))
    kind = RedisUnavailable if is_transient(error) else RedisMessagingError
    return kind(explain(error, url_of(client)))


def safe_url(url: str) -> str:
    """Return a URL without its password. safe_url("redis://me:secret@db:6379") -> 'redis://me@db:6379'"""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    query = urlencode([(k, v) for k, v in parse_qsl(parts.query) if "password" not in k], safe="/")
    return urlunsplit((parts.scheme, f"{user}@{host}" if user else host, parts.path, query, ""))


def is_transient(error: BaseException) -> bool:
    """Say whether an error may go away by itself, so that a worker should wait and try again.

    So do a lost connection, a time-out, and a server that is loading, busy, full, read-only or without its replicas; a
    refused login and a wrong command do not.
    """
    if isinstance(error, errors.AuthenticationError | errors.AuthorizationError):
        return False
    if isinstance(error, RedisUnavailable | errors.SlotNotCoveredError):
        return True
    if isinstance(error, errors.RedisClusterException):
        return "cannot be connected" in str(error)  # what a cluster's client raises while no node answers
    if isinstance(error, errors.ClusterError) and "TTL exhausted" in str(error):
        return True  # sixteen times MOVED, ASK or TRYAGAIN: the slot is on its way to another node
    if isinstance(error, errors.ConnectionError | errors.TimeoutError | errors.ReadOnlyError):
        return True
    if isinstance(error, errors.OutOfMemoryError | errors.ClusterDownError | errors.TryAgainError):
        return True
    if isinstance(error, errors.NoScriptError):  # it is sent with the next try
        return True
    words = ("BUSY ", "MISCONF", "NOREPLICAS", "UNBLOCKED", "MASTERDOWN")
    return isinstance(error, errors.ResponseError) and _message(error).startswith(words)


def reason_of(error: BaseException) -> str:
    """Return an error's message as one short line, without the internals that redis-py and Lua scripts append."""
    return re.split(r"\n|\.? script: | : <", _message(error))[0].rstrip(".") or type(error).__name__


def _message(error: BaseException) -> str:
    """Return an error's message without what redis-py's pipelines put before it."""
    return str(error).rpartition("of pipeline caused error: ")[2]


def explain(error: BaseException, url: str) -> str:
    """Return one line for a person: what went wrong, at which URL (without its password), what to do."""
    where = f"Redis at {safe_url(url)}"
    reason = reason_of(error)
    if isinstance(error, errors.AuthenticationError | errors.NoPermissionError):
        return f"{where} refused the login or the command ({reason}). Check the user and password in REDIS_URL."
    if isinstance(error, errors.BusyLoadingError):
        return f"{where} is still loading its data. Try again in a moment."
    if isinstance(error, errors.InvalidResponse):
        return f"what answers is no Redis at {safe_url(url)} ({reason}). Check host and port in REDIS_URL."
    if isinstance(error, errors.ReadOnlyError):
        return f"{where} is read-only ({reason}). Point REDIS_URL at the primary."
    if isinstance(error, errors.OutOfMemoryError):
        return f"{where} is out of memory ({reason}). Free some, or raise its maxmemory."
    if url.startswith("rediss") and re.search(r"\[SSL|No such file", reason):
        advice = f"Name the file of its CA: {url.partition(':')[0]}://…?ssl_ca_certs=ca.crt"
        if "mismatch" in reason:
            advice = "Its certificate is for another name: use that one in the URL."
        elif "No such file" in reason:
            advice = "Look at the files that the URL names: one is not there."
        return f"no secure connection to {where} ({reason}). {advice}"
    if isinstance(error, errors.ConnectionError | errors.TimeoutError | errors.RedisClusterException | OSError):
        return f"cannot reach {where} ({reason}). Is it running? Unset REDIS_URL to use the embedded server."
    return f"{where} answered: {reason}"
