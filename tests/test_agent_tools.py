"""The agent's tools: what they compute from real files, what they refuse, and that email is sent once."""

import csv
import gzip
import inspect
import json
import math
import os
import socket
import socketserver
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agent_tools
from agent_tools import DataProcessor, EmailSender, ToolError, ToolUnavailable, label, make_tools, unique

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_data"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\6\0\0\0"
ELF = b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0"
ZIP = b"PK\3\4\x14\0\0\0\x08\0\0\0!\0"
# each example writes its own file anew, so that tmp_path may be shared by them
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

Patch = pytest.MonkeyPatch
Write = Callable[[str, str | bytes], str]


@pytest.fixture
def data(tmp_path: Path) -> DataProcessor:
    (tmp_path / "data").mkdir()
    return DataProcessor(tmp_path / "data")


@pytest.fixture
def write(data: DataProcessor) -> Write:
    """write("a.csv", content) puts a file into the data root and returns its name."""

    def write(name: str, content: str | bytes) -> str:
        content = content.encode() if isinstance(content, str) else content
        (data.data_root / name).write_bytes(content)
        return name

    return write


def assert_refused(call: Callable[[], Any], *parts: str) -> None:
    """The call raises ToolError, with one printable line that holds the parts."""
    with pytest.raises(ToolError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 500
    for part in parts:
        assert part in message


def json_size(result: dict[str, Any]) -> int:
    """The bytes that the result takes in a stream; fails for NaN and for what UTF-8 cannot hold."""
    return len(json.dumps(result, allow_nan=False, ensure_ascii=False).encode())


# -- formats ------------------------------------------------------------------------------------------------
TABLE = [{"name": "a", "n": 1}, {"name": "b", "n": 2.5}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "name,n\na,1\nb,2.5\n", "csv"),
        ("t.tsv", "name\tn\na\t1\nb\t2.5\n", "tsv"),
        ("t.json", json.dumps(TABLE), "json"),
        ("object.json", json.dumps({"source": "us", "rows": TABLE, "tags": ["x"]}, indent=1), "json"),
        ("t.jsonl", "\n".join(map(json.dumps, TABLE)), "jsonl"),
        ("lines.json", "\n".join(map(json.dumps, TABLE)), "jsonl"),
        ("none", "name;n\na;1\nb;2.5\n", "csv"),
        ("t.CSV", "name|n\r\na|1\r\nb|2.5\r\n", "csv"),
        ("mac.csv", "name,n\ra,1\rb,2.5\r", "csv"),
    ],
)
def test_every_format_gives_the_same_table(
    data: DataProcessor, write: Write, name: str, content: str, expected: str
) -> None:
    """The same two rows, in any format, have the same columns, count and sum."""
    write(name, content)

    loaded, described = data.load_file(name), data.describe(name)

    assert (loaded["format"], loaded["rows"], loaded["columns"]) == (expected, 2, ["name", "n"])
    assert described["columns"]["n"]["sum"] == 3.5
    assert described["columns"]["name"]["top"] == {"a": 1, "b": 1}
    assert loaded["warnings"] == []


def test_load_file_reports_bytes_and_compression(data: DataProcessor, write: Write) -> None:
    """A gzipped file is recognised by its first bytes, whatever its name; `bytes` is its size on disk."""
    packed = gzip.compress(b"a,b\n1,2\n", mtime=0)
    write("t.csv", packed)

    loaded = data.load_file("t.csv")

    assert loaded["compressed"] is True
    assert loaded["bytes"] == len(packed)
    assert loaded["rows"] == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "name,n\na,1\nb,2.5\n", "csv"),
        ("t.tsv", "name\tn\na\t1\nb\t2.5\n", "tsv"),
        ("t.json", json.dumps(TABLE), "json"),
        ("object.json", json.dumps({"rows": TABLE}), "json"),
        ("t.jsonl", "\n".join(map(json.dumps, TABLE)), "jsonl"),
        ("t.txt", "one\ntwo\n", "text"),
        ("none", "name;n\na;1\nb;2.5\n", "csv"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_may_be_gzipped(
    data: DataProcessor, write: Write, name: str, content: str, expected: str, suffix: str
) -> None:
    """A gzipped file is described as it is plain, whether or not its name ends in .gz."""
    write("plain-" + name, content)
    write(name + suffix, gzip.compress(content.encode()))

    loaded, described = data.load_file(name + suffix), data.describe(name + suffix)

    assert (loaded["format"], loaded["compressed"], loaded["rows"]) == (expected, True, 2)
    assert described == data.describe("plain-" + name)


def test_name_before_gz_gives_the_format(data: DataProcessor, write: Write) -> None:
    """t.tsv.gz is TSV."""
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
    ],
)
def test_delimiter_is_sniffed(data: DataProcessor, write: Write, content: str, columns: list[str]) -> None:
    """A decimal comma, or a delimiter within quotes, is not mistaken for the delimiter."""
    write("t.csv", content)

    assert data.load_file("t.csv")["columns"] == columns


def test_prose_without_suffix_is_text(data: DataProcessor, write: Write) -> None:
    """A comma in the first line does not make a table of a letter."""
    write("letter", "Dear Ann,\nthank you for the book, the flowers, and all.\nYours, Ben\n")

    assert data.load_file("letter")["format"] == "text"


def test_quoted_cells_may_hold_line_breaks(data: DataProcessor, write: Write) -> None:
    """A quoted cell keeps its delimiter and line break, and is one cell of one row."""
    write("t.csv", 'a,b\n"1,\r\n2",3\n')

    assert data.load_file("t.csv")["rows"] == 1
    assert data.describe("t.csv")["columns"]["a"]["top"] == {r"1,\r\n2": 1}


CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("\t\r\n\"',")
TEXT = st.text(CHARACTERS, max_size=8)


@given(rows=st.lists(st.lists(TEXT, min_size=2, max_size=2)))
@PROPERTY
def test_csv_rows_are_those_of_the_csv_module(data: DataProcessor, rows: list[list[str]]) -> None:
    """Whatever csv.writer wrote comes back, cell by cell."""
    with (data.data_root / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b"], *rows])

    with agent_tools.open_source(data.data_root, "t.csv") as source:
        found = [list(row.values()) for row in agent_tools.rows_of(source)]

    assert found == rows


LEAVES = st.none() | st.integers() | st.text()


@given(
    elements=st.lists(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x))),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 2]),
)
@PROPERTY
def test_json_array_is_read_in_chunks_of_any_size(
    data: DataProcessor, elements: list[Any], chunk: int, indent: int | None
) -> None:
    """Wherever the chunks end (within a number, an escape, a space), the elements are those of json.loads."""
    (data.data_root / "t.json").write_text(json.dumps(elements, indent=indent))

    with pytest.MonkeyPatch.context() as patch, agent_tools.open_source(data.data_root, "t.json") as source:
        patch.setattr(agent_tools, "CHUNK_CHARS", chunk)
        found = list(agent_tools.json_array(source, source.read(1)))

    assert found == elements


