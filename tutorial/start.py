"""Begin a part of the tutorial: a clean embedded server, and what to type in which terminal.

Usage:   python tutorial/start.py 3     (`make part3` does this)
Keys:    none; what the embedded server held is moved to .redis/kept/, and it starts empty
See:     tutorial/part1.md
"""

import os
import re
import shlex
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ailf.messaging.redis import embedded

TUTORIAL = Path(__file__).resolve().parent
DATA = ["appendonlydir", "dump.rdb"]  # what a server leaves in its folder
COMMANDS = re.compile(r"(?:Terminal (\d)\b[^\n]*:\n+)?^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fresh_server() -> int:
    """Stop the embedded server, put its data aside, start it empty; return its port. No other Redis is touched."""
    embedded.stop()
    kept = embedded.DATA_DIR / "kept" / datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in DATA:
        if (embedded.DATA_DIR / name).exists():
            kept.mkdir(parents=True, exist_ok=True)
            (embedded.DATA_DIR / name).rename(kept / name)
    if kept.exists():
        print(f"what the server held is kept in .redis/kept/{kept.name}")
    port = embedded.PORT
    while embedded.answers_ping(port):  # a Redis that we did not start: leave it alone
        port += 1
    return embedded.find_or_start(port)[0]


def commands(page: str) -> dict[str, list[str]]:
    """Return the commands of a page's section "Run it", by terminal."""
    section = page.partition("\n## Run it\n")[2].partition("\n## Expected output\n")[0]
    found: dict[str, list[str]] = {}
    for terminal, block in COMMANDS.findall(section):
        found.setdefault(terminal or "1", []).extend(re.findall(r"^\$ (.*)", block, re.MULTILINE))
    return found


def main(argv: list[str]) -> int:
    pages = {path.stem.removeprefix("part"): path for path in sorted(TUTORIAL.glob("part*.md"))}
    if len(argv) != 1 or argv[0] not in pages:
        print(f"which part? One of {', '.join(pages)}, as in: make part1", file=sys.stderr)
        return 2
    try:
        port = fresh_server()
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    page = pages[argv[0]].read_text(encoding="utf-8")
    print(f"a clean server runs at redis://{embedded.HOST}:{port} (to stop it: make stop)")
    print(f"read tutorial/part{argv[0]}.md: {page.partition(chr(10))[0].removeprefix('# ')}")
    print("\nopen new terminals, and close those of other parts; in each, first:")
    print(f"    cd {shlex.quote(str(TUTORIAL.parent))}; source .venv/bin/activate")
    if port != embedded.PORT:
        print(f"    export REDIS_URL=redis://{embedded.HOST}:{port}; alias redis-cli='redis-cli -p {port}'")
    elif os.environ.get("REDIS_URL"):
        print("    unset REDIS_URL")
    for terminal, typed in sorted(commands(page).items()):
        print(f"\nterminal {terminal}:", *typed, sep="\n    ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
