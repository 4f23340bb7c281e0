"""Let calls of a script that come at the same time share a round trip.

    run_many        one thread has several calls: it sends them together
    SharedScript    many threads have one call each: one of them sends for all who wait

The batches form by themselves. Who finds a free place sends at once; who comes while AT_ONCE round trips are on their
way waits, and the next one takes all who wait. So an idle system stays instant, and nobody waits longer than two round
trips. (Databases write their logs so, as "group commit": DeWitt et al., Implementation Techniques for Main Memory
Database Systems, 1984.)
"""

import threading
from collections.abc import Sequence
from typing import Any

from redis import RedisCluster
from redis.exceptions import NoScriptError, ResponseError

from ailf.messaging.redis import Client, is_transient

AT_ONCE = 3  # round trips of one script: the next batch is prepared while the server works on the last
PACKED_AT_ONCE = 50  # commands

Call = tuple[Any, Sequence[str], Sequence[Any]]  # a script (redis-py's), its keys and arguments


def run_many(client: Client, calls: Sequence[Call]) -> list[Any]:
    """Run scripts in order, in one round trip; a cluster's client takes them one by one.

    Returns the replies; where the server refuses one call, the error is its reply. Raises redis-py's error where Redis
    is away, or refuses for a while: then any of the calls may have been carried out. None is repeated here, but those
    behind a script of another kind that the server had to be sent first.
    """
    if isinstance(client, RedisCluster):
        return [_run_in_cluster(call) for call in calls]
    commands = [("EVALSHA", script.sha, len(keys), *keys, *args) for script, keys, args in calls]
    replies = send(client, commands) if commands else []
    missing = {place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)}
    if missing:  # the script was not sent yet, or the server has restarted
        for source in {script.script for script, _, _ in calls}:
            client.script_load(source)
        # subtle: what was carried out is not sent again, unless another script should have been carried out before it
        shas = {commands[place][1] for place in missing}
        again = [n for n in range(min(missing), len(commands)) if n in missing or commands[n][1] not in shas]
        for place, reply in zip(again, send(client, [commands[n] for n in again]), strict=True):
            replies[place] = reply
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


def send(client: Client, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Send commands in one round trip, once; return the replies, as the server sent them. Not for a cluster.

    Where the server refuses one, the error is its reply. Raises redis-py's error where Redis is away.
    """
    # Not redis-py's pipeline and Script: they take twice as long for each, and ask by SCRIPT EXISTS before a batch.
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        for at in range(0, len(commands), PACKED_AT_ONCE):  # the server begins while the rest is packed
            connection.send_packed_command(connection.pack_commands(commands[at : at + PACKED_AT_ONCE]))
        return [_read(connection) for _ in commands]
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
    """A thread's call, until it is answered or it is this thread's turn to send."""

    __slots__ = ("call", "is_sender", "reply", "wake")

    def __init__(self, call: Call) -> None:
        self.call, self.reply, self.is_sender = call, None, False
        self.wake = threading.Lock()
        self.wake.acquire()


class SharedScript:
    """A script that many threads call, like redis-py's Script; those who wait at the same time share a round trip."""

    def __init__(self, client: Client, script: Any) -> None:
        self._client, self.script = client, script
        self._mutex = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._sending = 0  # round trips on their way, AT_ONCE at most; somebody waits only where they are so many

    def __call__(self, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run the script; return its reply, or raise redis-py's error. Blocks for a round trip or two."""
        call = self.script, keys, args
        if isinstance(self._client, RedisCluster):  # whose client sends them one by one: better each on its own
            return run(self._client, call)
        with self._mutex:
            has_place = self._sending < AT_ONCE
            if has_place:
                self._sending += 1
            else:
                self._waiting.append(mine := _Waiting(call))
        if has_place:
            try:
                return run(self._client, call)
            finally:
                self._pass_on([])
        try:
            mine.wake.acquire()
        except BaseException:  # Ctrl-C: whoever waits behind must not wait for this thread
            self._give_up(mine)
            raise
        if mine.is_sender:
            self._send_for_all(mine)
        if isinstance(mine.reply, BaseException):
            raise mine.reply
        return mine.reply

    def _send_for_all(self, mine: _Waiting) -> None:
        with self._mutex:
            batch, self._waiting = [mine, *self._waiting], []
        try:
            replies = run_many(self._client, [one.call for one in batch])
        except BaseException as error:  # whatever it is, each raises it in its own thread
            replies = [error] * len(batch)
        for one, reply in zip(batch, replies, strict=True):
            one.reply = reply
        self._pass_on(batch[1:])

    def _pass_on(self, answered: list[_Waiting]) -> None:
        """Give the place of a round trip that is back to the first of those who wait, and wake those it answered."""
        with self._mutex:
            if self._waiting:  # the sender first: its round trip goes on while the others wake
                sender = self._waiting.pop(0)
                sender.is_sender = True
                sender.wake.release()
            else:
                self._sending -= 1
        for one in answered:
            one.wake.release()

    def _give_up(self, mine: _Waiting) -> None:
        with self._mutex:
            if mine in self._waiting:
                self._waiting.remove(mine)
        if mine.is_sender:
            self._pass_on([])
