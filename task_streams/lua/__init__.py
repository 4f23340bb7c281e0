"""The server-side scripts, one `.lua` file each: what must happen as a whole happens in one of them."""

from pathlib import Path
from typing import Any

from ailf.messaging.redis import Client, lua

HERE = Path(__file__).parent


def load(client: Client, name: str) -> Any:
    """Return the script lua/<name>.lua, to be called with keys= and args=; sent by its hash, loaded when missing."""
    return lua.load(client, name, HERE)
