"""Let calls of a script that come at the same time share a round trip.

    run_many        one thread has several calls: it sends them together
    SharedScript    many threads have one call each: one of them sends for all who wait

The batches form by themselves. Who finds nobody sending sends at once; who comes meanwhile waits, and the next round
trip takes all of them. So an idle system stays instant, and nobody waits longer than two round trips. (Databases write
their logs so, as "group commit": DeWitt et al., Implementation Techniques for Main Memory Database Systems, 1984.)
"""

import threading
from collections.abc import Sequence
from typing import Any

from redis import RedisCluster
from redis.exceptions import NoScriptError, ResponseError

from ailf.messaging.redis import Client, is_transient

Call = tuple[Any, Sequence[str], Sequence[Any]]  # a script (redis-py's), its keys and arguments


def run_many(client: Client, calls: Sequence[Call]) -> list[Any]:
    """Run scripts in order, in one round trip; a cluster's client takes them one by one. All of them may be repeated.

    Returns the replies; where the server refuses one call, the error is its reply. Raises redis-py's error where Redis
    is away, or refuses for a while: then any of the calls may have been carried out.
    """
    if isinstance(client, RedisCluster):
        return [_run_in_cluster(call) for call in calls]
    replies = _send(client, calls) if calls else []
    if any(isinstance(reply, NoScriptError) for reply in replies):  # not sent yet, or the server has restarted
        for source in {script.script for script, _, _ in calls}:
            client.script_load(source)
        replies = _send(client, calls)
    for reply in replies:
        if isinstance(reply, Exception) and is_transient(reply):
            raise reply
    return replies


def run(client: Client, call: Call) -> Any:
    """Run one script and return its reply. Raises redis-py's error. It may be repeated."""
    [reply] = run_many(client, [call])
    if isinstance(reply, Exception):
        raise reply
    return reply


def _run_in_cluster(call: Call) -> Any:
    script, keys, args = call
    try:
        return script(keys=keys, args=args)
    except ResponseError as error:
        if is_transient(error):
            raise
        return error


def _send(client: Client, calls: Sequence[Call]) -> list[Any]:
    # Not redis-py's pipeline and Script: they take twice as long for each, and ask by SCRIPT EXISTS before a batch.
    pool = client.connection_pool
    connection = pool.get_connection()
    commands = [("EVALSHA", script.sha, len(keys), *keys, *args) for script, keys, args in calls]
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        return [_read(connection) for _ in calls]
    except BaseException:  # the rest of the replies must not be taken for those of the next command
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _read(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


class _Waiting:
    """A thread's call, until it is answered."""

    __slots__ = ("call", "is_answered", "reply", "wake")

    def __init__(self, call: Call) -> None:
        self.call, self.reply, self.is_answered = call, None, False
        self.wake = threading.Lock()
        self.wake.acquire()


class SharedScript:
    """A script that many threads call, like redis-py's Script; those who wait at the same time share a round trip."""

    def __init__(self, client: Client, script: Any) -> None:
        self._client, self.script = client, script
        self._mutex = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._is_sending = False

    def __call__(self, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run the script; return its reply, or raise redis-py's error. Blocks for a round trip or two."""
        if isinstance(self._client, RedisCluster):  # whose client sends them one by one: better each on its own
            return run(self._client, (self.script, keys, args))
        with self._mutex:
            is_alone = not self._is_sending
            self._is_sending = True
            if not is_alone:
                self._waiting.append(mine := _Waiting((self.script, keys, args)))
        if is_alone:
            try:
                return run(self._client, (self.script, keys, args))
            finally:
                self._pass_on([])
        mine.wake.acquire()  # until it is answered, or it is this thread's turn to send
        if not mine.is_answered:
            self._send_for_all()
        if isinstance(mine.reply, BaseException):
            raise mine.reply
        return mine.reply

    def _send_for_all(self) -> None:
        with self._mutex:
            batch, self._waiting = self._waiting, []
        try:
            replies = run_many(self._client, [one.call for one in batch])
        except BaseException as error:  # whatever it is, each raises it in its own thread
            replies = [error] * len(batch)
        for one, reply in zip(batch, replies, strict=True):
            one.reply, one.is_answered = reply, True
        self._pass_on(batch)

    def _pass_on(self, answered: list[_Waiting]) -> None:
        """Let the first of those who wait now send, and wake those who are answered."""
        with self._mutex:
            successors = self._waiting[:1]
            self._is_sending = bool(successors)
        for one in successors + answered:  # the sender first: its round trip goes on while the others wake
            one.wake.release()
