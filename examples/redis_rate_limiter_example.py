"""Several processes share five calls a second: each prints when it got one.

Usage:   python examples/redis_rate_limiter_example.py [--once]      (in two or three terminals)
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
See:     docs/source/guides/redis.md
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ailf.messaging.redis import RedisRateLimiter
from task_streams.cli import run

CALLS = 15


def main() -> int:
    parser = argparse.ArgumentParser(description="Make calls that are limited to five a second over all processes.")
    parser.add_argument("--once", action="store_true", help="one call, then exit")
    args = parser.parse_args()
    limiter = RedisRateLimiter("example", rate=5, period=1)
    for number in range(1, 2 if args.once else CALLS + 1):
        began = time.monotonic()
        limiter.wait("calls")
        print(f"process {os.getpid()}: call {number} after {time.monotonic() - began:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
