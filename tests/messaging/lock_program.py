"""A process for the tests to start, stop and kill: it acquires a lock, and writes to a resource that checks tokens.

Usage:   python tests/messaging/lock_program.py write COUNT [--die-at N | --pause-at N]
         python tests/messaging/lock_program.py hold EXPIRE
Needs:   Redis at $REDIS_URL
Keys:    resource (the greatest token it has seen), history (a line for each event, in the server's order)

`write` acquires lock:shared COUNT times, each time to write twice. Within one of them it can kill itself, or print a
line and wait for one on stdin. `hold` acquires lock:shared with auto_renew, prints its token, and never releases it.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ailf.messaging.redis import Client, LockNotOwned, RedisLock, connect

EXPIRE = 1.0  # of the lock: longer than a process on a busy machine is off its core, mostly

# A resource that heeds fencing tokens: it refuses a write with a token less than one that it has seen.
WRITE = """
local accepted = tonumber(ARGV[2]) >= tonumber(redis.call('GET', KEYS[1]) or 0)
if accepted then redis.call('SET', KEYS[1], ARGV[2]) end
redis.call('RPUSH', KEYS[2], ARGV[1] .. ' ' .. ARGV[2] .. (accepted and ' accepted' or ' refused'))
return accepted
"""


def write_often(redis: Client, count: int, die_at: int, pause_at: int) -> None:
    lock = RedisLock("shared", EXPIRE, redis)
    resource = redis.register_script(WRITE)
    for n in range(count):
        assert lock.acquire(retry=100_000, retry_delay=0.005)
        who, token = f"{os.getpid()}:{n}", lock.fencing_token
        resource(keys=["resource", "history"], args=[who, token])
        if n == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if n == pause_at:
            print("holding", flush=True)
            sys.stdin.readline()
            try:
                lock.extend()
            except LockNotOwned:
                redis.rpush("history", f"{who} {token} not-extended")
        resource(keys=["resource", "history"], args=[who, token])
        redis.rpush("history", f"{who} {token} {'released' if lock.release() else 'lost'}")
        time.sleep(random.uniform(0, 0.01))  # let the others have a turn


def hold(redis: Client, expire: float) -> None:
    lock = RedisLock("shared", expire, redis, auto_renew=True)
    assert lock.acquire()
    print(lock.fencing_token, flush=True)
    signal.pause()


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("count", type=int)
    writing.add_argument("--die-at", type=int, default=-1)
    writing.add_argument("--pause-at", type=int, default=-1)
    commands.add_parser("hold").add_argument("expire", type=float)
    args = parser.parse_args()
    if args.command == "write":
        write_often(connect(), args.count, args.die_at, args.pause_at)
    else:
        hold(connect(), args.expire)
    return 0


if __name__ == "__main__":
    sys.exit(main())
