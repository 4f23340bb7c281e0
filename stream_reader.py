"""Watch what happens in tasks, live: replay their streams, then follow them to the end.

Usage:   python stream_reader.py ID…                 to the end
         python stream_reader.py --all               every unfinished and new task, until Ctrl-C
         python stream_reader.py ID --since 1700000000000-7 | --no-follow | --json | --timeout 60
Exits:   0 completed, 1 failed (or Redis cannot be reached), 2 cancelled, 3 not ended yet, 4 no such task
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    XREADs task_logs:<id>, one connection for all of them
See:     tutorial/part5.md
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from ailf.messaging.redis import Client, blocking_client, connect, encode
from task_streams import Event, LogReader, TaskQueue, keys
from task_streams.cli import answer_command, number, printable, run
from task_streams.reader import BLOCK_SECONDS, PAGE, check_cursor, follow

EXIT_CODES = {"completed": 0, "failed": 1, "cancelled": 2}
NOT_ENDED, NO_SUCH_TASK = 3, 4
OVERLAP_MS = 100  # of two looks for new tasks, with --all: after a failover the server's clock may be a little behind
LONGEST_LINE_CHARS = 200  # of an event's text on a terminal; --json shows all of it
ID_CHARS, BAR_CHARS = 16, 16  # on a terminal of 80 columns, this leaves 32 for the LLM's words

CALL = "{tool}.{action} {status}"

# Event -> its colour, then how it reads: the first text whose fields are all there, else name=value.
LOOKS = {
    "started": ("bold cyan", "{worker}, attempt {attempt}"),
    "processing": ("cyan", "{step}"),
    "chain_of_thought": ("magenta", "{step}: {thought}", "{step}: {prompt}"),
    "llm_call": ("dim blue", "{model}"),
    "llm_response": ("blue", "{model}: {response}"),
    "tool_usage": (
        *("yellow", CALL + " in {duration_ms} ms  {result}", CALL + " in {duration_ms} ms  {error}"),
        CALL + "  {arguments}",
    ),
    "progress": ("green", "{percent:>3} %  {step}"),
    "rate_limited": ("dim yellow", "waits, {wait_ms} ms at least: no more than {limit}"),
    "input_required": ("bold yellow", "{question}  ({choice})", "{question}"),
    "input_received": ("yellow", "{by}: {answer}", "{answer}"),
    "steered": ("yellow", "{by}: {text}", "{text}"),
    "error": ("red", "{error_type}: {error}  will_retry={will_retry}"),
    "worker_lost": ("bold red", "{worker}"),
    "resumed": ("cyan", "starting over: {reason}", "{steps} completed step(s) are taken from the log"),
    "in_doubt": ("bold red", "{step}: {reason}"),
    "completed": ("bold green", "in {duration_ms} ms  {summary}", "in {duration_ms} ms  {result}"),
    "failed": ("bold red", "after {attempts} attempt(s): {error}"),
    "cancelled": ("bold yellow", "{reason}"),
    "gap": ("reverse", "{missed} event(s) missed: the stream was trimmed"),
    "reset": ("reverse", "the stream was rewritten; reading it from its start"),
}


# -- events: where they come from -------------------------------------------------------------------------------


def events_of(args: argparse.Namespace, redis: Client) -> Iterator[tuple[str, Event]]:
    """Yield (task id, event) of the tasks to watch. follow() says what to read next, and survives a lost server."""
    cursors = dict.fromkeys(args.ids, args.since)  # task id -> the entry to continue after; follow() keeps it current
    known: dict[str, float] = {}
    if args.all:
        unfinished = redis.zrange(keys.UNFINISHED, 0, -1)
        cursors = dict.fromkeys(unfinished, args.since)
        known = dict.fromkeys(unfinished, 0.0) | dict(redis.zrange(keys.RECENT, 0, -1, withscores=True))
        cursors[""] = "$"  # subtle: no task has this id, so follow() goes on even if all others have ended

    def read(streams: dict[str, str], block_ms: int) -> Any:
        """Read from all streams at once, each after its cursor: {"task_logs:7": "1700000000000-7", …}"""
        if args.all and (new := new_tasks(redis, known)):
            cursors.update(dict.fromkeys(new, "0"))  # whatever --since says, their entries are later
            return []  # follow() comes back at once, with the new streams
        return redis.xread(streams, count=PAGE, block=None if args.no_follow else block_ms)

    for task_id, event in follow(cursors, redis, args.timeout, read):
        if event is not None:
            yield task_id, event
        elif args.no_follow:
            return  # there is nothing more to read


def new_tasks(redis: Client, known: dict[str, float]) -> list[str]:
    """Return the tasks that were put since the newest of `known` (task id -> when it was put), and make them known."""
    since_ms = max(known.values(), default=0.0) - OVERLAP_MS
    found = dict(redis.zrange(keys.RECENT, since_ms, "+inf", byscore=True, withscores=True))
    new = [task_id for task_id in found if task_id not in known]
    known.clear()  # older ones are not found again
    known.update(found)
    return new


# -- printing ---------------------------------------------------------------------------------------------------


def options_of(event: Event) -> list[str]:
    """Return the answers from which a question lets people choose; none if any text will do."""
    options = event.fields.get("options")
    return [str(one) for one in options] if isinstance(options, list) else []


def text_of(event: Event) -> str:
    """Return what an event says, as one line for a person."""
    values = {name: value for name, value in event.fields.items() if name != "timestamp"}
    if options := options_of(event):
        values["choice"] = " / ".join(options)
    if event.name == "input_received" and values.get("answer") is None:
        values["answer"] = "nobody answered in time"
    if not values.get("by"):
        values.pop("by", None)
    if event.name == "completed" and isinstance(values.get("result"), dict) and "summary" in values["result"]:
        values["summary"] = values["result"]["summary"]
    fields = {name: value if isinstance(value, str) else encode(value) for name, value in values.items()}
    for text in LOOKS.get(event.name, ("",))[1:]:
        with suppress(KeyError):
            return text.format_map(fields)
    return "  ".join(f"{name}={value}" for name, value in fields.items())


def print_plain(task_id: str, event: Event, as_json: bool) -> None:
    """Print one line, for pipes. The LLM's words one by one are only in JSON: llm_response has them together."""
    if as_json:  # in ASCII, so that any text, a lone surrogate too, goes through any pipe
        print(json.dumps({"task": task_id, **event.as_dict()}), flush=True)
    elif event.name != "llm_delta":
        line = f"{event.fields.get('timestamp', '-')} {task_id} {event.name} {text_of(event)}"
        print(printable(line), flush=True)


