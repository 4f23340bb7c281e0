"""What can go wrong between a program and Redis, as exceptions of this package."""


class RedisMessagingError(Exception):
    """The base of all errors of ailf.messaging.redis that are not the caller's mistake."""


class RedisUnavailable(RedisMessagingError):
    """Redis cannot be reached or cannot serve now. The message is one line: what, where, what to do."""
