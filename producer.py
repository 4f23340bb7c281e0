"""Put tasks on the queue, and print their ids.

Usage:   python producer.py                                   the tutorial's two tasks
         python producer.py summarise sample_data/sales.csv
         python producer.py send-email --to ann@example.org --subject Hello --body "It works."
         python producer.py --type process_data --payload '{"file": "sample_data/sales.csv"}'
         python producer.py --count 3 summarise sample_data/sales.csv
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    INCRs task_id_counter, LPUSHes task_queue
See:     tutorial/part3.md; to cancel, requeue or import tasks: python -m task_streams --help
"""

import argparse
import sys
from typing import Any

from task_streams import TaskQueue
from task_streams.cli import number, parse_json, print_ids, put_all, run

TUTORIAL_TASKS = [
    {"type": "process_data", "payload": {"file": "sample_data/sales.csv"}},
    {"type": "send_email", "payload": {"to": "you@example.org", "subject": "Your report", "body": "It is ready."}},
]


def parse_arguments() -> argparse.Namespace:
    description, _, epilog = str(__doc__).partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=layout)
    parser.add_argument("--type", metavar="T", help="put a task of this type")
    parser.add_argument("--payload", metavar="JSON", help="its payload (default {})")
    parser.add_argument("--id", help="an id of your own: putting it twice queues it once")
    parser.add_argument("--delay", type=float, default=0, metavar="SECONDS", help="how long it waits before it may run")
    parser.add_argument("--count", type=number(1, kind=int), default=1, metavar="N", help="put each task N times (1)")
    commands = parser.add_subparsers(dest="command", metavar="summarise | send-email")
    summarise = commands.add_parser("summarise", help="have an agent look at data files")
    summarise.add_argument("files", nargs="+", metavar="FILE", help="CSV, TSV, JSON, JSON Lines or text; gzip too")
    email = commands.add_parser("send-email", help="have an agent send a message")
    for name in ("--to", "--subject", "--body"):
        email.add_argument(name, required=True)
    args = parser.parse_args()
    if args.command and args.type is not None:
        parser.error("choose a command or --type, not both")
    if args.type is None and (args.payload, args.id) != (None, None):
        parser.error("--payload and --id go with --type")
    if args.id is not None and args.count > 1:
        parser.error("--id cannot be combined with --count")
    return args


def tasks_from(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the tasks that the arguments ask for. Raises ValueError if --payload is not JSON."""
    if args.command == "summarise":
        return [{"type": "process_data", "payload": {"file": file}} for file in args.files]
    if args.command == "send-email":
        return [{"type": "send_email", "payload": {"to": args.to, "subject": args.subject, "body": args.body}}]
    if args.type is None:
        return TUTORIAL_TASKS
    return [{"type": args.type, "payload": {} if args.payload is None else parse_json(args.payload)}]


def main() -> int:
    args = parse_arguments()
    try:
        tasks, queue = tasks_from(args) * args.count, TaskQueue()
        if args.id is None:
            print_ids(put_all(queue, tasks, args.delay))
            return 0
        task = queue.put(tasks[0], args.id, args.delay)
    except ValueError as error:
        print(f"producer.py: {error}", file=sys.stderr)
        return 1
    if not task.is_new:
        print(f"producer.py: there is a task {task.id} already; nothing was queued", file=sys.stderr)
    print_ids([task])
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
