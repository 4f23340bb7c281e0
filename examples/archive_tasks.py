"""Append every finished task to a JSON Lines file, exactly once, however often this is killed.

Usage:   python examples/archive_tasks.py FILE [--once]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    reads {task_queue}:finished in a consumer group of the file's own (XREADGROUP, XACK), and the tasks' records
See:     docs/source/guides/redis.md

A consumer group delivers at least once. Exactly once comes from the file: each line holds the id of its entry, entries
come in order, and one process writes. So an entry that is not after the last line's entry is in the file already.
Only the last 10,000 finished tasks are kept in Redis: an archive that runs once a day must be enough for that.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from redis.exceptions import RedisError, ResponseError

from ailf.messaging.redis import RedisMessagingError, RedisStream, is_transient, reason_of, to_json
from task_streams import TaskQueue
from task_streams.cli import run
from task_streams.keys import FINISHED

BATCH = 100  # entries between two writes to the disk
LONGEST_LINE = 4_000_000  # bytes: a task's data and its result have a million each at most
BACK_OFF_SECONDS = 2.0  # between two tries while Redis is away
BLOCK_MS = 1_000  # so that Ctrl-C and SIGTERM are noticed within a second


logger = logging.getLogger("archive")


def order(entry_id: str) -> tuple[int, int]:
    """Return an entry id as numbers, to compare. order("1700000000000-7") -> (1700000000000, 7)"""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


class UsageError(Exception):
    """The file is not one of this program's."""


def last_entry(file: IO[bytes]) -> str:
    """Cut off a line that was not written to its end, and return the entry id of the last whole one; "0-0" if none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST_LINE))
    tail = file.read()
    end = tail.rfind(b"\n") + 1
    file.truncate(size - len(tail) + end)
    last = tail[:end].splitlines()[-1:]
    try:
        entry_id = str(json.loads(last[0])["entry"]) if last else "0-0"
        order(entry_id)
    except (ValueError, KeyError, TypeError):
        raise UsageError("this program did not write its last line: name another file") from None
    return entry_id


def describe(entry: dict[str, Any], queue: TaskQueue) -> dict[str, Any]:
    """Return the line for a finished task: what its entry says, and its record if that has not expired."""
    task_id = str(entry["data"]["id"])
    record = queue.get(task_id) or {}
    kept = ("data", "result", "attempts", "failures", "put_at", "finished_at")
    return {"entry": entry["id"], **entry["data"], **{name: record[name] for name in kept if name in record}}


def archive(file: IO[bytes], group: str, queue: TaskQueue, once: bool) -> int:
    """Write what has finished until a signal comes; return how many lines were written."""
    stream = RedisStream(FINISHED, queue.redis)
    last, written = last_entry(file), 0
    if last == "0-0":  # a new file gets them all, whatever was archived under its name before
        with contextlib.suppress(ResponseError):  # there is no such stream yet
            queue.redis.xgroup_destroy(FINISHED, group)
    pending = True  # first what was read and not acknowledged, by a process that was killed
    away = False
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: stopped.append(number))
    while not stopped:
        try:
            if pending:
                stream.create_consumer_group(group, "archive")
                batch = stream.read_group(BATCH, last_id="0")
            else:
                batch = stream.read_group(BATCH, block=None if once else BLOCK_MS)
            new = [entry for entry in batch if entry["data"] and order(entry["id"]) > order(last)]
            file.write("".join(to_json(describe(entry, queue)) + "\n" for entry in new).encode())
            file.flush()
            os.fsync(file.fileno())  # on the disk first: only then may Redis forget it
            last = new[-1]["id"] if new else last
            written += len(new)
            for entry in batch:
                stream.acknowledge(entry["id"])
            away = False
        except (RedisError, RedisMessagingError) as error:
            cause = error.__cause__ or error
            gone = reason_of(cause).startswith("NOGROUP")  # the server has lost its data: begin again
            if not gone and (once or not is_transient(error)):
                raise
            if not away:
                logger.warning("Redis does not serve (%s); waiting for it", reason_of(cause))
            away = pending = True
            time.sleep(BACK_OFF_SECONDS)
            continue
        if once and not batch and not pending:
            break
        pending = pending and bool(batch)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="Append every finished task to a JSON Lines file, exactly once.")
    parser.add_argument(
        "file", type=Path, help="a file and its consumer group belong together: a new one gets them all"
    )
    parser.add_argument("--once", action="store_true", help="archive what has finished by now, then exit")
    args = parser.parse_args()
    try:
        file = args.file.open("a+b")
    except OSError as error:
        print(f"archive_tasks.py: cannot write {args.file}: {error.strerror}", file=sys.stderr)
        return 1
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"archive_tasks.py: another process writes {args.file}", file=sys.stderr)
            return 1
        queue = TaskQueue()
        try:
            written = archive(file, f"archive:{args.file.resolve()}", queue, args.once)
        except (OSError, UsageError) as error:
            print(f"archive_tasks.py: cannot write {args.file}: {error}", file=sys.stderr)
            return 1
        finally:
            queue.close()
    print(f"{written} finished task(s) archived in {args.file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
