"""Acquire a lock, stand still for longer than it lives, then write as if nothing had happened.

Usage:   python tutorial/late_holder.py     it stops itself; `fg` lets it go on
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    those of examples/redis_lock_example.py, whose number it wants to set to 100
See:     tutorial/part7.md
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ailf.messaging.redis import RedisClient, RedisLock
from examples.redis_lock_example import WRITE
from task_streams.cli import run


def main() -> int:
    with RedisClient() as client:
        write = client.client.register_script(WRITE)
        lock = RedisLock("example-counter", expire=1, redis_client=client)
        if not lock.acquire():
            print("somebody else holds the lock", file=sys.stderr)
            return 1
        os.kill(os.getpid(), signal.SIGSTOP)  # as behind a laptop's lid; from here on after `fg`
        written = write(keys=["{example}:number", "{example}:token"], args=[lock.fencing_token, 100])
        print("it has written" if written else "it came late, and was refused")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
