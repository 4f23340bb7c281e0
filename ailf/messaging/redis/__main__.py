"""Look at or stop the embedded server.

Usage:   python -m ailf.messaging.redis [status|stop]
"""

import sys

from . import embedded


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    command = " ".join(argv) or "status"
    if command not in ("status", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if command == "stop":
            print("embedded server stopped" if embedded.stop() else "no embedded server is running")
            return 0
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    port = embedded.running_port()
    print(f"embedded server at redis://{embedded.HOST}:{port}" if port else "no embedded server is running")
    return 0 if port else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
