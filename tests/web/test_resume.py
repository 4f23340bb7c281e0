"""Server-sent events of the real dashboard: whoever is cut off anywhere and comes again has each entry once."""

import contextlib
import json
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Server, free_port, lacking, wait_until
from httpx_sse import connect_sse
from streams import Stream, take
from streams import finish as close

from task_streams import LogReader, TaskQueue, keys
from web.sse import split_cursors

Start = Callable[..., "subprocess.Popen[str]"]
SEED = 4  # of the places where connections are cut: the same in each run


class Dashboard:
    """dashboard.py as a process of its own, on one port."""

    def __init__(self, script: Start, server: Server) -> None:
        self.script, self.server, self.port = script, server, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = self.script(self.server.url, "dashboard.py", "--port", str(self.port), stderr=subprocess.DEVNULL)
        wait_until(self.answers, "the dashboard answers")

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/healthz").status_code == 200
        return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=60)

    def memory_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def streams(self) -> int:
        text = httpx.get(f"{self.url}/metrics").text
        return int(float(next(line for line in text.splitlines() if line.startswith("dashboard_watchers")).split()[1]))


@pytest.fixture
def dashboard(script: Start, valkey: Server) -> Dashboard:
    return Dashboard(script, valkey)


class Frame:
    """One event, parsed as the WHATWG says."""

    def __init__(self, text: str) -> None:
        self.id: str | None = None
        self.event, data = "message", []
        for line in text.split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                self.id = value
            elif name == "event":
                self.event = value
            elif name == "data":
                data.append(value)
        self.data = "\n".join(data)


def frames_of(body: bytes) -> list[Frame]:
    """Return the complete events of a body: those with their blank line, and with data."""
    text = body.replace(b"\r\n", b"\n")
    frames = [Frame(part.decode()) for part in text.split(b"\n\n")[:-1]]
    return [frame for frame in frames if frame.data]


def get(port: int, path: str, last_id: str | None = None, most: int | None = None, seconds: float = 20.0) -> bytes:
    """Return the body of a response of which at most so many bytes were read; then the connection is cut.

    HTTP/1.0, so that the body is not chunked. With `most` a silence of `seconds` cuts it as well.
    """
    head = f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Last-Event-ID: {last_id}\r\n" if last_id else ""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(f"{head}\r\n".encode())
        with contextlib.suppress(TimeoutError if most is not None else ()):
            while most is None or len(received) < most:
                data = connection.recv(65536 if most is None else min(65536, most - len(received)))
                if not data:
                    break
                received += data
    header, _, body = received.partition(b"\r\n\r\n")
    assert not received or header.startswith(b"HTTP/1.1 20"[: len(header)]), header
    return body


def read_in_pieces(
    port: int, path: str, cuts: int, before: Callable[[int], None] = lambda n: None
) -> list[list[Frame]]:
    """Return the frames of connections, each cut at a random byte and resumed by the last id; the last is not cut."""
    place = random.Random(SEED)
    last_id: str | None = None
    connections = []
    for n in range(cuts + 1):
        before(n)
        most, seconds = (place.randrange(500, 1600), 0.3) if n < cuts else (None, 60)
        frames = frames_of(get(port, path, last_id, most, seconds))
        connections.append(frames)
        last_id = next((frame.id for frame in reversed(frames) if frame.id is not None), last_id)
    return connections


