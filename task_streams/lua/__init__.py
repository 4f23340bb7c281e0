"""The server-side scripts, one `.lua` file each. Whatever must happen as a whole happens in one of them."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """A script, and the hash by which EVALSHA calls it."""

    source: str
    sha: str


@cache
def load(name: str) -> Script:
    """Return the script lua/<name>.lua. A line `-- include NAME` in it stands for the functions in lua/NAME.lua."""
    source = (HERE / f"{name}.lua").read_text()
    source = re.sub(r"^-- include (\w+)$", lambda match: (HERE / f"{match[1]}.lua").read_text(), source, flags=re.M)
    return Script(source, hashlib.sha1(source.encode()).hexdigest())
