"""Two agents that talk over channels: one sends commands, the other carries them out and publishes the results.

Usage:   python examples/redis_pubsub_example.py --role subscriber    (terminal 1)
         python examples/redis_pubsub_example.py --role publisher     (terminal 2)
         --once: handle or send one command, then exit
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
See:     docs/source/guides/redis.md
"""

import argparse
import sys
from pathlib import Path
from queue import Empty, Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ailf.messaging.redis import RedisPubSub
from task_streams.cli import run

TEXTS = ["Streams keep what they are told.", "Channels forget at once.", "A lock has one holder."]
ANSWER_SECONDS = 5  # how long the publisher waits for a result


def subscriber(once: bool) -> int:
    """Carry out the commands of the channel agent-commands, until Ctrl-C."""
    with RedisPubSub() as pubsub:

        def handle_command(message: dict[str, Any]) -> None:
            if message["command"] == "analyze":
                words = len(message["data"].split())
                print(f"analyzing {message['data']!r}", flush=True)
                pubsub.publish("agent-results", {"data": message["data"], "words": words})
            if once:
                pubsub.stop()

        pubsub.subscribe("agent-commands", handle_command)
        print("waiting for commands on agent-commands; Ctrl-C to stop", flush=True)
        pubsub.run()  # blocking
    return 0


def publisher(once: bool) -> int:
    """Send commands, and print the result of each. Exit code 1 if nobody answers."""
    results: Queue[dict[str, Any]] = Queue()
    with RedisPubSub() as pubsub:
        pubsub.subscribe("agent-results", results.put)  # before the first command: a channel keeps nothing
        pubsub.run_in_thread()
        for text in TEXTS[:1] if once else TEXTS:
            receivers = pubsub.publish("agent-commands", {"command": "analyze", "data": text})
            if not receivers:
                print("nobody listens: start the subscriber first, in another terminal", file=sys.stderr)
                return 1
            try:
                while (result := results.get(timeout=ANSWER_SECONDS))["data"] != text:
                    pass  # of an earlier command: another subscriber has answered that one too
            except Empty:
                print(f"no result within {ANSWER_SECONDS} s", file=sys.stderr)
                return 1
            print(f"{result['data']!r} has {result['words']} words")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Agents that talk over channels.")
    parser.add_argument("--role", choices=["publisher", "subscriber"], required=True)
    parser.add_argument("--once", action="store_true", help="one command, then exit")
    args = parser.parse_args()
    return publisher(args.once) if args.role == "publisher" else subscriber(args.once)


if __name__ == "__main__":
    raise SystemExit(run(main))
