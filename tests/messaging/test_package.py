"""The package for its users' own tests and projects: test doubles, and what it needs to be imported."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

from ailf.messaging import redis as package
from ailf.messaging.redis import (
    RedisClient,
    RedisConfig,
    RedisLock,
    RedisPubSub,
    RedisRateLimiter,
    RedisStream,
)


@pytest.fixture
def double() -> Iterator[mock.MagicMock]:
    """What redis.Redis(…) returns while it is patched."""
    with mock.patch("redis.Redis") as kind:
        yield kind.return_value


@pytest.mark.parametrize("given", ["config", "double", "nothing"])
def test_each_class_uses_a_double_of_redis_py(
    double: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """mock.patch("redis.Redis") is enough, whether a client is given or not: no method looks for a real one."""
    monkeypatch.setenv("REDIS_URL", "redis://nowhere.invalid")
    client = {"config": RedisClient(RedisConfig("nowhere.invalid")), "double": double, "nothing": None}[given]
    double.xadd.return_value = "1-0"
    double.publish.return_value = 2
    double.register_script.return_value.return_value = [1, 9, 0]

    stream = RedisStream("tasks", client)
    added = stream.add({"n": 1})
    published = RedisPubSub(client).publish("channel", {"n": 1})
    decision = RedisRateLimiter("limit", redis_client=client).check("a")
    double.register_script.return_value.return_value = 7
    lock = RedisLock("door", redis_client=client)

    assert (added, published, decision) == ("1-0", 2, (True, 9, 0))
    double.xadd.assert_called_once_with("tasks", {"n": "1"}, maxlen=10_000)
    double.publish.assert_called_once_with("channel", '{"n": 1}')
    assert (lock.acquire(), lock.fencing_token, lock.release()) == (True, 7, True)
    double.register_script.return_value.return_value = 0
    assert lock.acquire(retry=0) is False
    double.xreadgroup.return_value = [["tasks", [["1-0", {"n": "1"}]]]]
    stream.create_consumer_group("workers", "one")
    assert stream.read_group() == [{"id": "1-0", "data": {"n": 1}}]


def test_client_with_a_double_answers_what_the_double_answers(double: mock.MagicMock) -> None:
    """set, get and delete return it in the types that they promise."""
    double.get.return_value, double.delete.return_value, double.set.return_value = "text", 1, True
    client = RedisClient(RedisConfig())

    assert (client.set("a", "1", expire=2), client.get("a"), client.delete("a")) == (True, "text", True)
    double.set.assert_called_once_with("a", "1", px=2000)
    double.delete.return_value = 0
    assert client.delete("a") is False


def test_subscription_with_a_double_is_kept_and_handled(double: mock.MagicMock) -> None:
    """subscribe() calls redis-py's PubSub, and what that gives reaches the handler."""
    subscriber, got = double.pubsub.return_value, list[object]()
    subscriber.get_message.side_effect = [{"type": "subscribe", "channel": "news", "data": 1}]
    pubsub = RedisPubSub()

    def handler(message: object) -> None:
        got.append(message)
        pubsub.stop()

    pubsub.subscribe("news", handler)

    subscriber.subscribe.assert_called_once_with("news")
    assert pubsub.subscriptions == {"news": handler}
    subscriber.get_message.side_effect = [{"type": "message", "pattern": None, "channel": "news", "data": "[1]"}]
    pubsub.run()
    assert got == [[1]]


def test_a_double_leaves_no_trace_in_later_locks(double: mock.MagicMock, redis: object) -> None:
    """redis-py registers a lock's scripts once for all its locks; the double's must not stay there."""
    RedisLock("shared").acquire()

    real = RedisLock("shared", redis_client=redis)

    assert real.acquire(retry=0)
    assert real.release() is True
    assert real.locked() is False


def test_import_needs_redis_and_nothing_else() -> None:
    """It works where nothing else is installed: here, where nothing else can be imported."""
    program = """
import sys

class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"ailf", "redis"}:
            raise ModuleNotFoundError(f"No module named {name}")

sys.meta_path.insert(0, Nothing())
import ailf.messaging.redis
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_types_and_scripts_are_installed_with_the_package() -> None:
    """The marker of PEP 561, and each Lua script, are files of the packages that pyproject.toml includes."""
    settings = (ROOT / "pyproject.toml").read_text()

    assert '"*" = ["*.lua", "py.typed"]' in settings
    assert (ROOT / "ailf" / "py.typed").exists()
    assert all((folder / "__init__.py").exists() for folder in {file.parent for file in (ROOT / "ailf").rglob("*.lua")})


def test_data_is_kept_in_the_checkout_or_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$EMBEDDED_REDIS_DIR, else .redis of the checkout, else (installed) the user's state folder."""
    embedded = package.embedded
    in_checkout = embedded._data_dir()
    monkeypatch.setattr(embedded, "__file__", f"{tmp_path}/site-packages/ailf/messaging/redis/embedded.py")
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/state")
    installed = embedded._data_dir()
    monkeypatch.setenv("EMBEDDED_REDIS_DIR", f"{tmp_path}/mine")

    assert in_checkout == ROOT / ".redis"
    assert str(installed) == f"{tmp_path}/state/ailf-redis"
    assert str(embedded._data_dir()) == f"{tmp_path}/mine"
