"""The data tools: look at CSV, TSV, JSON, JSON Lines and text files, gzip too, in any encoding, with SQL.

Each call works in a process of its own (sandbox.py): its memory is limited, it sees no environment variables, and it is
killed when its time is up or when the agent's task is cancelled.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .base import Result, ToolError, ToolUnavailable, safe_to_repeat

SECONDS = 120.0  # for one call: describing a file of several GB, or a query that never ends
MAX_BYTES = 300_000_000  # of memory for one call
POLL_SECONDS = 0.05  # how soon a call ends that takes too much, or whose task is cancelled
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # the other variables may hold passwords
ROOT = Path(__file__).parents[1]
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
START = [sys.executable, "-c", "from agent_tools import sandbox; sandbox.main()"]


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process takes; 0 if the system doesn't tell (macOS)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):  # no /proc, or the process has just ended
        return 0


def never() -> None:
    """The `check` of a call that nobody cancels."""


class DataProcessor:
    """Look at data files below data_root.

    `check` is called a few times a second during a call. If it raises, because the task was cancelled, the call ends
    with that exception.
    """

    def __init__(self, data_root: Path, seconds: float = SECONDS) -> None:
        self.data_root = data_root
        self.seconds = seconds

    @safe_to_repeat
    def load_file(self, file: str, *, check: Callable[[], None] = never) -> Result:
        """Read a data file once: its format, encoding, number of rows, columns."""
        return self._run("load_file", {"file": file}, check)

    @safe_to_repeat
    def describe(self, file: str, *, check: Callable[[], None] = never) -> Result:
        """Describe each column: its type, missing values, least, greatest, mean and sum, or most common values."""
        return self._run("describe", {"file": file}, check)

    @safe_to_repeat
    def query(self, file: str, sql: str, *, check: Callable[[], None] = never) -> Result:
        """Run one SELECT (DuckDB's SQL) on a file: its table is called data, a text file's only column line."""
        return self._run("query", {"file": file, "sql": sql}, check)

    def _run(self, action: str, arguments: dict[str, Any], check: Callable[[], None]) -> Result:
        request = {"action": action, "root": str(self.data_root.absolute()), "arguments": arguments}
        unsent: bytes | None = json.dumps({**request, "seconds": self.seconds}).encode()
        deadline = time.monotonic() + self.seconds
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(TemporaryDirectory(prefix="agent-tool-"))
                environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"TMPDIR": scratch}
                # A session of its own: Ctrl-C in the terminal lets a running task finish.
                process = subprocess.Popen(START, cwd=ROOT, env=environment, start_new_session=True, **PIPES)
            except OSError as error:
                raise ToolUnavailable(f"cannot start a process for {action}: {error.strerror}") from error
            stack.enter_context(process)
            stack.callback(process.kill)
            while True:
                try:
                    output, _ = process.communicate(unsent, timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    unsent = None  # communicate() keeps what is left of it
                check()
                if memory_of(process.pid) > MAX_BYTES:
                    raise ToolError(f"{action} takes too much memory; ask for less")
                if time.monotonic() > deadline:
                    raise ToolError(f"{action} took over {self.seconds:g} s; ask for less")
        if process.returncode != 0:
            raise ToolError(f"{action} took too much memory or crashed (exit {process.returncode}); ask for less")
        answer = json.loads(output)
        if "error" in answer:
            raise ToolError(answer["error"])
        result: Result = answer["result"]
        return result
