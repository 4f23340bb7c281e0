"""The dashboard's pages in a real browser: what a person puts, sees, presses and reads, whatever breaks meanwhile."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dash
import httpx
import pytest
from attempts import attempt
from conftest import Server, free_port, lacking, wait_until
from httpx_sse import connect_sse
from redis import Redis
from screenshots import ARGUMENTS, CHROMIUM, ENDED, HEIGHT, WIDTH, scene, take_both
from streams import Stream, finish, take

from task_streams import Task, TaskLog, TaskQueue, keys

try:
    from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
except ImportError:  # the fixture `browser` says so
    Browser = Locator = Page = Any  # type: ignore[assignment, misc]

Start = Callable[..., "subprocess.Popen[str]"]
Browse = Callable[..., "Page"]

PHONE = {"width": 360, "height": 740}
PATIENCE_MS = 60_000  # for what the page shows, on a busy machine
LEASE_SECONDS = 300.0  # the test is the worker, and sends no heartbeat
TOKEN = "correct horse battery staple"
MARKED = "<b>bold</b> &amp;"
SALES = {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}}

# What a page does that it must not, and the connections that it holds.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
window.sources = [];
window.EventSource = class extends EventSource {
  constructor(...args) { super(...args); sources.push(this); }
};
"""
OPEN_SOURCES = "sources.filter((source) => source.readyState !== EventSource.CLOSED).length"

# What text would become if it were taken for HTML. The form's own textarea is none.
MARKUP = "document.querySelectorAll('body :is(img, svg, script, iframe, style, textarea:not(#payload))').length"

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror=\"window.pwned = 1; alert('pwned')\">",
    "</textarea></title></style><svg onload=alert(1)>",
    "\"'`${alert(1)}&lt;b&gt;&amp; {{7*7}} javascript:alert(1)",
    "\u202egnp.exe \u2066\u05e9\u05dc\u05d5\u05dd\u2069 \u0645\u0631\u062d\u0628\u0627 \u200b\ufeff",  # right to left
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x85\u2028\u2029\r\nid: 1-1\n\ndata: {}\n\nevent: completed",
    "\U0001f469\u200d\U0001f680 e\u0301 " + "Z\u0351\u036b\u0343" * 5,
    "constructor",
    "__proto__",
]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    try:
        import playwright  # noqa: F401
    except ImportError:
        lacking("playwright (pip install -r requirements-dev.txt)")
    if not CHROMIUM.exists():
        lacking(f"{CHROMIUM} (apt install chromium)")
    with sync_playwright() as started:
        expect.set_options(timeout=PATIENCE_MS)
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def browse(browser: "Browser") -> Iterator[Browse]:
    """Open a page in a context of its own: browse(url, failures=True, color_scheme="dark"). At the test's end no page
    may have shown a dialog, thrown, written to the console or broken its Content-Security-Policy; with `failures`
    requests may have failed, as when the server is away."""
    contexts, pages, problems = [], [], []

    def open_page(url: str, failures: bool = False, **options: Any) -> "Page":
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(WATCH)
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not (failures and "Failed to load" in message.text):
                problems.append(f"console: {message.text}")

        def on_dialog(dialog: Any) -> None:
            problems.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("console", on_console)
        page.on("dialog", on_dialog)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        problems.extend(f"policy: {violation}" for violation in page.evaluate("window.violations"))
    for context in contexts:
        context.close()
    assert problems == []


class Restartable:
    """dashboard.py on one port, that can be stopped and started again."""

    def __init__(self, script: Start, server: Server, **environment: str) -> None:
        self.port = free_port()
        self.begin = partial(script, server.url, "dashboard.py", "--port", str(self.port), env=environment)
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = self.begin()
        wait_until(self.answers, "the dashboard answers")

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/healthz").status_code == 200
        return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dash.Dashboard]]:
    directory = tmp_path_factory.mktemp("shared")
    with dash.valkey_server(directory) as server, dash.dashboard(server.url, directory) as dashboard:
        yield server, dashboard


@pytest.fixture
def server(shared: tuple[Server, dash.Dashboard]) -> Server:
    """One server for the tests that break nothing, emptied for each."""
    shared[0].client().flushall()
    return shared[0]


@pytest.fixture
def board(shared: tuple[Server, dash.Dashboard], server: Server) -> dash.Dashboard:
    """Its dashboard; in the end it must have gone at SIGTERM, and have written no traceback."""
    return shared[1]


