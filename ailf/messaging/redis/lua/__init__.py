"""The server-side scripts, one `.lua` file each: what must happen as a whole happens in one of them."""

from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def load(client: Any, name: str, folder: Path = HERE) -> Any:
    """Return redis-py's Script for <folder>/<name>.lua, to be called with keys= and args=; awaited with redis.asyncio.

    It is sent by its hash, and loaded where the server does not know it, as after a restart.
    """
    return client.register_script(_source(folder / f"{name}.lua"))


@cache
def _source(path: Path) -> str:
    return path.read_text()
