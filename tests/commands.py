"""Run a script to its end as a person types it, but inside this process: to start one takes a third of a second of CPU.

    result = typed(server.url, "producer.py", "--count", "3")
    assert (result.code, result.lines) == (0, ["1", "2", "3"])

If a real process, its signals or its pipes matter, use the fixture `script` instead; also for dashboard.py, which
serves until a signal comes.
"""

import io
import logging
import os
import runpy
import sys
import tempfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from conftest import ROOT


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Screen(io.TextIOWrapper):
    """Output that says to be a terminal: with `typed(…, terminal=True)` of 100 columns and with colours."""

    def isatty(self) -> bool:
        return True


def typed(
    url: str, *command: str, stdin: str | bytes = b"", traceback: bool = False, terminal: bool = False, term: str = ""
) -> Result:
    """Run `python …` to its end: typed(url, "producer.py") or typed(url, "-m", "task_streams", "dead").

    An exception that leaves it fails the test, as a traceback on stderr does unless `traceback` says that one is due.
    """
    kind = Screen if terminal else io.TextIOWrapper
    out, err = kind(io.BytesIO(), "utf-8"), kind(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own are
    environment = {"REDIS_URL": url, "TERM": term or "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    root = logging.getLogger()
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        file.write(stdin.encode() if isinstance(stdin, str) else stdin)
        file.seek(0)
        stack.callback(os.chdir, Path.cwd())
        os.chdir(ROOT)
        stack.enter_context(mock.patch.dict(os.environ, environment if terminal else {"REDIS_URL": url}))
        stack.enter_context(mock.patch.object(sys, "stdin", io.TextIOWrapper(file, "utf-8")))
        stack.enter_context(mock.patch.object(root, "handlers", []))  # those of pytest: cli.run() sets up its own
        stack.callback(root.setLevel, root.level)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        is_module = command[0] == "-m"
        stack.enter_context(mock.patch.object(sys, "argv", [*command[is_module:]]))
        code: object = 0
        try:
            if is_module:
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        out.flush()
        err.flush()
    result = Result(int(code or 0), *(one.buffer.getvalue().decode() for one in (out, err)))  # type: ignore[attr-defined, call-overload]
    assert traceback is ("Traceback" in result.err), result.err
    return result
