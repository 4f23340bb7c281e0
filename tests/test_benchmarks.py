"""The benchmarks run, and say what their pages say that they measure. No test judges a speed."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from speed import MEASURES

LONG = pytest.mark.chaos  # for `make chaos`: they take up to a minute each

Start = Callable[..., "subprocess.Popen[str]"]


def test_messaging_benchmark_compares_each_operation(script: Start) -> None:
    """It needs no server of anybody's, and gives the ratios of all rounds."""
    process = script("", "benchmarks/messaging.py", "--rounds", "3", "--calls", "20", "--json")
    out, err = process.communicate(timeout=300)

    results = json.loads(out)

    assert (process.returncode, err) == (0, "")
    assert [name.split(" (")[0] for name in results][:4] == ["add", "publish", "is_allowed", "acquire + release"]
    for result in results.values():
        assert 0 < result["least"] <= result["median"] <= result["greatest"]


@LONG
def test_speed_benchmark_takes_each_measure(script: Start) -> None:
    """A hundredth of the work, once: each measure has two sides and a ratio, or says that it is not possible here."""
    process = script("", "benchmarks/speed.py", "--quick", "--rounds", "1", "--json")
    out, _ = process.communicate(timeout=300)

    results = json.loads(out)["results"]

    assert process.returncode == 0
    assert list(results) == list(MEASURES)
    assert [name for name, result in results.items() if result is None] in ([], ["drain_by_two_held"])
    for result in filter(None, results.values()):
        assert min(result["bare"], result["ours"], *result["ratios"]) > 0


@LONG
def test_watchers_benchmark_compares_the_hub_with_a_connection_each(script: Start) -> None:
    """Each watcher gets every event on both sides; the hub's watchers share a few connections to Redis."""
    process = script("", "benchmarks/watchers.py", "--watchers", "120", "--tasks", "4", "--seconds", "0.5", "--json")
    out, err = process.communicate(timeout=300)

    results = json.loads(out)

    assert (process.returncode, err) == (0, "")
    assert [results[side]["complete"] for side in ("hub", "naive")] == [120, 120]
    assert [results[side]["deliveries"] for side in ("hub", "naive")] == [240, 240]
    assert results["hub"]["redis_connections"] < 120 <= results["naive"]["redis_connections"]
    assert set(results["ratios"]) <= set(results["hub"])


@LONG
def test_soak_says_whether_memory_grows(script: Start) -> None:
    """Every task ends, watchers come and go, and the exit code says what the figures say."""
    process = script("", "benchmarks/soak.py", "--seconds", "6", "--watchers", "10", "--json")
    out, progress = process.communicate(timeout=300)

    results = json.loads(out)

    assert "Traceback" not in progress
    assert (results["owed"], results["refused"]) == (0, 0)
    assert sum(results["ended"].values()) == results["tasks"] > 20
    assert results["connections_of_watchers"] > 10 and results["events_to_watchers"] > results["tasks"]
    assert list(results["memory"]) == ["worker 1", "worker 2", "dashboard", "server (used_memory)"]
    assert process.returncode == (0 if results["is_flat"] else 1)


@LONG
def test_memory_benchmark_takes_apart_what_a_finished_task_takes(script: Start) -> None:
    """A smaller node makes a finished task smaller, the parts are within the whole, and a lost task is found."""
    process = script("", "benchmarks/memory.py", "--waiting", "400", "--finished", "20,60", "--json")
    out, err = process.communicate(timeout=300)

    results = json.loads(out)
    default, embedded = results["finished"]["4096"], results["finished"]["1024"]

    assert (process.returncode, err) == (0, "")
    assert embedded["after 60"] < default["after 60"]
    for found in (default, embedded):
        assert found["raw"] < found["stream"]
        assert found["stream"] + found["writer"] + found["record"] < found["after 60"]
    assert results["waiting"]["recover calls"] >= 1 and results["waiting"]["drain"] > 0


@LONG
def test_peers_benchmark_runs_this_queue_beside_a_bare_loop(script: Start) -> None:
    """Every task is done on each side that is installed, and what is not installed is said to be so."""
    process = script(
        "", "benchmarks/peers.py", "--rounds", "1", "--tasks", "50", "--only", "ours", "--no-kill", "--json"
    )
    out, progress = process.communicate(timeout=300)

    results = json.loads(out)

    assert process.returncode == 0 and "Traceback" not in progress
    assert list(results["results"]) == ["bare", "ours"]
    assert all(found["drain"] > 0 and found["put"] > 0 and found["start"] > 0 for found in results["results"].values())
    assert {"rq", "celery", "dramatiq", "arq", "huey", "taskiq"} <= set(results["versions"])
