'''The agent's real tools: look at data files, send email. No Redis, no LLM: you can use and test them alone.

A tool is a method that takes JSON values and returns a small JSON object. It raises ToolError for wrong input (the same
call will fail again) and ToolUnavailable for trouble that may pass (the task is retried). To add one, write a method:

    class MyDataProcessor(DataProcessor):
        @safe_to_repeat
        def count_lines(self, file: str) -> Result:
            """Count the lines of a text file."""
            return {"lines": self.query(file, "SELECT count(*) FROM data")["rows"][0][0]}

and name it:  tools = make_tools(…) | {"data_processor.count_lines": MyDataProcessor(data_root).count_lines}

The LLM is told the name, the first line of the docstring and the parameters. Keyword-only parameters are the agent's
own: `check` raises when the task is cancelled, and `idempotency_key` is the same if the call is repeated. If nobody
knows whether a call has happened, a person is asked, unless the tool is marked @safe_to_repeat. A real LLM then uses
the tool by itself; the mock one needs a rule in mock_rules.py.
'''

from pathlib import Path

from .base import Result, ToolError, Tools, ToolUnavailable, safe_to_repeat
from .data import DataProcessor

__all__ = ["DataProcessor", "Result", "ToolError", "ToolUnavailable", "Tools", "make_tools", "safe_to_repeat"]


def make_tools(data_root: Path, outbox: Path, smtp_url: str | None) -> Tools:
    """Return the tools by the names that the LLM uses."""
    from .email import EmailSender  # not above: each call of a data tool imports this package, and TLS takes it long

    data, email = DataProcessor(data_root), EmailSender(outbox, smtp_url)
    return {
        "data_processor.load_file": data.load_file,
        "data_processor.describe": data.describe,
        "data_processor.query": data.query,
        # in the outbox, a file tells that an email was sent; over SMTP nobody can know
        "email_sender.send": email.send if smtp_url else safe_to_repeat(email.send),
    }
