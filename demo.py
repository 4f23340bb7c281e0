"""See the whole system in one terminal: three tasks, an agent working on them, and their streams, live.

Usage:   python demo.py [--llm-delay S]     (make demo)
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server
Keys:    those of producer.py, agent_consumer.py and stream_reader.py, which it runs as processes
See:     README.md
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from task_streams import TaskQueue
from task_streams.cli import number, run

HERE = Path(__file__).resolve().parent
STOP_SECONDS = 15.0  # for the agent to finish what it does

COMMANDS = [
    ["summarise", "sample_data/sales.csv"],
    ["summarise", "sample_data/support_tickets.jsonl"],
    ["send-email", "--to", "you@example.org", "--subject", "Your report", "--body", "The sales report is ready."],
]


def say(text: str) -> None:
    print(f"\n$ {text}", flush=True)


def put(command: list[str]) -> str:
    """Run producer.py as typed, and return the id that it prints."""
    say("python producer.py " + subprocess.list2cmdline(command))
    done = subprocess.run([sys.executable, "producer.py", *command], cwd=HERE, text=True, stdout=subprocess.PIPE)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # producer.py has said why
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The whole system in one terminal: three tasks, an agent, live.")
    delay = "seconds the mocked LLM takes to reply (default 1)"
    parser.add_argument("--llm-delay", type=number(0, 60), default=1.0, metavar="S", help=delay)
    args = parser.parse_args(argv)

    # Starts the embedded server if there is no other, so that the processes share it.
    if owed := TaskQueue().owed():
        print(f"({owed} task(s) of earlier runs are not finished; the agent works on them too)")

    ids = [put(command) for command in COMMANDS]
    with tempfile.TemporaryFile("w+") as agent_log:
        say("python agent_consumer.py --concurrency 3 &")
        command = [sys.executable, *f"agent_consumer.py --concurrency 3 --grace 2 --llm-delay {args.llm_delay}".split()]
        # a session of its own: Ctrl-C here ends the reader first, then we end the agent
        agent = subprocess.Popen(command, cwd=HERE, stderr=agent_log, start_new_session=True)
        try:
            say("python stream_reader.py " + " ".join(ids))
            code = subprocess.run([sys.executable, "stream_reader.py", *ids], cwd=HERE).returncode
        finally:
            agent.terminate()
            try:
                agent.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                agent.kill()
        if code != 0:
            agent_log.seek(0)
            print(f"\nthe agent's log:\n{agent_log.read()}", file=sys.stderr)
            return code
    print("\nAll of it is in Redis. Look, for example, at (after: source .venv/bin/activate):")
    print(f"  redis-cli XRANGE task_logs:{ids[0]} - +")
    print(f"  python stream_reader.py {ids[0]} --json")
    print(f"  cat outbox/task-{ids[2]}-*.eml")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
