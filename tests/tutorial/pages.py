"""Run the tutorial's pages as a reader does: in real terminals, in order, against an embedded server of their own.

Usage:   python tests/tutorial/pages.py                   run all pages, say what differs
         python tests/tutorial/pages.py --write [3 …]     rewrite the code shown, and every output that differs
See:     tests/tutorial/test_tutorial_pages.py

How to write a page (tutorial/partN.md)
---------------------------------------
A page runs in a copy of the tree, after `tutorial/start.py N` (= `make partN`): a clean embedded server, no REDIS_URL,
`redis-cli` and `python` as the reader has them. Server and dashboard have free ports; a page says 6379 and 8000.

    ```console            `$ command`, then what it prints. All blocks run in order; each terminal is one bash with a
    $ redis-cli PING      pseudo-terminal (so redis-cli quotes and counts), 80 columns, no colours.
    PONG                  `> ` goes on with the line before, as bash shows it.
    ```
    … Terminal 2:         the line before a block ends so, to say which terminal; else it is terminal 1. In brackets:
    Terminal 2 (leave it running):   the block's last command goes on; the test waits for the output shown, no longer
    Terminal 2 (still running):      the block begins with more output of that command, and it still goes on
    Terminal 2 (it ends):            the block begins with more output of that command, and it must end
    ^C                    such a line in a block presses Ctrl-C in its terminal; the output follows it

Output is compared line by line. What varies:
    …                     anything in a line; alone in a line: any number of lines
    1700000000000-7       an entry id; the same id on the page is the same id in the run
    vm:6638               a worker: host and process; the same on the page is the same in the run
    2026-11-21T10:00:00.000Z · 10:00:00 · 1700000000000 · 12 ms · 5.1 s · 32 hex digits · "duration_ms": 12
                          match any of the same shape. The page must say so: (ids, times and durations vary)
    (1.03s)               a line of redis-cli that says how long it waited: may be there or not
Everything else must be equal. A command must work when pasted, so it holds no id or process of yesterday: take it into
a variable (`id=$(redis-cli XADD …)`, in `$(…)` redis-cli prints it bare) or ask for it (`kill -9 $!`). It must end for
a reason, not by chance: --burst, --timeout, --no-follow, Ctrl-C. Blocks may be indented, as in a list.

    ```python after a line with "save this as `watch.py`"      is written to that file of the copy
    <!-- from consumer.py: handle -->       directly before a block (python, lua …): the block is that function, class,
    <!-- from consumer.py: Class.method --> method or constant of the real file. Also by lines, first and last included:
    <!-- from put.lua: "first words" to "last words" -->       --write fills it in; a test fails where they differ
    ```text                                 is not run: the line before it must say "not run"
    <details><summary>Solution</summary>    … blocks in it are run like all others: so an exercise's check has an answer

Code exercises: tutorial/exercises/partN_name.py (unsolved), test_partN_name.py (its check: imports it by name, needs no
server; the page runs `python -m pytest tutorial/exercises/test_partN_name.py`, with `…` and the last line as output),
tests/tutorial/solutions/partN_name.py (its solution: the tests run the check with both).
`--write` takes what it sees (of a running command: until it is silent for 3 s), so look at what it has written.
"""

import ast
import codecs
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "tutorial"
DEADLINE_SECONDS = 60.0  # of one command, on a busy machine
QUIET_SECONDS = 3.0  # only with --write: a running command has said what it had to say
PROMPT = "\x02ready\x03"  # no program prints it
COLUMNS, ROWS = 80, 40
NOT_COPIED = (".git", ".venv", ".redis", "outbox", "__pycache__", ".*_cache", ".hypothesis", "node_modules")

FENCE = re.compile(r"^( *)```(\S*)$")
LABEL = re.compile(r"Terminal (\d)(?: \(([^)]*)\))?:$")
SAVE_AS = re.compile(r"[Ss]ave this as `([\w/.]+)`")
FROM = re.compile(r'^<!-- from (\S+): (?:([\w.]+)|"(.+)" to "(.+)") -->$')

# What varies, and how it looks. The first two are bound: once seen, a sample means one real value.
SHAPES = {
    "id": r"\b\d{13}-\d+\b",
    "worker": r"\bvm:\d+\b",
    "iso": r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)?",
    "clock": r"\b\d\d:\d\d:\d\d(?:\.\d+)?\b",
    "milliseconds": r"\b\d{13}\b",
    "duration": r"\b\d[\d,]*(?:\.\d+)? (?:ms|s)\b",
    "duration_field": r'"duration_ms": \d+',
    "token": r"\b[0-9a-f]{32}\b",
    "any": "…",
}
VARYING = re.compile("|".join(f"(?P<{name}>{shape})" for name, shape in SHAPES.items()))
REAL = {**SHAPES, "any": ".*"}
HOST, NUMBER = r"[\w.-]+:", r"\d+"  # a real worker