# -- encodings ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "cp1251", "cp932"],
)
def test_encoding_is_found(data: DataProcessor, write: Write, encoding: str) -> None:
    """Text reads the same in every encoding: by mark, by shape, or as charset-normalizer finds."""
    text = {
        "cp1251": "Иван живёт в Москве, Пётр живёт в Казани\n",
        "cp932": "東京の天気は晴れです,大阪の会社に行きます\n",
    }.get(encoding, "Élodie visits Orléans, and Jürgen pays 5 € in Köln\n")
    write("t.txt", (text * 3).encode(encoding))

    loaded, described = data.load_file("t.txt"), data.describe("t.txt")

    assert loaded["encoding"] == encoding
    assert described["characters"] == 3 * len(text)
    assert set(described["most_common"]) <= set(agent_tools.re.findall(r"\w+", text.lower()))
    assert len(loaded["warnings"]) == encoding.startswith("cp")  # a guess is said to be one


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
@PROPERTY
def test_marked_encodings_round_trip(data: DataProcessor, text: str) -> None:
    """Any text comes back from UTF-8, UTF-16 and UTF-32 with a mark."""
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (data.data_root / "t.txt").write_bytes(text.encode(encoding))

        with agent_tools.open_source(data.data_root, "t.txt") as source:
            found = "".join(agent_tools.lines_of(source))

        assert found == text


@pytest.mark.parametrize("encoding", ["utf-8", "cp932"])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_sample_may_end_within_text(data: DataProcessor, write: Write, encoding: str, shift: int) -> None:
    """A character of several bytes, at the place where the sample for detection ends, confuses nothing."""
    line = "東京の天気は晴れです、大阪の会社に行きます\n"
    text = "x" * shift + line * (agent_tools.SAMPLE_BYTES // len(line))
    write("t.txt", text.encode(encoding))

    assert data.load_file("t.txt")["encoding"] == encoding
    assert data.describe("t.txt")["characters"] == len(text)


def test_wrong_bytes_after_the_sample_are_counted(data: DataProcessor, write: Write) -> None:
    """A file that is ASCII for long, then Latin-1, is read; a warning says how many characters are wrong."""
    write("t.csv", b"a,b\n" + b"1,2\n" * 20_000 + "ü,ö\n".encode("latin-1"))

    loaded = data.load_file("t.csv")

    assert loaded["rows"] == 20_001
    assert loaded["warnings"] == ["2 character(s) are U+FFFD: not utf-8, or damaged"]


def test_utf8_with_one_damaged_byte_stays_utf8(data: DataProcessor, write: Write) -> None:
    """One broken character does not turn all others into those of some code page."""
    write("t.csv", b"a\n" + "Köln\n".encode() * 50 + b"K\xf6ln\n")

    described = data.describe("t.csv")

    assert described["columns"]["a"]["top"]["Köln"] == 50
    assert "1 character(s)" in described["warnings"][0]


def test_replacement_character_is_valid_utf8(data: DataProcessor, write: Write) -> None:
    """A file that somebody else has damaged, and saved with U+FFFD in it, is UTF-8: nothing is guessed."""
    write("t.csv", "a,b\n\ufffd,x\n")

    assert data.load_file("t.csv")["encoding"] == "utf-8"
    assert data.describe("t.csv")["columns"]["a"]["top"] == {"\ufffd": 1}


# -- describe -----------------------------------------------------------------------------------------------
NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).map(lambda number: round(number, 4))


