"""Open a data file of any format and encoding as the table `data` of a DuckDB connection.

    with open_table(Path("sample_data"), "sales.csv") as table:
        table.connection.execute("SELECT region, sum(revenue) FROM data GROUP BY region").fetchall()

Python finds out how the file is written, and DuckDB reads it: the file itself if it is clean UTF-8, else a clean copy.
DuckDB may read that one file. It can't open another, write, or load anything.
"""

import csv
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TextIO

import duckdb

from .base import ToolError, label, require_text
from .formats import detect_delimiter, detect_encoding, detect_format, unique

SAMPLE_BYTES = 64 * 1024  # read to find out encoding, format and delimiter
SAMPLE_ROWS = 1_000  # read to find the columns that may be numbers
CHUNK_CHARS = 1024 * 1024
MAX_RECORD_BYTES = 3_000_000  # in a line, a CSV record, a JSON object
MAX_COLUMNS = 10_000
BATCH_COLUMNS = 500  # looked at in one pass: DuckDB keeps 2,048 rows of each, 32 KB
DUCKDB_MEMORY = "180MB"  # for DuckDB's tables and buffers; data.py limits the process as a whole

PADDING = "\x01\x02\x01"  # no cell holds this: so an empty cell is read as '', and one that isn't there as NULL
LINE_END = "\x1f"  # marks the end of each line of a text, because DuckDB skips empty lines
NUMBER = r"[+-]?(\d{1,15}(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?"  # exact in a float; "1,234", "$5" and "nan" stay text
NOT_JSON = "('nan', '-nan', 'inf', '-inf', 'infinity', '-infinity')"  # DuckDB accepts them
CSV_OPTIONS = (
    "auto_detect=false, strict_mode=false, parallel=false, null_padding=true, "
    f"nullstr='{PADDING}', max_line_size={MAX_RECORD_BYTES}"
)
JSON_OPTIONS = f"sample_size=-1, maximum_depth=1, map_inference_threshold=-1, maximum_object_size={MAX_RECORD_BYTES}"

Connection = duckdb.DuckDBPyConnection


@dataclass
class Table:
    """An opened data file, and what is known about it."""

    connection: Connection  # has the view `data`
    format: str
    encoding: str
    compressed: bool
    size_bytes: int
    rows: int
    columns: dict[str, str]  # name -> "number" or "text"
    warnings: list[str]


@contextmanager
def open_table(root: Path, file: str) -> Iterator[Table]:
    """Open a file below `root` as a table. Raises ToolError with one clear line if that is impossible."""
    path = checked_path(root, file)
    location = str(path)
    with ExitStack() as stack:
        try:
            # subtle: checked_path() has followed all links. If somebody has put a link or a FIFO in the file's place
            # since then, don't follow it, and don't wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            raw = stack.enter_context(os.fdopen(descriptor, "rb"))
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = stack.enter_context(gzip.GzipFile(fileobj=raw)) if compressed else raw
            sample = data.read(SAMPLE_BYTES)
            data.seek(0)
            if not sample:
                raise ToolError(f"{file} is empty; name a file with data in it")
            if len(sample) == SAMPLE_BYTES:  # end with a whole line, so that no character is cut
                sample = sample[: sample.rfind(b"\n") + 1] or sample
            encoding, guessed = detect_encoding(sample, file)
            head = sample.decode(encoding, errors="ignore")
            delimiter, is_table = detect_delimiter(head)
            form = detect_format(path, head, is_table)
            # newline="": line ends inside quotes stay as they are
            text = io.TextIOWrapper(data, encoding, "replace", newline=None if form == "text" else "")
            stack.enter_context(text)

            # subtle: this name leads to the file that was checked, even if the path leads elsewhere by now
            if Path(f"/proc/self/fd/{descriptor}").exists():
                location = f"/proc/self/fd/{descriptor}"
            is_clean = encoding == "utf-8" and form not in ("text", "object") and not compressed
            damaged = read_through(text, file, form) if is_clean else 0
            if damaged or not is_clean:
                copy = stack.enter_context(NamedTemporaryFile("w", encoding="utf-8", newline=""))
                location = copy.name
                text.seek(0)
                damaged = (rewrite_object if form == "object" else read_through)(text, file, form, copy)
                copy.flush()
            connection = stack.enter_context(connect(location))
            if form in ("csv", "tsv"):
                text.seek(0)
                cells = create_csv(connection, location, text, file, "\t" if form == "tsv" else delimiter)
            elif form == "text":
                cells = create_text(connection, location)
            else:
                cells = create_json(connection, location, "array" if form == "json" else "nd", file)
            rows, ragged, columns = create_data(connection, cells, form)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ToolError(f"{file} is damaged gzip ({error}); copy or compress it again") from error
        except csv.Error as error:
            raise ToolError(f"{file} is not CSV: {error}") from error
        except RecursionError:
            raise ToolError(f"{file}: the JSON is nested too deep; flatten it") from None
        except OSError as error:
            hint = "; check its permissions" if isinstance(error, PermissionError) else ""
            raise ToolError(f"cannot read {file}: {error.strerror or error}{hint}") from error
        except (duckdb.Error, UnicodeDecodeError) as error:
            raise ToolError(f"{file}: {explained(error)}".replace(location, file)) from error
        warnings = [f"the encoding {encoding} is a guess; save the file as UTF-8 to be sure"] if guessed else []
        if damaged:
            warnings.append(f"{damaged:,} character(s) are U+FFFD: not {encoding}, or damaged")
        if ragged:
            warnings.append(f"{ragged:,} row(s) have more or fewer cells than there are columns")
        size_bytes, form = os.fstat(descriptor).st_size, "json" if form == "object" else form
        yield Table(connection, form, encoding, compressed, size_bytes, rows, columns, warnings)