WAITED = re.compile(r"\(\d+\.\d+s\)")  # redis-cli says so after half a second, so it depends on the machine


Change = tuple[int, int, list[str]]  # of a page: the first line (from 0), how many, what stands there instead


class PageError(Exception):
    """A page does not say what happens; the message names its line."""


# -- reading a page ---------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced block of a page."""

    kind: str  # console, python, lua, text …
    before: str  # the last line of text before it
    number: int  # line of its first content, from 1
    lines: list[str]
    indent: str = ""  # before its lines on the page, as in a list

    def as_on_page(self, lines: list[str]) -> list[str]:
        return [f"{self.indent}{line}".rstrip() for line in lines]

    @property
    def terminal(self) -> tuple[str, str]:
        """The number of its terminal, and what stands in brackets."""
        found = LABEL.search(self.before)
        return (found[1], found[2] or "") if found else ("1", "")


@dataclass
class Step:
    """Something typed, and what is printed then."""

    typed: str  # a command, "^C", or "" for more output of what runs
    number: int
    expected: list[str] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The line of the page, from 0, where the output begins."""
        return self.number + self.typed.count("\n") if self.typed else self.number - 1


def blocks(text: str) -> Iterator[Block]:
    before, inside = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if inside is not None:
            if line.strip() == "```":
                yield inside
                inside, before = None, ""
            else:
                inside.lines.append(line.removeprefix(inside.indent))
        elif fence:
            inside = Block(fence[2], before, number + 1, [], fence[1])
        elif line.strip():
            before = line.strip()
    if inside is not None:
        raise PageError(f"line {inside.number}: the block does not end")


def steps(block: Block) -> list[Step]:
    found: list[Step] = []
    for number, line in enumerate(block.lines, start=block.number):
        if line.startswith("$ "):
            found.append(Step(line[2:], number))
        elif line == "^C":
            found.append(Step("^C", number))
        elif line.startswith("> ") and found and not found[-1].expected:
            found[-1].typed += "\n" + line[2:]
        else:
            if not found:
                found.append(Step("", number))
            found[-1].expected.append(line)
    return found or [Step("", block.number)]


def code_of(source: str, name: str | None, first: str = "", last: str = "") -> list[str]:
    """Return the lines of a function, class, method or constant of a file, or from one line to another."""
    path = ROOT / source
    lines = path.read_text(encoding="utf-8").splitlines()
    if name is None:
        start = next((n for n, line in enumerate(lines) if first in line), None)
        end = next((n for n, line in enumerate(lines) if start is not None and n >= start and last in line), None)
        if start is None or end is None:
            raise PageError(f'{source} has no lines from "{first}" to "{last}"')
        return lines[start : end + 1]
    node: ast.AST = ast.parse("\n".join(lines))
    for part in name.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if part in _names(child)), ast.Pass())
    if not isinstance(node, ast.stmt) or isinstance(node, ast.Pass):
        raise PageError(f"{source} has no {name}")
    begin = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return lines[begin - 1 : node.end_lineno]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def shown_code(text: str) -> Iterator[tuple[Block, list[str]]]:
    """Yield each block that a marker fills, and what the file says today."""
    for block in blocks(text):
        if found := FROM.match(block.before):
            yield block, code_of(*found.groups())


# -- terminals --------------------------------------------------------------------------------------------------

# A shell that has the pseudo-terminal as its own, so that Ctrl-C and `&` work as at a desk.
LAUNCHER = "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp('bash', ['bash', *{}])"
BASH = ["--norc", "--noprofile", "--noediting", "-i"]


class Terminal:
    """A bash in a pseudo-terminal; `seen` is what was printed and not yet compared."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        mode = termios.tcgetattr(slave)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER.format(BASH)],
            cwd=directory,
            env={**environment, "PS1": PROMPT, "PS2": ""},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""
        self.news = threading.Condition()  # held by who changes `seen`
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()  # it always reads: a full terminal would stop what runs in it
        if not self.read_until(lambda: self.at_prompt, DEADLINE_SECONDS):
            raise PageError("bash does not start")
        self.seen = PROMPT

    @property
    def at_prompt(self) -> bool:
        return self.seen.endswith(PROMPT)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the shell has gone, and its end of the line is closed
                return
            with self.news:
                self.seen += decoder.decode(data).replace("\r", "")
                self.news.notify()

    def read_until(self, done: Callable[[], object], seconds: float, quiet: float | None = None) -> bool:
        """Wait until done() holds; say whether it does. With `quiet`, a silence of so long ends it too."""
        deadline = time.monotonic() + seconds
        with self.news:
            while not done():
                left = deadline - time.monotonic()
                if left <= 0 or not self.news.wait(min(left, quiet or left)):
                    return False
        return True

    def close(self) -> None:
        """End the shell and what runs in it."""
        with contextlib.suppress(OSError):
            foreground = os.tcgetpgrp(self.master)
            if foreground not in (0, self.process.pid):
                os.killpg(foreground, signal.SIGHUP)  # as a terminal that is closed does: it ends its servers, too
                deadline = time.monotonic() + 5
                while time.monotonic() < deadline:
                    os.killpg(foreground, 0)  # OSError: all of them have gone
                    time.sleep(0.02)
                os.killpg(foreground, signal.SIGKILL)
        self.process.send_signal(signal.SIGHUP)  # bash passes it on to its jobs
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(timeout=60)
        if not self._reader.is_alive():  # subtle: else it would read whatever gets this number next
            os.close(self.master)


