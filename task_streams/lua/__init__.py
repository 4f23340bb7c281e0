"""The server-side scripts, one `.lua` file each: what must happen as a whole happens in one of them."""

from functools import cache
from pathlib import Path

from redis.commands.core import Script

from ailf.messaging.redis import Client


def load(client: Client, name: str) -> Script:
    """Return the script lua/<name>.lua, to be called with keys= and args=; sent by its hash, loaded when missing."""
    script: Script = client.register_script(_source(name))
    return script


@cache  # each task's log loads a script
def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.lua").read_text()
