"""The pages say what the code does."""

import re
from pathlib import Path

from task_streams import keys

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
        files = [path] if path.is_file() else list(path.glob("*.lua"))
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(lines - int(stated)) <= 0.1 * lines, f"{name} has {lines} lines"


def test_links_lead_to_files() -> None:
    """Every relative link of README and docs leads to something in the tree."""
    for page in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
