"""The server-side scripts, one `.lua` file each. Whatever must happen as a whole happens in one of them."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Script(NamedTuple):
    source: str
    sha: str  # by which EVALSHA calls it


@cache
def load(name: str) -> Script:
    """Return the script lua/<name>.lua. A line `-- include NAME` in it stands for the functions in lua/NAME.lua."""
    source = (HERE / f"{name}.lua").read_text()
    source = re.sub(r"^-- include (\w+)$", lambda match: (HERE / f"{match[1]}.lua").read_text(), source, flags=re.M)
    return Script(source, hashlib.sha1(source.encode()).hexdigest())