@given(numbers=st.lists(NUMBERS, min_size=2))
@PROPERTY
def test_describe_agrees_with_statistics(data: DataProcessor, numbers: list[float]) -> None:
    """Count, least, greatest, sum, mean and standard deviation are those of the statistics module."""
    (data.data_root / "t.csv").write_text("n\n" + "".join(f"{number!r}\n" for number in numbers))

    column = data.describe("t.csv")["columns"]["n"]

    assert column["type"] == "number" and column["count"] == len(numbers)
    assert column["min"] == pytest.approx(min(numbers), rel=1e-11)
    assert column["max"] == pytest.approx(max(numbers), rel=1e-11)
    assert column["sum"] == pytest.approx(math.fsum(numbers), rel=1e-11, abs=1e-3)
    assert column["mean"] == pytest.approx(statistics.fmean(numbers), rel=1e-11, abs=1e-3)
    assert column["stdev"] == pytest.approx(statistics.stdev(numbers), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize(
    "cell", ["1,234", "$5", "nan", "inf", "-Infinity", "1_000", "0x10", "1e999", "9" * 5000, "12 kg"]
)
def test_what_only_looks_like_a_number_is_text(data: DataProcessor, write: Write, cell: str) -> None:
    """These cells are text, so no sum is made of them; a number beside them does not change that."""
    write("t.jsonl", json.dumps({"n": cell}) + '\n{"n": 1}\n')

    column = data.describe("t.jsonl")["columns"]["n"]

    assert column["type"] == "text"
    assert column["distinct"] == 2


@pytest.mark.parametrize("number", ["9" * 399, "9" * 5000, "1e999", "-1e999"])
def test_numbers_in_json_beyond_all_floats_are_text(data: DataProcessor, write: Write, number: str) -> None:
    """A number that no float holds is text: neither infinity nor an exception of another kind."""
    write("t.json", f'[{{"n": {number}}}, {{"n": 2}}]')

    assert data.describe("t.json")["columns"]["n"]["type"] == "text"


def test_sum_beyond_all_floats_is_null(data: DataProcessor, write: Write) -> None:
    """JSON has no infinity: what overflows is null."""
    write("t.csv", "n\n1e308\n1e308\n-1e308\n")

    described = data.describe("t.csv")

    assert described["columns"]["n"]["sum"] is None
    assert json_size(described) < 1000


def test_missing_cells_are_counted(data: DataProcessor, write: Write) -> None:
    """Empty cells, null and absent keys are missing; they are neither zeros nor values."""
    write("t.csv", "a,b\n1,\n , x\n3,y\n")
    write("t.jsonl", '{"a": 1}\n{"b": 2, "a": null}\n{"a": 3}\n')

    table, lines = data.describe("t.csv")["columns"], data.describe("t.jsonl")["columns"]

    assert (table["a"]["count"], table["a"]["missing"], table["a"]["mean"]) == (2, 1, 2)
    assert (table["b"]["count"], table["b"]["missing"], table["b"]["distinct"]) == (2, 1, 2)
    assert (lines["a"]["missing"], lines["b"]["missing"]) == (1, 2)


def test_distinct_values_are_exact_up_to_a_limit(data: DataProcessor, write: Write) -> None:
    """Beyond a thousand values, the number is called what it is: a lower bound."""
    write("t.csv", "few,many\n" + "".join(f"x{n % 1000},y{n}\n" for n in range(1001)))

    columns = data.describe("t.csv")["columns"]

    assert columns["few"]["distinct"] == 1000
    assert columns["many"]["distinct_at_least"] == 1000 and "distinct" not in columns["many"]


def test_text_is_described_by_its_words(data: DataProcessor, write: Write) -> None:
    """A plain text has lines, words, characters and most common words, and no columns."""
    write("t.txt", "The cat.\nThe dog, the end\n")

    described = data.describe("t.txt")

    assert (described["lines"], described["words"], described["characters"]) == (2, 6, 26)
    assert described["most_common"]["the"] == 3
    assert described["columns"] == {}


def test_result_of_5000_columns_is_small(data: DataProcessor, write: Write) -> None:
    """5,000 columns with long names and values are read; the result says how many of them it leaves out."""
    names = [f"\N{GRINNING FACE}column {n} " + "x" * 100 for n in range(5000)]
    write("t.csv", ",".join(names) + "\n" + (",".join(["\x01" * 100] * 5000) + "\n") * 3)

    described, loaded = data.describe("t.csv"), data.load_file("t.csv")

    assert len(described["columns"]) + described["columns_left_out"] == 5000
    assert len(loaded["columns"]) + loaded["columns_left_out"] == 5000
    assert json_size(described) < 100_000 and json_size(loaded) < 100_000


def test_half_a_surrogate_pair_can_be_stored(data: DataProcessor, write: Write) -> None:
    """JSON text may hold what UTF-8 cannot: it is shown escaped, as a column and as a value."""
    write("t.jsonl", r'{"\ud800": "\udc00", "a": 1}' + "\n")

    results = [
        data.load_file("t.jsonl"),
        data.describe("t.jsonl"),
        data.group_by("t.jsonl", "a", how="count"),
    ]

    assert all(json_size(result) for result in results)
    assert results[1]["columns"][r"\ud800"]["top"] == {r"\udc00": 1}


@given(value=st.text() | st.integers() | st.lists(st.text()))
def test_label_is_short_and_printable(value: Any) -> None:
    """Any value has a label that fits into a line."""
    assert label(value).isprintable()
    assert len(label(value)) <= agent_tools.MAX_LABEL_CHARS


def test_long_values_are_told_apart() -> None:
    """Two long values that differ only in their last character are two."""
    assert label("x" * 500 + "1") != label("x" * 500 + "2")


# -- tables with flaws --------------------------------------------------------------------------------------
def test_ragged_rows_are_counted(data: DataProcessor, write: Write) -> None:
    """Rows with too few or too many cells are no error: a warning counts them."""
    write("t.csv", "a,b\n1,2\n3\n4,5,6\n")

    described = data.describe("t.csv")

    assert described["columns"]["a"]["sum"] == 8
    assert (described["columns"]["b"]["sum"], described["columns"]["b"]["missing"]) == (7, 1)
    assert described["warnings"] == ["2 row(s) have more or fewer cells than there are columns"]


@given(names=st.lists(st.sampled_from(["", "a", "b", "a (2)", "a (3)", "column 1", "column 2"])))
def test_column_names_are_made_unique(names: list[str]) -> None:
    """However empty or equal the names, each column gets one of its own, and the first of equals keeps it."""
    result = unique(names)

    assert len(set(result)) == len(names) and "" not in result
    assert all(name in result for name in names if name)


def test_equal_column_names_lose_no_column(data: DataProcessor, write: Write) -> None:
    """The second of two equal names, and a nameless column, can be asked for."""
    write("t.csv", "a,a,\n1,20,300\n")

    columns = data.describe("t.csv")["columns"]

    assert {name: column["sum"] for name, column in columns.items()} == {"a": 1, "a (2)": 20, "column 3": 300}


def test_field_of_200_kb_is_read(data: DataProcessor, write: Write) -> None:
    """A cell longer than the csv module's default limit is a cell like others."""
    write("t.csv", f"a,b\n{'x' * 200_000},1\n")

    assert data.describe("t.csv")["columns"]["b"]["sum"] == 1


def test_header_without_rows_is_a_table(data: DataProcessor, write: Write) -> None:
    """A table of no rows has its columns, all empty; it can be grouped, into nothing."""
    write("t.csv", "a,b\n")

    assert data.load_file("t.csv")["rows"] == 0
    assert data.describe("t.csv")["columns"]["a"]["count"] == 0
    assert data.group_by("t.csv", "a", "b")["groups"] == {}


# -- group_by and find_outliers -----------------------------------------------------------------------------
@given(rows=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(-1000, 1000)), min_size=1))
@PROPERTY
def test_group_by_agrees_with_python(data: DataProcessor, rows: list[tuple[str, int]]) -> None:
    """Sum, mean, min, max and count of each group are what plain Python makes of it."""
    (data.data_root / "t.csv").write_text("k,n\n" + "".join(f"{key},{number}\n" for key, number in rows))
    groups: dict[str, list[int]] = {}
    for key, number in rows:
        groups.setdefault(key, []).append(number)

    measures = {"sum": sum, "mean": statistics.fmean, "min": min, "max": max, "count": len}
    for how, measure in measures.items():
        found = data.group_by("t.csv", "k", "n", how)["groups"]

        assert found == pytest.approx({key: measure(group) for key, group in groups.items()})


def test_group_by_skips_and_counts_what_is_no_number(data: DataProcessor, write: Write) -> None:
    """A cell that is no number takes no part, and is counted; a missing key is a group."""
    write("t.csv", "k,n\nx,1\nx,\nx,n/a\n,2\n")

    result = data.group_by("t.csv", "k", "n")

    assert result["groups"] == {"(missing)": 2, "x": 1}
    assert result["skipped"] == 2


def test_group_by_without_value_counts_rows(data: DataProcessor, write: Write) -> None:
    """Where no number column is named, rows are counted."""
    write("t.csv", "k\nx\ny\nx\n")

    result = data.group_by("t.csv", "k")

    assert (result["how"], result["groups"]) == ("count", {"x": 2, "y": 1})