class Screen:
    """A terminal: a line for each event; below them, a bar for each task, with its progress and the LLM's words."""

    def __init__(self, task_ids: list[str]) -> None:
        self.console = Console(highlight=False)
        columns = (  # subtle: without markup=False a task's "[/b]" would be an error, and its "[b]" would be obeyed
            TextColumn("task {task.fields[id]}", markup=False),
            BarColumn(BAR_CHARS),
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            TimeElapsedColumn(),
        )
        ours = sys.stderr.isatty()  # then the log is drawn above the bars; a file gets it as usual
        self.progress = Progress(*columns, console=self.console, expand=True, transient=True, redirect_stderr=ours)
        self.words: dict[str, str] = {}  # of the LLM so far, until its response is complete
        self.bars: dict[str, TaskID] = {}
        for task_id in task_ids:
            self.bar(task_id)

    def bar(self, task_id: str) -> TaskID:
        if task_id not in self.bars:
            self.bars[task_id] = self.progress.add_task("waiting", total=None, id=task_id[:ID_CHARS])
        return self.bars[task_id]

    def show(self, task_id: str, event: Event) -> None:
        bar, words = self.bar(task_id), self.words.pop(task_id, "")
        if event.name == "llm_delta":
            words = self.words[task_id] = words + str(event.fields.get("text", ""))
            room = self.console.width - ID_CHARS - BAR_CHARS - len("task     0:00:00")
            self.progress.update(bar, description=printable(words)[-max(room, 10) :])
            return
        percent = event.fields.get("percent")
        if isinstance(percent, int | float):
            self.progress.update(bar, total=100, completed=percent)
        self.progress.update(bar, description=event.name.replace("_", " "))
        if event.is_terminal:
            self.progress.remove_task(self.bars.pop(task_id))
        if event.name == "llm_call":
            return  # its name is on the bar
        if event.name != "llm_response" or words != event.fields.get("response"):  # else its words were on the bar
            self.console.print(self.row(task_id, event))

    def row(self, task_id: str, event: Event) -> Table:
        style, text, clock = LOOKS.get(event.name, ("",))[0], printable(text_of(event)), ""
        if len(text) > LONGEST_LINE_CHARS and event.name != "input_required":  # people must see what they answer
            text = f"{text[:LONGEST_LINE_CHARS]} … ({len(text):,} characters; --json shows all)"
        with suppress(ValueError):  # somebody's own entry has no time
            clock = f"{datetime.fromisoformat(str(event.fields.get('timestamp'))).astimezone():%H:%M:%S}"
        table = Table.grid(padding=(0, 2, 0, 0))
        for width in (8, min(max(3, len(task_id)), ID_CHARS), 16, None):
            table.add_column(width=width, overflow="fold")
        table.add_row(Text(clock, "dim"), Text(task_id, "bold"), Text(event.name, style), Text(text))
        if event.name == "input_required":
            command = answer_command(task_id, options_of(event), event.fields.get("number"))
            table.add_row("", "", "", Text(printable(command), "dim"))
        return table


