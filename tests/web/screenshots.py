"""Make the two pictures that README.md shows: the list of tasks, and a task in the middle of its work.

Usage:   python tests/web/screenshots.py [DIRECTORY]      (docs/)
Needs:   playwright, /usr/bin/chromium; starts a Redis server, a dashboard and real agents of its own
See:     make screenshots
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import ROOT, Server, wait_until
from dash import Dashboard, dashboard, valkey_server

from task_streams import keys

CHROMIUM = Path("/usr/bin/chromium")  # Debian's
ARGUMENTS = [
    "--no-sandbox",  # the sandbox refuses root, which a container usually is
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
]
WIDTH, HEIGHT = 1280, 800
MOST_BYTES = 200_000  # of one picture, for a page that many load
SLOW_LLM_SECONDS = 1.2  # of an agent that is seen at work
FAST_LLM_SECONDS = 0.05
WORDS = 8  # of the sentence that is growing in the picture, at least


def process(file: str) -> dict[str, Any]:
    return {"type": "process_data", "payload": {"file": f"sample_data/{file}"}}


def email(subject: str) -> dict[str, Any]:
    return {"type": "send_email", "payload": {"to": "ann@example.org", "subject": subject, "body": "It is ready."}}


ENDED = [
    process("temperatures.tsv"),
    process("gettysburg.txt"),
    email("Your report on the temperatures"),
    process("no_such_file.csv"),
    process("requests.csv.gz"),
    email("Your report on the requests"),
    process("inventory.json"),
    email("Your report on the inventory"),
    process("support_tickets.jsonl"),
]
AT_WORK = [
    process("sales.csv"),
    process("support_tickets.jsonl"),
    process("temperatures.tsv"),
]  # one begins after another
WAITING = [process("inventory.json"), process("requests.csv.gz"), email("The inventory was counted")]


@contextmanager
def agent(server: Server, directory: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the real agent, with an outbox of its own."""
    command = [sys.executable, "agent_consumer.py", "--outbox", str(directory), *options]
    with (directory / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "REDIS_URL": server.url, "SMTP_URL": ""},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def put(board: Dashboard, task: dict[str, Any]) -> str:
    answer = board.http.post("/api/tasks", json=task)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def percent(board: Dashboard, task_id: str) -> float:
    return float(board.http.get(f"/api/tasks/{task_id}").json()["percent"] or 0)


@contextmanager
def scene(directory: Path, ended: Sequence[dict[str, Any]] = ENDED) -> Iterator[tuple[Dashboard, str]]:
    """Set up tasks in every state, some of them at work; give the dashboard, and the id of one that is on its way.

    Its agents are stopped in the middle of a sentence: however long the pictures take, they show it.
    """
    with ExitStack() as stack:
        server = stack.enter_context(valkey_server(directory))
        board = stack.enter_context(dashboard(server.url, directory))
        for task in ended:
            put(board, task)
        cancelled = put(board, email("Never mind"))
        board.http.post(f"/api/tasks/{cancelled}/cancel", json={"reason": "not needed any more"}).raise_for_status()
        options = ["--concurrency", "4", "--llm-delay", str(FAST_LLM_SECONDS)]
        with agent(server, directory, "--burst", *options) as quick:
            wait_until(lambda: quick.poll() is not None, "the first tasks end")

        agents = []
        for concurrency in ("2", "1"):
            options = ["--concurrency", concurrency, "--llm-delay", str(SLOW_LLM_SECONDS)]
            agents.append(stack.enter_context(agent(server, directory, *options)))
        ids: list[str] = []
        for task in AT_WORK:
            ids.append(put(board, task))
            wait_until(lambda: percent(board, ids[-1]) >= 20, "the task is on its way")
        redis = server.client()
        found: list[str] = []

        def are_stopped_in_mid_sentence() -> bool:
            for process in agents:
                process.send_signal(signal.SIGSTOP)
            for task_id in ids:
                last = redis.xrevrange(keys.stream(task_id), count=WORDS)
                if all(fields["event"] == "llm_delta" for _, fields in last):
                    found.append(task_id)
            if not found:
                for process in agents:
                    process.send_signal(signal.SIGCONT)
            return bool(found)

        wait_until(are_stopped_in_mid_sentence, "an agent speaks")
        for task in WAITING:
            put(board, task)
        yield board, found[0]


def take(page: Any, path: Path) -> None:
    """Save what the page shows now."""
    page.evaluate("document.fonts.ready.then(() => null)")
    page.screenshot(path=path, animations="disabled")


def take_both(browser: Any, board: Dashboard, task_id: str, directory: Path) -> list[Path]:
    """Save list.png and task.png, as README.md shows them."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    listed, watched = directory / "list.png", directory / "task.png"
    try:
        page = context.new_page()
        page.goto(f"{board.url}/tasks/{task_id}")
        # in the middle: tools have given their results, and the LLM's next answer is growing
        page.locator("#story [data-event=tool_usage][data-status=completed]").first.wait_for()
        page.locator("#story .growing").wait_for()
        page.locator("#timeline li[data-lasts]").wait_for()
        take(page, watched)
        page.goto(board.url)
        page.locator("#tasks progress:not([hidden])").first.wait_for()
        page.locator("#workers li[data-worker]").first.wait_for()
        take(page, listed)
    finally:
        context.close()
    return [listed, watched]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the pictures that README.md shows.")
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "docs", help="where to (docs/)")
    args = parser.parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("screenshots.py: needs playwright (pip install -r requirements-dev.txt)", file=sys.stderr)
        return 1
    if not CHROMIUM.exists():
        print(f"screenshots.py: needs {CHROMIUM} (apt install chromium)", file=sys.stderr)
        return 1

    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            with scene(Path(temporary)) as (board, task_id):
                pictures = take_both(browser, board, task_id, args.directory)
        finally:
            browser.close()
    for picture in pictures:
        size = picture.stat().st_size
        print(f"{picture}  {size:,} bytes")
        if size > MOST_BYTES:
            print(f"screenshots.py: {picture} has {size:,} bytes, over {MOST_BYTES:,}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