def test_group_by_refuses_too_many_groups(data: DataProcessor, write: Write) -> None:
    """10,000 groups are grouped, and the largest shown; one more is an error that says what to do."""
    rows = "".join(f"k{n},{n}\n" for n in range(10_000))
    write("most.csv", "k,n\n" + rows)
    write("more.csv", "k,n\n" + rows + "another,1\n")

    result = data.group_by("most.csv", "k", "n")

    assert next(iter(result["groups"])) == "k9999"
    assert len(result["groups"]) + result["groups_left_out"] == 10_000
    assert_refused(lambda: data.group_by("more.csv", "k", "n"), "k has over 10,000 values", "another column")


def test_find_outliers_names_the_rows(data: DataProcessor, write: Write) -> None:
    """The rows beyond z standard deviations are told by number (the first is 1), of many the first 20."""
    write("t.csv", "n\n" + "1\n2\n" * 500 + "1000\n" * 25)
    write("one.csv", "n\n" + "1\n2\n" * 20 + "-500\n" + "3\n")

    many, one = data.find_outliers("t.csv", "n"), data.find_outliers("one.csv", "n", z=4)

    assert many["count"] == 25 and len(many["outliers"]) == 20
    assert many["outliers"][0] == {"row": 1001, "value": 1000}
    assert one["outliers"] == [{"row": 41, "value": -500}]


def test_equal_numbers_have_no_outliers(data: DataProcessor, write: Write) -> None:
    """Without any deviation nothing is far from the mean."""
    write("t.csv", "n\n" + "0.1\n" * 10)

    assert data.find_outliers("t.csv", "n")["count"] == 0


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_unknown_column_is_refused(data: DataProcessor, write: Write, name: str) -> None:
    """The message names the column that is lacking and those that there are."""
    write(name, "k,n\nx,1\n" if name.endswith("csv") else '{"k": "x", "n": 1}\n')

    assert_refused(lambda: data.group_by(name, "price"), "no column 'price'", "k, n")
    assert_refused(lambda: data.group_by(name, "k", "price"), "no column 'price'", "k, n")
    assert_refused(lambda: data.find_outliers(name, "price"), "no column 'price'", "k, n")


@pytest.mark.parametrize(
    "arguments",
    [
        {"by": None},
        {"by": ["k"]},
        {"by": "k", "value": 1},
        {"by": "k", "how": "median"},
        {"by": "k", "how": {}},
        {"by": "k", "how": "mean"},
    ],
)
def test_group_by_refuses_the_unfit(data: DataProcessor, write: Write, arguments: dict[str, Any]) -> None:
    """Whatever JSON value an LLM passes, the answer is a ToolError."""
    write("t.csv", "k,n\nx,1\n")

    assert_refused(lambda: data.group_by("t.csv", **arguments))


@pytest.mark.parametrize("z", [0, -1, "x", None, [], math.nan, math.inf, True])
def test_find_outliers_refuses_unfit_z(data: DataProcessor, write: Write, z: Any) -> None:
    """z must be a number above zero."""
    write("t.csv", "n\n1\n")

    assert_refused(lambda: data.find_outliers("t.csv", "n", z), "z =", "above 0")


def test_find_outliers_needs_numbers(data: DataProcessor, write: Write) -> None:
    """A column of words has no outliers to look for."""
    write("t.csv", "k\nx\n")

    assert_refused(lambda: data.find_outliers("t.csv", "k"), "column k of t.csv has no numbers")


# -- what is no data file -----------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["nothing.csv", "a/b/c.csv", "line\nbreak", "\x1b[31m"])
def test_missing_file_is_refused(data: DataProcessor, file: str) -> None:
    """The message names the file (without the control characters in it) and where it was looked for."""
    assert_refused(lambda: data.load_file(file), "no such file", str(data.data_root))


@pytest.mark.parametrize("file", ["x" * 300, "a/" * 3000, "nul\0.csv", "\ud800", "file.csv/inside"])
def test_impossible_names_are_refused(data: DataProcessor, write: Write, file: str) -> None:
    """A name too long, one with a NUL or half a surrogate pair, or a path through a file: one clear line."""
    write("file.csv", "a\n1\n")

    assert_refused(lambda: data.load_file(file), "cannot be a file")


@pytest.mark.parametrize("file", [None, 7, True, ["t.csv"], {"file": "t.csv"}])
def test_names_that_are_no_text_are_refused(data: DataProcessor, file: Any) -> None:
    """An LLM may pass any JSON value."""
    assert_refused(lambda: data.load_file(file), "expected text")


def test_empty_files_are_refused(data: DataProcessor, write: Write) -> None:
    """An empty file, and gzip of nothing."""
    write("t.csv", b"")
    write("t.csv.gz", gzip.compress(b""))

    assert_refused(lambda: data.load_file("t.csv"), "t.csv is empty")
    assert_refused(lambda: data.describe("t.csv.gz"), "t.csv.gz is empty")


def test_directory_is_refused(data: DataProcessor) -> None:
    """A directory, the data root too."""
    (data.data_root / "folder").mkdir()

    for file in ("folder", ".", ""):
        assert_refused(lambda file=file: data.load_file(file), "is a directory")


def test_fifo_and_socket_are_refused_without_waiting(data: DataProcessor, monkeypatch: Patch) -> None:
    """To open a FIFO would wait for its writer, for ever."""
    os.mkfifo(data.data_root / "fifo")
    monkeypatch.chdir(data.data_root)  # the path of a socket may have about 100 characters only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")

        for file in ("fifo", "socket"):
            assert_refused(lambda file=file: data.load_file(file), "is a device, FIFO or socket")


def test_device_is_refused() -> None:
    """/dev/zero would be read for ever."""
    assert_refused(lambda: DataProcessor(Path("/dev")).load_file("zero"), "is a device, FIFO or socket")


def test_fifo_put_in_place_after_the_check_does_not_block(data: DataProcessor, monkeypatch: Patch) -> None:
    """Should somebody exchange the file between check and opening, it is opened without waiting."""
    os.mkfifo(data.data_root / "t.csv")
    monkeypatch.setattr(agent_tools, "checked_path", lambda root, file: root / file)

    assert_refused(lambda: data.load_file("t.csv"))


@pytest.mark.parametrize(
    "file", ["../secret.csv", "/etc/passwd", "link.csv", "folder/secret.csv", "a/../../secret.csv"]
)
def test_files_outside_the_data_root_are_refused(data: DataProcessor, file: str) -> None:
    """Neither `..` nor an absolute path nor a symbolic link (to a file, to a folder) leads out."""
    secret = data.data_root.parent / "secret.csv"
    secret.write_text("password\n1234\n")
    (data.data_root / "link.csv").symlink_to(secret)
    (data.data_root / "folder").symlink_to(data.data_root.parent)

    assert_refused(lambda: data.load_file(file), "outside the data root")


