"""This queue beside others that keep their tasks in Redis: same machine, same server, same run.

Usage:   python benchmarks/peers.py [--rounds N] [--tasks N] [--only ours rq] [--quick] [--json] [--write]
Needs:   Linux. It starts a server of its own, on loopback. Others run if they are installed:
         pip install rq 'celery[redis]' 'dramatiq[redis]' huey taskiq taskiq-redis uvloop; pip install --no-deps arq
         ardiq needs Python 3.12: name an interpreter that has it in $ARDIQ_PYTHON. $RQ_PYTHON and so on work alike
See:     benchmarks/sides.py for the sides; docs/performance.md, whose table --write fills in

Each side puts tasks from one process and runs them in another, with its documented settings for many short tasks, 10
and 100 at a time, results off. The sides take turns in rounds. A bare BRPOP loop runs before each, and a ratio is to
the median of those in the round. A side is measured from its first task to its last.

kill -9: 20 tasks of one second, default settings but for 10 at a time; all processes of the worker are killed when ten
tasks have begun, and a new worker starts. Counted is what is not done 15 s later.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from common import PATIENCE_SECONDS, machine, run, server, wait_until, write_page
from sides import SIDES, STAMP, STAMPS, read_stamps

from ailf.messaging.redis import connect

CONCURRENCIES = (10, 100)
KILLED = 20  # tasks
KILLED_SECONDS = 15.0  # after which they are counted
BARE_TASKS = 5  # times as many for the bare loop, which is that much faster: else it is over in a moment
LATENCIES = 20  # a round
HEAD = """\
| | version | drained a second, 10 at a time | ratio to BRPOP | 100 at a time | ratio | put a second | ratio to LPUSH \
| start, p50 | of 20 not done 15 s after kill -9 |
|---|---|---|---|---|---|---|---|---|---|"""

Figures = dict[str, float]  # drain_10, drain_100 and put: a second; start: seconds


def python_of(name: str) -> str:
    return os.environ.get(f"{name.upper()}_PYTHON") or sys.executable


@cache
def version(name: str) -> str | None:
    """Return the version of what a side needs, '' if it needs nothing, None if it is not installed."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    command = [python_of(name), "-c", code, *SIDES[name].packages]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return None if found.returncode else next(iter(found.stdout.split()), "")


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has gone
            for one in path.read_text().split():
                found += family(int(one))
    return found


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9 a side's process and all that it started."""
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=10)


class Peers:
    """A server, and the processes of all sides."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.client = url, connect(url)
        self.stamps, self.log = folder / "stamps", folder / "log"
        os.environ[STAMPS] = str(self.stamps)

    def clean(self) -> None:
        self.client.flushall()
        self.stamps.write_bytes(b"")

    @contextmanager
    def running(self, name: str, role: str, concurrency: int, best: bool, *args: Any) -> Iterator[Any]:
        """Run a process of a side; kill it at the end."""
        program = str(Path(__file__).with_name("sides.py"))
        command = [python_of(name), program, name, role, self.url, str(concurrency), "best" if best else "default"]
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.log.parent
            )
        try:
            yield process
        finally:
            kill(process)

    def result_of(self, name: str, role: str, best: bool, *args: Any) -> float:
        with self.running(name, role, CONCURRENCIES[0], best, *args) as process:
            out, _ = process.communicate(timeout=PATIENCE_SECONDS)
            return float(out.splitlines()[-1])

    def drain_and_put(self, name: str, concurrency: int, count: int) -> tuple[float, float]:
        """Return (tasks a second of a worker, puts a second)."""
        self.clean()
        put = self.result_of(name, "put", True, count, 0.0)
        size = STAMP.size * count
        with self.running(name, "work", concurrency, True):
            wait_until(lambda: self.stamps.stat().st_size >= size, f"{name} has done {count} tasks")
        when = {number: moment for _, number, moment in read_stamps()}
        assert when.keys() == set(range(count))
        return count / (max(when.values()) - min(when.values())), put

    def round_of(self, name: str, count: int) -> Figures:
        figures: Figures = {}
        for concurrency in CONCURRENCIES:
            if concurrency <= SIDES[name].most:
                figures[f"drain_{concurrency}"], figures["put"] = self.drain_and_put(name, concurrency, count)
        self.clean()
        with self.running(name, "work", CONCURRENCIES[0], True):  # it is idle
            figures["start"] = self.result_of(name, "latency", True, LATENCIES)
        return figures

    def measure(self, names: list[str], rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
        """Return the figures of all rounds, by side, and the ratios, named with `ratio` at the end."""
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
        for turn in range(rounds):
            this: dict[str, Figures] = {}
            bare = []
            for name in names:
                bare.append(self.drain_and_put("bare", 1, BARE_TASKS * count))
                this[name] = self.round_of(name, count)
                shown = " ".join(f"{figure} {value:.4g}" for figure, value in this[name].items())
                print(f"{turn + 1} {name:14} {shown}; bare {bare[-1][0]:.0f}", file=sys.stderr)
            drained, pushed = map(statistics.median, zip(*bare, strict=True))
            for name, figures in this.items():
                for figure, value in figures.items():
                    found[name][figure].append(value)
                    found[name][f"{figure} ratio"].append(value / (pushed if figure == "put" else drained))
        return found

    def not_done_after_kill(self, name: str) -> int:
        """Return how many of KILLED tasks are not done KILLED_SECONDS after their worker's processes were killed."""

        def done() -> int:
            return len({number for kind, number, _ in read_stamps() if kind == b"e"})

        self.clean()
        self.result_of(name, "put", False, KILLED, 1.0)
        with self.running(name, "work", 10, False) as worker:
            wait_until(lambda: len(read_stamps()) >= 10, f"{name} has begun ten tasks")
            kill(worker)
        with self.running(name, "work", 10, False), suppress(TimeoutError):
            wait_until(lambda: done() == KILLED, "all are done", KILLED_SECONDS)
        return KILLED - done()


