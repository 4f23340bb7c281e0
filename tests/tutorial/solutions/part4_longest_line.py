"""A solution of part 4's exercise."""

from pathlib import Path

from agent_tools import DataProcessor, Result, Tools, lines_of, make_tools, open_source


class MyDataProcessor(DataProcessor):
    """The data tools, and one more."""

    def longest_line(self, file: str) -> Result:
        """Find the longest line of a text file: {"line": 3, "characters": 17}. Of equal ones, the first."""
        longest, characters = 0, -1
        with open_source(self.data_root, file) as source:
            for number, line in enumerate(lines_of(source), start=1):
                length = len(line.rstrip("\r\n"))
                if length > characters:
                    longest, characters = number, length
        return {"line": longest, "characters": characters}


def make_my_tools(data_root: Path, outbox: Path) -> Tools:
    """Return the project's tools and `data_processor.longest_line`."""
    mine = MyDataProcessor(data_root)
    return {**make_tools(data_root, outbox, None), "data_processor.longest_line": mine.longest_line}
