"""The tutorial's pages: they run as they stand, show the code of the tree, and their links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Server, free_port, lacking
from pages import LABEL, ROOT, SAVE_AS, SHAPES, TUTORIAL, VARYING, PageError, Run, blocks, run_page, shown_code, steps
from redis import Redis

PAGES = sorted(TUTORIAL.glob("part*.md"))
LINKED = [ROOT / "README.md", *sorted(TUTORIAL.rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXERCISES = sorted((TUTORIAL / "exercises").glob("part*.py"))
SOLUTIONS = ROOT / "tests/tutorial/solutions"
HEADINGS = [
    "Goal",
    "Background",
    "Run it",
    "Expected output",
    "How it works",
    "Try it with redis-cli",
    "What can go wrong",
    "Exercises",
    "Recap",
]
BRACKETS = ("", "leave it running", "still running", "it ends")
OUTSIDE = re.compile(r"\b(?:pip3?|apt|apt-get|brew|docker|npm|git)\b|https?://(?!127\.0\.0\.1|localhost)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@each_page
def test_page_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    """Every command of a page, typed in order into real terminals, prints what the page shows."""
    if not shutil.which("redis-cli"):
        lacking("redis-cli (apt install redis-tools)")
    if not shutil.which("curl"):
        lacking("curl")
    run_page(page, tmp_path, free_port())


FALSE_PAGES = {
    "another value": '```console\n$ redis-cli SET a 1\nOK\n$ redis-cli GET a\n"2"\n```',
    "a line that is not printed": "```console\n$ redis-cli PING\nPONG\nPONG\n```",
    "a line that is not shown": "```console\n$ redis-cli PING\n```",
    "one id for two": "```console\n" + "$ redis-cli XADD s '*' n 1\n\"1700000000000-0\"\n" * 2 + "```",
    "a command that ends": "Terminal 2 (leave it running):\n```console\n$ redis-cli PING\n```\nTerminal 2:\n"
    "```console\n$ redis-cli PING\nPONG\n```",
}


@pytest.mark.parametrize("name", FALSE_PAGES)
def test_false_page_is_found_out(name: str, tmp_path: Path) -> None:
    """A page that shows something else than what is printed fails."""
    page = tmp_path / "part1.md"
    page.write_text(FALSE_PAGES[name] + "\n")

    with pytest.raises(PageError, match="line"):
        run_page(page, tmp_path, free_port())


@each_page
def test_page_shows_the_code_of_the_tree(page: Path) -> None:
    """Code shown from a file is what the file says; `python tests/tutorial/pages.py --write` brings it up to date."""
    for block, code in shown_code(page.read_text()):
        assert block.lines == code, f"line {block.number}"


def test_part3_shows_the_loop_of_the_consumer() -> None:
    """Part 3 teaches BRPOP and XADD, so it shows both in consumer.py: the loop, and a line of its handler."""
    shown = "\n".join("\n".join(block.lines) for block, _ in shown_code((TUTORIAL / "part3.md").read_text()))

    assert "consumer.redis.brpop(keys.QUEUE" in shown
    assert "await work_on(job, consumer)" in shown
    assert "await log.add(" in shown


@each_page
def test_page_has_the_form(page: Path) -> None:
    """A page has 80 to 150 lines, the headings in order, and its last section leads to the next part."""
    text = page.read_text()

    assert 80 <= len(text.splitlines()) <= 150
    assert re.findall(r"^## (.*)", without_code(text), re.MULTILINE) == HEADINGS
    following = TUTORIAL / f"part{int(page.stem.removeprefix('part')) + 1}.md"
    if following in PAGES:
        assert f"]({following.name})" in text.partition("\n## Recap\n")[2]


@each_page
def test_page_hides_nothing_from_the_tests(page: Path) -> None:
    """A block runs, is filled from a file or says "not run"; no command needs the network; what varies is said."""
    text = page.read_text()
    filled = {block.number for block, _ in shown_code(text)}
    varies = False
    for block in blocks(text):
        if block.kind == "console":
            found = LABEL.search(block.before)
            assert found is None or (found[2] or "") in BRACKETS, f"line {block.number}: {block.before}"
            for step in steps(block):
                assert not OUTSIDE.search(step.typed), f"line {step.number}: {step.typed}"
                assert not re.search(SHAPES["id"], step.typed), f"line {step.number}: the reader's id is another"
                varies |= bool(VARYING.search("\n".join(step.expected)))
        elif block.kind == "text":
            assert "not run" in block.before, f"line {block.number}: say above that it is not run"
        else:
            saved = block.kind == "python" and SAVE_AS.search(block.before)
            assert block.number in filled or saved, f"line {block.number}: neither from a file nor saved to one"
    assert not varies or re.search(r"\([^)]*vary[^)]*\)", text), "say in brackets what varies"


# -- links ------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = 0
        while name in found:
            count += 1
            name = f"{anchor}-{count}"
        found.add(name)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file of the tree, and its anchor to a heading there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", target):  # outside; nothing is fetched
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{target}: there is no such heading"


# -- exercises --------------------------------------------------------------------------------------------------


def check(directory: Path, *solutions: Path) -> dict[str, bool]:
    """Run all checks in a copy of the folder, with these files in it; say of each check whether all of it passes."""
    copy = directory / "tutorial/exercises"
    shutil.copytree(TUTORIAL / "exercises", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for solution in solutions:
        shutil.copy(solution, copy / solution.name)
    command = [sys.executable, "-m", "pytest", "-rA", "--tb=no", "-p", "no:cacheprovider", str(copy)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a check needs none, and to load them takes longer than it
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300).stdout
    outcomes: dict[str, bool] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*test_(\w+)\.py", said, re.MULTILINE):
        outcomes[name] = outcomes.get(name, True) and outcome == "PASSED"
    return outcomes


def test_exercises_are_red_until_they_are_solved(tmp_path: Path) -> None:
    """The check of each exercise fails as it is given, and passes with its solution."""
    names = [path.stem for path in EXERCISES]

    assert check(tmp_path / "unsolved") == dict.fromkeys(names, False)
    assert check(tmp_path / "solved", *SOLUTIONS.glob("*.py")) == dict.fromkeys(names, True)


def test_every_solution_has_its_exercise() -> None:
    """Exercises, checks and solutions are named alike."""
    names = [path.name for path in EXERCISES]

    assert [path.name for path in sorted(SOLUTIONS.glob("*.py"))] == names
    assert [path.name for path in sorted((TUTORIAL / "exercises").glob("test_*.py"))] == [f"test_{n}" for n in names]


# -- make part1 … -----------------------------------------------------------------------------------------------


def test_start_keeps_what_the_server_held(tmp_path: Path) -> None:
    """Each part begins with an empty server; the data before it are put aside, not removed."""
    run = Run(tmp_path, free_port())
    redis = Redis(port=run.port, decode_responses=True)
    try:
        run.project("tutorial/start.py", "1")
        redis.set("mine", "1")
        run.project("tutorial/start.py", "1")

        assert redis.keys() == []
        assert list((run.tree / ".redis/kept").glob("*/appendonlydir"))
    finally:
        run.close()


def test_start_leaves_a_foreign_redis_alone(valkey: Server, tmp_path: Path) -> None:
    """Where somebody else's Redis has the port, the tutorial takes another one, and says how to reach it."""
    valkey.client().set("mine", "1")
    run = Run(tmp_path, valkey.port)
    try:
        said = run.project("tutorial/start.py", "1")

        assert valkey.client().get("mine") == "1"
        assert re.search(rf"export REDIS_URL=redis://127\.0\.0\.1:(?!{valkey.port}\b)\d+; alias redis-cli=", said)
    finally:
        run.close()
    assert valkey.client().get("mine") == "1"


def test_makefile_begins_each_part() -> None:
    """`make part3` runs tutorial/start.py 3, for every part there is."""
    for page in PAGES:
        number = page.stem.removeprefix("part")
        typed = subprocess.run(["make", "-n", page.stem], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        assert f"tutorial/start.py {number}" in typed
