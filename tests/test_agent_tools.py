"""The data tools: what they compute from real files, what SQL may do, and what they refuse."""

import csv
import gzip
import inspect
import io
import json
import math
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_tools import DataProcessor, ToolError, ToolUnavailable, make_tools, sandbox, table
from agent_tools.base import MAX_LABEL_CHARS, label
from agent_tools.formats import unique

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_data"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\6\0\0\0"
ELF = b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0"
ZIP = b"PK\3\4\x14\0\0\0\x08\0\0\0!\0"
# each example writes its own file, so they may share tmp_path
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Patch = pytest.MonkeyPatch
Result = dict[str, Any]


class Data:
    """The data tools without the process that each call of DataProcessor starts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load_file(self, file: Any) -> Result:
        return sandbox.load_file(self.root, file)

    def describe(self, file: str) -> Result:
        return sandbox.describe(self.root, file)

    def query(self, file: str, sql: Any) -> Result:
        return sandbox.query(self.root, file, sql)

    def rows(self, file: str) -> list[list[Any]]:
        """All rows as text, an empty cell as ''."""
        with table.open_table(self.root, file) as opened:
            rows = opened.connection.execute("SELECT COLUMNS(*)::VARCHAR FROM data").fetchall()
            return [[cell or "" for cell in row] for row in rows]


Write = Callable[[str, str | bytes], str]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    (tmp_path / "data").mkdir()
    return Data(tmp_path / "data")


@pytest.fixture
def write(data: Data) -> Write:
    """write("a.csv", content) puts a file into the data root and returns its name."""

    def write(name: str, content: str | bytes) -> str:
        content = content.encode() if isinstance(content, str) else content
        (data.root / name).write_bytes(content)
        return name

    return write


def refused(call: Callable[[], Any], *parts: str) -> str:
    """The call raises ToolError with one printable line that holds the parts."""
    with pytest.raises(ToolError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 500
    for part in parts:
        assert part in message
    return message


def json_size(result: Result) -> int:
    """The bytes that the result takes in a stream; fails for NaN and for text that UTF-8 cannot hold."""
    return len(json.dumps(result, allow_nan=False, ensure_ascii=False).encode())


# -- formats ------------------------------------------------------------------------------------------------
TABLE = [{"name": "a", "n": 1}, {"name": "b", "n": 2.5}]
FORMATS = [
    ("t.csv", "name,n\na,1\nb,2.5\n", "csv"),
    ("t.tsv", "name\tn\na\t1\nb\t2.5\n", "tsv"),
    ("t.json", json.dumps(TABLE), "json"),
    ("object.json", json.dumps({"source": "us", "rows": TABLE, "tags": ["x"]}, indent=1), "json"),
    ("t.jsonl", "\n".join(map(json.dumps, TABLE)), "jsonl"),
    ("lines.json", "\n".join(map(json.dumps, TABLE)), "jsonl"),
    ("none", "name;n\na;1\nb;2.5\n", "csv"),
    ("t.CSV", "name|n\r\na|1\r\nb|2.5\r\n", "csv"),
    ("mac.csv", "name,n\ra,1\rb,2.5\r", "csv"),
    ("blank.csv", "\n\nname,n\n\na,1\n\nb,2.5", "csv"),
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(("name", "content", "expected"), FORMATS)
def test_every_format_gives_the_same_table(
    data: Data, write: Write, name: str, content: str, expected: str, pack: Callable[[bytes], bytes]
) -> None:
    """The same two rows have the same columns and sums in any format, gzipped or not, whatever the name says."""
    packed = pack(content.encode())
    write(name, packed)

    loaded, described = data.load_file(name), data.describe(name)

    assert (loaded["format"], loaded["rows"], loaded["columns"]) == (expected, 2, ["name", "n"])
    assert (loaded["bytes"], loaded["compressed"]) == (len(packed), pack is gzip.compress)
    assert described["columns"]["n"]["sum"] == 3.5
    assert sorted(described["columns"]["name"]["top"]) == ["a", "b"]
    assert loaded["warnings"] == []


def test_name_before_gz_gives_the_format(data: Data, write: Write) -> None:
    write("t.tsv.gz", gzip.compress(b"a\tb,c\n1\t2\n"))

    assert data.load_file("t.tsv.gz")["columns"] == ["a", "b,c"]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("a;b\n1,5;2,5\n3,5;4,5\n", ["a", "b"]),
        ("price, EUR;day\n1;2\n3;4\n", ["price, EUR", "day"]),
        ('"x;y;z",b\n1,2\n', ["x;y;z", "b"]),
        ("a\tb\n1,5\t2,5\n", ["a", "b"]),
        ("only\n1\n", ["only"]),
        ('"first\nname";"last\nname";"city"\nA;B;C\n', [r"first\nname", r"last\nname", "city"]),
        ("a,A,\n1,20,300\n", ["a", "A (2)", "column 3"]),
        (f"a,{'b' * 200}\n1,2\n", ["a", label("b" * 200)]),
    ],
)
def test_columns_are_found(data: Data, write: Write, content: str, columns: list[str]) -> None:
    """A decimal comma, a delimiter or line break inside quotes, equal and empty names: each column has its name."""
    write("t.csv", content)

    assert data.load_file("t.csv")["columns"] == columns
    assert data.query("t.csv", "SELECT * FROM data")["columns"] == columns


def test_prose_without_suffix_is_text(data: Data, write: Write) -> None:
    """A comma in the first line doesn't turn a letter into a table."""
    write("letter", "Dear Ann,\nthank you for the book, the flowers, and all.\nYours, Ben\n")

    assert data.load_file("letter")["format"] == "text"


CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("\t\n\"',")
CELLS = st.text(CHARACTERS, max_size=8).map(str.strip)


@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2)))
@PROPERTY
def test_csv_rows_are_those_of_the_csv_module(data: Data, rows: list[list[str]]) -> None:
    """Whatever csv.writer wrote comes back, cell by cell."""
    with (data.root / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b"], ["text", "text"], *rows])

    assert data.rows("t.csv")[1:] == rows


def test_json_values_become_cells(data: Data, write: Write) -> None:
    """Columns may turn up in any row; a nested value is a cell of JSON text."""
    write("t.json", json.dumps([{"a": 1, "b": [1, {"c": 2}]}, {"a": None}, {"late": "x y"}]))

    assert data.rows("t.json") == [["1.0", '[1,{"c":2}]', ""], ["", "", ""], ["", "", "x y"]]


# -- encodings ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "cp1251", "cp932"],
)
def test_encoding_is_found(data: Data, write: Write, encoding: str) -> None:
    """Text reads the same in every encoding: by its mark, by its shape, or as charset-normalizer finds."""
    text = {
        "cp1251": "Иван живёт в Москве, Пётр живёт в Казани\n",
        "cp932": "東京の天気は晴れです,大阪の会社に行きます\n",
    }.get(encoding, "Élodie visits Orléans, and Jürgen pays 5 € in Köln\n")
    write("t.txt", (text * 3).encode(encoding))

    loaded = data.load_file("t.txt")

    assert loaded["encoding"] == encoding
    assert data.rows("t.txt") == [[text.rstrip()]] * 3
    assert len(loaded["warnings"]) == encoding.startswith("cp")  # a guess is said to be one


@pytest.mark.parametrize("encoding", ["utf-8", "cp932"])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_sample_may_end_within_text(data: Data, write: Write, encoding: str, shift: int) -> None:
    """A character of several bytes at the end of the sample confuses nothing."""
    line = "東京の天気は晴れです、大阪の会社に行きます\n"
    count = table.SAMPLE_BYTES // len(line)
    write("t.txt", ("x" * shift + line * count).encode(encoding))

    assert data.load_file("t.txt")["encoding"] == encoding
    assert data.describe("t.txt")["characters"] == shift + count * (len(line) - 1)


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (b"a,b\n" + b"1,2\n" * 20_000 + "ü,ö\n".encode("latin-1"), 2),
        (b"a,b\n" + "Köln,x\n".encode() * 50 + b"K\xf6ln,x\n", 1),
        ("a,b\n\ufffd,x\n".encode(), 1),
    ],
    ids=["Latin-1 after the sample", "one bad byte", "U+FFFD in the file"],
)
def test_damaged_utf8_stays_utf8(data: Data, write: Write, content: bytes, damaged: int) -> None:
    """Wrong bytes don't turn the rest into some code page: they are counted in a warning, and no row is lost."""
    write("t.csv", content)

    loaded = data.load_file("t.csv")

    assert (loaded["encoding"], loaded["rows"]) == ("utf-8", content.count(b"\n") - 1)
    assert loaded["warnings"] == [f"{damaged} character(s) are U+FFFD: not utf-8, or damaged"]


# -- describe -----------------------------------------------------------------------------------------------
NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).map(lambda number: round(number, 4))


