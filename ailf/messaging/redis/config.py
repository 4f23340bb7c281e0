"""How to reach one Redis server, as a value: checked when it is made, never changed."""

import math
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from redis.connection import parse_url


@dataclass(frozen=True)
class RedisConfig:
    """Host, login and limits of a connection. Raises ValueError or TypeError, naming the field that is wrong.

    Times are in seconds. The password is left out of repr(). With max_connections in use, a further call waits for one
    of them, socket_timeout at most.
    """

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    password: str | None = field(default=None, repr=False)
    ssl: bool = False
    socket_timeout: float = 5
    socket_connect_timeout: float = 5
    socket_keepalive: bool = True
    max_connections: int = 10
    decode_responses: bool = True
    username: str | None = None

    def __post_init__(self) -> None:
        for name in ("host", "username", "password"):
            if name == "host" or getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("ssl", "socket_keepalive", "decode_responses"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, least, most in (("port", 1, 65535), ("db", 0, 2**31 - 1), ("max_connections", 1, 2**31 - 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            if not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, not {value}")
        for name in ("socket_timeout", "socket_connect_timeout"):
            check_seconds(name, getattr(self, name))

    @classmethod
    def from_url(cls, url: str) -> "RedisConfig":
        """Return the config that redis://user:password@host:port/db?field=value (or rediss://, with TLS) describes."""
        _check_text("url", url)
        if not url.startswith(("redis://", "rediss://")):
            raise ValueError("a config is of one server: redis://… or rediss://… (for a cluster set REDIS_URL)")
        options = dict(parse_url(url))  # raises ValueError for a bad number
        parts = urlsplit(url)
        if parts.port is not None:
            options["port"] = parts.port  # subtle: parse_url takes port 0 for none
        if (text := str(options.get("decode_responses")).lower()) in ("true", "false"):
            options["decode_responses"] = text == "true"
        options.pop("connection_class", None)
        known = {field.name for field in fields(cls)} - {"ssl"}  # which the scheme says
        if unknown := options.keys() - known:
            raise ValueError(
                f"unknown in a Redis URL: {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})"
            )
        path = parts.path.strip("/")
        if path and not path.isdecimal():
            raise ValueError(f"not a database number in a Redis URL: {path!r}")
        return cls(**options, ssl=parts.scheme == "rediss")


def check_seconds(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless a value is a number of seconds above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 seconds, not {value!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must not be empty")
