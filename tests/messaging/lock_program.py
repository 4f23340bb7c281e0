"""A process for the tests to start, stop and kill: it acquires a lock, and writes to a resource that checks tokens.

Usage:   python tests/messaging/lock_program.py write sync|async COUNT [--die-at N | --pause-at N]
         python tests/messaging/lock_program.py hold sync|async EXPIRE
Needs:   Redis at $REDIS_URL
Keys:    resource (the greatest token it has seen), history (a line for each event, in the server's order)

`write` acquires lock:shared COUNT times, each time to write twice. Within one of them it can kill itself, or print a
line and wait for one on stdin. `hold` acquires lock:shared with auto_renew, prints its token, and never releases it.
"""

import argparse
import asyncio
import inspect
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from ailf.messaging.redis import AsyncRedisLock, Client, LockNotOwned, RedisLock, connect

EXPIRE = 1.0  # of the lock: longer than a process on a busy machine is off its core, mostly

# A resource that heeds fencing tokens: it refuses a write with a token less than one that it has seen.
WRITE = """
local accepted = tonumber(ARGV[2]) >= tonumber(redis.call('GET', KEYS[1]) or 0)
if accepted then redis.call('SET', KEYS[1], ARGV[2]) end
redis.call('RPUSH', KEYS[2], ARGV[1] .. ' ' .. ARGV[2] .. (accepted and ' accepted' or ' refused'))
return accepted
"""


async def answer(value: Any) -> Any:
    """Return what either kind of lock answers."""
    return await value if inspect.isawaitable(value) else value


async def write_often(redis: Client, lock: Any, count: int, die_at: int, pause_at: int) -> None:
    resource = redis.register_script(WRITE)
    for n in range(count):
        assert await answer(lock.acquire(retry=100_000, retry_delay=0.005))
        who, token = f"{os.getpid()}:{n}", lock.fencing_token
        resource(keys=["resource", "history"], args=[who, token])
        if n == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if n == pause_at:
            print("holding", flush=True)
            sys.stdin.readline()
            try:
                await answer(lock.extend())
            except LockNotOwned:
                redis.rpush("history", f"{who} {token} not-extended")
        resource(keys=["resource", "history"], args=[who, token])
        redis.rpush("history", f"{who} {token} {'released' if await answer(lock.release()) else 'lost'}")
        time.sleep(random.uniform(0, 0.01))  # let the others have a turn


async def hold(lock: Any) -> None:
    assert await answer(lock.acquire())
    print(lock.fencing_token, flush=True)
    await asyncio.Event().wait()


async def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("kind", choices=["sync", "async"])
    writing.add_argument("count", type=int)
    writing.add_argument("--die-at", type=int, default=-1)
    writing.add_argument("--pause-at", type=int, default=-1)
    holding = commands.add_parser("hold")
    holding.add_argument("kind", choices=["sync", "async"])
    holding.add_argument("expire", type=float)
    args = parser.parse_args()
    Lock = RedisLock if args.kind == "sync" else AsyncRedisLock
    if args.command == "write":
        await write_often(connect(), Lock("shared", EXPIRE), args.count, args.die_at, args.pause_at)
    else:
        await hold(Lock("shared", args.expire, auto_renew=True))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