@given(numbers=st.lists(NUMBERS, min_size=2))
@PROPERTY
def test_describe_agrees_with_statistics(data: Data, numbers: list[float]) -> None:
    """Count, least, greatest, sum, mean and standard deviation are those of the statistics module."""
    (data.root / "t.csv").write_text("n\n" + "".join(f"{number!r}\n" for number in numbers))

    column = data.describe("t.csv")["columns"]["n"]

    assert column["type"] == "number" and column["count"] == len(numbers)
    assert column["min"] == pytest.approx(min(numbers), rel=1e-11)
    assert column["max"] == pytest.approx(max(numbers), rel=1e-11)
    assert column["sum"] == pytest.approx(math.fsum(numbers), rel=1e-11, abs=1e-3)
    assert column["mean"] == pytest.approx(statistics.fmean(numbers), rel=1e-11, abs=1e-3)
    assert column["stdev"] == pytest.approx(statistics.stdev(numbers), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize(
    "cell",
    ["1,234", "$5", "nan", "inf", "-Infinity", "1_000", "0x10", "1e999", "-1e999", "9" * 5000, "9" * 399, "12 kg"],
)
def test_text_that_only_looks_like_a_number_stays_text(data: Data, write: Write, cell: str) -> None:
    """No sum is made of these cells; a number beside them doesn't change that."""
    write("t.jsonl", json.dumps({"n": cell}) + '\n{"n": 1}\n')

    column = data.describe("t.jsonl")["columns"]["n"]

    assert (column["type"], column["distinct"]) == ("text", 2)


@pytest.mark.parametrize("number", ["9" * 399, "9" * 5000, "1e999", "-1e999", "12345678901234567890"])
def test_numbers_that_no_float_holds_are_text(data: Data, write: Write, number: str) -> None:
    """So a sum never becomes infinite, and a long id keeps all its digits."""
    write("t.json", f'[{{"n": {number}}}, {{"n": 2}}]')

    assert data.describe("t.json")["columns"]["n"]["type"] == "text"


@pytest.mark.parametrize("cell", ["", " ", "+5", "1.", ".5", "-.5e-3", " 7 "])
def test_numbers_may_be_written_in_many_ways(data: Data, write: Write, cell: str) -> None:
    write("t.csv", f"n,x\n{cell},a\n2,b\n")

    column = data.describe("t.csv")["columns"]["n"]

    assert column["type"] == "number"
    assert column["sum"] == pytest.approx(2 + float(cell.strip() or 0))


def test_missing_cells_are_counted(data: Data, write: Write) -> None:
    """Empty cells, null and absent keys are missing; they are neither zeros nor values."""
    write("t.csv", "a,b\n1,\n , x\n3,y\n")
    write("t.jsonl", '{"a": 1}\n{"b": 2, "a": null}\n{"a": 3}\n')

    cells, lines = data.describe("t.csv")["columns"], data.describe("t.jsonl")["columns"]

    assert (cells["a"]["count"], cells["a"]["missing"], cells["a"]["mean"]) == (2, 1, 2)
    assert (cells["b"]["count"], cells["b"]["missing"], cells["b"]["distinct"]) == (2, 1, 2)
    assert (lines["a"]["missing"], lines["b"]["missing"]) == (1, 2)


def test_number_after_many_empty_cells_is_found(data: Data, write: Write) -> None:
    """A column is judged by all of its rows, not by the first ones."""
    empty = "," * 1 + "x\n"
    write("number.csv", "n,k\n" + empty * 3_000 + "5,x\n")
    write("text.csv", "n,k\n" + "5,x\n" * 3_000 + "five,x\n")

    assert data.describe("number.csv")["columns"]["n"]["sum"] == 5
    assert data.describe("text.csv")["columns"]["n"]["type"] == "text"


def test_distinct_values_are_exact_up_to_a_limit(data: Data, write: Write) -> None:
    """Beyond a hundred values the number is an estimate."""
    write("t.csv", "few,many\n" + "".join(f"x{n % 100},y{n}\n" for n in range(5_000)))

    columns = data.describe("t.csv")["columns"]

    assert columns["few"]["distinct"] == 100
    assert columns["many"]["distinct"] == pytest.approx(5_000, rel=0.2)


def test_text_is_described_by_its_words(data: Data, write: Write) -> None:
    """A plain text has lines (empty ones too), words and characters, and no columns to describe."""
    write("t.txt", "The cat.\n\nThe dog, the énd\n")
    write("7.txt", "7")

    assert data.describe("t.txt") == {"lines": 3, "words": 6, "characters": 24, "columns": {}, "warnings": []}
    assert data.describe("7.txt")["words"] == 1


@pytest.mark.parametrize("count", [table.BATCH_COLUMNS + 1, pytest.param(5000, marks=pytest.mark.chaos)])
def test_result_of_many_columns_is_small(data: Data, write: Write, count: int) -> None:
    """Many columns with long names and values are read; each result says how many of them it leaves out."""
    names = [f"\N{GRINNING FACE}column {n} " + "x" * 100 for n in range(count)]
    write("t.csv", ",".join(names) + "\n" + (",".join(["\x01" * 100] * count) + "\n") * 3)

    results = [DataProcessor(data.root).describe("t.csv"), data.load_file("t.csv"), data.query("t.csv", "FROM data")]

    for result in results:
        assert len(result["columns"]) + result["columns_left_out"] == count
        assert json_size(result) < 150_000


@given(value=st.text() | st.integers() | st.lists(st.text()))
def test_label_is_short_and_printable(value: Any) -> None:
    assert label(value).isprintable()
    assert len(label(value)) <= MAX_LABEL_CHARS


def test_long_values_are_told_apart() -> None:
    """Two long values that differ only in their last character are two."""
    assert label("x" * 500 + "1") != label("x" * 500 + "2")


@given(names=st.lists(st.sampled_from(["", "a", "A", "b", "a (2)", "a (3)", "column 1", "column 2"])))
def test_column_names_are_made_unique(names: list[str]) -> None:
    """However empty or equal the names, each column gets its own, and the first of equals keeps it."""
    result = unique(names)

    assert len({name.lower() for name in result}) == len(names) and "" not in result
    assert all(name.lower() in map(str.lower, result) for name in names if name)


# -- tables with flaws --------------------------------------------------------------------------------------
def test_ragged_rows_are_counted(data: Data, write: Write) -> None:
    """Rows with too few or too many cells are no error: a warning counts them."""
    write("t.csv", "a,b\n1,2\n3\n4,5,6,7,8\n")

    described = data.describe("t.csv")

    assert described["columns"]["a"]["sum"] == 8
    assert (described["columns"]["b"]["sum"], described["columns"]["b"]["missing"]) == (7, 1)
    assert described["warnings"] == ["2 row(s) have more or fewer cells than there are columns"]


@pytest.mark.parametrize("row", ["5 | x | y", '5" pipe,3', '"q""q",3', ",", " , ", "NULL,\\N", "#c,d", "\u2028,\x0c"])
def test_odd_rows_are_read_as_the_csv_module_reads_them(data: Data, write: Write, row: str) -> None:
    content = f"a,b\nx,y\n{row}\n1,2\n"
    write("t.csv", content)

    expected = [[cell.strip(" ") for cell in [*cells, ""][:2]] for cells in csv.reader(io.StringIO(content))]
    assert data.rows("t.csv") == expected[1:]


def test_field_of_200_kb_is_read(data: Data, write: Write) -> None:
    """A long cell is a cell like others; a query shows the beginning of it."""
    write("t.csv", f"a,b\n{'x' * 200_000},1\n")

    assert data.query("t.csv", "SELECT length(a), b FROM data")["rows"] == [[200_000, 1]]
    assert len(data.query("t.csv", "SELECT a FROM data")["rows"][0][0]) == sandbox.CELL_CHARS


def test_header_without_rows_is_a_table(data: Data, write: Write) -> None:
    """A table of no rows has its columns, all empty."""
    write("t.csv", "a,b\n")

    assert data.load_file("t.csv")["rows"] == 0
    assert data.describe("t.csv")["columns"]["a"]["count"] == 0
    assert data.query("t.csv", "SELECT a FROM data") == {"columns": ["a"], "rows": []}


# -- query --------------------------------------------------------------------------------------------------
SHOP = "k,n\nx,1\ny,2.5\nx,4\n"


@pytest.mark.parametrize(
    ("sql", "columns", "rows"),
    [
        ("SELECT k, sum(n) AS s FROM data GROUP BY k ORDER BY s DESC", ["k", "s"], [["x", 5], ["y", 2.5]]),
        ("select 1 as a, 2 as a ; ", ["a", "a_1"], [[1, 2]]),
        ("WITH t AS (FROM data LIMIT 1) SELECT * FROM t", ["k", "n"], [["x", 1]]),
        ("SELECT true AS b, NULL AS n, DATE '2026-01-02' AS d", ["b", "n", "d"], [[True, None, "2026-01-02"]]),
        ("SELECT 'nan'::DOUBLE AS a, 1.10::DECIMAL(5,2) AS b, [1, 2] AS c", ["a", "b", "c"], [[None, 1.1, "[1, 2]"]]),
        ("SELECT 0.1 + 0.2 AS a, 2::HUGEINT ** 3 AS b, chr(27) AS c", ["a", "b", "c"], [[0.3, 8, r"\x1b"]]),
        ("SUMMARIZE SELECT n FROM data", None, None),
    ],
)
def test_query_returns_columns_and_rows(data: Data, write: Write, sql: str, columns: Any, rows: Any) -> None:
    """One SELECT of any kind; its values come as JSON, with 12 digits at most."""
    write("t.csv", SHOP)

    result = data.query("t.csv", sql)

    assert json_size(result)
    if columns:
        assert result == {"columns": columns, "rows": rows}


def test_query_shows_some_rows_and_counts_the_rest(data: Data, write: Write) -> None:
    write("t.csv", SHOP)

    result = data.query("t.csv", "SELECT range AS n FROM range(1234) ORDER BY n DESC")

    assert result["rows"][:2] == [[1233], [1232]]
    assert len(result["rows"]) + result["rows_left_out"] == 1234


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_unknown_column_is_refused_with_the_known_ones(data: Data, write: Write, name: str) -> None:
    """The message helps an LLM to do better."""
    write(name, SHOP if name.endswith("csv") else '[{"k": "x", "n": 1}]')

    refused(lambda: data.query(name, "SELECT price FROM data"), '"price" not found', '"k"')


@given(rows=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(-1000, 1000)), min_size=1))
@PROPERTY
def test_groups_agree_with_python(data: Data, rows: list[tuple[str, int]]) -> None:
    (data.root / "t.csv").write_text("k,n\n" + "".join(f"{key},{number}\n" for key, number in rows))
    groups: dict[str, list[int]] = {}
    for key, number in rows:
        groups.setdefault(key, []).append(number)

    found = data.query("t.csv", "SELECT k, sum(n), mean(n), min(n), max(n), count(*) FROM data GROUP BY k")["rows"]

    assert {key: figures for key, *figures in found} == {
        key: pytest.approx([sum(group), statistics.fmean(group), min(group), max(group), len(group)])
        for key, group in groups.items()
    }