@contextlib.contextmanager
def agent(
    server: Server, *task_ids: str, pause_seconds: float = 0.004, history: int = 0
) -> Iterator[Callable[[], None]]:
    """Write to tasks in turn, in a thread, the first without a pause; a call of what is yielded writes their ends."""
    stop = threading.Event()

    def work() -> None:
        logs = [Stream(task_id, server.client()) for task_id in task_ids]
        n = 0
        while not stop.wait(pause_seconds if n >= history else 0):
            for log in logs:
                n += 1
                match n % 4:
                    case 0:
                        log.add("chain_of_thought", step=f"step {n}", prompt="?", thought='ü "quoted" \n\n line' * 3)
                    case 1:
                        log.add("llm_delta", text=f"word {n} ")
                    case 2:
                        log.add("tool_usage", call_id=f"c{n}", tool="t", status="started", arguments={"n": n})
                    case _:
                        log.add("progress", percent=n, step="s")
        for log in logs:
            log.add("completed", result={"n": n})

    def end() -> None:
        stop.set()
        thread.join(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    streams = [keys.stream(task_id) for task_id in task_ids]
    wait_until(lambda: server.client().exists(*streams) == len(streams), "every task has begun")
    try:
        yield end
    finally:
        end()


def ids_of(server: Server, task_id: str) -> list[str]:
    return [entry_id for entry_id, _ in server.client().xrange(keys.stream(task_id))]


def entries_of(server: Server, task_id: str) -> list[dict[str, object]]:
    return [{"task": task_id, **event.as_dict()} for event in LogReader(task_id, server.client()).read()]


# -- one task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [150, pytest.param(1_000, marks=pytest.mark.chaos)])
def test_many_cuts_lose_and_repeat_nothing(dashboard: Dashboard, valkey: Server, cuts: int) -> None:
    """Cut anywhere, also in the head or within a character, while the task runs: the pieces are the stream."""
    history = cuts * 5 // 2
    with agent(valkey, "t", history=history) as end:
        wait_until(lambda: len(ids_of(valkey, "t")) >= history, "there is a history")
        connections = read_in_pieces(
            dashboard.port, "/api/tasks/t/events", cuts, lambda n: end() if n == cuts else None
        )

    frames = [frame for frames in connections for frame in frames]
    assert [frame.id for frame in frames] == ids_of(valkey, "t")
    assert [json.loads(frame.data) for frame in frames] == entries_of(valkey, "t")
    assert sum(bool(frames) for frames in connections) > cuts / 4  # many were cut between two events of it
    wait_until(lambda: dashboard.streams() == 0, "no watcher is left")


def test_ag_ui_is_cut_and_resumed_entry_by_entry(dashboard: Dashboard, valkey: Server) -> None:
    """One entry is several frames, the last with its id: cut within, an entry comes again as a whole."""
    path = "/api/tasks/t/events?format=ag-ui"
    with agent(valkey, "t") as end:
        wait_until(lambda: len(ids_of(valkey, "t")) > 100, "there is a history")
        connections = read_in_pieces(dashboard.port, path, 80, lambda n: end() if n == 80 else None)

    whole = groups(frames_of(get(dashboard.port, path)))
    pieces = [group for frames in connections for group in groups(frames)]
    assert [entry_id for entry_id, _ in pieces] == [entry_id for entry_id, _ in whole] == ids_of(valkey, "t")
    for (_, got), (_, expected) in zip(pieces, whole, strict=True):
        assert got[-len(expected) :] == expected  # before the first of a connection comes the prelude


def groups(frames: list[Frame]) -> list[tuple[str, list[str]]]:
    """Return each entry's id and frames; what comes after the last id was cut off, and is no entry yet."""
    found, data = [], []
    for frame in frames:
        data.append(frame.data)
        if frame.id is not None:
            found.append((frame.id, data))
            data = []
    return found


def test_clients_get_the_same(dashboard: Dashboard, valkey: Server) -> None:
    """curl -N and httpx-sse get what XRANGE gives; a connection after the end gets 204, one with a bad id 400."""
    url = f"{dashboard.url}/api/tasks/t/events"
    with agent(valkey, "t") as end, subprocess.Popen(["curl", "-sN", url], stdout=subprocess.PIPE) as curl:
        with httpx.Client() as client, connect_sse(client, "GET", url) as source:
            received = source.iter_sse()
            first = [next(received) for _ in range(300)]
            end()
            events = [event for event in [*first, *received] if event.data]  # `retry:` alone is none
        body, _ = curl.communicate(timeout=60)

    expected = ids_of(valkey, "t")
    assert [event.id for event in events] == expected
    assert [frame.id for frame in frames_of(body)] == expected
    assert [json.loads(event.data) for event in events] == entries_of(valkey, "t")
    assert httpx.get(url, headers={"Last-Event-ID": expected[-1]}).status_code == 204
    assert httpx.get(url, headers={"Last-Event-ID": "no id"}).status_code == 400


def test_trimmed_cursor_gets_a_gap_first(dashboard: Dashboard, valkey: Server) -> None:
    """It tells how many entries have gone, and whoever is cut right after it goes on as before it."""
    log = Stream("t", valkey.client())
    ids = [log.add("progress", percent=n, step="") for n in range(20)]
    log.add("completed")
    valkey.client().xtrim(keys.stream("t"), maxlen=5, approximate=False)

    for path, last in (("/api/tasks/t/events", ids[2]), ("/api/events?task=t&task=other", f"t={ids[2]},other=0")):
        with httpx.stream("GET", dashboard.url + path, headers={"Last-Event-ID": last}) as response:
            body = b""
            for data in response.iter_raw():
                body += data
                if b"completed" in body:
                    break
        frames = frames_of(body)
        assert [frame.event for frame in frames] == ["gap", *["progress"] * 4, "completed"]
        assert json.loads(frames[0].data)["missed"] == 13
        cursors = split_cursors(frames[0].id or "")[0] if "other" in last else {"t": frames[0].id}
        assert cursors is not None and cursors["t"] == ids[2]


# -- several tasks --------------------------------------------------------------------------------------------------


def test_named_tasks_come_exactly_once_through_cuts_and_restarts(dashboard: Dashboard, valkey: Server) -> None:
    """?task=a&task=b&task=c over one connection, which is cut, while the dashboard is killed and started again."""

    def before(n: int) -> None:
        if n in (20, 40):
            dashboard.stop(signal.SIGKILL if n == 20 else signal.SIGTERM)
            dashboard.start()
        if n == 60:
            end()

    with agent(valkey, *"abc", pause_seconds=0.01) as end:
        connections = read_in_pieces(dashboard.port, "/api/events?task=a&task=b&task=c", 60, before)

    received = [json.loads(frame.data) for frames in connections for frame in frames]
    for task_id in "abc":
        assert [entry for entry in received if entry["task"] == task_id] == entries_of(valkey, task_id)


def test_all_tasks_come_at_least_once_through_cuts(dashboard: Dashboard, valkey: Server) -> None:
    """Without names: those that run, and those that are put while the connection lasts."""
    queue = TaskQueue(valkey.client())
    tasks = ["early1", "early2", "late"]
    for task_id in tasks[:2]:
        queue.put({}, id=task_id)
    path, place, last_id = "/api/events", random.Random(SEED), None
    received = []
    with agent(valkey, *tasks[:2], pause_seconds=0.01) as end_early, agent(valkey, "late", pause_seconds=0.01) as end:
        for n in range(60):
            if n == 20:
                queue.put({}, id="late")
            frames = frames_of(get(dashboard.port, path, last_id, place.randrange(500, 3000), 0.3))
            received += frames
            last_id = next((frame.id for frame in reversed(frames) if frame.id is not None), last_id)
        end_early()
        end()
    received += frames_of(get(dashboard.port, path, last_id, 10**7, 2.0))

    entries = [json.loads(frame.data) for frame in received]
    for task_id in tasks:
        assert {entry["id"] for entry in entries if entry["task"] == task_id} == set(ids_of(valkey, task_id))


def everything_until(
    dashboard: Dashboard, last_id: str | None, enough: Callable[[list[tuple[str, str]]], bool]
) -> tuple[list[tuple[str, str]], str | None]:
    """Watch all tasks until there is enough; return the pairs (task, event), and the last id, as a browser has it."""
    seen: list[tuple[str, str]] = []
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with (
        httpx.Client(timeout=60) as client,
        connect_sse(client, "GET", f"{dashboard.url}/api/events", headers=headers) as source,
    ):
        assert source.response.status_code == 200
        events = source.iter_sse()
        while last_id is None or not enough(seen):
            event = next(events)
            last_id = event.id or last_id
            if event.data:
                seen.append((event.json()["task"], event.json()["event"]))
    return seen, last_id


def finish(server: Server, task_id: str) -> None:
    """Bring a task that waits to its end, as a worker does."""
    queue = TaskQueue(server.client())
    task = take(queue, newest=True)
    assert task is not None and task.id == task_id
    log = Stream(task.id, queue.redis, task.epoch)
    log.add("started", worker="w")
    log.add("completed", result=1)
    close(queue, task, "completed", 1)


def test_task_that_lived_while_nobody_watched_is_not_missed(dashboard: Dashboard, valkey: Server) -> None:
    """Put and ended between two connections, it comes as a whole; what was seen whole before does not come again."""
    queue = TaskQueue(valkey.client())
    whole = ["started", "completed"]

    _, cursor = everything_until(dashboard, None, lambda seen: True)  # cut off before any event
    received: list[tuple[str, str]] = []
    for n in range(6):
        queue.put({}, id=f"t{n}")
        finish(valkey, f"t{n}")
        seen, cursor = everything_until(dashboard, cursor, lambda seen, n=n: (f"t{n}", "completed") in seen)
        received += seen
        if n == 3:  # another process, which has seen none of it
            dashboard.stop()
            dashboard.start()

    assert received == [(f"t{n}", name) for n in range(6) for name in whole]


def test_id_of_too_many_tasks_is_a_position(dashboard: Dashboard, valkey: Server) -> None:
    """Past 100 running tasks a resume goes on with the 100 oldest, and has all that was put after these, or ended
    meanwhile, from its start."""
    queue = TaskQueue(valkey.client())
    many = [task.id for task in queue.put_many([{}] * 101)]
    logs = {task_id: Stream(task_id, queue.redis) for task_id in many}
    for task_id in many:
        logs[task_id].add("started", worker="w")

    _, cursor = everything_until(dashboard, None, lambda seen: len(seen) == 101)
    named = split_cursors(cursor or "")[0]
    [left_out] = [task_id for task_id in many if task_id not in named]
    for task_id in (many[0], left_out):
        logs[task_id].add("completed", result=1)
        queue.redis.zrem(keys.UNFINISHED, task_id)
    queue.put({}, id="meanwhile")
    finish(valkey, "meanwhile")
    seen, _ = everything_until(
        dashboard, cursor, lambda seen: {("meanwhile", "completed"), (left_out, "completed")} <= {*seen}
    )

    whole = ["started", "completed"]
    assert [name for task_id, name in seen if task_id == many[0]] == ["completed"]
    for task_id in (left_out, "meanwhile"):
        assert [name for other, name in seen if other == task_id] == whole


def test_odd_positions_are_refused(dashboard: Dashboard) -> None:
    """A position that is none is 400, as a cursor is."""
    for cursor in ("@", "@x", "@-1", "@1234567890123456", "*", "@1,*,7=1-1", "@1,,", "7=1-1,@1", "@1,x"):
        answer = httpx.get(f"{dashboard.url}/api/events", headers={"Last-Event-ID": cursor})
        assert answer.status_code == 400, cursor


# -- when things break ----------------------------------------------------------------------------------------------


def test_restart_of_the_dashboard_loses_and_repeats_nothing(dashboard: Dashboard, valkey: Server) -> None:
    """SIGTERM closes the watchers' streams; a client that comes again goes on after its last entry."""
    received: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            headers = {"Last-Event-ID": received[-1]} if received else {}
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.Client(timeout=60) as client,
                connect_sse(client, "GET", f"{dashboard.url}/api/tasks/t/events", headers=headers) as source,
            ):
                if source.response.status_code == 204:
                    return
                for event in source.iter_sse():
                    if event.event != "message":  # httpx-sse takes `retry:` alone for one
                        received.append(event.id)
            over.wait(0.05)  # a browser waits a second

    with agent(valkey, "t") as end:
        readers = [threading.Thread(target=read, daemon=True)]
        readers[0].start()
        for number in (signal.SIGTERM, signal.SIGKILL):
            count = len(received)
            wait_until(lambda count=count: len(received) > count + 50, "events come")  # type: ignore[misc]
            dashboard.stop(number)
            dashboard.start()
        end()
    wait_until(lambda: received == ids_of(valkey, "t"), "it has all of it, once")
    over.set()


