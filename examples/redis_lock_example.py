"""One of several processes at a time counts up a number, guarded by a lock and by its fencing token.

Usage:   python examples/redis_lock_example.py [--once]      (in two or three terminals)
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
See:     docs/source/guides/redis.md
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ailf.messaging.redis import RedisClient, RedisLock
from task_streams.cli import run

ROUNDS = 5
SECONDS_INSIDE = 0.5  # what the guarded work takes

# The resource refuses a holder that comes late: one whose token is less than the greatest that it has seen.
# KEYS: the number, the greatest token   ARGV: token, new value   returns 1 (written) or 0 (refused)
WRITE = """
if tonumber(redis.call('GET', KEYS[2]) or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Count up a number, one process at a time.")
    parser.add_argument("--once", action="store_true", help="one round, then exit")
    args = parser.parse_args()
    with RedisClient() as client:
        lock = RedisLock("example-counter", expire=5, redis_client=client)
        write = client.client.register_script(WRITE)
        for _ in range(1 if args.once else ROUNDS):
            with lock.acquire_context(retry=100) as acquired:
                if not acquired:
                    print("somebody else holds the lock all the time", file=sys.stderr)
                    return 1
                value = int(client.get("{example}:number") or 0)
                time.sleep(SECONDS_INSIDE)  # without the lock, two processes would now count to the same number
                written = write(keys=["{example}:number", "{example}:token"], args=[lock.fencing_token, value + 1])
                what = f"counted to {value + 1}" if written else "came late, and was refused"
                print(f"process {os.getpid()} (token {lock.fencing_token}) {what}", flush=True)
            time.sleep(SECONDS_INSIDE)  # let others have their turn: a lock keeps no queue of those who wait
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
