"""The agent as a worker that tests kill: its LLM and its tools write into a file what was really done.

Usage:   python tests/agent_program.py DONE [options of a worker]

Each call appends its step's key to the file DONE. $TASK_STREAMS_DIE_AFTER=N kills the process, as kill -9 does, right
after it has appended the Nth event.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from step_programs import count_events

from agent import Agent
from agent_tools import make_tools
from mock_llm import MockLLM
from task_streams import run_worker
from task_streams.cli import add_worker_arguments, run, worker_options
from task_streams.steps import Step


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("done")
    add_worker_arguments(parser)
    args = parser.parse_args()
    count_events()
    done = os.open(args.done, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ready = Step.ready

    def ready_and_noted(self: Step) -> Any:
        os.write(done, f"{self.key}\n".encode())
        return ready(self)

    Step.ready = ready_and_noted  # type: ignore[method-assign]
    root = Path(__file__).parents[1]
    return run_worker(Agent(MockLLM(), make_tools(root, Path(args.done).parent, None)), **worker_options(args))


if __name__ == "__main__":
    raise SystemExit(run(main))
