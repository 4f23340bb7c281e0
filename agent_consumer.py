"""Take tasks from the queue and be an agent that thinks, uses tools, and reports every step live.

Usage:   python agent_consumer.py [--concurrency N] [--burst] [--llm-delay S] [--llm-fail-rate P] [--llm-rate 10/s]
         [--max-tokens N] [--approve TOOL]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server; email goes to $SMTP_URL, else to outbox/;
         the LLM is $LLM_MODEL at $LLM_URL, with the key $LLM_API_KEY, else the stub
Keys:    BRPOPs task_queue, XADDs to task_logs:<id>
See:     tutorial/part4.md

Here are the options and the wiring: agent.py is the loop, mock_llm.py or openai_llm.py the LLM, agent_tools/ the tools.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from agent import LLM, Agent
from agent_tools import make_tools
from ailf.messaging.redis import AsyncRedisRateLimiter
from mock_llm import MockLLM
from task_streams import run_worker
from task_streams.cli import add_worker_arguments, number, run, worker_options
from task_streams.keys import LLM_RATE

HERE = Path(__file__).resolve().parent


def rate(text: str) -> tuple[int, float]:
    """Return calls and seconds. rate("10/s") -> (10, 1.0); rate("100/m") -> (100, 60.0); rate("1/0.5s") -> (1, 0.5)"""
    match = re.fullmatch(r"([0-9]+)/([0-9]+(?:\.[0-9]+)?)?(s|m|h)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not a rate; expected one like 10/s, 100/m or 1/5s")
    calls, seconds = int(match[1]), float(match[2] or 1) * {"s": 1, "m": 60, "h": 3600}[match[3]]
    if not calls or not seconds:
        raise argparse.ArgumentTypeError(f"{text} would allow nothing")
    return calls, seconds


def directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return Path(text)


def make_llm(delay_seconds: float, fail_rate: float) -> LLM:
    """Return the model that the environment names, else the stub. Exits with one line if something is missing."""
    url, model, key = (os.environ.get(name, "").strip() for name in ("LLM_URL", "LLM_MODEL", "LLM_API_KEY"))
    if not url:
        return MockLLM(delay_seconds, fail_rate)
    try:
        is_url = url.startswith(("http://", "https://")) and bool(urlsplit(url).hostname)
    except ValueError:  # as for http://[
        is_url = False
    if not is_url or not model:
        raise SystemExit(
            "LLM_URL must be like http://localhost:11434/v1, and LLM_MODEL name a model: see docs/agents.md"
        )
    if not (key.isascii() and key.isprintable()):
        raise SystemExit("LLM_API_KEY must be printable ASCII")  # the error of a bad header would show the key
    try:
        from openai_llm import OpenAILLM  # late: only users with a model of their own need it
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise SystemExit(f"LLM_URL needs a package: {sys.executable} -m pip install 'openai>=3.57,<4'") from None
    return OpenAILLM(url, model, key)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Work on tasks as an agent, and report each step live.")
    add_worker_arguments(parser)
    add = parser.add_argument
    add("--llm-delay", type=number(0, 60), default=0.5, metavar="S", help="seconds that the stub takes to reply (0.5)")
    add("--llm-fail-rate", type=number(0, 1), default=0.0, metavar="P", help="share of the stub's calls that fail (0)")
    add("--llm-rate", type=rate, metavar="R", help="calls to the LLM by all workers together: 10/s, 100/m (no limit)")
    add(
        "--max-tokens",
        type=number(1, kind=int),
        metavar="N",
        help="tokens that the LLM may use for one task (no limit)",
    )
    add(
        "--approve",
        action="append",
        default=[],
        metavar="TOOL",
        help="ask a person before each call of this tool, as email_sender.send; may be given several times",
    )
    add("--data-root", type=directory, default=HERE, metavar="DIR", help="the only folder that tools read from")
    add("--outbox", type=Path, default=HERE / "outbox", metavar="DIR", help="where email goes without SMTP_URL")
    args = parser.parse_args(argv)

    llm = make_llm(args.llm_delay, args.llm_fail_rate)
    tools = make_tools(args.data_root, args.outbox, os.environ.get("SMTP_URL"))
    if unknown := set(args.approve) - tools.keys():
        parser.error(f"--approve {min(unknown)}: there is no such tool; there are {', '.join(tools)}")
    limiter = None
    if args.llm_rate:  # counted in Redis, so that all workers together stay below the LLM provider's limit
        calls, seconds = args.llm_rate
        limiter = AsyncRedisRateLimiter(f"{LLM_RATE}:{seconds:g}s", calls, seconds)  # a count for each length of window
    # LPUSH by producer.py; here BRPOP, claim, Agent(task, log) with its XADDs, then `completed`, `failed` or a retry.
    return run_worker(Agent(llm, tools, limiter, args.max_tokens, frozenset(args.approve)), **worker_options(args))


if __name__ == "__main__":
    raise SystemExit(run(main))