# -- the whole --------------------------------------------------------------------------------------------------


def status_of(task_id: str, queue: TaskQueue) -> str | None:
    """Return how a task ended, or its status if it has not; None if nothing is known of it."""
    last = LogReader(task_id, queue.redis).last()
    status: str | None = queue.redis.hget(keys.record(task_id), "status")
    if last is not None and last.is_terminal:
        return last.name
    if status is None and (last is not None or queue.is_listed(task_id)):
        return "waiting"  # pushed by hand, it has no record yet
    return status


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, epilog = str(__doc__).partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=layout)
    parser.add_argument("ids", nargs="*", metavar="ID", help="tasks to watch")
    parser.add_argument("--all", action="store_true", help="watch every unfinished and new task, until Ctrl-C")
    parser.add_argument("--since", default="0", metavar="ENTRY_ID", help="only events after this entry id; $ is now")
    parser.add_argument("--no-follow", action="store_true", help="show what there is, and exit")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--timeout", type=number(0.001), metavar="S", help="give up after S seconds (exit code 3)")
    args = parser.parse_args(argv)
    if bool(args.ids) == args.all:
        parser.error("--all needs no ids" if args.all else "name the tasks to watch, or say --all")
    if args.no_follow and (args.all or args.since == "$"):
        parser.error("--no-follow shows what there is: not with --all or --since $")
    try:
        check_cursor(args.since)
    except ValueError as error:
        parser.error(f"--since: {error}")
    args.ids = list(dict.fromkeys(args.ids))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    queue = TaskQueue(blocking_client(connect(), BLOCK_SECONDS))  # also for bytes that are not UTF-8, unlike connect()
    unknown = [task_id for task_id in args.ids if status_of(task_id, queue) is None]
    for task_id in unknown:
        print(f"stream_reader.py: no task {task_id}: it was never put, or it finished long ago", file=sys.stderr)
    args.ids = [task_id for task_id in args.ids if task_id not in unknown]

    screen = Screen(args.ids) if sys.stdout.isatty() and not args.json else None
    # subtle: the Live inside Progress, since Progress itself would end with an empty line if TERM=dumb
    with screen.progress.live if screen else nullcontext(), suppress(TimeoutError):
        for task_id, event in events_of(args, queue.redis):
            if screen:
                screen.show(task_id, event)
            else:
                print_plain(task_id, event, args.json)

    code = NOT_ENDED if args.all else 0
    for task_id in args.ids:
        status = status_of(task_id, queue)
        if status not in EXIT_CODES:
            print(f"stream_reader.py: task {task_id} has not ended: {status}", file=sys.stderr)
        elif not queue.redis.exists(keys.stream(task_id)):
            print(f"stream_reader.py: task {task_id}: {status}; its stream has expired", file=sys.stderr)
        code = max(code, EXIT_CODES.get(str(status), NOT_ENDED))
    return NO_SUCH_TASK if unknown else code


if __name__ == "__main__":
    raise SystemExit(run(main))
