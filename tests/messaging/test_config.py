"""RedisConfig: a value that is checked when it is made."""

import dataclasses
import math
from typing import Any

import pytest

from ailf.messaging.redis import RedisConfig
from ailf.schemas.redis import RedisConfig as FromSchemas


def test_defaults_are_those_of_the_documentation() -> None:
    """Without arguments it means a Redis of this machine, with 5 s for every answer."""
    assert dataclasses.asdict(RedisConfig()) == {
        "host": "localhost",
        "port": 6379,
        "db": 0,
        "password": None,
        "ssl": False,
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "max_connections": 10,
        "decode_responses": True,
        "username": None,
    }


def test_fields_may_be_given_by_position() -> None:
    """host, port, db, password, ssl: the order of the documentation."""
    config = RedisConfig("db", 7000, 2, "secret", True)

    assert (config.host, config.port, config.db, config.password, config.ssl) == ("db", 7000, 2, "secret", True)


def test_it_is_found_among_the_schemas_too() -> None:
    """ailf.schemas.redis has the same class."""
    assert FromSchemas is RedisConfig


def test_it_cannot_be_changed() -> None:
    """A config is a value: equal ones are equal, and none changes."""
    config = RedisConfig()

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]

    assert config == RedisConfig()
    assert len({config, RedisConfig()}) == 1


def test_the_password_is_not_shown() -> None:
    """repr() and str() leave it out."""
    config = RedisConfig(password="secret")

    assert "secret" not in repr(config)
    assert "secret" not in f"{config}"


def test_unknown_field_is_named() -> None:
    """A misspelt field is an error that names it."""
    with pytest.raises(TypeError, match="hots"):
        RedisConfig(hots="db")  # type: ignore[call-arg]


OUT_OF_RANGE = [
    *[(field, "") for field in ("host", "username", "password")],
    *[("port", value) for value in (0, 65536, -1)],
    *[("db", -1), ("max_connections", 0), ("socket_connect_timeout", 0.0)],
    *[("socket_timeout", value) for value in (0, -1, math.inf, math.nan)],
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_a_clear_error(field: str, value: Any) -> None:
    """ValueError, and the field is named."""
    with pytest.raises(ValueError, match=rf"^{field} must"):
        RedisConfig(**{field: value})


OF_WRONG_TYPE = [
    *[("host", None), ("host", b"db"), ("password", b"secret"), ("db", None), ("max_connections", 1.5)],
    *[("port", value) for value in ("6379", 6379.0, True)],
    *[("ssl", "yes"), ("ssl", 1), ("socket_keepalive", None), ("decode_responses", "no")],
    *[("socket_timeout", None), ("socket_timeout", "5"), ("socket_connect_timeout", True)],
]


@pytest.mark.parametrize(("field", "value"), OF_WRONG_TYPE)
def test_value_of_wrong_type_is_a_clear_error(field: str, value: Any) -> None:
    """TypeError, the field is named, and a password of the wrong type is not shown."""
    with pytest.raises(TypeError, match=rf"^{field} must") as caught:
        RedisConfig(**{field: value})

    assert "secret" not in str(caught.value)


URLS = [
    ("redis://", RedisConfig()),
    ("redis://db", RedisConfig(host="db")),
    ("redis://db:7000/3", RedisConfig(host="db", port=7000, db=3)),
    ("redis://db/", RedisConfig(host="db")),
    ("rediss://db", RedisConfig(host="db", ssl=True)),
    ("redis://me:s%40cret@db", RedisConfig(host="db", username="me", password="s@cret")),
    ("redis://:secret@db", RedisConfig(host="db", password="secret")),
    ("redis://[::1]:7000", RedisConfig(host="::1", port=7000)),
    ("redis://db?db=4", RedisConfig(host="db", db=4)),
    (
        "redis://db?socket_timeout=2.5&socket_connect_timeout=1&max_connections=3",
        RedisConfig(host="db", socket_timeout=2.5, socket_connect_timeout=1, max_connections=3),
    ),
    (
        "redis://db?decode_responses=False&socket_keepalive=false",
        RedisConfig(host="db", decode_responses=False, socket_keepalive=False),
    ),
]


@pytest.mark.parametrize(("url", "config"), URLS)
def test_url_is_understood(url: str, config: RedisConfig) -> None:
    """from_url() takes what redis-py takes, and the fields in the query."""
    assert RedisConfig.from_url(url) == config


BAD_URLS = [
    ("", "url"),
    ("localhost:6379", "one server"),
    ("http://db", "one server"),
    ("redis://db:port", "[Pp]ort"),
    ("redis://db:70000", "Port"),
    ("redis://db:0", "port"),
    ("redis://db/one", "one"),
    ("redis://db/-1", "-1"),
    ("redis://db?db=-1", "db"),
    ("redis://db?db=one", "db"),
    ("redis://db?socket_timeout=never", "socket_timeout"),
    ("redis://db?socket_timeout=0", "socket_timeout"),
    ("redis://db?max_connections=0", "max_connections"),
    ("redis://db?colour=red", "colour"),
    ("redis://db?ssl=true", "ssl"),
    ("unix:///run/redis.sock", "one server"),
]


@pytest.mark.parametrize(("url", "named"), BAD_URLS)
def test_bad_url_is_a_clear_error(url: str, named: str) -> None:
    """ValueError that names what is wrong; nothing is silently left out."""
    with pytest.raises(ValueError, match=named):
        RedisConfig.from_url(url)


def test_bad_url_does_not_show_the_password() -> None:
    """Whatever is wrong with it."""
    for url in ("redis://:secret@db:port", "redis://:secret@db?colour=red", "redis://:secret@db/one"):
        with pytest.raises(ValueError) as caught:
            RedisConfig.from_url(url)
        assert "secret" not in str(caught.value)


def test_no_url_is_a_clear_error() -> None:
    """from_url(os.environ.get("REDIS_URL")) without that variable."""
    with pytest.raises(TypeError, match="url must be text, not NoneType"):
        RedisConfig.from_url(None)  # type: ignore[arg-type]