def test_root_with_the_same_beginning_is_outside(data: DataProcessor) -> None:
    """/x/data-private is not inside /x/data."""
    private = data.data_root.with_name("data-private")
    private.mkdir()
    (private / "t.csv").write_text("a\n1\n")

    assert_refused(lambda: data.load_file("../data-private/t.csv"), "outside the data root")


def test_paths_that_stay_inside_are_read(data: DataProcessor, write: Write) -> None:
    """An absolute path, `..` and a symbolic link are fine as long as they end inside the root."""
    write("t.csv", "a\n1\n")
    (data.data_root / "folder").mkdir()
    (data.data_root / "link.csv").symlink_to("t.csv")

    for file in (str(data.data_root / "t.csv"), "folder/../t.csv", "link.csv"):
        assert data.load_file(file)["rows"] == 1


def test_data_root_may_be_a_link(data: DataProcessor, write: Write) -> None:
    """Root and file are both resolved before they are compared."""
    write("t.csv", "a\n1\n")
    link = data.data_root.with_name("link")
    link.symlink_to(data.data_root)

    assert DataProcessor(link).load_file("t.csv")["rows"] == 1


def test_loop_of_links_is_refused(data: DataProcessor) -> None:
    """Two links that lead to each other lead to no file."""
    (data.data_root / "a").symlink_to("b")
    (data.data_root / "b").symlink_to("a")

    assert_refused(lambda: data.load_file("a"))


def test_link_put_in_place_after_the_check_is_not_followed(
    data: DataProcessor, write: Write, monkeypatch: Patch
) -> None:
    """A file that became a link between check and opening is refused."""
    write("t.csv", "a\n1\n")
    (data.data_root / "link.csv").symlink_to("t.csv")
    monkeypatch.setattr(agent_tools, "checked_path", lambda root, file: root / file)

    assert_refused(lambda: data.load_file("link.csv"), "cannot read link.csv")


def test_file_without_permission_is_refused(data: DataProcessor, write: Write, monkeypatch: Patch) -> None:
    """The system's "permission denied" (simulated, since root may read all) becomes one clear line."""
    write("t.csv", "a\n1\n")

    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(agent_tools.os, "open", denied)

    with pytest.raises(ToolError, match=r"cannot read t\.csv: Permission denied"):
        data.load_file("t.csv")


@pytest.mark.parametrize("content", [PNG, ELF, ZIP, bytes(range(1, 256)) * 20, gzip.compress(PNG, mtime=0)])
@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.txt", "t"])
def test_binary_content_is_refused(data: DataProcessor, write: Write, name: str, content: bytes) -> None:
    """An image, a program or an archive is called binary, whatever its name."""
    write(name, content)

    assert_refused(lambda: data.load_file(name), f"{name} is binary")


def test_nul_after_the_sample_is_refused_with_its_line(data: DataProcessor, write: Write) -> None:
    """A NUL far down in a table is named by its line; one at the top, too."""
    write("late.csv", b"a,b\n" + b"1,2\n" * 20_000 + b"3\0,4\n")
    write("early.csv", b"a,b\n1,2\n3\0,4\n")

    assert_refused(lambda: data.load_file("late.csv"), "late.csv, line 20002 has a NUL")
    assert_refused(lambda: data.load_file("early.csv"), "early.csv is binary or damaged", "line 3")


@pytest.mark.parametrize("keep", [5, 15, -20, -4])
def test_truncated_gzip_is_refused(data: DataProcessor, write: Write, keep: int) -> None:
    """A gzip file cut within its header, its data or its checksum is damaged: no rows are made of it."""
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 50_000)
    write("t.csv.gz", packed[:keep])

    assert_refused(lambda: data.load_file("t.csv.gz"), "t.csv.gz is damaged gzip")


@pytest.mark.parametrize("place", [2, 30, -6])
def test_corrupt_gzip_is_refused(data: DataProcessor, write: Write, place: int) -> None:
    """A wrong byte in the method, the data or the checksum is noticed."""
    packed = bytearray(gzip.compress(os.urandom(2000).hex().encode()))
    packed[place] ^= 0xFF
    write("t.txt.gz", bytes(packed))

    assert_refused(lambda: data.load_file("t.txt.gz"), "t.txt.gz is damaged gzip")


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.jsonl", "t.json", "t.csv.gz"])
def test_endless_line_is_refused(data: DataProcessor, write: Write, monkeypatch: Patch, name: str) -> None:
    """A file without line breaks is not read whole (with a lower limit here, so that the file is small)."""
    monkeypatch.setattr(agent_tools, "MAX_RECORD_CHARS", 100_000)
    content = (b'["' if name == "t.json" else b"") + b"x" * 400_000
    write(name, gzip.compress(content) if name.endswith("gz") else content)

    assert_refused(lambda: data.load_file(name), "100,000 characters")


def test_too_long_lines_and_fields_are_refused_at_the_true_limit(data: DataProcessor, write: Write) -> None:
    """20 MB without a line break, a field of 12 MB, and one of 12 MB in quotes and lines: none is kept whole."""
    write("line.csv", b"x" * 20_000_000)
    write("field.csv", b"a,b\n" + b"x" * 12_000_000 + b",1\n")
    write("quoted.csv", b'a,b\n"' + b"xxxxxxxxxxx\n" * 1_000_000 + b'",1\n')

    for name in ("line.csv", "field.csv", "quoted.csv"):
        assert_refused(lambda name=name: data.load_file(name), name, "over 3,000,000 characters")


def test_quote_left_open_is_refused(data: DataProcessor, write: Write, monkeypatch: Patch) -> None:
    """A quote without its end does not swallow the rest of a large file."""
    monkeypatch.setattr(agent_tools, "MAX_RECORD_CHARS", 10_000)
    write("t.csv", 'a,b\n1,"2\n' + "3,4\n" * 5_000)

    assert_refused(lambda: data.load_file("t.csv"), "over 10,000 characters", "quote")


def test_too_many_columns_are_refused(data: DataProcessor, write: Write) -> None:
    """A header of a million commas is no table."""
    write("t.csv", "," * 1_000_000 + "\n1\n")

    assert_refused(lambda: data.load_file("t.csv"), "over 20,000 columns")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t.json", "[" * 100_000, "nested too deep"),
        ("t.json", '{"a":' * 100_000, "nested too deep"),
        ("t.jsonl", '{"a": 1}\n' + "[" * 100_000, "nested too deep"),
        ("t.json", '[{"n": NaN}]', "NaN"),
        ("t.json", '{"n": -Infinity}', "-Infinity"),
        ("t.jsonl", '{"n": 1}\n{"n": Infinity}\n', "line 2 is not JSON: Infinity"),
        ("t.jsonl", '{"n": 1}\n\n{"n": 2\n{"n": 3}\n', "line 3 is not JSON"),
        ("t.json", "[1 2]", 'no "," or "]"'),
        ("t.json", "[1,,2]", "not JSON near ',2]'"),
        ("t.json", '[{"a": 1}, {"a": 2}', "not JSON"),
        ("t.json", '[{"a": 1', "not JSON"),
        ("t.json", "[1] 2", "more after the array's end"),
        ("t.json", "hello", "not JSON"),
    ],
)
def test_bad_json_is_refused(data: DataProcessor, write: Write, name: str, content: str, part: str) -> None:
    """Broken, too deep, or with numbers that JSON does not know: one line that names the place."""
    write(name, content)

    assert_refused(lambda: data.describe(name), name, part)


