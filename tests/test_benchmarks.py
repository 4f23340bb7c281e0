"""The benchmarks run, and say what their pages say that they measure. No test judges a speed."""

import json
import subprocess
from collections.abc import Callable

Start = Callable[..., "subprocess.Popen[str]"]


def test_messaging_benchmark_compares_each_operation(script: Start) -> None:
    """It needs no server of anybody's, and gives the ratios of all rounds."""
    process = script("", "benchmarks/messaging.py", "--rounds", "3", "--calls", "20", "--json")
    out, err = process.communicate(timeout=60)

    results = json.loads(out)

    assert (process.returncode, err) == (0, "")
    assert [name.split(" (")[0] for name in results][:4] == ["add", "publish", "is_allowed", "acquire + release"]
    for result in results.values():
        assert 0 < result["least"] <= result["median"] <= result["greatest"]
