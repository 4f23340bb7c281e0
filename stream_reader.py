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
import logging
import math
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from ailf.messaging.redis import REDIS_ERRORS, Client, blocking_client, decode, encode, is_transient
from task_streams import Event, LogReader, TaskQueue, keys
from task_streams.cli import printable, run
from task_streams.reader import BLOCK_SECONDS, PAGE, Cursor, Read, check_cursor, follow

COMPLETED, FAILED, CANCELLED, NOT_ENDED, NO_SUCH_TASK = range(5)
EXIT_CODES = {"completed": COMPLETED, "failed": FAILED, "cancelled": CANCELLED}
OVERLAP_MS = 1_000  # by which two looks for new tasks overlap, with --all
LONGEST_LINE_CHARS = 200  # of an event's text on a terminal; --json shows all of it
ID_CHARS = 20  # of an id beside which everything else fits into 80 columns; a longer one is folded (on the bar: cut)
BAR_CHARS = 20

STYLES = {
    "started": "bold cyan",
    "processing": "cyan",
    "chain_of_thought": "magenta",
    "llm_delta": "dim",
    "llm_response": "blue",
    "tool_usage": "yellow",
    "progress": "green",
    "rate_limited": "dim yellow",
    "error": "red",
    "worker_lost": "bold red",
    "completed": "bold green",
    "failed": "bold red",
    "cancelled": "bold yellow",
    "gap": "reverse",
    "reset": "reverse",
}


# -- events: where they come from -------------------------------------------------------------------------------


def read(task_id: str, since: str, queue: TaskQueue) -> Iterator[Event]:
    """Yield the events stored after an entry id, with each `gap` and `reset`."""
    log, cursor = LogReader(task_id, queue.redis), Cursor(since)
    while True:
        events = log.read(cursor.id)
        yield from cursor.take(events)
        if not events:
            last = log.last()  # None: nothing was written, or it has expired
            reset = last and cursor.check_end(last.id)
            if reset is None:
                return
            yield reset


def reader(redis: Client) -> Read:
    """Return what follow() asks for more: XREAD of all streams at once, each from its cursor on."""

    def read(streams: dict[str, str], block_ms: int) -> Any:
        return redis.xread(streams, count=PAGE, block=block_ms)

    return read


def events_of(args: argparse.Namespace, queue: TaskQueue) -> Iterator[tuple[str, Event | None]]:
    """Yield (task id, event); ("", None) at least once a second while nothing happens."""
    if args.no_follow:
        for task_id in args.ids:
            for event in read(task_id, args.since, queue):
                yield task_id, event
    elif args.all:
        yield from events_of_all(args, queue)
    else:
        cursors = dict.fromkeys(args.ids, args.since)
        redis = blocking_client(queue.redis, BLOCK_SECONDS)
        yield from follow(cursors, redis, args.timeout, reader(redis))


def events_of_all(args: argparse.Namespace, queue: TaskQueue) -> Iterator[tuple[str, Event | None]]:
    """Follow every task that is unfinished or put from now on; new ones join once a second."""
    deadline = math.inf if args.timeout is None else time.monotonic() + args.timeout
    known: set[str] = set(queue.redis.zrange(keys.RECENT, 0, -1)) - set(queue.redis.zrange(keys.UNFINISHED, 0, -1))
    put_at = 0.0  # of the newest task that was found (ms)
    cursors: dict[str, str] = {}

    def look_for_new() -> float:
        nonlocal known, put_at
        try:
            found = queue.redis.zrange(keys.RECENT, put_at - OVERLAP_MS, "+inf", byscore=True, withscores=True)
        except REDIS_ERRORS as error:
            if not is_transient(error):
                raise
            return time.monotonic() + BLOCK_SECONDS  # follow() reports it if it follows anything
        cursors.update({task_id: args.since for task_id, _ in found if task_id not in known})  # follow() takes them up
        if found:  # from now on only what was put since then, and shortly before, is asked for and need be known
            known, put_at = {task_id for task_id, _ in found}, found[-1][1]
        return time.monotonic() + BLOCK_SECONDS

    blocking = blocking_client(queue.redis, BLOCK_SECONDS)
    while time.monotonic() < deadline:
        look_again_at = look_for_new()
        for task_id, event in follow(cursors, blocking, read=reader(blocking)):
            yield task_id, event
            if time.monotonic() >= min(look_again_at, deadline):
                look_again_at = look_for_new()
            if time.monotonic() >= deadline:
                break
        else:
            time.sleep(BLOCK_SECONDS)  # no task is unfinished; new ones announce themselves nowhere
            yield "", None
    raise TimeoutError


# -- printing ---------------------------------------------------------------------------------------------------