@given(content=st.binary(max_size=300), name=st.sampled_from(["t", "t.csv", "t.json", "t.jsonl", "t.txt"]))
@settings(PROPERTY, max_examples=150)
def test_any_bytes_give_a_result_or_a_tool_error(data: DataProcessor, content: bytes, name: str) -> None:
    """No content of a file makes a tool raise anything else, or return what JSON cannot hold."""
    (data.data_root / name).write_bytes(content)

    for action in (data.load_file, data.describe):
        try:
            result = action(name)
        except ToolError as error:
            assert str(error).isprintable()
        else:
            assert json_size(result) < 100_000


# -- memory -------------------------------------------------------------------------------------------------
MEASURE = """
import json, resource, sys
from pathlib import Path
from agent_tools import DataProcessor
result = DataProcessor(Path(sys.argv[1])).load_file(sys.argv[2])
try:
    peak_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
except OSError:  # no Linux. There, getrusage() would count the memory of who started this process, too
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps([result["rows"], peak_kb]))
"""


@pytest.mark.parametrize("name", ["big.csv.gz", "big.json.gz", "big.csv"])
def test_large_file_takes_little_memory(data: DataProcessor, name: str) -> None:
    """118 MB of rows are read with less than 80 MB of memory: plain, zipped, and as one JSON array."""
    is_json = "json" in name
    row = json.dumps({"n": 1, "text": "x" * 1000}) + "," if is_json else f"1,{'x' * 1000}\n"
    path = data.data_root / name
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as file:
        file.write(b"[" if is_json else b"n,text\n")
        for _ in range(118):
            file.write((row * 1000).encode())
        file.write(b"{}]" if is_json else b"")

    command = [sys.executable, "-c", MEASURE, str(data.data_root), name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    rows, peak_kb = json.loads(run.stdout)

    assert rows == 118_000 + is_json
    assert peak_kb < 80_000


MEASURE_ALL = """
import json, sys
from pathlib import Path
from agent_tools import DataProcessor
data = DataProcessor(Path(sys.argv[1]))
rows = data.load_file("big.csv")["rows"]
described = data.describe("big.csv")["columns"]["n"]
groups = data.group_by("big.csv", "key", "n")["groups"]
outliers = data.find_outliers("big.csv", "n")["count"]
peak_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps([rows, described["sum"], groups, outliers, peak_kb]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read from /proc")
def test_all_data_tools_on_a_large_file_take_little_memory(data: DataProcessor) -> None:
    """The four tools in turn on 100 MB of CSV agree with the numbers written, in under 200 MB of memory."""
    blocks, block = 100, [(f"k{n % 3}", n) for n in range(1000)]
    rows = "".join(f"{key},{n},{'x' * 990}\n" for key, n in block).encode()
    with (data.data_root / "big.csv").open("wb") as file:
        file.write(b"key,n,text\n")
        for _ in range(blocks):
            file.write(rows)

    command = [sys.executable, "-c", MEASURE_ALL, str(data.data_root)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    count, total, groups, outliers, peak_kb = json.loads(run.stdout)

    expected = {f"k{k}": blocks * sum(n for key, n in block if key == f"k{k}") for k in range(3)}
    assert (count, total, outliers) == (100_000, blocks * sum(range(1000)), 0)
    assert groups == expected
    assert peak_kb < 200_000


# -- email --------------------------------------------------------------------------------------------------
@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def read(path: str | Path) -> EmailMessage:
    message = message_from_bytes(Path(path).read_bytes(), policy=policy.default)
    assert isinstance(message, EmailMessage)
    return message


def test_email_becomes_a_file(outbox: Path, monkeypatch: Patch) -> None:
    """Without a server, a message with all that RFC 5322 asks for is in the outbox, and nothing beside it."""
    monkeypatch.setenv("MAIL_FROM", "robot@example.org")

    result = EmailSender(outbox, None).send("a@example.org", "Größe: 5 €", "Zeile eins\nZeile zwei ü\n")

    message = read(result["file"])
    assert message["From"] == "robot@example.org" and message["To"] == "a@example.org"
    assert message["Subject"] == "Größe: 5 €"
    assert message.get_content() == "Zeile eins\nZeile zwei ü\n"
    assert message["Date"].datetime and message["Message-ID"] == result["message_id"]
    assert [path.name for path in outbox.iterdir()] == [Path(result["file"]).name]


@pytest.mark.parametrize(
    "to",
    [["a@example.org", "b@example.org"], "a@example.org, b@example.org", "Ann <a@example.org>,b@example.org"],
)
def test_several_recipients(outbox: Path, to: str | list[str]) -> None:
    """Recipients are a list, or text with commas; names beside the addresses are left out."""
    result = EmailSender(outbox, None).send(to, "s", "b")

    assert read(result["file"])["To"] == "a@example.org, b@example.org"


def test_same_message_id_sends_once(outbox: Path) -> None:
    """A task that is tried again sends no second message, and learns what it learned the first time."""
    sender = EmailSender(outbox, None)

    first = sender.send("a@example.org", "s", "first", message_id="task-7")
    content = Path(first["file"]).read_bytes()
    second = sender.send("a@example.org", "s", "second", message_id="task-7")

    assert second == {**first, "already_sent": True}
    assert Path(first["file"]).name == "task-7.eml"
    assert Path(first["file"]).read_bytes() == content


def test_messages_without_id_are_all_sent(outbox: Path) -> None:
    """Two equal messages without message_id are two messages."""
    sender = EmailSender(outbox, None)

    files = {sender.send("a@example.org", "s", "b")["file"] for _ in range(2)}

    assert len(files) == 2


@pytest.mark.parametrize("message_id", ["../../evil", "/etc/passwd", "a\nBcc: x", "x" * 5000, "\ud800", ".."])
def test_message_id_cannot_leave_the_outbox(outbox: Path, message_id: str) -> None:
    """Whatever the id holds, it is one file in the outbox and one header."""
    result = EmailSender(outbox, None).send("a@example.org", "s", "b", message_id)

    assert Path(result["file"]).resolve().parent == outbox.resolve()
    assert read(result["file"])["Bcc"] is None


def test_message_ids_that_look_alike_are_two(outbox: Path) -> None:
    """Ids that differ only in characters unfit for file names do not count as sent already."""
    sender = EmailSender(outbox, None)

    results = [sender.send("a@example.org", "s", "b", message_id) for message_id in ("t/1", "t_1", "t 1")]

    assert len({result["file"] for result in results}) == 3
    assert not any("already_sent" in result for result in results)


@pytest.mark.parametrize(
    "arguments",
    [
        {"subject": "x\r\nBcc: victim@example.org"},
        {"subject": "x\nBcc: victim@example.org"},
        {"subject": "x\u2028y"},
        {"subject": "\ud800"},
        {"subject": None},
        {"body": None},
        {"body": "\ud800"},
        {"body": {"text": "x"}},
        {"to": "a@example.org\nBcc: victim@example.org"},
        {"to": ["a@example.org", "b@example.org\r\nX: y"]},
        {"to": "nobody"},
        {"to": "a@b@c"},
        {"to": ""},
        {"to": []},
        {"to": [7]},
        {"to": None},
        {"to": "jürgen@example.org"},
        {"to": "<script>@example.org"},
        {"to": "a@example.org, nobody"},
        {"message_id": 7},
    ],
)
def test_unfit_emails_are_refused(outbox: Path, arguments: dict[str, Any]) -> None:
    """Line breaks in headers, what is no address, and what is no text: a ToolError, and no file."""
    fit = {"to": "a@example.org", "subject": "s", "body": "b"}

    assert_refused(lambda: EmailSender(outbox, None).send(**{**fit, **arguments}))

    assert not outbox.exists()


def test_line_break_in_mail_from_is_refused(outbox: Path, monkeypatch: Patch) -> None:
    """The environment cannot add headers either."""
    monkeypatch.setenv("MAIL_FROM", "a@example.org\nBcc: victim@example.org")

    assert_refused(lambda: EmailSender(outbox, None).send("a@example.org", "s", "b"))


def test_outbox_that_cannot_be_written_is_unavailable(outbox: Path) -> None:
    """A full disk or a missing permission may pass: the task is tried again."""
    outbox.write_text("a file where the folder should be")

    with pytest.raises(ToolUnavailable, match="cannot write"):
        EmailSender(outbox, None).send("a@example.org", "s", "b", "task-7")


def test_failed_write_leaves_nothing(outbox: Path, monkeypatch: Patch) -> None:
    """When the disk is full halfway, neither the message nor a part of it stays."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent_tools.os, "fsync", full)

    with pytest.raises(ToolUnavailable, match="No space left"):
        EmailSender(outbox, None).send("a@example.org", "s", "b", "task-7")

    assert list(outbox.iterdir()) == []


class SMTPHandler(socketserver.StreamRequestHandler):
    """Speak as much SMTP as a client needs; `server.answers` overrides what is said to a command."""

    timeout = 10

    def handle(self) -> None:
        answers: dict[str, str] = self.server.answers  # type: ignore[attr-defined]
        self.say(answers.get("greeting", "220 ready"))
        while line := self.rfile.readline().decode().strip():
            command = line.split()[0].upper()
            self.server.commands.append(line)  # type: ignore[attr-defined]
            usual = {
                "EHLO": "250-me\r\n250 AUTH PLAIN",
                "AUTH": "235 welcome",
                "DATA": "354 go on",
                "QUIT": "221 bye",
            }
            answer = answers.get(line) or answers.get(command) or usual.get(command, "250 fine")
            if answer == "hang up":
                return
            self.say(answer)
            if answer.startswith("354"):
                lines = list(iter(self.rfile.readline, b".\r\n"))
                if answers.get("message") == "hang up":
                    return
                self.say(answers.get("message", "250 accepted"))
                self.server.messages.append(b"".join(lines))  # type: ignore[attr-defined]
            if command == "QUIT":
                return

    def say(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")


@contextmanager
def smtp_server(answers: dict[str, str] | None = None) -> Iterator[Any]:
    """A server on loopback, with .url, .commands and .messages; it answers one client at a time."""
    with socketserver.TCPServer(("127.0.0.1", 0), SMTPHandler) as server:
        server.answers, server.commands, server.messages = answers or {}, [], []  # type: ignore[attr-defined]
        server.url = f"smtp://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


def test_smtp_server_gets_the_message(outbox: Path) -> None:
    """The server is told every recipient, and gets the message with its non-ASCII body."""
    with smtp_server() as server:
        EmailSender(outbox, server.url).send(["a@example.org", "b@example.org"], "Grüße", "ü" * 2000)

    message = message_from_bytes(server.messages[0], policy=policy.default)
    assert isinstance(message, EmailMessage)
    assert message["Subject"] == "Grüße" and message.get_content().strip() == "ü" * 2000
    assert sum(command.upper().startswith("RCPT") for command in server.commands) == 2


def test_same_message_id_is_sent_by_smtp_once(outbox: Path) -> None:
    """The copy in the outbox is the memory of what the server has accepted."""
    with smtp_server() as server:
        sender = EmailSender(outbox, server.url)
        first = sender.send("a@example.org", "s", "b", "task-7")
        second = sender.send("a@example.org", "s", "b", "task-7")

    assert second == {**first, "already_sent": True}
    assert len(server.messages) == 1


@pytest.mark.parametrize("answer", ["421 too busy", "hang up"])
def test_accepted_message_is_sent_whatever_follows(outbox: Path, answer: str) -> None:
    """A server that answers badly to QUIT has the message: failing now would send it once more."""
    with smtp_server({"QUIT": answer}) as server:
        result = EmailSender(outbox, server.url).send("a@example.org", "s", "b", "task-7")

    assert Path(result["file"]).exists()


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"greeting": "421 busy"}, ToolUnavailable),
        ({"greeting": "554 go away"}, ToolError),
        ({"MAIL": "451 later"}, ToolUnavailable),
        ({"MAIL": "550 no"}, ToolError),
        ({"RCPT": "450 mailbox busy"}, ToolUnavailable),
        ({"RCPT": "550 no such user"}, ToolError),
        ({"DATA": "451 later"}, ToolUnavailable),
        ({"DATA": "554 no"}, ToolError),
        ({"message": "452 full"}, ToolUnavailable),
        ({"message": "552 too large"}, ToolError),
        ({"MAIL": "hang up"}, ToolUnavailable),
        ({"message": "hang up"}, ToolUnavailable),
    ],
)
def test_smtp_refusals(outbox: Path, answers: dict[str, str], kind: type[Exception]) -> None:
    """5xx is for good, 4xx and a lost connection may pass; neither counts as sent."""
    with smtp_server(answers) as server, pytest.raises(kind) as caught:
        EmailSender(outbox, server.url).send("a@example.org", "s", "b", "task-7")

    assert type(caught.value) is kind
    assert str(caught.value).isprintable()
    assert not outbox.exists()