# -- running a page ---------------------------------------------------------------------------------------------


class Run:
    """A copy of the tree with a server of its own, the terminals of a page, and what the page's samples stand for."""

    def __init__(self, directory: Path, port: int) -> None:
        self.tree, self.port = directory / "tree", port
        self.terminals: dict[str, Terminal] = {}
        self.bound: dict[str, str] = {}  # sample -> real: entry ids and processes
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.web_port = port + 10_000  # free_port() has looked at that one as well
        for name, usual, own in (
            ("ailf/messaging/redis/embedded.py", r"\nPORT = 6379\b", f"\nPORT = {port}"),
            ("dashboard.py", r"\bdefault=8000\b", f"default={self.web_port}"),
        ):
            text, count = re.subn(usual, own, (self.tree / name).read_text())
            if count != 1:
                raise PageError(f"{name} has no {usual.strip()}")
            (self.tree / name).write_text(text)
        tools = self.tree / ".venv/bin"  # what `make` and `source .venv/bin/activate` look for
        tools.mkdir(parents=True)
        redis_cli = shutil.which("redis-cli")
        for name, command in {"python": sys.executable, "redis-cli": f"{redis_cli} -p {port}"}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (tools / name).chmod(0o755)
        (tools / "activate").touch()
        (tools.parent / "ready").touch()
        dropped = (
            "REDIS",
            "LLM_",
            "TASK_",
            "MAKE",
            "MFLAGS",
            "PYTEST",
            "COLUMNS",
            "LINES",
            "FORCE_COLOR",
            "PYTHONPATH",
            "CI",
        )
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        self.environment |= {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TERM": "dumb",  # no colours, no cursor movements
            "NO_COLOR": "1",
            "HISTFILE": "",
            "PYTHONIOENCODING": "utf-8",
        }

    def project(self, *command: str) -> str:
        """Run one of the project's own commands, which must succeed; return what it printed."""
        python = str(self.tree / ".venv/bin/python")
        done = subprocess.run(
            [python, *command], cwd=self.tree, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise PageError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def close(self) -> None:
        try:
            for terminal in self.terminals.values():
                terminal.close()
        finally:
            self.project("-m", "ailf.messaging.redis", "stop")

    def pattern(self, expected: list[str]) -> tuple["re.Pattern[str]", dict[str, str]]:
        """Return the pattern that the output must match, and its groups: name -> sample."""
        groups: dict[str, str] = {}

        def one(found: "re.Match[str]") -> str:
            kind, text = str(found.lastgroup), found[0]
            if kind not in ("id", "worker"):
                return REAL[kind]
            sample = text.removeprefix("vm:")
            prefix = HOST if kind == "worker" else ""
            if sample in self.bound:
                return prefix + re.escape(self.bound[sample])
            for name, known in groups.items():
                if known == sample:
                    return f"{prefix}(?P={name})"
            groups[f"g{len(groups)}"] = sample
            return f"{prefix}(?P<g{len(groups) - 1}>{NUMBER if kind == 'worker' else REAL['id']})"

        parts = []
        for line in expected:
            if WAITED.fullmatch(line):
                continue
            if line.strip() == "…":
                parts.append(r"(?:[^\n]*\n)*?")
                continue
            line, pieces, at = line.rstrip(), [], 0
            for found in VARYING.finditer(line):
                pieces += [re.escape(line[at : found.start()]), one(found)]
                at = found.end()
            parts.append("".join([*pieces, re.escape(line[at:])]) + r"[ \t]*\n")
        return re.compile("".join(parts)), groups

    def visible(self, text: str) -> str:
        """Return what was printed as a page shows it."""
        text = re.sub(rf"^{WAITED.pattern}\n", "", text, flags=re.MULTILINE)
        text = re.sub(rf"(?<=:){self.web_port}\b", "8000", text)
        return re.sub(rf"(?<=:){self.port}\b|(?<=port ){self.port}\b", "6379", text)

    def step(self, block: Block, step: Step, goes_on: bool, write: bool) -> list[str] | None:
        """Do one step; raise PageError where the output differs, or with `write` return it."""
        number, _ = block.terminal
        if number not in self.terminals:
            self.terminals[number] = Terminal(self.tree, self.environment)
        terminal = self.terminals[number]
        if step.typed:
            with terminal.news:
                if step.typed == "^C" and terminal.at_prompt:
                    raise PageError(f"line {step.number}: nothing runs in terminal {number}, it said: {terminal.seen}")
                if step.typed != "^C" and terminal.seen != PROMPT:
                    raise PageError(f"line {step.number}: terminal {number} runs or says more: {terminal.seen}")
                terminal.seen = terminal.seen.removesuffix(PROMPT)
            typed = step.typed.replace("127.0.0.1:8000", f"127.0.0.1:{self.web_port}")
            terminal.type("\x03" if typed == "^C" else typed + "\n")
        pattern, groups = self.pattern(step.expected)

        def match() -> "re.Match[str] | None":
            text = self.visible(terminal.seen)
            if goes_on:
                return pattern.match(text)
            if not terminal.at_prompt:
                return None
            text = text.removesuffix(PROMPT)
            return pattern.fullmatch(text + "\n" * (text != "" and not text.endswith("\n")))

        def done() -> bool:
            return match() is not None if goes_on else terminal.at_prompt

        terminal.read_until(done, DEADLINE_SECONDS, quiet=QUIET_SECONDS if write and goes_on else None)
        with terminal.news:
            printed, found = self.visible(terminal.seen).removesuffix(PROMPT), match()
            if found and goes_on:
                terminal.seen = self.visible(terminal.seen)[found.end() :]
            elif found or write:
                terminal.seen = PROMPT if terminal.at_prompt else ""
        if found:
            self.bound |= {sample: found[name] for name, sample in groups.items()}
            return None
        if write and "Traceback" not in printed:
            for sample, real in self.bound.items():
                printed = re.sub(rf"\b{real}\b", sample, printed)
            return printed.replace(f"{socket.gethostname()}:", "vm:").splitlines()
        ended = "" if goes_on or terminal.at_prompt else f" (it did not end within {DEADLINE_SECONDS:g} s)"
        wanted = "\n".join(step.expected)
        raise PageError(
            f"line {step.number}: {step.typed or 'more output'}{ended}\n"
            f"-- the page says:\n{wanted}\n-- it printed:\n{printed}\n-- samples: {self.bound}"
        )


def run_page(path: Path, directory: Path, port: int, write: bool = False) -> list[Change]:
    """Run all blocks of a page; raise PageError at the first that differs, or with `write` return what was printed."""
    changes: list[Change] = []
    run = Run(directory, port)
    try:
        run.project("tutorial/start.py", path.stem.removeprefix("part"))
        for block in blocks(path.read_text(encoding="utf-8")):
            if block.kind == "python" and (name := SAVE_AS.search(block.before)):
                (run.tree / name[1]).write_text("\n".join(block.lines) + "\n")
            if block.kind != "console":
                continue
            todo = steps(block)
            for step in todo:
                goes_on = step is todo[-1] and "running" in block.terminal[1]
                printed = run.step(block, step, goes_on, write)
                if printed is not None:
                    changes.append((step.first, len(step.expected), block.as_on_page(printed)))
                    # what is new on the page is real: it stands for itself
                    for kind in VARYING.finditer("\n".join(printed)):
                        if kind.lastgroup in ("id", "worker"):
                            sample = kind[0].removeprefix("vm:")
                            run.bound.setdefault(sample, sample)
    finally:
        run.close()
    return changes


# -- rewriting --------------------------------------------------------------------------------------------------


def rewrite(path: Path, changes: list[Change]) -> None:
    """Replace lines of a page."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for start, count, new in sorted(changes, reverse=True):
        lines[start : start + count] = new
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import free_port  # it needs pytest, which a reader of this module need not have

    write = "--write" in argv
    chosen = [word for word in argv if word.isdigit()]
    failures = 0
    for path in sorted(TUTORIAL.glob("part*.md")):
        if chosen and path.stem.removeprefix("part") not in chosen:
            continue
        if write:
            text = path.read_text(encoding="utf-8")
            rewrite(
                path, [(block.number - 1, len(block.lines), block.as_on_page(code)) for block, code in shown_code(text)]
            )
        with tempfile.TemporaryDirectory() as directory:
            began = time.monotonic()
            try:
                changes = run_page(path, Path(directory), free_port(), write)
            except PageError as error:
                print(f"{path.name}, {error}", file=sys.stderr)
                failures += 1
                continue
            rewrite(path, changes)
            print(f"{path.name}: {len(changes)} outputs rewritten, {time.monotonic() - began:.1f} s")
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
