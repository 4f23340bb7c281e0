"""Agents for the tests to kill: their LLM and their tools write into a file what was really done.

Usage:   python tests/agent_program.py DIRECTORY

For n = 1, 2, 3 … it puts a task, and starts an attempt that dies, as by kill -9, right after it has appended its nth
event, until one comes to the end. It prints each task's id; what its attempt has done is in the file DIRECTORY/<id>.
Each attempt is a fork of this process: it dies as a whole, and need not start Python first.
"""

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import step_programs
from attempts import attempts, popped, run

from agent import Agent
from agent_tools import Tools, safe_to_repeat
from mock_llm import MockLLM, Piece
from task_streams import TaskQueue

TASK = {"type": "process_data", "payload": {"file": "shop.csv"}}
REVENUE = {"type": "number", "count": 40, "missing": 0, "sum": 400, "mean": 10, "min": 1, "max": 90, "stdev": 5}
REGION = {"type": "text", "count": 40, "distinct": 3}


def agent_of(path: Path) -> Agent:
    """Return an agent that appends a line to a file for each call of its LLM, and of its four tools."""

    def note(what: str) -> None:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{what}\n".encode())
        os.close(file)

    class NotingLLM(MockLLM):
        async def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncIterator[Piece]:
            note(f"llm {sum(message['role'] == 'assistant' for message in messages) + 1}")
            async for piece in super().chat(messages, tools):
                yield piece

    @safe_to_repeat
    def load_file(file: str) -> dict[str, Any]:
        """Pretend to load a file."""
        note("load_file")
        return {"rows": 40}

    @safe_to_repeat
    def describe(file: str) -> dict[str, Any]:
        """Pretend to describe a file."""
        note("describe")
        return {"rows": 40, "columns": {"region": REGION, "revenue": REVENUE}}

    @safe_to_repeat
    def query(file: str, sql: str) -> dict[str, Any]:
        """Pretend to query a file."""
        note("outliers" if "stddev" in sql else "groups")
        return {"columns": ["region", "sum"], "rows": [["north", 300]]}

    tools: Tools = {f"data_processor.{tool.__name__}": tool for tool in (load_file, describe, query)}
    return Agent(NotingLLM(), tools)


def attempt(queue: TaskQueue, directory: Path) -> None:
    """Take the next task, and work on it to its end, as a worker does."""
    url = os.environ["REDIS_URL"]

    async def to_the_end() -> None:
        async with attempts(url) as worker:
            task, log = await worker.claim(popped(queue.redis))
            result = await agent_of(directory / task.id)(task, log)
            await log.end("completed", result, result=result, duration_ms=0)

    run(to_the_end)


def main() -> int:
    directory, n, code = Path(sys.argv[1]), 0, -1
    while code != 0:
        n += 1
        queue = TaskQueue()
        print(queue.put(TASK).id, flush=True)
        pid = os.fork()
        if pid == 0:
            step_programs.DIE_AFTER = str(n)
            step_programs.count_events()
            attempt(TaskQueue(), directory)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, -signal.SIGKILL):
            return 1
        queue.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
