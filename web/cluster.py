"""The hub of a Redis Cluster: a reader for each node.

One XREAD cannot read streams of several hash slots, so these readers poll: a pipeline with an XRANGE for each stream.
A node that fails holds up only its own streams, and a stream that moves to another node gets the reader there.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import SlotNotCoveredError

from ailf.messaging.redis import REDIS_ERRORS, Client
from task_streams import keys

from .hub import PAGE, Hub, Reader
from .watcher import may_pass

POLL_SECONDS = 0.05  # between two reads of a node with nothing new
REGROUP_SECONDS = 1.0  # between two looks whether the streams are still on their nodes

logger = logging.getLogger(__name__)


class ClusterHub(Hub):
    """Knows which node holds what."""

    async def __aenter__(self) -> "ClusterHub":
        await self.client.initialize()
        self.client.reinitialize_steps = 0  # else it closes all connections at each fifth slot that has moved
        await super().__aenter__()
        self.spawn(self._look_after_nodes())
        return self

    def node_of(self, key: str) -> str:
        try:
            return str(self.client.get_node_from_key(key).name)
        except SlotNotCoveredError:
            return "no node"  # it is away as soon as somebody wants to read there

    async def run(self, command: str, *args: Any, **options: Any) -> Any:
        # subtle: in a pipeline. If a node fails, a cluster's client closes its connections to all nodes, and may then
        # ask the failed one which commands there are; its pipeline just fails.
        async with self.client.pipeline() as pipe:
            getattr(pipe, command)(*args, **options)
            return (await pipe.execute())[0]

    async def time(self) -> tuple[int, int]:
        node = self.client.get_node_from_key(keys.RECENT)
        seconds, microseconds = await self.run("execute_command", "TIME", target_nodes=node)
        return seconds, microseconds

    def new_reader(self, node: str) -> Reader:
        return PollingReader(self, node)

    async def _look_after_nodes(self) -> None:
        """Ask the nodes again that are away, and give streams that have moved to the readers there."""
        while True:
            await asyncio.sleep(REGROUP_SECONDS)
            try:
                if self.away:
                    await self.client.nodes_manager.initialize()  # after a failover others hold their slots
                for reader in self.readers:
                    moved = [one for one in reader.cursors if self.node_of(keys.stream(one)) != reader.node]
                    for task_id in moved:
                        self.assign(task_id, reader.cursors.pop(task_id))
            except REDIS_ERRORS as error:
                if not may_pass(error):
                    logger.exception("cannot ask for the cluster's nodes; trying again")
            await asyncio.gather(*map(self._try_node, self.away - {self.core}))

    async def _try_node(self, node: str) -> None:
        """Note that a node is back if it answers, or if it holds nothing that anybody watches."""
        watched = {task_id for watcher in self.all_watchers for task_id in watcher.cursors}
        there = next((task_id for task_id in watched if self.node_of(keys.stream(task_id)) == node), None)
        try:
            if there is not None:
                await self.run("exists", keys.stream(there))
        except REDIS_ERRORS as error:
            if not may_pass(error):
                logger.exception("cannot read from %s; trying again", node)
        else:
            self.came(node)


class PollingReader(Reader):
    """Asks one node again and again. A stream that has moved is read where it is now: redis-py follows MOVED."""

    async def replies(self) -> AsyncGenerator[list[Any]]:
        while True:
            streams = await self.next_streams()
            async with self.hub.client.pipeline() as pipe:
                # subtle: not XREAD. Before each of those, redis-py would ask some node for the positions of its keys.
                for stream, cursor in streams.items():
                    pipe.xrange(stream, f"({cursor}", "+", count=PAGE)
                replies = await pipe.execute()
            found = [pair for pair in zip(streams, replies, strict=True) if pair[1]]
            yield found
            if not found:
                await asyncio.sleep(POLL_SECONDS)


def hub_of(redis: Client) -> Hub:
    """Return the hub for a client, of a cluster or of one server."""
    return ClusterHub(redis) if isinstance(redis, RedisCluster) else Hub(redis)