def text_of(event: Event, before: Event | None) -> str:
    """Return what an event says, as one line for a person, and not again what the task's event `before` it said."""
    values = {name: value for name, value in event.fields.items() if name != "timestamp"}  # which begins the line
    shown = {name: encode(value) for name, value in values.items()}
    match event.name, shown:
        case "gap", {"missed": missed}:  # somebody's own entry of that name may have none
            return f"{missed} event(s) missed: the stream was trimmed"
        case "reset", _:
            return "that entry is not in the stream, which may have been rewritten; reading it from its start"
        case "started", {"worker": worker}:
            return worker if (n := event.fields.get("attempt")) in (None, 0, 1) else f"attempt {n}  {worker}"
        case "error", {"error": error, "error_type": error_type}:
            return f"{error_type}: {error}" + ("  (to be tried again)" if values.get("will_retry") else "")
        case "failed", {"error": error, "attempts": attempts}:
            said = before is not None and before.name == "error" and before.fields.get("error") == values["error"]
            return f"after {attempts} attempt(s)" + ("" if said else f": {error}")
        case "progress", {"percent": percent}:
            return f"{percent:>3} %  {shown.get('step', '')}"
        case "rate_limited", {"limit": limit, "wait_ms": wait_ms}:
            return f"waits, {wait_ms} ms at least: no more than {limit}"
        case "tool_usage", {"tool": tool, "action": action, "status": status}:
            duration = f" in {shown['duration_ms']} ms" if "duration_ms" in shown else ""
            return f"{tool}.{action} {status}{duration}  {shown.get('result', shown.get('arguments', ''))}"
        case "chain_of_thought", {"step": step}:
            return f"{step}: {shown.get('thought', shown.get('prompt', ''))}"
        case "llm_response", {"model": model, "response": response}:
            return f"{model}: {decode(response)}"
        case "completed", {"result": result, "duration_ms": duration_ms}:
            summary = values["result"].get("summary") if isinstance(values["result"], dict) else None
            return f"in {duration_ms} ms  {summary or result}"
    return next(iter(shown.values())) if len(shown) == 1 else "  ".join(f"{n}={text}" for n, text in shown.items())


class PlainPrinter:
    """One line an event, for pipes: JSON, or time, task, event and text, without the LLM's words one by one."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, task_id: str, event: Event, before: Event | None) -> None:
        if self.as_json:
            # ASCII only, so that any text, a lone surrogate too, goes through any pipe
            print(json.dumps({"task": task_id, **event.as_dict()}), flush=True)
        elif event.name != "llm_delta":
            line = f"{event.fields.get('timestamp', '-')} {task_id} {event.name} {text_of(event, before)}"
            print(printable(line), flush=True)

    def waiting(self, task_id: str, ahead: int | None) -> None:
        """A pipe is not told what changes all the time."""

    def close(self) -> None:
        """Nothing to put back."""


class TerminalPrinter:
    """Colour by event, words as they stream, and a progress bar a task at the bottom."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        # subtle: without markup=False a task's "[/b]" would be an error, and its "[b]" would be obeyed
        name, rest = Column(max_width=5 + ID_CHARS, no_wrap=True), Column(ratio=1, no_wrap=True)
        columns = (
            TextColumn("task {task.fields[id]}", markup=False, table_column=name),
            BarColumn(BAR_CHARS),
            TextColumn("{task.description}", markup=False, table_column=rest),
            TimeElapsedColumn(Column(no_wrap=True)),
        )
        self.progress = Progress(*columns, console=self.console, expand=True)
        self.bars: dict[str, Any] = {}
        self.words: dict[str, str] = {}  # the LLM's words so far, on the bar until its response is complete
        ours = sys.stderr.isatty()  # then what is logged stands above the bars; a file gets it as ever
        self.live = Live(
            self.progress, console=self.console, refresh_per_second=10, transient=True, redirect_stderr=ours
        )
        self.live.start()
        log_to_stderr()

    def show(self, task_id: str, event: Event, before: Event | None) -> None:
        bar = self._bar(task_id)
        if event.name == "llm_delta":
            self.words[task_id] = self.words.get(task_id, "") + str(event.fields.get("text", ""))
            room = self.console.width - BAR_CHARS - min(max(map(len, self.bars)), ID_CHARS) - len("task     0:00:00")
            self.progress.update(bar, description=printable(self.words[task_id])[-max(room, 10) :])
            return
        words = self.words.pop(task_id, "")
        percent = {"started": 0, "progress": event.fields.get("percent")}.get(event.name)  # a new attempt starts at 0
        if isinstance(percent, int | float):
            self.progress.update(bar, total=100 if event.name == "progress" else None, completed=percent)
        self.progress.update(bar, description=event.name.replace("_", " "))
        if event.is_terminal:
            self.progress.remove_task(self.bars.pop(task_id))
        if event.name != "llm_response" or words != event.fields.get("response"):  # else its words were on the bar
            self.console.print(self._row(task_id, event, before))

    def waiting(self, task_id: str, ahead: int | None) -> None:
        place = "next in the queue" if ahead == 0 else f"{ahead} ahead in the queue"
        self.progress.update(self._bar(task_id), description="waiting" if ahead is None else place)

    def close(self) -> None:
        self.live.stop()
        log_to_stderr()

    def _bar(self, task_id: str) -> Any:
        if task_id not in self.bars:
            self.bars[task_id] = self.progress.add_task("", total=None, id=task_id)
        return self.bars[task_id]

    def _row(self, task_id: str, event: Event, before: Event | None) -> Table:
        style = STYLES.get(event.name, "")
        text = printable(text_of(event, before))
        if len(text) > LONGEST_LINE_CHARS:
            text = f"{text[:LONGEST_LINE_CHARS]} … ({len(text):,} characters; --json shows all)"
        row = Table.grid(padding=(0, 2, 0, 0))
        for width in (8, min(max(3, len(task_id)), ID_CHARS), 16, None):
            row.add_column(width=width, overflow="fold")
        try:
            clock = f"{datetime.fromisoformat(str(event.fields.get('timestamp'))).astimezone():%H:%M:%S}"
        except ValueError:  # somebody's own entry
            clock = ""
        row.add_row(
            Text(clock, "dim"),
            Text(task_id, "bold"),
            Text(event.name, style),
            Text(text, style if event.is_terminal or event.name == "error" else ""),
        )
        return row


