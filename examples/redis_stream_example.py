"""A dispatcher adds documents to a stream; the workers of one group share them, and take over from one that dies.

Usage:   python examples/redis_stream_example.py --role worker --id anna     (terminals 1 and 2, another name in each)
         python examples/redis_stream_example.py --role dispatcher           (terminal 3)
         --once: add one document, or process what is there, then exit
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
See:     docs/source/guides/redis.md
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ailf.messaging.redis import RedisStream
from task_streams.cli import run

STREAM = "documents"
GROUP = "workers"
DOCUMENTS = 10
STALE_MS = 5_000  # a document whose worker gives no sign of life for so long goes to another one
SECONDS_PER_DOCUMENT = 0.5  # what the work takes; long enough to kill a worker in the middle and see what happens


def dispatcher(once: bool) -> int:
    """Add documents to the stream."""
    stream = RedisStream(STREAM)
    for number in range(1, 2 if once else DOCUMENTS + 1):
        entry_id = stream.add({"type": "document_processing", "number": number, "content": f"Document {number}"})
        print(f"added document {number} as {entry_id}")
    return 0


def worker(name: str, once: bool) -> int:
    """Process documents until Ctrl-C. After a kill, start it under the same name: it continues where it stopped."""
    stream = RedisStream(STREAM, stale_ms=STALE_MS)
    stream.create_consumer_group(GROUP, name)

    def process(task: dict[str, Any]) -> bool:
        print(f"{name}: document {task['number']} ...", flush=True)
        time.sleep(SECONDS_PER_DOCUMENT)
        print(f"{name}: document {task['number']} done", flush=True)
        return True  # acknowledge it

    print(f"{name}: waiting for documents; Ctrl-C to stop", flush=True)
    done = stream.process_messages(process, count=1, burst=once)
    print(f"{name}: stopped" + (f" after {done} document(s)" if once else ""))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A stream whose entries the workers of a group share.")
    parser.add_argument("--role", choices=["dispatcher", "worker"], required=True)
    parser.add_argument("--id", metavar="NAME", help="the worker's name in its group, its own in each terminal")
    parser.add_argument("--once", action="store_true", help="one document, or what is there, then exit")
    args = parser.parse_args()
    if args.role == "worker" and not args.id:
        parser.error("--role worker needs --id NAME")
    return dispatcher(args.once) if args.role == "dispatcher" else worker(args.id, args.once)


if __name__ == "__main__":
    raise SystemExit(run(main))
