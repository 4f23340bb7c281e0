"""Messaging utilities on Redis: the connection policy and the field codec."""

from .client import Client, blocking_client, connect, explain, is_transient, reason_of, safe_url, url_of
from .codec import decode, encode, from_json, to_json
from .errors import RedisMessagingError, RedisUnavailable

__all__ = [
    "Client",
    "RedisMessagingError",
    "RedisUnavailable",
    "blocking_client",
    "connect",
    "decode",
    "encode",
    "explain",
    "from_json",
    "is_transient",
    "reason_of",
    "safe_url",
    "to_json",
    "url_of",
]