def test_some_refused_recipients_are_named(outbox: Path) -> None:
    """If the server takes the message for some, it is sent, and the result says for whom not."""
    with smtp_server({"rcpt TO:<b@example.org>": "550 no such user"}) as server:
        result = EmailSender(outbox, server.url).send("a@example.org, b@example.org", "s", "b")

    assert result["refused"] == ["b@example.org"]
    assert len(server.messages) == 1


@pytest.mark.parametrize(("answer", "kind"), [("535 pa$s/word", ToolError), ("454 wait", ToolUnavailable)])
def test_password_is_sent_and_never_shown(outbox: Path, answer: str, kind: type[Exception]) -> None:
    """The password of SMTP_URL (with its escapes) goes to the server only, even if the server repeats it."""
    with smtp_server({"AUTH": answer}) as server, pytest.raises(kind) as caught:
        url = server.url.replace("smtp://", "smtp://user:pa%24s%2Fword@")
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert any(command.startswith("AUTH PLAIN") for command in server.commands)
    assert "pa$s" not in str(caught.value) and "pa%24s" not in str(caught.value)


@pytest.mark.parametrize("word", ["pa$s/word", "AHVzZXIAcGEkcy93b3Jk"])
def test_answer_to_the_login_is_not_repeated(outbox: Path, word: str) -> None:
    """A server may quote what it was sent, as it is or in base64: of its answer only the code is shown."""
    with smtp_server({"AUTH": f"535 no {word}"}) as server, pytest.raises(ToolError, match="535") as caught:
        url = server.url.replace("smtp://", "smtp://user:pa%24s%2Fword@")
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert word not in str(caught.value)


