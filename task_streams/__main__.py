"""`python -m task_streams`: see admin.py."""

from .admin import main
from .cli import run

if __name__ == "__main__":
    raise SystemExit(run(main))