def log_to_stderr() -> None:
    """Let the log follow sys.stderr, which Live replaces: lines written past it would run into the bars."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)


# -- the whole --------------------------------------------------------------------------------------------------


def is_known(task_id: str, queue: TaskQueue) -> bool:
    known = queue.redis.exists(keys.record(task_id)) or queue.redis.exists(keys.stream(task_id))
    return bool(known) or queue.is_listed(task_id)


def place(task_id: str, queue: TaskQueue) -> int | None:
    """Return how many tasks are before this one; None if that is not known, for example while Redis is away."""
    try:
        return None
    except REDIS_ERRORS as error:
        if not is_transient(error):
            raise
        return None


def watch(args: argparse.Namespace, queue: TaskQueue) -> int:
    """Show the events; return the worst outcome of the tasks as an exit code."""
    printer = TerminalPrinter() if sys.stdout.isatty() and not args.json else PlainPrinter(args.json)
    latest: dict[str, Event] = {}  # each task's
    try:
        for task_id, event in events_of(args, queue):
            if event is None:
                for silent_id in [task_id for task_id in args.ids if task_id not in latest]:
                    printer.waiting(silent_id, place(silent_id, queue))
                continue
            printer.show(task_id, event, latest.get(task_id))
            latest[task_id] = event
            if args.all and event.is_terminal:
                del latest[task_id]
    finally:
        printer.close()
    outcomes = {task_id: event.name for task_id, event in latest.items() if event.is_terminal}
    for task_id in [task_id for task_id in args.ids if task_id not in outcomes]:
        last, record = LogReader(task_id, queue.redis).last(), queue.get(task_id) or {"status": "waiting"}
        outcomes[task_id] = last.name if last is not None and last.is_terminal else record["status"]
        if outcomes[task_id] not in keys.TERMINAL:
            print(f"stream_reader.py: task {task_id} has not ended: {outcomes[task_id]}", file=sys.stderr)
        elif last is None:
            print(f"task {task_id}: {outcomes[task_id]}; its stream has expired", file=sys.stderr)
    return max((EXIT_CODES.get(outcome, NOT_ENDED) for outcome in outcomes.values()), default=COMPLETED)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stream_reader.py",
        description="Watch what happens in tasks, live: replay their streams, then follow them to the end.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="tasks to watch")
    parser.add_argument("--all", action="store_true", help="watch every unfinished and new task, until Ctrl-C")
    parser.add_argument("--since", default="0", metavar="ENTRY_ID", help="only events after this entry id; $ is now")
    parser.add_argument("--no-follow", action="store_true", help="show what there is, and exit")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--timeout", type=positive, metavar="S", help="give up after S seconds (exit code 3)")
    args = parser.parse_args(argv)
    if bool(args.ids) == args.all:
        parser.error("name the tasks to watch, or --all" if args.all is False else "--all needs no ids")
    if args.all and args.no_follow:
        parser.error("--all follows: it does not take --no-follow")
    if args.since == "$" and args.no_follow:
        parser.error("--since $ waits for new events: not with --no-follow")
    try:
        check_cursor(args.since)
    except ValueError as error:
        parser.error(f"--since: {error}")
    args.ids = list(dict.fromkeys(args.ids))
    return args


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    queue = TaskQueue()
    try:
        unknown = [task_id for task_id in args.ids if not is_known(task_id, queue)]
        args.ids = [task_id for task_id in args.ids if task_id not in unknown]
        code = watch(args, queue) if args.ids or args.all else NO_SUCH_TASK
    except TimeoutError:
        print(f"stream_reader.py: not ended within {args.timeout:g} s", file=sys.stderr)
        code = NOT_ENDED
    finally:
        queue.close()
    for task_id in unknown:
        print(f"stream_reader.py: no task {task_id}: it was never put, or it finished long ago", file=sys.stderr)
    return NO_SUCH_TASK if unknown else code


if __name__ == "__main__":
    raise SystemExit(run(main))