def test_login_that_is_not_ascii_is_refused(outbox: Path) -> None:
    """smtplib cannot send such a login: a ToolError, in which (and behind which) no password stands."""
    with smtp_server() as server, pytest.raises(ToolError, match="not ASCII") as caught:
        url = server.url.replace("smtp://", "smtp://user:gehe%C3%ADm@")
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert "gehe" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert server.messages == []


@pytest.mark.parametrize("asked", ["starttls=yes", "starttls=true", "starttls=", "starttls"])
def test_misspelt_starttls_is_refused_before_connecting(outbox: Path, asked: str) -> None:
    """A wish for encryption that is not understood is not taken for "no": nothing is sent in the clear."""
    with smtp_server() as server, pytest.raises(ToolError, match="SMTP_URL is not like"):
        EmailSender(outbox, f"{server.url}?{asked}").send("a@example.org", "s", "b")

    assert server.commands == []


def test_starttls_that_is_not_offered_is_refused(outbox: Path) -> None:
    """A message (and a password) that should be encrypted is not sent in the clear."""
    with smtp_server() as server, pytest.raises(ToolError, match="STARTTLS"):
        EmailSender(outbox, server.url + "?starttls=1").send("a@example.org", "s", "b")

    assert server.messages == []


def test_unreachable_server_is_unavailable(outbox: Path) -> None:
    """Nobody listens: another try makes sense."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen, so that connecting is refused
        port = probe.getsockname()[1]

        with pytest.raises(ToolUnavailable, match=f"cannot reach smtp://127.0.0.1:{port}"):
            EmailSender(outbox, f"smtp://u:secret@127.0.0.1:{port}").send("a@example.org", "s", "b")


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "host:25",
        "smtp://",
        "smtp://u:secret/x@host",
        "smtp://[::1",
        "smtp://h:99999",
        "smtp://h:0",
        "smtp://h:x",
        "smtp://a..b",
    ],
)
def test_unfit_smtp_url_is_refused(outbox: Path, url: str) -> None:
    """The message shows what such a URL looks like, and nothing of this one: it may hold a password."""
    with pytest.raises(ToolError, match="SMTP_URL is not like") as caught:
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert "secret" not in str(caught.value)


# -- the registry, and the samples --------------------------------------------------------------------------
def test_tools_have_names_and_descriptions(tmp_path: Path) -> None:
    """Each tool is named <class's name>.<method's name>; its first docstring line tells what it does."""
    tools = make_tools(tmp_path, tmp_path / "outbox", None)

    for name, tool in tools.items():
        assert name == f"{tool.__self__.name}.{tool.__name__}"  # type: ignore[attr-defined]
        assert (inspect.getdoc(tool) or "").partition("\n")[0].endswith(".")


@pytest.mark.parametrize("path", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_sample_can_be_described(path: Path) -> None:
    """Each file in sample_data is read without a warning, is small, and stands in its README."""
    described = DataProcessor(SAMPLES).describe(path.name)

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

    described = DataProcessor(SAMPLES).describe(name)

    numbers = {key: column for key, column in described["columns"].items() if column["type"] == "number"}
    assert described["rows"] == len(rows) and list(described["columns"]) == list(rows[0])
    assert numbers
    for key, column in numbers.items():
        cells = [float(row[key]) for row in rows if row[key] not in ("", None)]
        expected = {"count": len(cells), "missing": len(rows) - len(cells), "min": min(cells), "max": max(cells)}
        expected |= {"sum": math.fsum(cells), "mean": statistics.fmean(cells), "stdev": statistics.stdev(cells)}
        assert {measure: column[measure] for measure in expected} == pytest.approx(expected)


def test_sales_results_are_those_of_the_file() -> None:
    """The numbers that the tutorial shows of sales.csv are those that plain Python finds in it."""
    with (SAMPLES / "sales.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    revenues = [float(row["revenue"]) for row in rows if row["revenue"]]
    north = sum(float(row["revenue"] or 0) for row in rows if row["region"] == "north")
    data = DataProcessor(SAMPLES)

    revenue = data.describe("sales.csv")["columns"]["revenue"]
    groups = data.group_by("sales.csv", "region", "revenue")["groups"]
    outliers = data.find_outliers("sales.csv", "revenue")

    assert (revenue["count"], revenue["missing"]) == (len(revenues), 1)
    assert revenue["sum"] == pytest.approx(sum(revenues))
    assert groups["north"] == pytest.approx(north)
    assert outliers["count"] == 2
    for found in outliers["outliers"]:
        assert float(rows[found["row"] - 1]["revenue"]) == found["value"] >= sorted(revenues)[-2]