def test_client_that_never_reads_slows_nobody(dashboard: Dashboard, valkey: Server) -> None:
    """Ten of them, while 10 MB are written: others get all, and the dashboard's memory stays bounded."""
    log = Stream("t", valkey.client())
    log.add("started", worker="w")
    hostile = [socket.socket() for _ in range(10)]
    for connection in hostile:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", dashboard.port))
        connection.sendall(b"GET /api/tasks/t/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    wait_until(lambda: dashboard.streams() == 10, "they watch")
    before = dashboard.memory_bytes()

    with httpx.Client(timeout=60) as client, connect_sse(client, "GET", f"{dashboard.url}/api/tasks/t/events") as good:
        received = good.iter_sse()
        wait_until(lambda: next(received).event == "started", "it watches")
        for n in range(250):
            log.add("progress", percent=n, step="x" * 40_000)
            next(received)  # each comes before the next is written
        log.add("completed")
        assert [event.event for event in received] == ["completed"]

    assert dashboard.memory_bytes() - before < 60e6  # one buffer of shared entries, not ten times all of them
    for connection in hostile:
        connection.close()
    wait_until(lambda: dashboard.streams() == 0, "they are gone")


def test_curl_is_there() -> None:
    """The tests above compare with it."""
    if subprocess.run(["which", "curl"], capture_output=True).returncode:
        lacking("curl")