@pytest.fixture
def redis(server: Server) -> Iterator[Redis]:
    client = server.client()
    yield client
    client.close()


class Work:
    """A task that the test itself works on, as its worker."""

    def __init__(self, redis: Redis, data: Any = SALES, id: str | None = None) -> None:
        self.queue = TaskQueue(redis)
        self.id = self.queue.put(data, id).id
        task = take(self.queue, worker="the test", lease_seconds=LEASE_SECONDS)
        assert task is not None and task.id == self.id
        self.task = task
        self.log = Stream(task.id, redis, task.epoch)
        self.log.add("started", worker="the test", attempt=task.attempt)

    def think(self, thought: str) -> None:
        self.log.add("chain_of_thought", step="working", thought=thought)

    @contextlib.contextmanager
    def thinking(self) -> Iterator[None]:
        """Write an entry every few milliseconds meanwhile."""
        enough = threading.Event()

        def write() -> None:
            number = 0
            while not enough.wait(0.01):
                self.think(f"thought {(number := number + 1)}")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            yield
        finally:
            enough.set()
            writer.join()

    def end(self) -> None:
        self.log.add("completed", result={"summary": "all was seen"}, duration_ms=1)
        finish(self.queue, self.task, "completed", {"summary": "all was seen"})


def agent(script: Start, server: Server, directory: Path, llm_delay: float) -> "subprocess.Popen[str]":
    options = ["--llm-delay", str(llm_delay), "--outbox", str(directory)]
    return script(server.url, "agent_consumer.py", *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def entries(redis: Redis, task_id: str) -> list[str]:
    """The ids that XRANGE gives."""
    return [entry_id for entry_id, _ in redis.xrange(keys.stream(task_id))]


def shown(page: "Page") -> list[str]:
    return page.evaluate("window.shownEntries") or []


def wait_for_more(page: "Page", than: int) -> None:
    wait_until(lambda: len(shown(page)) > than, f"more than {than} entries are shown")


def state(page: "Page") -> "Locator":
    return page.locator("#state")


def row(page: "Page", task_id: str) -> "Locator":
    return page.locator(f'#tasks > li[data-task="{task_id}"]')


def listed(page: "Page") -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#tasks > li')].map((row) => row.dataset.task)")


def assert_all_shown(page: "Page", redis: Redis, task_id: str) -> None:
    """The stream has ended, and no connection is held open; what the page has told is XRANGE, in order, none twice; and
    each entry has one element of its own."""
    told = entries(redis, task_id)
    wait_until(lambda: page.evaluate(OPEN_SOURCES) == 0, "the stream has ended")
    wait_until(lambda: len(shown(page)) >= len(told), "all entries are told")
    assert shown(page) == told
    drawn = page.evaluate("[...document.querySelectorAll('#story [data-entry]')].map((one) => one.dataset.entry)")
    assert sorted(drawn) == sorted(told)


# -- looks ------------------------------------------------------------------------------------------------------


# The screenshots first: they take longest, and other processes run the rest meanwhile.


def test_screenshots_of_both_pages_light_dark_and_phone(browser: "Browser", tmp_path: Path) -> None:
    """Both pages of a real scene, in three looks; none is blank, the dark ones are dark, README's are as wanted."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    desk = {"width": WIDTH, "height": HEIGHT}
    looks = {"dark": (desk, "dark"), "phone": (PHONE, "light"), "phone-dark": (PHONE, "dark")}
    with scene(tmp_path, ENDED[2:4]) as (board, task_id):
        pictures = dict.fromkeys(take_both(browser, board, task_id, folder), (desk, "light"))
        for look, (viewport, scheme) in looks.items():
            context = browser.new_context(viewport=viewport, color_scheme=scheme)
            page = context.new_page()
            for name, path, ready in (("list", "/", "#tasks li"), ("task", f"/tasks/{task_id}", "#story .tool_usage")):
                page.goto(f"{board.url}{path}")
                expect(page.locator(ready).first).to_be_visible()
                picture = folder / f"{name}-{look}.png"
                page.screenshot(path=picture)
                pictures[picture] = viewport, scheme
            context.close()

    assert len(pictures) == 8
    for path, (viewport, scheme) in pictures.items():
        width, height, lightness, variety = look_at(path)
        assert {"width": width, "height": height} == viewport, path
        assert variety > 20, f"{path} is blank: {variety} different rows"
        assert lightness < 80 if scheme == "dark" else lightness > 200, f"{path}: {lightness}"
        assert path.stat().st_size < 200_000, path


def look_at(path: Path) -> tuple[int, int, float, int]:
    """Return a PNG's width, height, the lightness of its first pixel (0 to 255), and how many rows differ."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, bits, colour = (int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), data[24], data[25])
    assert bits == 8 and colour in (2, 6)  # RGB, with or without alpha
    packed, at = b"", 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    pixels = zlib.decompress(packed)
    stride = 1 + width * (3 if colour == 2 else 4)  # a byte more: how the row is filtered
    rows = {pixels[start : start + stride] for start in range(0, len(pixels), stride)}
    return width, height, sum(pixels[1:4]) / 3, len(rows)  # no filter changes the very first pixel


def test_pages_do_not_scroll_sideways_on_a_phone(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """At 360 px, whatever long words a task has, nothing is wider than the screen."""
    endless = "endless_" * 60
    work = Work(redis, {"type": endless, "payload": {"file": endless}}, id="task-" + "0123456789" * 9)
    call = {"call_id": endless, "tool": endless, "action": endless}
    work.log.add("chain_of_thought", step=endless, thought=endless)
    work.log.add("llm_delta", text=endless)
    work.log.add("llm_response", model=endless, response=endless)
    work.log.add("tool_usage", **call, status="started", arguments={endless: [endless] * 3})
    work.log.add("tool_usage", **call, status="completed", result=endless, duration_ms=5)
    work.log.add("progress", percent=50, step=endless)
    work.log.add("error", error=endless, error_type=endless, will_retry=True)

    def assert_narrow(page: "Page") -> None:
        wide, width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= width == PHONE["width"], f"{page.url}: {wide} px wide"
        assert page.evaluate("(scrollTo(1000, scrollY), scrollX)") == 0
        beyond = page.evaluate(
            """[...document.querySelectorAll("a, button, input, select, textarea, h1, #state")]
              .filter((one) => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 0.5)
              .map((one) => one.outerHTML)"""
        )
        assert beyond == []

    options = {"viewport": PHONE, "is_mobile": True, "has_touch": True}
    page = browse(board.url, **options)
    expect(row(page, work.id)).to_be_visible()
    assert_narrow(page)
    page.goto(f"{board.url}/tasks/{work.id}")
    wait_for_more(page, 7)
    assert_narrow(page)
    for summary in page.locator("summary:visible").all():
        summary.click()
    assert_narrow(page)
    page.locator("#raw").click()
    assert_narrow(page)


# -- a task from the form to its end ----------------------------------------------------------------------------


def test_task_from_a_sample_file_is_watched_to_its_end(
    board: dash.Dashboard, server: Server, redis: Redis, script: Start, browse: Browse, tmp_path: Path
) -> None:
    """Somebody picks a sample file, finds the task in the list, opens it, and sees an agent's work as it happens."""
    page = browse(board.url)
    page.locator("#sample").select_option("sample_data/inventory.json")
    expect(page.locator("#payload")).to_have_value('{"file":"sample_data/inventory.json"}')
    page.get_by_role("button", name="Put the task").click()
    expect(page.locator("#put-status")).to_contain_text("Queued: watch task")
    (task_id,) = redis.zrange(keys.RECENT, 0, -1)
    expect(row(page, task_id)).to_contain_text("next in the queue")

    row(page, task_id).get_by_role("link").click()
    expect(page).to_have_url(f"{board.url}/tasks/{task_id}")
    expect(page.locator("#waiting")).to_contain_text("waits for a worker")
    expect(state(page)).to_have_text("waiting")

    agent(script, server, tmp_path, llm_delay=0.3)
    growth = []
    wait_until(lambda: growth.append(len(shown(page))) or state(page).text_content() == "completed", "it has ended")
    assert len({length for length in growth if 0 < length < len(entries(redis, task_id))}) >= 5, growth
    expect(page.locator("#story .completed h3")).to_contain_text("Completed in")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#retry")).to_be_hidden()
    assert_all_shown(page, redis, task_id)


def test_task_typed_by_keyboard_alone_is_put_by_enter_and_opened(
    board: dash.Dashboard, redis: Redis, browse: Browse
) -> None:
    """Tab leads to the form past controls that all show their focus; Enter puts what was typed."""
    page = browse(board.url)
    expect(page.locator("#sample option")).not_to_have_count(1)

    def tab_to(element_id: str, key: str = "Tab") -> None:
        for _ in range(30):
            page.keyboard.press(key)
            focus = page.evaluate(
                """(() => {
                  const focused = document.activeElement, box = focused.getBoundingClientRect();
                  const { outlineWidth, outlineStyle } = getComputedStyle(focused);
                  return [focused.id, parseFloat(outlineWidth), outlineStyle, box.width * box.height];
                })()"""
            )
            assert focus[1] >= 2 and focus[2] != "none" and focus[3] > 0, f"focus that nobody sees: {focus}"
            if focus[0] == element_id:
                return
        pytest.fail(f"no way to #{element_id} by {key}")

    tab_to("type")
    page.keyboard.press("Control+A")
    page.keyboard.type("send_email")
    tab_to("payload")
    page.keyboard.press("Control+A")
    page.keyboard.type(
        '{"to": "ann@example.org", "subject": "Typed", "body": "9007199254740993", "n": 9007199254740993}'
    )
    tab_to("type", "Shift+Tab")
    page.keyboard.press("Escape")  # the suggestions
    page.keyboard.press("Enter")
    link = page.locator("#put-status a")
    expect(link).to_be_visible()
    (task_id,) = redis.zrange(keys.RECENT, 0, -1)
    assert board.http.get(f"/api/tasks/{task_id}").json()["data"] == {
        "type": "send_email",
        "payload": {"to": "ann@example.org", "subject": "Typed", "body": "9007199254740993", "n": 9007199254740993},
    }
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("Boolean(document.activeElement.closest('#put-status'))"):
            break
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{board.url}/tasks/{task_id}")


def test_form_offers_an_example_of_each_type_but_keeps_what_was_typed(board: dash.Dashboard, browse: Browse) -> None:
    """A known type brings its payload; an unknown one, and a payload that somebody touched, change nothing."""
    page = browse(board.url)
    kind, payload = page.locator("#type"), page.locator("#payload")
    kind.fill("send_email")
    expect(payload).to_have_value(re.compile('"to": "you@example.org"'))
    kind.fill("constructor")
    expect(payload).to_have_value(re.compile('"to": "you@example.org"'))
    kind.fill("process_data")
    expect(payload).to_have_value('{"file": "sample_data/sales.csv"}')
    payload.fill('{"mine": 1}')
    kind.fill("send_email")
    expect(payload).to_have_value('{"mine": 1}')


def test_form_says_what_is_wrong_and_puts_nothing(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """A payload that is no JSON, no type, and what only the server can refuse: each is said beside the form."""
    page = browse(board.url, failures=True)  # the server's refusal is written to the console
    error, button = page.locator("#put-error"), page.get_by_role("button", name="Put the task")

    for payload in ('{"file": ', "", "{'file': 'x'}", "NaN"):
        page.locator("#payload").fill(payload)
        button.click()
        expect(error).to_contain_text("The payload is not JSON")
        expect(page.locator("#payload")).to_be_focused()
        expect(page.locator("#payload")).to_have_attribute("aria-invalid", "true")
    page.locator("#payload").fill("{}")
    page.locator("#type").fill("  ")
    button.click()
    expect(error).to_contain_text("A task needs a type")
    page.locator("#type").fill("anything")
    page.locator("#payload").fill(json.dumps("x" * 1_000_001))
    button.click()
    expect(error).to_contain_text("1,000,000")
    assert redis.zcard(keys.RECENT) == 0

    page.locator("#payload").fill("{}")
    button.click()
    expect(page.locator("#put-status")).to_contain_text("Queued")
    expect(error).to_be_hidden()


# -- the same stream for everybody ------------------------------------------------------------------------------

LISTEN = """([url, names]) => new Promise((done) => {
  const got = [];
  const source = new EventSource(url);
  const take = ({ type, lastEventId, data }) => {
    if (data === undefined) return;  // no entry called `error`, but a connection that broke
    got.push([lastEventId, type, data]);
    if (type === "completed") { source.close(); done(got); }
  };
  for (const name of names) source.addEventListener(name, take);
})"""


def test_eventsource_curl_and_httpx_sse_get_the_same_entries(
    board: dash.Dashboard, redis: Redis, browse: Browse
) -> None:
    """Live, while the task works: the same ids, names and data in the same order, and they are those of XRANGE."""
    work = Work(redis)
    url = f"{board.url}/api/tasks/{work.id}/events"
    page = browse(board.url)
    page.evaluate(f"window.heard = ({LISTEN})({json.dumps([url, [*sorted(keys.EVENTS), 'message']])}); null")
    try:
        curl = subprocess.Popen(["curl", "-sN", url], stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        lacking("curl (apt install curl)")
    with curl, httpx.Client(timeout=30) as client, connect_sse(client, "GET", url) as source:
        received = (event for event in source.iter_sse() if event.data)  # `retry:` alone is none
        with work.thinking():
            events = [next(received) for _ in range(50)]
        work.log.add("error", error=HOSTILE[5], error_type="ValueError", will_retry=False)
        work.log.add("an_event_of_its_own", said=HOSTILE)
        work.end()
        events.extend(received)
        body, _ = curl.communicate(timeout=60)

    got = [(event.id, event.event, event.data) for event in events]
    frames = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in body.split("\n\n") if frame]
    assert [(frame["id"], frame["event"], frame["data"]) for frame in frames if "data" in frame] == got
    assert [tuple(one) for one in page.evaluate("window.heard")] == got
    assert [entry_id for entry_id, _, _ in got] == entries(redis, work.id)


# -- what breaks meanwhile --------------------------------------------------------------------------------------


def test_reload_in_the_middle_loses_and_repeats_nothing(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """After a reload, entries before it and entries after it stand as in XRANGE."""
    work = Work(redis)
    page = browse(f"{board.url}/tasks/{work.id}")
    with work.thinking():
        for _ in range(3):
            wait_for_more(page, 10)
            before = len(entries(redis, work.id))
            page.reload()
            wait_for_more(page, before)  # the old ones, and newer ones
    work.end()
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, work.id)


def test_dashboard_restarted_in_the_middle_loses_and_repeats_nothing(
    valkey: Server, script: Start, browse: Browse
) -> None:
    """The page stays open while the server is away, says so, and goes on from its cursor when it is back."""
    board = Restartable(script, valkey)
    redis = valkey.client()
    work = Work(redis)
    page = browse(f"{board.url}/tasks/{work.id}", failures=True)
    banner = page.locator("#banner")
    page.evaluate("window.sameDocument = true")
    with work.thinking():
        wait_for_more(page, 10)
        board.stop()
        expect(banner).to_contain_text("connection to the server is lost")
        away_from = len(shown(page))
        wait_until(lambda: len(entries(redis, work.id)) > away_from + 20, "entries come that the page cannot see")
        assert len(shown(page)) == away_from
        board.start()
        expect(banner).to_be_hidden()
        wait_for_more(page, away_from + 20)
    work.end()
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, work.id)
    assert page.evaluate("window.sameDocument")


def test_redis_restarted_in_the_middle_loses_and_repeats_nothing(
    valkey: Server, script: Start, browse: Browse, tmp_path: Path
) -> None:
    """A banner says that Redis is away, on both pages, and goes when it is back; the agent and its story go on."""
    board = Restartable(script, valkey)
    redis = valkey.client()
    task = TaskQueue(redis).put(SALES)
    agent(script, valkey, tmp_path, llm_delay=0.4)
    page = browse(f"{board.url}/tasks/{task.id}", failures=True)
    listing = browse(board.url, failures=True)
    wait_for_more(page, 5)

    valkey.stop()
    expect(page.locator("#banner")).to_contain_text("Redis is away")
    expect(listing.locator("#banner")).to_contain_text("Redis is away")
    assert state(page).text_content() == "running"
    valkey.start()
    expect(page.locator("#banner")).to_be_hidden()
    expect(listing.locator("#banner")).to_be_hidden()
    expect(state(page)).to_have_text("completed")
    expect(row(listing, task.id)).to_have_attribute("data-state", "completed")
    assert_all_shown(page, redis, task.id)


def test_page_follows_the_end_until_the_reader_scrolls_up(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """Who scrolled up stays there, and a button leads back to the end, which is followed again."""
    at_end = "innerHeight + scrollY >= document.documentElement.scrollHeight - 80"
    work = Work(redis)
    page = browse(f"{board.url}/tasks/{work.id}")
    for number in range(60):
        work.think(f"thought {number}")
    wait_for_more(page, 60)
    wait_until(lambda: page.evaluate(at_end), "the end is in view")

    page.mouse.move(600, 500)
    page.mouse.wheel(0, -100_000)
    wait_until(lambda: page.evaluate("scrollY === 0"), "the reader is at the top")
    for number in range(20):
        work.think(f"later thought {number}")
    wait_for_more(page, 80)
    expect(page.locator("#new-events")).to_be_visible()
    assert page.evaluate("scrollY === 0")

    page.locator("#new-events").click()
    expect(page.locator("#new-events")).to_be_hidden()
    work.think("the last thought")
    wait_for_more(page, 81)
    wait_until(lambda: page.evaluate(at_end), "the end is in view again")
    work.end()


# -- buttons ----------------------------------------------------------------------------------------------------


def test_cancel_button_ends_a_running_and_a_waiting_task(
    board: dash.Dashboard, server: Server, redis: Redis, script: Start, browse: Browse, tmp_path: Path
) -> None:
    """Pressed once, it ends the task that waits at once, and the one that runs at its agent's next entry."""
    queue = TaskQueue(redis)
    running, waiting = queue.put(SALES).id, queue.put(SALES).id
    agent(script, server, tmp_path, llm_delay=5)
    page = browse(f"{board.url}/tasks/{waiting}")
    expect(state(page)).to_have_text("waiting")
    page.locator("#cancel").click()
    expect(state(page)).to_have_text("cancelled")
    expect(page.locator("#story .cancelled")).to_contain_text("cancelled in the browser")
    assert_all_shown(page, redis, waiting)

    page.goto(f"{board.url}/tasks/{running}")
    expect(state(page)).to_have_text("running")
    page.locator("#cancel").click()
    expect(state(page)).to_have_text("cancelled")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#retry")).to_be_hidden()
    assert_all_shown(page, redis, running)
    assert {board.http.get(f"/api/tasks/{task_id}").json()["state"] for task_id in (running, waiting)} == {"cancelled"}


def test_retry_button_of_a_failed_task_leads_to_the_new_one(
    board: dash.Dashboard, server: Server, redis: Redis, script: Start, browse: Browse, tmp_path: Path
) -> None:
    """What was given up on is put again as a new task, whose page opens; pressed again, it leads to the same."""
    agent(script, server, tmp_path, llm_delay=0.05)
    task = TaskQueue(redis).put({"type": "no_such_type", "payload": {}})
    page = browse(f"{board.url}/tasks/{task.id}")
    expect(state(page)).to_have_text("failed")
    expect(page.locator("#story .failed")).to_contain_text("Failed after 1 attempt")
    assert_all_shown(page, redis, task.id)

    page.locator("#retry").click()
    expect(page).to_have_url(re.compile(rf"/tasks/{task.id}\.r2$"))
    expect(page.locator("#title")).to_have_text(f"Task {task.id}.r2")
    expect(state(page)).to_have_text("failed")  # again
    page.goto(f"{board.url}/tasks/{task.id}")
    page.locator("#retry").click()
    expect(page).to_have_url(re.compile(rf"/tasks/{task.id}\.r2$"))
    assert redis.zcard(keys.RECENT) == 2


def test_question_is_answered_by_a_button_or_in_a_field(
    board: dash.Dashboard, server: Server, redis: Redis, browse: Browse
) -> None:
    """The box comes by itself, with what is asked; the answer is in the story, and the box goes."""

    async def handle(task: Task, log: TaskLog) -> list[str | None]:
        return [await log.ask(f"Send it? {MARKED}", ["yes", "no"]), await log.ask("To whom?")]

    def work() -> None:  # in a thread, since the browser's event loop is this one's
        worker = threading.Thread(target=attempt, args=(server.url, redis, handle))
        worker.start()
        worker.join()

    task = TaskQueue(redis).put({"type": "asks", "payload": {}})
    page = browse(f"{board.url}/tasks/{task.id}")
    expect(state(page)).to_have_text("waiting")
    work()
    box = page.locator("#question")
    expect(state(page)).to_have_text("parked")
    expect(box).to_contain_text(f"Send it? {MARKED}")
    box.get_by_role("button", name="no").click()
    expect(box).to_be_hidden()
    work()
    expect(box).to_contain_text("To whom?")
    box.get_by_role("textbox").fill("Ann & Bob")
    box.get_by_role("textbox").press("Enter")
    expect(box).to_be_hidden()
    work()
    expect(state(page)).to_have_text("completed")
    expect(page.locator("#story .input_received")).to_have_count(2)
    expect(page.locator("#story .input_received").last).to_contain_text("Ann & Bob")
    expect(page.locator("#story .resumed")).to_have_count(1)  # behind the first answer; before it there was no step
    assert_all_shown(page, redis, task.id)


# -- what a task says is text -----------------------------------------------------------------------------------


def test_hostile_payload_and_events_are_shown_as_text(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """Markup, quotes, direction marks, control characters and names that JavaScript knows run and break nothing."""
    page = browse(board.url)
    payload = {"file": HOSTILE[1], "subject": HOSTILE[0], "all": HOSTILE, **dict.fromkeys(HOSTILE, "value")}
    page.locator("#type").fill(HOSTILE[0])
    page.locator("#payload").fill(json.dumps(payload))
    page.get_by_role("button", name="Put the task").click()
    expect(page.locator("#put-status")).to_contain_text("Queued")
    (task_id,) = redis.zrange(keys.RECENT, 0, -1)
    expect(row(page, task_id).locator(".type")).to_have_text(HOSTILE[0])
    expect(row(page, task_id).locator(".what")).to_have_text(HOSTILE[1])
    assert board.http.get(f"/api/tasks/{task_id}").json()["data"]["payload"] == payload

    task = take(TaskQueue(redis), worker=HOSTILE[0], lease_seconds=LEASE_SECONDS)
    assert task is not None
    log = Stream(task_id, redis, task.epoch)
    log.add("started", worker=HOSTILE[1])
    for text in HOSTILE:
        log.add("chain_of_thought", step=text, thought=text)
        log.add("llm_delta", text=text)
        log.add("llm_response", model=text, response=text)
        call = {"call_id": text, "tool": text, "action": text}
        log.add("tool_usage", **call, status="started", arguments={text: text})
        log.add("tool_usage", **call, status=text, result=[text], duration_ms=text)
        log.add("progress", percent=text, step=text)
        log.add("rate_limited", limit=text, wait_ms=text)
        log.add("error", error=text, error_type=text, will_retry=True)
        log.add("worker_lost", worker=text)
        redis.xadd(keys.stream(task_id), {"event": "message", "by hand": text, text: text})
        if not text.isidentifier():
            redis.xadd(keys.stream(task_id), {"event": text})
    expect(page.locator("#workers")).to_contain_text(HOSTILE[0])
    expect(row(page, task_id).locator(".state")).to_have_text("running")
    assert page.evaluate(MARKUP) == 0

    page.goto(f"{board.url}/tasks/{task_id}")
    wait_until(lambda: len(shown(page)) >= redis.xlen(keys.stream(task_id)), "all entries are told")
    log.add("completed", result={"summary": HOSTILE[0], **dict.fromkeys(HOSTILE, "value")}, duration_ms=1)
    finish(TaskQueue(redis), task, "completed", HOSTILE)
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, task_id)
    thoughts = page.evaluate(
        "[...document.querySelectorAll('#story .chain_of_thought .prose')].map((one) => one.textContent)"
    )
    assert thoughts == HOSTILE  # to the character
    page.locator("#raw").click()
    expect(page.locator("#raw-entries li").last).to_contain_text("completed")
    assert page.evaluate(MARKUP) == 0
    assert page.evaluate("window.pwned") is None


def test_entries_with_names_of_their_own_are_shown(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """A handler may write an event that docs/events.md does not have, and somebody any entry by hand; names that
    JavaScript or the server itself uses are names, too."""
    work = Work(redis)
    names = ["an_event_of_its_own", "constructor", "__proto__", "toString", "message", "open", "redis", "gap", "reset"]
    for name in names:
        redis.xadd(keys.stream(work.id), {"event": name, "said": json.dumps(f"by {name}")})
    work.log.add("about_itself", attempt=7, seq=8)
    work.end()
    page = browse(f"{board.url}/tasks/{work.id}")
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, work.id)
    said = page.evaluate("[...document.querySelectorAll('#story .other .text')].map((one) => one.textContent)")
    assert said == [*(f"by {name}" for name in names), "7", "8"]
    assert page.locator("#story h2").count() == 1  # that was no attempt


# -- the list ---------------------------------------------------------------------------------------------------


def test_search_and_filter_narrow_the_list_and_its_address(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """By state and by the beginning of the id; the address says so, and Back, reload and a link bring it again."""
    running = Work(redis, id="order-1")
    done = Work(redis, id="order-2")
    done.end()
    queue = TaskQueue(redis)
    for task_id in ("order-3", "report-1"):
        queue.put(SALES, task_id)
    page = browse(board.url)
    wait_until(lambda: listed(page) == ["report-1", "order-3", "order-2", "order-1"], "all, the newest first")
    expect(page.locator("#filter")).to_have_text(re.compile(r"All 4\s+Waiting 2\s+Running 1\s+Done 1\s+Failed 0"))

    page.locator("#filter").get_by_role("link", name="Waiting").click()
    wait_until(lambda: listed(page) == ["report-1", "order-3"], "those that wait")
    page.locator("#q").fill("order")
    wait_until(lambda: listed(page) == ["order-3"], "those that wait and begin so")
    expect(page).to_have_url(f"{board.url}/?state=waiting&q=order")
    page.reload()
    wait_until(lambda: listed(page) == ["order-3"], "the same after a reload")
    expect(page.locator("#q")).to_have_value("order")
    page.locator("#filter").get_by_role("link", name="Running").click()
    wait_until(lambda: listed(page) == [running.id], "those that run")
    page.go_back()
    wait_until(lambda: listed(page) == ["order-3"], "as before")
    page.locator("#q").fill("<nothing>")
    expect(page.locator("#empty")).to_have_text("No task matches.")
    page.goto(f"{board.url}/?state=done")
    wait_until(lambda: listed(page) == ["order-2"], "a link to a filter")


def test_list_holds_one_connection_and_follows_every_task(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """However many tasks run and come, a page has one EventSource: browsers allow six over all tabs."""
    works = [Work(redis) for _ in range(3)]
    page = browse(board.url)
    wait_until(lambda: len(listed(page)) == 3, "three tasks")
    works.append(Work(redis))
    for work in works:
        work.log.add("progress", percent=42, step="half of it")
        expect(row(page, work.id).locator("progress")).to_have_js_property("value", 42)
    page.locator("#filter").get_by_role("link", name="Running").click()
    works[0].end()
    wait_until(lambda: len(listed(page)) == 3, "three tasks still run")
    assert page.evaluate("sources.length") == page.evaluate(OPEN_SOURCES) == 1
    one = re.compile(r"^dashboard_watchers 1\.0$", re.MULTILINE)
    wait_until(lambda: one.search(board.http.get("/metrics").text), "one watcher")


def test_unknown_task_is_said_to_be_unknown_until_it_comes(board: dash.Dashboard, redis: Redis, browse: Browse) -> None:
    """A link to a task that nobody put says so; when it is put, the page shows it."""
    page = browse(f"{board.url}/tasks/nobody-put-it", failures=True)
    expect(page.locator("#problem")).to_contain_text("No task nobody-put-it")
    expect(page.locator("#cancel")).to_be_hidden()
    work = Work(redis, id="nobody-put-it")
    expect(state(page)).to_have_text("running")
    expect(page.locator("#problem")).to_be_hidden()
    work.end()
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, work.id)


def test_banner_goes_with_the_outage_although_the_task_is_unknown(
    valkey: Server, script: Start, browse: Browse
) -> None:
    """That Redis knows no such task is an answer of Redis, which is not away."""
    board = Restartable(script, valkey)
    page = browse(f"{board.url}/tasks/nobody-put-it", failures=True)
    expect(page.locator("#problem")).to_contain_text("No task nobody-put-it")
    valkey.stop()
    expect(page.locator("#banner")).to_contain_text("Redis is away")
    valkey.start()
    expect(page.locator("#banner")).to_be_hidden()


# -- login ------------------------------------------------------------------------------------------------------


def test_login_wants_the_token(valkey: Server, script: Start, browse: Browse) -> None:
    """With DASHBOARD_TOKEN pages lead to the login; a wrong token is said to be wrong; the right one opens all."""
    redis = valkey.client()
    board = Restartable(script, valkey, DASHBOARD_TOKEN=TOKEN)
    work = Work(redis)
    work.end()
    page = browse(f"{board.url}/tasks/{work.id}")
    expect(page).to_have_url(f"{board.url}/login")
    expect(page.locator("#token")).to_be_focused()

    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#failed")).to_have_text("That token is wrong.")
    assert page.context.cookies() == []
    page.locator("#token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(f"{board.url}/")
    expect(row(page, work.id)).to_be_visible()
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and TOKEN not in cookie["value"]
    page.goto(f"{board.url}/tasks/{work.id}")
    expect(state(page)).to_have_text("completed")
    assert_all_shown(page, redis, work.id)