@pytest.mark.parametrize("end", ["", ";", " ; ", "; -- done", ";\n/* done; */ -- really;", " -- 'é';\n;"])
def test_statement_may_end_in_any_way(data: Data, end: str) -> None:
    """An LLM writes semicolons, and comments after them."""
    (data.root / "t.csv").write_text("k,n\né;,1\ny,2\n")

    found = data.query("t.csv", f"SELECT k FROM data WHERE k = 'é;'{end}")

    assert found["rows"] == [["é;"]]


def test_sql_that_is_not_unicode_is_refused(data: Data) -> None:
    (data.root / "t.csv").write_text("k,n\nx,1\n")

    with pytest.raises(ToolError, match="half a surrogate pair"):
        data.query("t.csv", "SELECT '\ud800'")


# -- what SQL must not do -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{root}/out.csv'",
        "COPY data TO '{root}/t.csv'",
        "ATTACH '{root}/out.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "LOAD json",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA version",
        "CALL pragma_version()",
        "EXPORT DATABASE '{root}/out'",
        "IMPORT DATABASE '{root}'",
        "EXPLAIN ANALYZE SELECT 1",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW data",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{root}/out.csv'",
        "SELECT 1) TO '{root}/out.csv' --",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{root}/out.csv''')",
        "WITH t AS (INSERT INTO data VALUES (1) RETURNING *) SELECT * FROM t",
        "SELECT * FROM read_csv('{root}/other.csv')",
        "FROM '{root}/other.csv'",
        "SELECT * FROM read_text('{root}/../secret.csv')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "FROM '/etc/passwd'",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/proc/self/environ')",
        "SELECT * FROM read_json('/etc/passwd')",
        "SELECT * FROM parquet_scan('/etc/passwd')",
        "SELECT * FROM glob('{root}/*')",
        "SELECT * FROM glob('/**')",
        "SELECT * FROM duckdb_secrets()",
        "SELECT * FROM rows",
        "SELECT getenv('SECRET')",
        "",
        ";",
        "-- nothing",
        "hello",
        "SELECT ?",
    ],
)
def test_sql_that_reaches_out_is_refused(data: Data, write: Write, monkeypatch: Patch, sql: str) -> None:
    """One clear line; nothing is written, and nothing is read but the file itself."""
    write("t.csv", SHOP)
    write("other.csv", "password\nhunter2\n")
    (data.root.parent / "secret.csv").write_text("password\nhunter2\n")
    monkeypatch.setenv("SECRET", "hunter2")
    before = {path: path.read_bytes() for path in data.root.parent.rglob("*") if path.is_file()}
    rows = ["hunter2"]

    message = refused(lambda: data.query("t.csv", sql.format(root=data.root)))

    assert rows[0] not in message and "root:" not in message
    assert {path: path.read_bytes() for path in data.root.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "sql", ["SELECT getenv('SECRET')", "SELECT \ud800", "(" * 10_000, "SELECT " + "1+" * 20_000 + "1"]
)
def test_tool_call_refuses_sql_too(data: Data, write: Write, monkeypatch: Patch, sql: str) -> None:
    """The real call sees no environment, and survives what DuckDB's parser cannot take."""
    write("t.csv", SHOP)
    monkeypatch.setenv("SECRET", "hunter2")

    assert "hunter2" not in refused(lambda: DataProcessor(data.root).query("t.csv", sql))


@pytest.mark.parametrize("sql", [None, 7, ["SELECT 1"], {"sql": "SELECT 1"}])
def test_sql_that_is_no_text_is_refused(data: Data, write: Write, sql: Any) -> None:
    write("t.csv", SHOP)

    refused(lambda: data.query("t.csv", sql), "expected text")


ENDLESS = [
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "SELECT count(*) FROM range(10000000000) a, range(1000000) b",
    "SELECT * FROM range(1000000000000)",
]


@pytest.mark.parametrize("sql", ENDLESS)
def test_query_that_never_ends_is_ended(data: Data, write: Write, sql: str) -> None:
    """It has a time limit, which the message names."""
    write("t.csv", SHOP)

    refused(lambda: DataProcessor(data.root, seconds=0.5).query("t.csv", sql), "query took over 0.5 s")


def test_query_ends_when_the_task_is_cancelled(data: Data, write: Write) -> None:
    """`check` is asked again and again; its exception ends the call."""

    class Cancelled(Exception):
        pass

    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    write("t.csv", SHOP)

    with pytest.raises(Cancelled):
        DataProcessor(data.root).query("t.csv", ENDLESS[0], check=check)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT length(repeat('x', 2000000000))",
        "SELECT list_sort(range(100000000))",
        "SELECT format('{:>1000000000}', 'x')",
        "SELECT string_agg(repeat('y', 1000000), '') FROM range(300)",
        "SELECT list(a.range) FROM range(100000000) a",
    ],
)
def test_query_that_takes_too_much_memory_is_refused(data: Data, write: Write, sql: str) -> None:
    write("t.csv", SHOP)

    refused(lambda: DataProcessor(data.root).query("t.csv", sql), "too much memory")


# -- files that can't be read -------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["nothing.csv", "a/b/c.csv", "line\nbreak", "\x1b[31m"])
def test_missing_file_is_refused(data: Data, file: str) -> None:
    """The message names the file (without its control characters) and where it was looked for."""
    refused(lambda: data.load_file(file), "no such file", str(data.root))


@pytest.mark.parametrize("file", ["x" * 300, "a/" * 3000, "nul\0.csv", "\ud800", "file.csv/inside"])
def test_impossible_names_are_refused(data: Data, write: Write, file: str) -> None:
    """A name too long, one with a NUL or half a surrogate pair, or a path through a file: one clear line."""
    write("file.csv", "a\n1\n")

    refused(lambda: data.load_file(file), "cannot be a file")


@pytest.mark.parametrize("file", [None, 7, True, ["t.csv"], {"file": "t.csv"}])
def test_names_that_are_no_text_are_refused(data: Data, file: Any) -> None:
    """An LLM may pass any JSON value."""
    refused(lambda: data.load_file(file), "expected text")


def test_tool_call_passes_on_refusals(data: Data) -> None:
    """The real call, with its own process, says the same."""
    refused(lambda: DataProcessor(data.root).load_file("nothing.csv"), "no such file: nothing.csv", str(data.root))


def test_process_that_cannot_start_is_unavailable(data: Data, monkeypatch: Patch) -> None:
    """Too many processes may pass: the task is tried again."""
    monkeypatch.setattr("agent_tools.data.START", ["/no/such/python"])

    with pytest.raises(ToolUnavailable, match="cannot start a process"):
        DataProcessor(data.root).load_file("t.csv")


def test_process_that_crashes_is_one_clear_line(data: Data, monkeypatch: Patch) -> None:
    monkeypatch.setattr("agent_tools.data.START", ["/bin/sh", "-c", "kill -9 $$"])

    refused(lambda: DataProcessor(data.root).load_file("t.csv"), "load_file took too much memory or crashed")


@pytest.mark.parametrize(("name", "content"), [("t.csv", b""), ("t.csv.gz", gzip.compress(b"", mtime=0))])
def test_empty_files_are_refused(data: Data, write: Write, name: str, content: bytes) -> None:
    write(name, content)

    refused(lambda: data.load_file(name), f"{name} is empty")


@pytest.mark.parametrize("file", ["folder", ".", ""])
def test_directory_is_refused(data: Data, file: str) -> None:
    (data.root / "folder").mkdir()

    refused(lambda: data.load_file(file), "is a directory")


def test_fifo_socket_and_device_are_refused_without_waiting(data: Data, monkeypatch: Patch) -> None:
    """Opening a FIFO would wait for its writer, and /dev/zero never ends."""
    os.mkfifo(data.root / "fifo")
    monkeypatch.chdir(data.root)  # the path of a socket may have about 100 characters only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")

        refused(lambda: data.load_file("fifo"), "is a device, FIFO or socket")
        refused(lambda: data.load_file("socket"), "is a device, FIFO or socket")
    refused(lambda: Data(Path("/dev")).load_file("zero"), "is a device, FIFO or socket")


def test_file_exchanged_after_the_check_is_refused(data: Data, write: Write, monkeypatch: Patch) -> None:
    """If a FIFO or a link takes the file's place between check and opening, nobody waits and nothing is followed."""
    write("t.csv", "a\n1\n")
    (data.root / "link.csv").symlink_to("t.csv")
    os.mkfifo(data.root / "fifo.csv")
    monkeypatch.setattr(table, "checked_path", lambda root, file: root / file)

    refused(lambda: data.load_file("link.csv"), "cannot read link.csv")
    refused(lambda: data.load_file("fifo.csv"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="on other systems DuckDB opens the path")
def test_file_exchanged_before_duckdb_reads_it_is_the_old_one(data: Data, write: Write, monkeypatch: Patch) -> None:
    """DuckDB reads the file that was checked and opened, whatever its path leads to by then."""
    write("t.csv", "a,b\n1,2\n")
    real = table.connect

    def exchange(location: str) -> Any:
        (data.root / "t.csv").unlink()
        (data.root / "t.csv").symlink_to("/etc/passwd")
        return real(location)

    monkeypatch.setattr(table, "connect", exchange)

    assert data.rows("t.csv") == [["1.0", "2.0"]]


@pytest.mark.parametrize(
    "file",
    ["../secret.csv", "/etc/passwd", "link.csv", "folder/secret.csv", "a/../../secret.csv", "../data-private/t.csv"],
)
def test_files_outside_the_data_root_are_refused(data: Data, file: str) -> None:
    """Neither `..` nor an absolute path nor a symbolic link leads out; a folder with the same beginning is outside."""
    secret = data.root.parent / "secret.csv"
    secret.write_text("password\n1234\n")
    (data.root / "link.csv").symlink_to(secret)
    (data.root / "folder").symlink_to(data.root.parent)
    data.root.with_name("data-private").mkdir()
    (data.root.with_name("data-private") / "t.csv").write_text("a\n1\n")

    refused(lambda: data.load_file(file), "outside the data root")


def test_paths_that_stay_inside_are_read(data: Data, write: Write) -> None:
    """An absolute path, `..` and a link are fine as long as they end inside the root, which may be a link itself."""
    write("t.csv", "a\n1\n")
    (data.root / "folder").mkdir()
    (data.root / "link.csv").symlink_to("t.csv")
    data.root.with_name("root-link").symlink_to(data.root)

    for file in (str(data.root / "t.csv"), "folder/../t.csv", "link.csv"):
        assert data.load_file(file)["rows"] == 1
    assert Data(data.root.with_name("root-link")).load_file("t.csv")["rows"] == 1


def test_loop_of_links_is_refused(data: Data) -> None:
    (data.root / "a").symlink_to("b")
    (data.root / "b").symlink_to("a")

    refused(lambda: data.load_file("a"))


def test_file_without_permission_is_refused(data: Data, write: Write, monkeypatch: Patch) -> None:
    """The system's "permission denied" (simulated, since root may read all) becomes one clear line."""
    write("t.csv", "a\n1\n")

    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(table.os, "open", denied)

    refused(lambda: data.load_file("t.csv"), "cannot read t.csv: Permission denied")


@pytest.mark.parametrize("content", [PNG, ELF, ZIP, bytes(range(1, 256)) * 20, gzip.compress(PNG, mtime=0)])
@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.txt", "t"])
def test_binary_content_is_refused(data: Data, write: Write, name: str, content: bytes) -> None:
    """An image, a program or an archive is called binary, whatever its name."""
    write(name, content)

    refused(lambda: data.load_file(name), f"{name} is binary")


def test_nul_is_refused_with_its_line(data: Data, write: Write) -> None:
    """A NUL far down in a table is named by its line; one at the top, too."""
    write("late.csv", b"a,b\n" + b"1,2\n" * 20_000 + b"3\0,4\n")
    write("early.csv", b"a,b\n1,2\n3\0,4\n")

    refused(lambda: data.load_file("late.csv"), "late.csv, line 20002 has a NUL")
    refused(lambda: data.load_file("early.csv"), "early.csv is binary or damaged", "line 3")


@pytest.mark.parametrize("keep", [5, 15, -20, -4])
def test_truncated_gzip_is_refused(data: Data, write: Write, keep: int) -> None:
    """A gzip file cut within its header, its data or its checksum is damaged: no rows are made of it."""
    write("t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 50_000)[:keep])

    refused(lambda: data.load_file("t.csv.gz"), "t.csv.gz is damaged gzip")


@pytest.mark.parametrize("place", [2, 30, -6])
def test_corrupt_gzip_is_refused(data: Data, write: Write, place: int) -> None:
    """A wrong byte in the method, the data or the checksum is noticed."""
    packed = bytearray(gzip.compress(os.urandom(2000).hex().encode()))
    packed[place] ^= 0xFF
    write("t.txt.gz", bytes(packed))

    refused(lambda: data.load_file("t.txt.gz"), "t.txt.gz is damaged gzip")


ENDLESS_RECORDS = {
    "line": ("t.csv", b"x" * 4_000_000),
    "field": ("t.csv", b"a,b\n" + b"x" * 4_000_000 + b",1\n"),
    "quoted": ("t.csv", b'a,b\n"' + b"xxxxxxxxxxx\n" * 400_000 + b'",1\n'),
    "open quote": ("t.csv", b'a,b\n1,"2\n' + b"3,4\n" * 1_000_000),
    "text": ("t.txt", b"x" * 4_000_000),
    "jsonl": ("t.jsonl", b'{"a": "' + b"x" * 4_000_000),
    "json": ("t.json", b'["' + b"x" * 4_000_000),
    "object": ("t.json", b'{"a": "' + b"x" * 4_000_000),
    "commas": ("t.csv", b"," * 1_000_000 + b"\n1\n"),
    "keys": ("t.json", json.dumps([{f"c{n}": n for n in range(table.MAX_COLUMNS + 1)}]).encode()),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("what", ENDLESS_RECORDS)
def test_endless_records_are_refused(data: Data, write: Write, what: str, pack: Callable[[bytes], bytes]) -> None:
    """A record, a quote or a header of over 3 MB, or of over 10,000 columns: one clear line."""
    name, content = ENDLESS_RECORDS[what]
    write(name, pack(content))

    refused(lambda: data.load_file(name), name)


@pytest.mark.parametrize(("name", "pack"), [("t.csv", bytes), ("t.txt", gzip.compress), ("t.json", gzip.compress)])
def test_tool_call_does_not_keep_an_endless_record_in_memory(
    data: Data, write: Write, name: str, pack: Callable[[bytes], bytes]
) -> None:
    write(name, pack(b'["' + b"x" * 20_000_000))

    message = refused(lambda: DataProcessor(data.root).load_file(name), name)

    assert "too much memory" not in message


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t.json", "[" * 100_000, "Malformed JSON"),
        ("t.json", '{"a":' * 100_000, "nested too deep"),
        ("t.jsonl", '{"a": 1}\n' + "[" * 100_000, "Malformed JSON"),
        ("t.json", '[{"n": NaN}]', "NaN"),
        ("t.json", '{"n": -Infinity}', "-Infinity"),
        ("t.jsonl", '{"n": 1}\n{"n": Infinity}\n', "Infinity"),
        ("t.jsonl", '{"n": 1}\n\n{"n": 2\n{"n": 3}\n', "line 3"),
        ("t.json", "[1 2]", "JSON"),
        ("t.json", "[1,,2]", "JSON"),
        ("t.json", '[{"a": 1}, {"a": 2}', "JSON"),
        ("t.json", '[{"a": 1', "JSON"),
        ("t.json", "[1] 2", "JSON"),
        ("t.json", "hello", "JSON"),
        ("t.jsonl", r'{"\ud800": "\udc00", "a": 1}', "surrogate"),
    ],
)
def test_bad_json_is_refused(data: Data, write: Write, name: str, content: str, part: str) -> None:
    """Broken, too deep, or with numbers that JSON doesn't know: one line that names the file, not a copy of it."""
    write(name, content)

    message = refused(lambda: data.describe(name), name, part)

    assert "/proc/" not in message and "/tmp/tmp" not in message


@given(content=st.binary(max_size=300), name=st.sampled_from(["t", "t.csv", "t.json", "t.jsonl", "t.txt"]))
@settings(PROPERTY, max_examples=60)
def test_any_bytes_give_a_result_or_a_tool_error(data: Data, content: bytes, name: str) -> None:
    """No content of a file makes a tool raise anything else, or return what JSON cannot hold."""
    (data.root / name).write_bytes(content)

    for action in (data.load_file, data.describe):
        try:
            result = action(name)
        except ToolError as error:
            assert str(error).isprintable()
        else:
            assert json_size(result) < 100_000


# -- memory -------------------------------------------------------------------------------------------------
LARGE = ["big.csv", "big.csv.gz", "big.json.gz", "big.jsonl", "big.txt"]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("big.csv.gz", 24), ("big.jsonl", 24), *(pytest.param(name, 118, marks=pytest.mark.chaos) for name in LARGE)],
)
def test_large_file_fits_into_the_memory(data: Data, name: str, blocks: int) -> None:
    """As many MB of rows are described and grouped in a process whose memory is limited, with the right sums."""
    is_json, block = "json" in name, range(1000)
    end = ",\n" if name.startswith("big.json.") else "\n"
    with gzip.open(data.root / name, "wb", 1) if name.endswith("gz") else (data.root / name).open("wb") as file:
        rows = [{"k": f"k{n % 3}", "n": n, "text": "x" * 980} for n in block]
        lines = [json.dumps(row) if is_json else ",".join(map(str, row.values())) for row in rows]
        file.write(b"[" if end == ",\n" else b"" if is_json else b"k,n,text\n")
        for _ in range(blocks):
            file.write("".join(line + end for line in lines).encode())
        file.write(b'{"k": "k0", "n": 0}]' if end == ",\n" else b"")
    tool = DataProcessor(data.root)

    described = tool.describe(name)

    if name.endswith("txt"):
        assert described["lines"] == 1000 * blocks + 1
        return
    groups = tool.query(name, "SELECT k, sum(n) FROM data GROUP BY k ORDER BY k")["rows"]
    assert described["columns"]["n"]["sum"] == blocks * sum(block)
    assert groups == [[f"k{k}", blocks * sum(block[k::3])] for k in range(3)]


# -- the registry, and the samples --------------------------------------------------------------------------
def test_tools_have_names_and_descriptions(tmp_path: Path) -> None:
    """Each tool is named <what>.<method's name>; its first docstring line tells what it does."""
    for name, tool in make_tools(tmp_path, tmp_path / "outbox", None).items():
        assert name.endswith(f".{tool.__name__}")
        assert (inspect.getdoc(tool) or "").partition("\n")[0].endswith(".")


@pytest.mark.parametrize("path", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_sample_can_be_described(path: Path) -> None:
    """Each file in sample_data is read without a warning, is small, and has its line in the README there."""
    described = Data(SAMPLES).describe(path.name)

    assert described["warnings"] == []
    assert path.stat().st_size < 10_000
    assert path.name == "README.md" or f"`{path.name}`" in (SAMPLES / "README.md").read_text()


def plain_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a sample as the standard library reads them."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = content.decode().splitlines()
    if ".jsonl" in path.suffixes:
        return [json.loads(line) for line in lines]
    return list(csv.DictReader(lines, delimiter="\t" if ".tsv" in path.suffixes else ","))


@pytest.mark.parametrize("name", ["sales.csv", "temperatures.tsv", "requests.csv.gz", "support_tickets.jsonl"])
def test_number_columns_of_samples_agree_with_statistics(name: str) -> None:
    """Every number column of the samples has the figures that the statistics module finds."""
    rows = plain_rows(SAMPLES / name)

    described = Data(SAMPLES).describe(name)

    numbers = {key: column for key, column in described["columns"].items() if column["type"] == "number"}
    assert described["rows"] == len(rows) and list(described["columns"]) == list(rows[0])
    assert numbers
    for key, column in numbers.items():
        cells = [float(row[key]) for row in rows if row[key] not in ("", None)]
        expected = {"count": len(cells), "missing": len(rows) - len(cells), "min": min(cells), "max": max(cells)}
        expected |= {"sum": math.fsum(cells), "mean": statistics.fmean(cells), "stdev": statistics.stdev(cells)}
        assert {measure: column[measure] for measure in expected} == pytest.approx(expected)
