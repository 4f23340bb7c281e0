"""AG-UI's own client, from npm, against whose rules the tests check. It is installed once, outside the tree."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from conftest import lacking

CLIENT = "@ag-ui/client@1.0.0"


def client_folder() -> Path:
    """Return the folder that has the client, for tests/ag_ui_verify.mjs and tests/ag_ui_run.mjs."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            lacking(f"{program} (apt install nodejs npm)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agent-task-streams-tests"
    folder = cache / CLIENT.replace("/", "-")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            new = Path(temporary) / "new"
            options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--fetch-retries=1"]
            command = ["npm", "install", "--prefix", str(new), *options, CLIENT]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            if done.returncode:
                lacking(f"the npm registry, for {CLIENT}: {done.stderr.strip()[:200]}")
            with contextlib.suppress(OSError):  # another run was quicker
                new.rename(folder)
    return folder
