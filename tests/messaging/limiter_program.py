"""A process for the tests to start: its threads call one rate limiter until it reads a line.

Usage:   python tests/messaging/limiter_program.py sync|async THREADS RATE PERIOD SKEW_SECONDS
Needs:   Redis at $REDIS_URL
Keys:    limit:shared, and calls (a line for each decision: its time on the server, 1 or 0, who asked)

This process' clocks are wrong by SKEW_SECONDS. Every other thread waits for its turn, the rest ask again and again.
"""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from ailf.messaging.redis import AsyncRedisRateLimiter, RedisRateLimiter, lua

PAUSE_SECONDS = 0.02  # after a denied call, so that demand does not eat up the machine

# The limiter's own script, whose decisions are recorded with the very time that it got from the server.
RECORD = """
local server, time = redis, nil
local redis = {{ call = function(command, ...)
  local reply = server.call(command, ...)
  if command == 'TIME' then time = reply end
  return reply
end }}
local function decide()
{source}
end
local reply = decide()
local now = string.format('%.0f', time[1] * 1000000 + time[2])
server.call('RPUSH', KEYS[2], now .. ' ' .. reply[1] .. ' ' .. ARGV[3])
return reply
"""


def record(limiter: RedisRateLimiter | AsyncRedisRateLimiter) -> None:
    """Let a limiter that is connected record its decisions in the list `calls`."""
    source = (lua.HERE / "allow.lua").read_text()
    script = limiter.redis.register_script(RECORD.format(source=source))

    def allow(keys: list[str], args: list[Any]) -> Any:
        return script(keys=[*keys, "calls"], args=[*args, f"{os.getpid()}:{threading.get_native_id()}"])

    limiter._allow = allow


def call(limiter: RedisRateLimiter, wait: bool, stopped: threading.Event) -> None:
    while not stopped.is_set():
        if wait:
            limiter.wait("shared")
        elif not limiter.is_allowed("shared"):
            time.sleep(PAUSE_SECONDS)


async def call_async(limiter: AsyncRedisRateLimiter, wait: bool, stopped: threading.Event) -> None:
    await limiter.check("other")  # connects
    record(limiter)
    while not stopped.is_set():
        if wait:
            await limiter.wait("shared")
        elif not await limiter.is_allowed("shared"):
            await asyncio.sleep(PAUSE_SECONDS)


def main() -> int:
    kind, threads, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    period, skew = float(sys.argv[4]), float(sys.argv[5])
    the_time, the_monotonic = time.time, time.monotonic
    time.time, time.monotonic = lambda: the_time() + skew, lambda: the_monotonic() + skew
    stopped = threading.Event()
    shared = RedisRateLimiter("limit", rate, period)
    record(shared)

    def work(wait: bool) -> None:
        if kind == "sync":
            call(shared, wait, stopped)
        else:
            asyncio.run(call_async(AsyncRedisRateLimiter("limit", rate, period), wait, stopped))

    callers = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(threads)]
    for caller in callers:
        caller.start()
    sys.stdin.readline()
    stopped.set()
    for caller in callers:
        caller.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
