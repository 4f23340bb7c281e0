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

Call = tuple[Sequence[str], Sequence[Any]]  # keys and arguments of a script


def run_many(client: Client, script: Any, calls: Sequence[Call]) -> list[Any]:
    """Run a script once for each (keys, args), in one round trip; a cluster's client takes them one by one.

    Returns the replies; where the server refuses one call, the error is its reply. Raises redis-py's error where Redis
    is away, or refuses for a while: then any of the calls may have been carried out.
    """
    if len(calls) <= 1 or isinstance(client, RedisCluster):
        return [_run(script, call) for call in calls]
    replies = _send(client, script, calls)
    if any(isinstance(reply, NoScriptError) for reply in replies):
        client.script_load(script.script)  # the server does not know it yet, or has restarted: it has run none of them
        replies = _send(client, script, calls)
    for reply in replies:
        if isinstance(reply, Exception) and is_transient(reply):
            raise reply
    return replies


def _run(script: Any, call: Call) -> Any:
    try:
        return script(keys=call[0], args=call[1])
    except ResponseError as error:
        if is_transient(error):
            raise
        return error


def _send(client: Client, script: Any, calls: Sequence[Call]) -> list[Any]:
    with client.pipeline(transaction=False) as pipe:
        for keys, args in calls:  # subtle: not script(client=pipe), which asks by SCRIPT EXISTS before each batch
            pipe.evalsha(script.sha, len(keys), *keys, *args)
        return list(pipe.execute(raise_on_error=False))


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
        self._client, self._script = client, script
        self._mutex = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._is_sending = False

    def many(self, calls: Sequence[Call]) -> list[Any]:
        """Run it for several calls of this thread: see run_many."""
        return run_many(self._client, self._script, calls)

    def __call__(self, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run the script; return its reply, or raise redis-py's error. Blocks for a round trip or two."""
        if isinstance(self._client, RedisCluster):  # whose client sends them one by one: better each on its own
            return self._script(keys=keys, args=args)
        mine = _Waiting((keys, args))
        with self._mutex:
            self._waiting.append(mine)
            leads, self._is_sending = not self._is_sending, True
        if not leads:
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
            replies = self.many([one.call for one in batch])
        except BaseException as error:  # whatever it is, each raises it in its own thread
            replies = [error] * len(batch)
        for one, reply in zip(batch, replies, strict=True):
            one.reply, one.is_answered = reply, True
        with self._mutex:
            successors = self._waiting[:1]
            self._is_sending = bool(successors)
        for one in successors + batch:  # the next sender first: its round trip goes on while the others wake
            one.wake.release()
