"""The pages say what the code does."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, wait_until

from task_streams import keys

Start = Callable[..., "subprocess.Popen[str]"]

DOCS = Path(__file__).parents[1] / "docs"


def test_events_page_lists_the_events_of_keys() -> None:
    """docs/events.md and keys.EVENTS name the same events with the same fields."""
    rows = re.findall(r"^\| `(\w+)` \| (`\w+`(?:, `\w+`)*) \|", (DOCS / "events.md").read_text(), re.MULTILINE)

    listed = {name: tuple(re.findall(r"`(\w+)`", fields)) for name, fields in rows}

    assert listed == keys.EVENTS


def test_readme_line_counts_are_those_of_the_files() -> None:
    """The README's table names existing files with their line counts, to 10 %: a small edit need not touch it."""
    root = DOCS.parent
    rows = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \| (\d+) \|", (root / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 10

    for name, stated in rows:
        path = root / name
        files = [path] if path.is_file() else list(path.glob("*.lua")) or list(path.glob("*.py"))
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(lines - int(stated)) <= 0.1 * lines, f"{name} has {lines} lines"


def test_links_lead_to_files() -> None:
    """Every relative link of README and docs leads to something in the tree."""
    for page in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_guarantees_name_tests_that_exist() -> None:
    """Each file that docs/guarantees.md calls proof is there, and has tests."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (DOCS / "guarantees.md").read_text()))
    assert len(named) > 10

    for name in named:
        assert "def test_" in (DOCS.parent / name).read_text(), f"{name} tests nothing"


# -- the messaging guide: every block is run --------------------------------------------------------------------

GUIDE = DOCS / "source" / "guides" / "redis.md"
BLOCK = re.compile(r"^```python( background)?\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
SECTIONS = [section for section in re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE) if "```python" in section]
WAITING = {"subscribe", "psubscribe", "xreadgroup"}  # the last command of a client that waits for messages


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_guide_prints_what_it_says(valkey: Server, script: Start, section: str) -> None:
    """Each block of a section, in order, prints what stands below it; those that wait do so until all have run."""
    background: list[tuple[subprocess.Popen[str], str]] = []
    clients = valkey.client()
    for waits, code, expected in BLOCK.findall(section):
        process = script(valkey.url, "-c", code)
        if waits:
            background.append((process, expected))
            wait_until(lambda: WAITING & {one["cmd"] for one in clients.client_list()}, "it waits for messages")
        else:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert out == expected

    for process, expected in background:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in expected.splitlines()]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "".join(lines) == expected
        assert (process.returncode, err) == (0, "")