def checked_path(root: Path, file: str) -> Path:
    """Return the path of a regular file below `root`, all links resolved. Raises ToolError for anything else."""
    require_text(file=file)
    try:
        path = (root / file).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ToolError(f"{file} is outside the data root {root}; name a file inside it")
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ToolError(f"no such file: {file} (looked in {root})") from None
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a loop of links, a NUL
        raise ToolError(f"{file} cannot be a file: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise ToolError(f"{file} is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise ToolError(f"{file} is a device, FIFO or socket; name a regular file")
    return path


def explained(error: duckdb.Error | UnicodeDecodeError) -> str:
    """Return DuckDB's message on one line, without the hints for DuckDB's own users."""
    # subtle: DuckDB cuts the lines that it quotes, sometimes within a character, and Python can't decode the message
    message = str(error.object, "utf-8", "replace") if isinstance(error, UnicodeDecodeError) else str(error)
    if "Maximum line size" in message:
        return f"a line or record of over {MAX_RECORD_BYTES:,} bytes; is a quote left open?"
    if isinstance(error, duckdb.OutOfMemoryException):
        return "this takes too much memory; select fewer rows or columns"
    return " ".join(message.partition("\n\n")[0].split())


# -- reading the file in Python ------------------------------------------------------------------------------
def read_through(text: TextIO, file: str, form: str, copy: Any = None) -> int:
    """Read to the end, copy if asked to, and return the number of damaged characters."""
    damaged, line = 0, 1
    while chunk := text.read(CHUNK_CHARS):
        if "\0" in chunk:
            line += chunk.count("\n", 0, chunk.index("\0"))
            raise ToolError(f"{file}, line {line} has a NUL character: binary or damaged")
        line += chunk.count("\n")
        damaged += chunk.count("\ufffd")
        if copy:
            copy.write(chunk.replace("\n", f"{LINE_END}\n") if form == "text" else chunk)
    return damaged


def rewrite_object(text: TextIO, file: str, form: str, copy: Any = None) -> int:
    """Copy a JSON object as JSON Lines: the rows of its only list of objects, or else itself."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number; use null")

    content = text.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise ToolError(f"{file}: an object of over {MAX_RECORD_BYTES:,} characters; use JSON Lines")
    try:
        whole = json.loads(content, parse_constant=refuse)
    except ValueError as error:
        raise ToolError(f"{file} is not JSON: {error}") from None
    lists = [value for value in whole.values() if isinstance(value, list)]
    tables = [rows for rows in lists if rows and all(isinstance(row, dict) for row in rows)]
    copy.writelines(json.dumps(row) + "\n" for row in (tables[0] if len(tables) == 1 else [whole]))
    return content.count("\ufffd")


# -- handing it to DuckDB ------------------------------------------------------------------------------------
@contextmanager
def connect(location: str) -> Iterator[Connection]:
    """Connect to a DuckDB in memory that can read one file, and nothing else outside of itself."""
    config = {"threads": 1, "memory_limit": DUCKDB_MEMORY, "temp_directory": "", "python_enable_replacements": False}
    with duckdb.connect(config=config) as connection:  # type: ignore[arg-type]
        connection.execute("SET enable_progress_bar = false")  # it would be printed among the answer
        # subtle: not allowed_directories, which would allow the files beside it, and COPY … TO
        connection.execute(f"SET allowed_paths = [{quoted(location)}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def create_csv(connection: Connection, location: str, text: TextIO, file: str, delimiter: str) -> dict[str, str]:
    """Create the view `raw` of the file's records; return {column: the SQL of its cell as text}.

    DuckDB's own sniffer would read a file with ragged rows as one column, and say nothing.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)  # for the whole process, which ends with this tool call

    def lines() -> Iterator[str]:
        while line := text.readline(MAX_RECORD_BYTES):
            if len(line) == MAX_RECORD_BYTES:
                raise ToolError(f"{file}: a line of over {MAX_RECORD_BYTES:,} characters")
            yield line

    records = csv.reader(lines(), delimiter=delimiter)
    skip, header = 0, next(records, [])
    while not header and records.line_num > skip:  # empty lines above the header
        skip, header = records.line_num, next(records, [])
    if not 0 < len(header) <= MAX_COLUMNS:
        raise ToolError(f"{file}: no column, or over {MAX_COLUMNS:,} columns")
    places = [f"c{place}" for place in range(len(header))]
    types = ", ".join(f"'{place}': 'VARCHAR'" for place in [*places, "extra"])
    options = f"delim={quoted(delimiter)}, quote='\"', escape='\"', header=true, skip={skip}, columns={{{types}}}"
    connection.execute(f"CREATE VIEW raw AS FROM read_csv({quoted(location)}, {options}, {CSV_OPTIONS})")
    return dict(zip(unique([label(name) for name in header]), places, strict=True))


def create_text(connection: Connection, location: str) -> dict[str, str]:
    options = "delim='\x1e\x1e\x1e\x1e', quote='', escape='', header=false, columns={'line': 'VARCHAR'}"
    connection.execute(f"CREATE VIEW raw AS FROM read_csv({quoted(location)}, {options}, {CSV_OPTIONS})")
    return {"line": f"rtrim(line, '{LINE_END}')"}


def create_json(connection: Connection, location: str, form: str, file: str) -> dict[str, str]:
    connection.execute(f"CREATE VIEW raw AS FROM read_json({quoted(location)}, format='{form}', {JSON_OPTIONS})")
    names = [name for name, *_ in connection.execute("DESCRIBE raw").fetchall()]
    if len(names) > MAX_COLUMNS:
        raise ToolError(f"{file}: over {MAX_COLUMNS:,} columns")
    for batch in batched(names, BATCH_COLUMNS):
        if any(one_row(connection, (f"bool_or(lower({identifier(n)}::VARCHAR) IN {NOT_JSON})" for n in batch), "raw")):
            raise ToolError(f"{file} is not JSON: NaN and Infinity are no JSON numbers; use null")
    cells = (f"({identifier(name)} ->> '$')" for name in names)
    return dict(zip(unique([label(name) for name in names]), cells, strict=True))


def create_data(connection: Connection, cells: dict[str, str], form: str) -> tuple[int, int, dict[str, str]]:
    """Create the view `data` with the right types; return the number of rows, of ragged rows, and the types."""

    def columns_of(names: Iterable[str], source: str) -> dict[str, dict[str, Any]]:
        """Return for each column whether all cells fit a number or are blank, and whether any is not blank."""
        found: dict[str, dict[str, Any]] = {}
        for batch in batched(names, BATCH_COLUMNS):
            fits = (f"bool_and(regexp_full_match({cells[name]}, '\\s*({NUMBER})?\\s*'))" for name in batch)
            anys = (f"bool_or({cells[name]} > ' ')" for name in batch)
            row = one_row(connection, (f"{{'fit': {f}, 'any': {a}}}" for f, a in zip(fits, anys, strict=True)), source)
            found |= zip(batch, row, strict=True)
        return found

    sample = columns_of(cells if form != "text" else (), f"(FROM raw LIMIT {SAMPLE_ROWS})")
    whole = columns_of((name for name, column in sample.items() if column["fit"] is not False), "raw")
    numbers = {name for name, column in whole.items() if column["fit"] and column["any"]}
    ragged = f"{list(cells.values())[-1]} IS NULL OR extra IS NOT NULL" if form in ("csv", "tsv") else "false"
    rows, ragged_rows = one_row(connection, ["count(*)", f"count(*) FILTER ({ragged})"], "raw")

    def typed(name: str, cell: str) -> str:
        if name in numbers:
            # subtle: without nullif() DuckDB lets the CSV reader do the cast, which fails at an empty cell
            return f"TRY_CAST(nullif({cell}, '') AS DOUBLE)"
        return cell if form == "text" else f"nullif(trim({cell}), '')"

    columns = ", ".join(f"{typed(name, cell)} AS {identifier(name)}" for name, cell in cells.items())
    connection.execute(f"CREATE VIEW data AS SELECT {columns} FROM raw")
    return rows, ragged_rows, {name: "number" if name in numbers else "text" for name in cells}


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    names = list(names)
    return (names[start : start + size] for start in range(0, len(names), size))


def one_row(connection: Connection, expressions: Iterable[str], source: str) -> tuple[Any, ...]:
    return connection.execute(f"SELECT {', '.join(expressions)} FROM {source}").fetchone() or ()


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
