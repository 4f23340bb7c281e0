"""Imports point one way: scripts → task_streams → ailf.messaging.redis → redis."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OURS = SCRIPTS | {"task_streams", "ailf", "web", "agent_tools"}
ALLOWED_SCRIPTS = {
    "agent_consumer": {"agent", "mock_llm", "openai_llm"},
    "agent": {"conversation", "mock_llm"},
    "conversation": {"mock_llm"},
    "openai_llm": {"mock_llm"},
    "mock_server": {"mock_llm"},
    "mock_llm": {"mock_rules", "mock_server"},  # the latter only for --serve
}


def imports_of(path: Path) -> set[str]:
    """Return the top-level names of the project that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & OURS


def test_scripts_do_not_import_scripts() -> None:
    """Only the agent imports its LLM and its tools."""
    for name in SCRIPTS:
        assert imports_of(ROOT / f"{name}.py") & SCRIPTS <= ALLOWED_SCRIPTS.get(name, set()), name


def test_llm_and_tools_stand_alone() -> None:
    """mock_llm.py and agent_tools/ know nothing of Redis or of the rest of the project, but for --serve."""
    assert imports_of(ROOT / "mock_llm.py") == {"mock_rules", "mock_server"}
    assert imports_of(ROOT / "mock_rules.py") == set()
    for path in (ROOT / "agent_tools").glob("*.py"):
        assert imports_of(path) == set(), path


def test_helper_and_messaging_do_not_look_up() -> None:
    """task_streams imports ailf and no script; ailf imports nothing of the project."""
    for path in (ROOT / "task_streams").rglob("*.py"):
        assert imports_of(path) <= {"ailf", "task_streams"}, path
    for path in (ROOT / "ailf").rglob("*.py"):
        assert imports_of(path) <= {"ailf"}, path
