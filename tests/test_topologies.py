"""The local cluster and the local sentinels, as people start them, and the project's scripts on them."""

import contextlib
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import typed
from conftest import ROOT, wait_until

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["cluster", "sentinel"])
def about(request: pytest.FixtureRequest, script: Start, tmp_path: Path) -> Iterator[str]:
    """Start what `make cluster` or `make sentinel` starts; give what it says; stop it by Ctrl-C."""
    said = tmp_path / "said"
    with said.open("w") as file:
        program = script("", "tutorial/topologies.py", request.param, stdout=file, env={"TMPDIR": str(tmp_path)})
    wait_until(lambda: "Ctrl-C" in said.read_text() or program.poll() is not None, "the servers are up")
    assert program.poll() is None, program.communicate()[1]
    ports = {int(port) for port in re.findall(r"[\s:](\d{4,5})\b", said.read_text().partition("python")[0])}
    assert len(ports) == (6 if request.param == "cluster" else 5)
    assert all(listens(port) for port in ports)

    yield said.read_text()

    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=60) == 0
    assert said.read_text().endswith(f"{request.param} stopped\n")
    assert program.communicate()[1] == ""
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert not any(listens(port) for port in ports)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


def test_scripts_work_on_what_it_starts(about: str) -> None:
    """The printed REDIS_URL serves producer, consumer and reader; Ctrl-C leaves neither a process nor a file."""
    url = str(re.search(r"export REDIS_URL=(\S+)", about)[1])  # type: ignore[index]

    put = typed(url, "producer.py")
    worked = typed(url, "consumer.py", "--burst")
    shown = typed(url, "stream_reader.py", *put.lines)

    assert (put.code, worked.code, shown.code) == (0, 0, 0)
    assert len(put.lines) == 2
    assert shown.out.count("completed") == 2


def test_unknown_topology_is_refused(script: Start) -> None:
    """Anything but `cluster` and `sentinel` is a usage error."""
    program = script("", "tutorial/topologies.py", "ring")

    assert "cluster" in program.communicate(timeout=60)[1]
    assert program.returncode == 2


def test_makefile_offers_both() -> None:
    """`make cluster` and `make sentinel` start them."""
    makefile = (ROOT / "Makefile").read_text()

    for what in ("cluster", "sentinel"):
        assert re.search(
            rf"^{what}: .*##.*\n\t@\$\(BIN\)/python tutorial/topologies.py {what}$", makefile, re.MULTILINE
        )
