"""The benchmarks run, and the page has the rows that they write. No test judges a speed."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import capacity
from speed import MEASURES

LONG = pytest.mark.chaos  # for `make chaos`: they take some seconds each, and both cores

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(script: Callable[..., "subprocess.Popen[str]"]) -> Run:
    """Run a benchmark with little work and return what it prints as JSON. It needs no server of anybody's."""

    def run(name: str, *options: str) -> dict[str, Any]:
        process = script("", f"benchmarks/{name}.py", "--quick", "--json", *options)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err  # not its exit code: that of soak.py says whether memory has grown
        return json.loads(out)  # type: ignore[no-any-return]

    return run


def test_messaging_benchmark_compares_each_operation(run: Run) -> None:
    """It gives the ratios of all rounds."""
    results = run("messaging")

    assert [name.split(" (")[0] for name in results][:4] == ["add", "publish", "is_allowed", "acquire + release"]
    for result in results.values():
        assert 0 < result["least"] <= result["median"] <= result["greatest"]


def test_speed_benchmark_takes_each_measure(run: Run) -> None:
    """Each row has two sides and a ratio, and says whether it reaches its target if it has one."""
    rows = run("speed", "--rounds", "1")["rows"]

    assert [row["what"] for row in rows] == [row.what for measure in MEASURES.values() for row in measure]
    for row in rows:
        assert min(row["bare"], row["ours"], *row["ratios"]) >= 0
        assert (row["reached"] is None) == (row["target"] is None)


@LONG
def test_memory_benchmark_takes_apart_what_a_finished_task_takes(run: Run) -> None:
    """The keys are a part of the whole, and a lost task is found among those that wait."""
    results = run("memory")

    for found in results["finished"].values():
        assert found["stream"] + found["record"] < found["task"]
    assert results["waiting"]["calls"] >= 1


@LONG
def test_watchers_benchmark_compares_the_hub_with_a_connection_each(run: Run) -> None:
    """Each watcher gets every event on both sides; the hub's watchers share a few connections to Redis."""
    results = run("watchers")

    assert results["hub"]["complete"] == results["naive"]["complete"] == 100
    assert results["hub"]["connections"] < 100 <= results["naive"]["connections"]


@LONG
def test_soak_says_how_memory_develops(run: Run) -> None:
    """Every task ends, watchers come and go, and nobody is refused."""
    results = run("soak", "--watchers", "10")

    assert (results["owed"], results["refused"]) == (0, 0)
    assert sum(results["ended"].values()) == results["tasks"] > 0
    assert results["watchers"] > 0 and results["events_to_watchers"] > 0
    assert results["figures"].keys() >= {"worker 1, MB", "worker 2, MB", "dashboard, MB", "server, MB"}


@LONG
def test_peers_benchmark_runs_this_queue_beside_a_bare_loop(run: Run) -> None:
    """Every task is done at both concurrencies; the queues that are not installed are named."""
    results = run("peers", "--only", "bare", "ours")

    assert list(results["results"]) == ["bare", "ours"]
    for found in results["results"].values():
        assert min(map(min, found.values())) > 0
        assert found.keys() >= {"drain_10", "drain_100", "put", "start"}
    assert {"ardiq", "rq", "celery", "dramatiq", "arq", "huey", "taskiq"} <= results["versions"].keys()


def test_performance_page_has_the_rows_of_the_program() -> None:
    """The table of docs/performance.md was written by the measures that speed.py has now, with their targets."""
    page = (ROOT / "docs" / "performance.md").read_text()
    [table] = re.findall(r"<!-- speed -->.*?\|---\|\n(.*?)<!-- /speed -->", page, re.DOTALL)
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [row for measure in MEASURES.values() for row in measure]

    assert [line[:2] for line in written] == [[row.what, row.beside] for row in rows]
    for line, row in zip(written, rows, strict=True):
        assert re.findall(r"[\d.]+", line[5]) == ([] if row.target is None else [f"{row.target:g}"])


def test_capacity_benchmark_measures_costs_and_computes_sizes(run: Run) -> None:
    """More agents need more of everything, and the page has the table."""
    cost = run("capacity")
    assert min(cost.values()) > 0
    small, large = (capacity.sizes(cost, agents) for agents in (10, 100_000))
    assert small["workers"] == small["nodes_cpu"] == 1
    assert large["workers"] > 1
    assert large["memory"][24] > large["memory"][1] > small["memory"][1]
    assert capacity.as_page(cost, "here").splitlines()[2] in (ROOT / "docs/performance.md").read_text()
