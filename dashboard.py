"""Watch tasks live in the browser: a list of them, and each one's story as it happens.

Usage:   python dashboard.py [--host 127.0.0.1] [--port 8000] [--allow-host NAME]
Needs:   Redis at $REDIS_URL, else localhost:6379, else an embedded server; $DASHBOARD_TOKEN where --host is not local
Keys:    XREADs task_logs:<id>, one connection for all who watch; LPUSHes task_queue for the form
See:     tutorial/part5.md
"""

import argparse
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys

import uvicorn

from ailf.messaging.redis import connect, connect_async
from task_streams import TaskQueue
from task_streams.cli import run
from web.app import make_app

PATIENCE_SECONDS = 2.0  # how long a request waits for a Redis that is away
SHUTDOWN_SECONDS = 4  # for the watchers' streams to close; the rest is cut off


def is_local(host: str) -> bool:
    """Say whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of a host: "localhost" has two. Raises OSError."""
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(socket.create_server(address[:2], family=family))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            lacking = error  # a machine without IPv6 may know its own name there all the same
    if not sockets and lacking is not None:
        raise lacking
    return sockets


class Server(uvicorn.Server):
    """uvicorn's server; before it waits for connections to close, it ends the streams on them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for watcher in list(self.config.app.state.hub.all_watchers):  # type: ignore[union-attr]
            watcher.close()
        await super().shutdown(sockets)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Watch tasks live in the browser.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="another host name that browsers may use"
    )
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        parser.error(f"--port is a number from 1 to 65535, not {args.port}")
    token = os.environ.get("DASHBOARD_TOKEN", "").strip() or None
    if token is not None and not token.isprintable():  # nor is what is not UTF-8
        print("dashboard.py: DASHBOARD_TOKEN must be printable UTF-8", file=sys.stderr)
        return 1
    if not is_local(args.host) and token is None:
        print(f"dashboard.py: set DASHBOARD_TOKEN to listen on {args.host}: others could reach it", file=sys.stderr)
        return 1
    name = f"[{args.host}]" if ":" in args.host else args.host  # as a URL and a Host header have it
    hosts = frozenset(one.lower() for one in ("localhost", "127.0.0.1", "[::1]", name, *args.allow_host))
    try:
        sockets = listen(args.host, args.port)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        print(
            f"dashboard.py: cannot listen on {name}:{args.port} ({reason}). Choose another --host or --port.",
            file=sys.stderr,
        )
        return 1
    queue = TaskQueue(connect(), patience_seconds=PATIENCE_SECONDS)
    try:
        app = make_app(queue, connect_async, hosts, token)
        config = uvicorn.Config(
            app, args.host, args.port, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        print(f"http://{name}:{args.port}  (Ctrl-C stops it)", file=sys.stderr, flush=True)
        # subtle: after a clean end uvicorn raises the signal again, for whoever had a handler before
        signal.signal(signal.SIGTERM, lambda *_: None)
        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run(sockets)
    finally:
        queue.close()
        for one in sockets:
            one.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