def line(name: str, found: dict[str, list[float]] | None, not_done: int | None) -> str:
    """Return a row of the page's table."""
    cells = [SIDES[name].title, version(name) or ""]
    if found is None:
        return f"| {' | '.join([cells[0], 'not run' if version(name) is not None else 'not installed'])} |{' |' * 8}"
    for figure in ("drain_10", "drain_100", "put"):
        values, ratios = found.get(figure), found.get(f"{figure} ratio", [])
        cells.append(f"{statistics.median(values):,.0f}" if values else "")
        cells.append(f"{min(ratios):.2f} · {statistics.median(ratios):.2f} · {max(ratios):.2f}" if ratios else "")
    cells.append(f"{statistics.median(found['start']) * 1000:.1f} ms")
    return f"| {' | '.join([*cells, '' if not_done is None else str(not_done)])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this queue with others that are installed.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--tasks", type=int, default=5000, help="tasks a turn (5000)")
    only = f"some of: {', '.join(SIDES)}"
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SIDES, default=list(SIDES), help=only)
    parser.add_argument("--quick", action="store_true", help="one round of a few tasks, no kill, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write", action="store_true", help="fill in the table of docs/performance.md")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tasks = 1, 50
    names = [name for name in SIDES if name in args.only and version(name) is not None]
    with tempfile.TemporaryDirectory() as folder, server() as url:
        peers = Peers(url, Path(folder))
        where = f"{machine(peers.client)}; {args.rounds} rounds of {args.tasks:,} tasks"
        try:
            found = peers.measure(names, args.rounds, args.tasks)
            killed = [] if args.quick else [name for name in names if name != "bare"]
            not_done = {name: peers.not_done_after_kill(name) for name in killed}
        except Exception:
            print(peers.log.read_text()[-5000:], file=sys.stderr)
            raise
    if args.json:
        versions = {name: version(name) for name in SIDES}
        print(json.dumps({"machine": where, "versions": versions, "results": found, "not_done": not_done}))
        return 0
    rows = [line(name, found.get(name), not_done.get(name)) for name in SIDES]
    settings = [f"- {SIDES[name].title.strip('*')}: {SIDES[name].settings}" for name in names]
    text = "\n".join(
        [f"{where}.", "", HEAD, *rows, "", "Settings of the speeds (kill -9: defaults, 10 at a time):", "", *settings]
    )
    print(text)
    if args.write:
        write_page("peers", text)
    return 0


if __name__ == "__main__":
    run(main)
