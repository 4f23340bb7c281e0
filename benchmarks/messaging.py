"""How much slower the messaging utilities are than redis-py's bare calls, as ratios measured in the same run.

Usage:   python benchmarks/messaging.py [--rounds N] [--calls N] [--quick] [--json]
Needs:   nothing that runs: it starts a server of its own, on loopback, and ends it
See:     docs/source/guides/redis.md

Rounds of the bare call and of ours alternate, so that whatever else the machine does hits both. A ratio is ours / bare,
of calls a second: 1 is as fast, 0.8 is a call that takes 25 % longer. Shown are the least, the median and the greatest
of all rounds. Both sides use the same client settings and send the same number of commands.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import machine, run, server
from redis.asyncio.lock import Lock as AsyncLock
from redis.lock import Lock

from ailf.messaging.redis import (
    AsyncRedisLock,
    AsyncRedisPubSub,
    AsyncRedisRateLimiter,
    AsyncRedisStream,
    RedisLock,
    RedisPubSub,
    RedisRateLimiter,
    RedisStream,
    connect,
    connect_async,
)
from ailf.messaging.redis.lua import HERE as LUA

MESSAGE = {"task_id": "123", "type": "document_processing", "content": "Document content", "pages": 7}
FIELDS = {**MESSAGE, "pages": "7"}
LEAST_RATIO = 0.8  # what the issue asks for: an overhead below 25 %
NEVER = 10**9  # a rate that is not reached

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def pairs(url: str) -> dict[str, Pair]:
    """Return (bare call, our call) of each operation."""
    bare, ours = connect(url), connect(url)
    stream, pubsub = RedisStream("ours", ours), RedisPubSub(ours)
    limiter = RedisRateLimiter("ours", rate=NEVER, period=0.001, redis_client=ours)
    group = RedisStream("ours-group", ours)
    group.create_consumer_group("workers", "one")
    bare.xgroup_create("bare-group", "workers", id="0", mkstream=True)
    lock, bare_lock = RedisLock("ours", redis_client=ours), Lock(bare, "bare-lock", timeout=10, thread_local=False)
    allow = bare.script_load((LUA / "allow.lua").read_text())
    text = json.dumps(MESSAGE)

    def acquire_and_release_bare() -> None:
        bare_lock.acquire(blocking=False)
        bare_lock.release()

    def acquire_and_release() -> None:
        lock.acquire(retry=0)
        lock.release()

    def add_read_and_acknowledge_bare() -> None:
        bare.xadd("bare-group", FIELDS, maxlen=10_000)
        [[_, [[entry_id, _]]]] = bare.xreadgroup("workers", "one", {"bare-group": ">"}, 10)
        bare.xack("bare-group", "workers", entry_id)

    def add_read_and_acknowledge() -> None:
        group.add(MESSAGE)
        [entry] = group.read_group(10)
        group.acknowledge(entry["id"])

    return {
        "add (XADD)": (lambda: bare.xadd("bare", FIELDS, maxlen=10_000), lambda: stream.add(MESSAGE)),
        "publish (PUBLISH)": (lambda: bare.publish("channel", text), lambda: pubsub.publish("channel", MESSAGE)),
        "is_allowed (EVALSHA of the same script)": (
            lambda: bare.evalsha(allow, 1, "bare-limit", NEVER, 1000),
            lambda: limiter.is_allowed("key"),
        ),
        "acquire + release (redis-py's Lock)": (acquire_and_release_bare, acquire_and_release),
        "add + read_group + acknowledge": (add_read_and_acknowledge_bare, add_read_and_acknowledge),
    }


async def async_pairs(url: str) -> dict[str, Pair]:
    """Return the same of the asyncio classes, except the group."""
    bare, ours = await connect_async(url), await connect_async(url)
    stream, pubsub = AsyncRedisStream("ours", ours), AsyncRedisPubSub(ours)
    limiter = AsyncRedisRateLimiter("ours", rate=NEVER, period=0.001, redis_client=ours)
    lock = AsyncRedisLock("ours", redis_client=ours)
    bare_lock = AsyncLock(bare, "bare-lock", timeout=10, thread_local=False)
    allow = await bare.script_load((LUA / "allow.lua").read_text())
    text = json.dumps(MESSAGE)

    async def acquire_and_release_bare() -> None:
        await bare_lock.acquire(blocking=False)
        await bare_lock.release()

    async def acquire_and_release() -> None:
        await lock.acquire(retry=0)
        await lock.release()

    return {
        "asyncio: add": (lambda: bare.xadd("bare", FIELDS, maxlen=10_000), lambda: stream.add(MESSAGE)),
        "asyncio: publish": (lambda: bare.publish("channel", text), lambda: pubsub.publish("channel", MESSAGE)),
        "asyncio: is_allowed": (
            lambda: bare.evalsha(allow, 1, "bare-limit", NEVER, 1000),
            lambda: limiter.is_allowed("key"),
        ),
        "asyncio: acquire + release": (acquire_and_release_bare, acquire_and_release),
    }


def calls_per_second(call: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return calls / (time.perf_counter() - began)


def in_loop(runner: asyncio.Runner, call: Callable[[], Any]) -> Callable[[int], float]:
    """Return calls_per_second() of a call that is awaited: the loop runs for all calls of a round at once."""

    async def all_of(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            await call()
        return calls / (time.perf_counter() - began)

    return lambda calls: runner.run(all_of(calls))


def measure(pair: list[Callable[[int], float]], rounds: int, calls: int) -> dict[str, float]:
    """Alternate rounds of both; return calls a second (medians) and the ratios."""
    for speed_of in pair:
        speed_of(calls // 10)  # to warm up
    speeds = [[speed_of(calls) for speed_of in pair] for _ in range(rounds)]
    ratios = sorted(ours / bare for bare, ours in speeds)
    return {
        "bare_per_second": round(statistics.median(bare for bare, _ in speeds)),
        "ours_per_second": round(statistics.median(ours for _, ours in speeds)),
        "least": round(ratios[0], 3),
        "median": round(statistics.median(ratios), 3),
        "greatest": round(ratios[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the messaging utilities with redis-py's bare calls.")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds of each (15)")
    parser.add_argument("--calls", type=int, default=1000, help="calls a round (1000)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 20 calls, to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.calls = 3, 20
    with server() as url, asyncio.Runner() as runner:
        rounds: dict[str, list[Callable[[int], float]]] = {
            name: [partial(calls_per_second, call) for call in pair] for name, pair in pairs(url).items()
        }
        for name, pair in runner.run(async_pairs(url)).items():
            rounds[name] = [in_loop(runner, call) for call in pair]
        results = {name: measure(pair, args.rounds, args.calls) for name, pair in rounds.items()}
        where = machine(connect(url))
    if args.json:
        print(json.dumps(results))
        return 0
    print(f"{args.rounds} rounds of {args.calls} calls; {where}\n")
    print(f"{'operation':42} {'bare/s':>8} {'ours/s':>8}   ratio: least median greatest")
    for name, result in results.items():
        row = f"{name:42} {result['bare_per_second']:8,} {result['ours_per_second']:8,}"
        enough = "" if result["median"] >= LEAST_RATIO else f"   below {LEAST_RATIO}"
        print(f"{row}          {result['least']:5.2f}  {result['median']:5.2f}    {result['greatest']:5.2f}{enough}")
    return 0


if __name__ == "__main__":
    run(main)
