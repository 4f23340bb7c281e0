"""The process in which a data tool does its work: what it may use is limited before it looks at the file.

Usage:   DataProcessor in data.py starts it, writes one JSON object to its stdin and reads one from its stdout.

A query is written by an LLM, and a file comes from anywhere. DuckDB's memory limit does not count everything (a
`repeat('x', 2000000000)` takes 4 GB), and not every function can be interrupted. A process can be limited, and killed.
"""

import json
import math
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb

from .base import Result, ToolError, ToolProblem, label, require_text
from .table import Table, explained, identifier, open_table

RESERVED_BYTES = 1024**3  # DuckDB reserves far more than it touches; data.py watches what it really takes
COPY_BYTES = 8 * 1024**3  # of a file's copy on disk: a small gzip file may hold terabytes
COLUMNS_SHOWN = 50
ROWS_SHOWN = 100
CELL_CHARS = 200
MANY_VALUES = 100  # distinct values in a column; up to here they are counted exactly

NUMBER = """{{'count': count({0}), 'missing': count(*) - count({0}), 'min': min({0}), 'max': max({0}),
    'mean': avg({0}), 'stdev': coalesce(stddev_samp({0}), 0), 'sum': coalesce(sum({0}), 0)}}"""
TEXT = """{{'count': count({0}), 'missing': count(*) - count({0}), 'distinct': approx_count_distinct({0}),
    'top': approx_top_k(left({0}, 200), 101)}}"""
WORDS = r"SELECT count(*), sum(len(regexp_extract_all(line, '[\pL\pM\pN_]+'))), sum(length(line)) FROM data"
WHOLE = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")  # and unsigned: shown as they are


def load_file(root: Path, file: str) -> Result:
    with open_table(root, file) as table:
        names = list(table.columns)[:COLUMNS_SHOWN]
        found = {"format": table.format, "encoding": table.encoding, "compressed": table.compressed}
        found |= {"bytes": table.size_bytes, "rows": table.rows, "columns": names, "warnings": table.warnings}
        return {"file": file, **found} | left_out("columns", len(table.columns) - COLUMNS_SHOWN)


def describe(root: Path, file: str) -> Result:
    with open_table(root, file) as table:
        if table.format == "text":
            lines, words, characters = table.connection.execute(WORDS).fetchone() or (0, 0, 0)
            columns, figures = {}, {"lines": lines, "words": words, "characters": characters}
        else:
            columns, figures = described(table), {"rows": table.rows}
        found = {**figures, "columns": columns, "warnings": table.warnings}
        return found | left_out("columns", len(table.columns) - COLUMNS_SHOWN)


def described(table: Table) -> dict[str, Any]:
    """Return each column's figures. One SELECT, because SUMMARIZE has no sum, and "missing" only in per cent."""
    shown = dict(list(table.columns.items())[:COLUMNS_SHOWN])
    figures = [(NUMBER if kind == "number" else TEXT).format(identifier(name)) for name, kind in shown.items()]
    row = table.connection.execute(f"SELECT {', '.join(figures)} FROM data").fetchone() or ()
    columns = {}
    for (name, kind), found in zip(shown.items(), row, strict=True):
        if kind == "text":
            common = found["top"] or []
            if len(common) <= MANY_VALUES:
                found["distinct"] = len(common)
            found["top"] = [label(value) for value in common[:3]]
        columns[name] = {"type": kind, **{key: plain(value) for key, value in found.items()}}
    return columns


def query(root: Path, file: str, sql: str) -> Result:
    require_text(sql=sql)
    if not sql.isascii() and sql.encode(errors="replace").decode() != sql:
        raise ToolError("sql is not valid Unicode: it holds half a surrogate pair")
    with open_table(root, file) as table:
        try:
            statements = duckdb.extract_statements(sql)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                raise ToolError(f"sql = {sql:.200}; expected one SELECT statement, from the table data")
            inner = f"({without_end(statements[0].query)}\n)"
            columns = table.connection.execute(f"DESCRIBE SELECT * FROM {inner}").fetchall()
            shown = [shown_as(f"c{place}", kind) for place, (_, kind, *_) in enumerate(columns[:COLUMNS_SHOWN])]
            names = ", ".join(f"c{place}" for place in range(len(columns)))
            cursor = table.connection.execute(f"SELECT {', '.join(shown)} FROM {inner} AS result({names})")
            rows = cursor.fetchmany(ROWS_SHOWN)
            more = 0
            while chunk := cursor.fetchmany(ROWS_SHOWN):
                more += len(chunk)
        except (duckdb.Error, UnicodeDecodeError) as error:
            raise ToolError(explained(error)) from error
    result: Result = {"columns": [label(name) for name, *_ in columns[:COLUMNS_SHOWN]]}
    result["rows"] = [[plain(value) for value in row] for row in rows]
    return result | left_out("columns", len(columns) - COLUMNS_SHOWN) | left_out("rows", more)


def without_end(sql: str) -> str:
    """Return a statement without its semicolon and the comments after it. "SELECT 1; -- end" -> "SELECT 1" """
    raw = sql.encode()  # tokenize() counts bytes
    tokens = [start for start, kind in duckdb.tokenize(sql) if kind != duckdb.token_type.comment]
    return raw[: tokens[-1]].decode() if raw[tokens[-1] : tokens[-1] + 1] == b";" else sql


def shown_as(name: str, kind: str) -> str:
    """Return the SQL of a cell that is small and fits into JSON. "c0", "DATE" -> "left(c0::VARCHAR, 1000)" """
    if kind.removeprefix("U") in WHOLE:
        return name
    return f"{name}::DOUBLE" if kind.startswith(("FLOAT", "DOUBLE", "DECIMAL")) else f"left({name}::VARCHAR, 1000)"


def plain(value: Any) -> Any:
    """Return a value for JSON: numbers with 12 digits at most, whole ones without a point, short text."""
    if isinstance(value, float):
        rounded = float(f"{value:.12g}")
        if not math.isfinite(rounded):  # JSON has no infinity
            return None
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return label(value, CELL_CHARS) if isinstance(value, str) else value


def left_out(what: str, number: int) -> Result:
    return {f"{what}_left_out": number} if number > 0 else {}


ACTIONS: dict[str, Callable[..., Result]] = {"load_file": load_file, "describe": describe, "query": query}


def main() -> None:
    request = json.load(sys.stdin)
    with suppress(OSError, ValueError):  # macOS may not know this limit
        resource.setrlimit(resource.RLIMIT_DATA, (RESERVED_BYTES, RESERVED_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (COPY_BYTES, COPY_BYTES))
    seconds = math.ceil(request["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # in case the process that started this one is killed
    answer: Result
    try:
        answer = {"result": ACTIONS[request["action"]](Path(request["root"]), **request["arguments"])}
    except ToolProblem as problem:
        answer = {"error": str(problem)}
    except MemoryError:
        answer = {"error": "this takes too much memory; select fewer rows or columns"}
    json.dump(answer, sys.stdout)
