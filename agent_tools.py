"""The agent's real tools: look at data files, send email. No Redis, no LLM: plain functions, testable alone.

A tool is a method that takes JSON values and returns a small JSON object. It raises ToolError for wrong input
(the same call will fail again), ToolUnavailable for what may pass by itself (it is retried), nothing else.

To add a tool, two steps. Write a method; its first docstring line is what the LLM is told about it:

    def count_lines(self, file: str) -> dict[str, Any]:
        \"""Count the lines of a file.\"""
        with open_source(self.data_root, file) as source:
            return {"lines": sum(1 for _ in lines_of(source))}

And name it in make_tools(), at the end:  "data_processor.count_lines": data.count_lines
A real LLM then uses it by itself; the mock one needs a rule in mock_llm.py.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import smtplib
import ssl
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, getaddresses, make_msgid
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import parse_qs, unquote, urlsplit

import charset_normalizer

SAMPLE_BYTES = 64 * 1024  # what encoding and format are judged by
CHUNK_CHARS = 256 * 1024  # of a JSON array, read at a time
MAX_RECORD_CHARS = 3_000_000  # of a line, CSV record or JSON element; as objects it may be 50 times larger
MAX_COLUMNS = 20_000
MAX_DISTINCT = 1_000  # values counted exactly per column
MAX_COUNTED = 100_000  # values counted over all columns: 5,000 columns must not fill the memory
MAX_WORDS = 100_000
MAX_GROUPS = 10_000
MAX_LABEL_CHARS = 60  # of a column's name or a value, as counted and shown
COLUMNS_SHOWN = 50
GROUPS_SHOWN = 100
OUTLIERS_SHOWN = 20
FIGURES = ("min", "max", "mean", "stdev", "sum")  # of a number column
MEASURES = ("count", "sum", "mean", "min", "max")  # of a group
SMTP_SECONDS = 10.0  # for each step of the conversation

BOMS = [  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]
UNLIKELY = ["utf_7", "utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"]  # never guessed by statistics
FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text", ".md": "text", ".log": "text"}
FORMATS |= {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # bytes that no text has
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # "1,234", "$5", "nan" and "inf" stay text
ADDRESS = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}", re.ASCII)
LINE_BREAK = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and all other control characters

Result = dict[str, Any]  # JSON, small
Tools = dict[str, Callable[..., Result]]


class ToolProblem(Exception):
    """A message of one line, whatever is quoted in it: it goes to logs, to terminals and to the LLM."""

    def __init__(self, message: str) -> None:
        message = message if message.isprintable() else repr(message)[1:-1]
        super().__init__(message if len(message) <= 500 else f"{message[:250]} … {message[-240:]}")


class ToolError(ToolProblem):
    """The input is wrong: the same call will fail again. The message says what, which value, what to do."""


class ToolUnavailable(ToolProblem):
    """Something outside does not answer now: the same call may work later."""


def require_text(**arguments: Any) -> None:
    """Raise ToolError for an argument that is not text: an LLM may pass any JSON value."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise ToolError(f"{name} = {value!r:.200}; expected text")


# -- opening a file -----------------------------------------------------------------------------------------
@dataclass
class Source:
    """An opened data file: its text, and what has been found out about it so far."""

    name: str
    text: TextIO
    format: str
    delimiter: str
    encoding: str
    guessed: bool  # the encoding, by statistics
    compressed: bool
    size_bytes: int
    columns: dict[str, None] = field(default_factory=dict)  # the names, in order of appearance
    ragged: int = 0
    undecodable: int = 0

    def read(self, chars: int) -> str:
        text = self.text.read(chars)
        self.undecodable += text.count("\ufffd")
        return text

    def warnings(self) -> list[str]:
        found = []
        if self.guessed:
            found.append(f"the encoding {self.encoding} is a guess; save the file as UTF-8 to be sure")
        if self.undecodable:
            found.append(f"{self.undecodable:,} character(s) are U+FFFD: not {self.encoding}, or damaged")
        if self.ragged:
            found.append(f"{self.ragged:,} row(s) have more or fewer cells than there are columns")
        return found


@contextmanager
def open_source(root: Path, file: str) -> Iterator[Source]:
    """Open a file below `root` as text, whatever its encoding, unzipped. Raise ToolError if that cannot be.

    The path is resolved before it is checked, symbolic links too. What remains is a race: who may write
    below `root` can put a link in a folder's place between check and opening (not in the file's: O_NOFOLLOW).
    """
    path = checked_path(root, file)
    try:
        with ExitStack() as stack:
            # O_NONBLOCK: should the file be a FIFO by now, opening it must not wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            raw = stack.enter_context(os.fdopen(descriptor, "rb"))
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = stack.enter_context(gzip.GzipFile(fileobj=raw)) if compressed else raw
            sample = data.read(SAMPLE_BYTES)
            data.seek(0)
            if not sample:
                raise ToolError(f"{file} is empty; name a file with data in it")
            if len(sample) == SAMPLE_BYTES:  # end with a whole line, lest a character be cut
                sample = sample[: sample.rfind(b"\n") + 1] or sample
            encoding, guessed = detect_encoding(sample, file)
            # newline="": the csv module wants to see line ends within quotes as they are
            text = io.TextIOWrapper(data, encoding=encoding, errors="replace", newline="")
            head = sample.decode(encoding, errors="ignore")
            delimiter, is_table = detect_delimiter(head)
            form, size_bytes = detect_format(path, head, is_table), os.fstat(descriptor).st_size
            stack.enter_context(text)
            yield Source(file, text, form, delimiter, encoding, guessed, compressed, size_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ToolError(f"{file} is damaged gzip ({error}); copy or compress it anew") from error
    except csv.Error as error:
        raise ToolError(f"{file} is not CSV: {error}") from error
    except RecursionError:
        raise ToolError(f"{file}: the JSON is nested too deep; flatten it") from None
    except OSError as error:
        raise ToolError(f"cannot read {file}: {error.strerror or error}; check its permissions") from error


def checked_path(root: Path, file: str) -> Path:
    require_text(file=file)
    try:
        path = (root / file).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ToolError(f"{file} is outside the data root {root}; name a file inside it")
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ToolError(f"no such file: {file} (looked in {root})") from None
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a NUL
        raise ToolError(f"{file} cannot be a file: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise ToolError(f"{file} is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise ToolError(f"{file} is a device, FIFO or socket; name a regular file")
    return path


def detect_encoding(sample: bytes, file: str) -> tuple[str, bool]:
    """Return the encoding, and whether it is a guess: by its mark, else UTF-16, UTF-8, else by statistics."""
    for mark, encoding in BOMS:
        if sample.startswith(mark):
            return encoding, False
    if b"\0" in sample:  # text has none, but UTF-16 of Latin text has one in every second place
        even, odd = sample[0::2], sample[1::2]
        for encoding, highs, lows in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
            if highs.count(0) > 0.6 * len(highs) and lows.count(0) < 0.05 * len(lows):
                return encoding, False
        line = sample.count(b"\n", 0, sample.index(0)) + 1
        raise ToolError(f"{file} is binary or damaged: a NUL byte in line {line}; name a text file")
    if len(sample) - len(sample.translate(None, CONTROLS)) > 2 + len(sample) // 100:
        raise ToolError(f"{file} is binary, full of control characters; name a text file")

    # subtle: final=False, since a character that the sample's end cuts is no error
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample, final=False)
    bad = len(re.findall("[\udc80-\udcff]", text))  # what that made of wrong bytes
    good = len(re.findall("[^\0-\x7f]", text)) - bad
    if good >= 10 * bad:  # UTF-8, or UTF-8 with a little damage
        return "utf-8", False
    guesses = charset_normalizer.from_bytes(sample, cp_exclusion=UNLIKELY)
    best = guesses.best()
    if best is None:
        raise ToolError(f"{file} is binary, or text in an unknown encoding; save it as UTF-8")
    # A few accents fit many code pages. cp1252 is by far the commonest: it wins unless another fits better.
    western = (m for m in guesses if "cp1252" in m.could_be_from_charset and m.coherence >= best.coherence)
    return ("cp1252" if any(western) else best.encoding), True


def detect_delimiter(head: str) -> tuple[str, bool]:
    """Return the likeliest delimiter, and whether the first lines (two at least) hold it equally often.

    Example: 'a;b\\n1,5;2\\n' -> (";", True)
    """
    lines = [re.sub(r'"[^"]*"', "", line) for line in re.split(r"\r\n?|\n", head)[:20] if line.strip()]

    def rank(delimiter: str) -> tuple[bool, int]:
        counts = [line.count(delimiter) for line in lines] or [0]
        return counts[0] > 0 and len(set(counts)) == 1, counts[0]

    best = max(",;\t|", key=rank)  # of equals the first
    return best, len(lines) > 1 and rank(best)[0]


def detect_format(path: Path, head: str, is_table: bool) -> str:
    """Return the format: by the name's suffix, else by what the file begins with."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    known = FORMATS.get(suffixes[-1]) if suffixes else None
    first, _, rest = head.strip().partition("\n")
    if known in (None, "json") and first.startswith("{") and rest:  # many a .json file is JSON Lines in truth
        with suppress(ValueError, RecursionError):
            json.loads(first)
            return "jsonl"
    return known or ("json" if first[:1] in ("{", "[") else "csv" if is_table else "text")


# -- reading rows -------------------------------------------------------------------------------------------
def lines_of(source: Source) -> Iterator[str]:
    """Yield the lines one at a time; refuse NULs and endless lines, count undecodable characters."""
    number = 0
    while line := source.text.readline(MAX_RECORD_CHARS):
        number += 1
        if len(line) == MAX_RECORD_CHARS:
            raise ToolError(f"{source.name}: line {number} is over {MAX_RECORD_CHARS:,} characters long")
        if "\0" in line:
            raise ToolError(f"{source.name}, line {number} has a NUL character: binary or damaged")
        source.undecodable += line.count("\ufffd")
        yield line


def rows_of(source: Source) -> Iterator[Result]:
    """Yield the rows as {column: value}, one at a time: a file of any size takes the memory of one row."""
    for value in values_of(source):
        row = value if isinstance(value, dict) else {"value": value}
        if not row.keys() <= source.columns.keys():
            add_columns(source, list(row))
        yield row


def values_of(source: Source) -> Iterator[Any]:
    if source.format == "json":
        yield from json_rows(source)
    elif source.format in ("csv", "tsv"):
        yield from table_rows(source)
    else:
        for number, line in enumerate(lines_of(source), start=1):
            if source.format == "text":
                yield {"line": line.rstrip("\r\n")}
            elif line.strip():
                yield parse_json(line, f"{source.name}, line {number}")


def add_columns(source: Source, names: list[str]) -> None:
    source.columns.update(dict.fromkeys(names))
    if max(len(names), len(source.columns)) > MAX_COLUMNS or max(map(len, names)) > 1_000:
        raise ToolError(f"{source.name}: over {MAX_COLUMNS:,} columns, or a name over 1,000 characters")


def table_rows(source: Source) -> Iterator[Result]:
    """Yield the records below the header. Missing cells are "", extra ones are dropped; both are counted."""
    taken = 0  # characters of the record that is being read

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in lines_of(source):
            taken += len(line)
            if taken > MAX_RECORD_CHARS:
                raise ToolError(f"{source.name}: record over {MAX_RECORD_CHARS:,} characters. Open quote?")
            yield line

    csv.field_size_limit(MAX_RECORD_CHARS)  # for the whole process; its default, 131,072, real fields exceed
    reader = csv.reader(lines(), delimiter="\t" if source.format == "tsv" else source.delimiter)
    header: list[str] = []
    for cells in reader:
        taken = 0
        if not cells:
            continue
        if not header:
            header = unique([label(name) for name in cells]) if len(cells) <= MAX_COLUMNS else cells
            add_columns(source, header)
            continue
        if len(cells) != len(header):
            source.ragged += 1
            cells += [""] * (len(header) - len(cells))
        yield dict(zip(header, cells, strict=False))


def unique(names: list[str]) -> list[str]:
    """Name the nameless and tell equal names apart. ["a", "", "a"] -> ["a", "column 2", "a (3)"]"""
    given, result = set(names), dict[str, None]()
    for place, name in enumerate(names, start=1):
        new = name or f"column {place}"
        while new in result or (new != name and new in given):
            new += f" ({place})"
        result[new] = None
    return list(result)


def json_rows(source: Source) -> Iterator[Any]:
    """Yield the elements of an array one by one; of an object its list of objects, or the object itself."""
    buffer = source.read(CHUNK_CHARS).lstrip()
    if buffer.startswith("["):
        yield from json_array(source, buffer)
        return
    buffer += source.read(MAX_RECORD_CHARS)
    if len(buffer) >= MAX_RECORD_CHARS:
        raise ToolError(f"{source.name}: object over {MAX_RECORD_CHARS:,} characters; use JSON Lines")
    whole = parse_json(buffer, source.name)
    lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
    tables = [rows for rows in lists if rows and all(isinstance(row, dict) for row in rows)]
    yield from tables[0] if len(tables) == 1 else [whole]


def json_array(source: Source, buffer: str) -> Iterator[Any]:
    """Yield the elements of the array that `buffer` begins and the rest of the file ends.

    An element counts once the comma or bracket after it is there, too: "12" might be the beginning of "123".
    """
    position, chunk, first, mark, ended = 1, CHUNK_CHARS, True, "", False
    while mark != "]":
        start = skip_space(buffer, position)
        if first and buffer.startswith("]", start):
            position = start + 1
            break
        try:
            element, end = DECODER.raw_decode(buffer, start)
            end = skip_space(buffer, end)
            mark, problem = buffer[end : end + 1], 'no "," or "]" after it'
        except json.JSONDecodeError as error:
            mark, problem = "", error.msg
        except ValueError as error:  # NaN
            raise ToolError(f"{source.name}: {error}") from None
        if mark in (",", "]"):
            yield element
            position, chunk, first = end + 1, CHUNK_CHARS, False
        elif mark or ended:
            raise ToolError(f"{source.name} is not JSON near {buffer[start : start + 40]!r}: {problem}")
        elif len(buffer) - position > MAX_RECORD_CHARS:
            raise ToolError(f"{source.name} is not JSON, or has over {MAX_RECORD_CHARS:,} characters a row")
        else:
            more = source.read(chunk)
            chunk *= 2  # so that a long element is not parsed anew for every little bit of it
            buffer, position, ended = buffer[position:] + more, 0, not more
    if buffer[position:].strip() or source.read(CHUNK_CHARS).strip():
        raise ToolError(f"{source.name} is not JSON: there is more after the array's end")


def skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; use null")


def parse_integer(digits: str) -> int | str:
    return int(digits) if len(digits) < 400 else digits  # more than a float holds; int() refuses 4,301


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_int=parse_integer)


def parse_json(text: str, where: str) -> Any:
    try:
        return DECODER.decode(text)
    except ValueError as error:
        raise ToolError(f"{where} is not JSON: {error}") from None


# -- looking at values --------------------------------------------------------------------------------------
def number_of(value: Any) -> float | None:
    """Return a cell as a number, or None. number_of(" 1.50 ") -> 1.5; number_of("1,234") -> None"""
    if isinstance(value, str):
        value = value.strip()
        if len(value) > 400 or not NUMBER.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return number if math.isfinite(number) else None


def label(value: Any) -> str:
    """Return a value as short, printable text, to count and to show; a long one ends in its checksum."""
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = repr(text)[1:-1]
    if len(text) > MAX_LABEL_CHARS:
        text = f"{text[: MAX_LABEL_CHARS - 9]}…{zlib.crc32(text.encode()):08x}"
    return text


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def figure(number: float) -> float | None:
    """Round to 12 digits, for people; whole numbers stay. What overflowed is None: JSON has no infinity."""
    if not math.isfinite(number):
        return None
    return number if number == int(number) else float(f"{number:.12g}")


@dataclass(slots=True)
class Moments:
    """Count, mean and variance in one pass (Welford 1962), with the sum, the least and the greatest."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    sum: float = 0.0
    min: float = math.inf
    max: float = -math.inf

    def add(self, x: float) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.squares += delta * (x - self.mean)
        self.sum += x
        if x < self.min:
            self.min = x
        if x > self.max:
            self.max = x

    @property
    def stdev(self) -> float:
        """The sample's standard deviation; 0 for fewer than two numbers."""
        # subtle: beyond all floats, squares is nan or even below zero
        return math.sqrt(self.squares / max(1, self.count - 1)) if self.squares >= 0 else math.nan


@dataclass(slots=True)
class Column:
    """What is known of one column so far."""

    count: int = 0
    numbers: Moments = field(default_factory=Moments)
    values: Counter[str] = field(default_factory=Counter)
    more_values: bool = False

    def add(self, value: Any, may_grow: bool) -> bool:
        """Take in a value; return whether it is a new one that is counted from now on."""
        if is_missing(value):
            return False
        self.count += 1
        number = number_of(value)
        if number is not None:
            self.numbers.add(number)
        text = label(value)
        new = text not in self.values
        if new and not (may_grow and len(self.values) < MAX_DISTINCT):
            self.more_values = True
            return False
        self.values[text] += 1
        return new

    def described(self, rows: int) -> Result:
        common = {"count": self.count, "missing": rows - self.count}
        if self.count and self.numbers.count == self.count:
            figures = {name: figure(getattr(self.numbers, name)) for name in FIGURES}
            return {"type": "number", **common, **figures}
        distinct = {"distinct_at_least" if self.more_values else "distinct": len(self.values)}
        return {"type": "text", **common, **distinct, "top": dict(self.values.most_common(3))}


# -- the data tools -----------------------------------------------------------------------------------------
class DataProcessor:
    """Look at data files below data_root: CSV, TSV, JSON, JSON Lines and text, gzip too, in any encoding."""

    name = "data_processor"

    def __init__(self, data_root: Path) -> None:
        self.data_root = data_root

    def load_file(self, file: str) -> Result:
        """Read a data file once: its format, encoding, number of rows, columns."""
        with open_source(self.data_root, file) as source:
            rows = sum(1 for _ in rows_of(source))
        names = [label(name) for name in list(source.columns)[:COLUMNS_SHOWN]]
        found = {"format": source.format, "encoding": source.encoding, "compressed": source.compressed}
        found |= {"bytes": source.size_bytes, "rows": rows, "columns": names, "warnings": source.warnings()}
        return {"file": file, **found} | left_out("columns", len(source.columns) - COLUMNS_SHOWN)

    def describe(self, file: str) -> Result:
        """Describe each column: type, missing values, least, greatest, mean, sum or most common values."""
        columns: dict[str, Column] = {}
        rows = counted = 0
        with open_source(self.data_root, file) as source:
            if source.format == "text":
                return self._describe_text(source)
            for row in rows_of(source):
                rows += 1
                for name, value in row.items():
                    if name not in columns:
                        columns[name] = Column()
                    counted += columns[name].add(value, may_grow=counted < MAX_COUNTED)
        shown = list(source.columns)[:COLUMNS_SHOWN]
        described = {label(name): columns.get(name, Column()).described(rows) for name in shown}
        result = {"rows": rows, "columns": described, "warnings": source.warnings()}
        return result | left_out("columns", len(source.columns) - len(shown))

    @staticmethod
    def _describe_text(source: Source) -> dict[str, Any]:
        lines = words = characters = 0
        common: Counter[str] = Counter()
        for line in lines_of(source):
            lines += 1
            characters += len(line)
            for match in re.finditer(r"\w+", line.lower()):
                words += 1
                word = label(match[0])
                if word in common or len(common) < MAX_WORDS:
                    common[word] += 1
        figures = {"lines": lines, "words": words, "characters": characters}
        most_common = dict(common.most_common(10))
        return {**figures, "most_common": most_common, "columns": {}, "warnings": source.warnings()}

    def group_by(self, file: str, by: str, value: str | None = None, how: str = "sum") -> Result:
        """Group rows by a column: sum, mean, min, max or count of the numbers in value, or count the rows."""
        how = "count" if value is None and how == "sum" else how
        require_text(by=by, how=how, value=by if value is None else value)
        if how not in MEASURES:
            raise ToolError(f"how = {how}; use one of {', '.join(MEASURES)}")
        if value is None and how != "count":
            raise ToolError(f"how = {how} needs a number column: give value")
        groups: dict[str, Moments] = {}
        skipped = 0
        with open_source(self.data_root, file) as source:
            for key, cell in cells_of(source, by, by if value is None else value):
                number = 1.0 if value is None else number_of(cell)
                if number is None:
                    skipped += 1
                    continue
                group = "(missing)" if is_missing(key) else label(key)
                if group not in groups:
                    if len(groups) == MAX_GROUPS:
                        raise ToolError(f"{by} has over {MAX_GROUPS:,} values; group by another column")
                    groups[group] = Moments()
                groups[group].add(number)
        figures = {group: figure(getattr(moments, how)) for group, moments in groups.items()}
        ordered = sorted(figures.items(), key=lambda item: (-(item[1] or 0), item[0]))
        shown = dict(ordered[:GROUPS_SHOWN])
        result = {"by": by, "value": value, "how": how, "skipped": skipped, "groups": shown}
        return result | left_out("groups", len(groups) - GROUPS_SHOWN)

    def find_outliers(self, file: str, column: str, z: float = 3.0) -> Result:
        """Find the rows (the first is 1) whose number is over z standard deviations away from the mean."""
        require_text(column=column)
        limit = number_of(z)
        if limit is None or limit <= 0:
            raise ToolError(f"z = {z!r:.200}; expected a number above 0")
        moments = Moments()
        with open_source(self.data_root, file) as source:
            for (cell,) in cells_of(source, column):
                if (number := number_of(cell)) is not None:
                    moments.add(number)
        if not moments.count:
            raise ToolError(f"column {column} of {file} has no numbers; name a number column")
        outliers: list[Result] = []
        count = 0
        with open_source(self.data_root, file) as source:
            for place, (cell,) in enumerate(cells_of(source, column), start=1):
                number = number_of(cell)
                if number is not None and abs(number - moments.mean) > limit * moments.stdev:
                    count += 1
                    if len(outliers) < OUTLIERS_SHOWN:
                        outliers.append({"row": place, "value": number})
        figures = {"mean": figure(moments.mean), "stdev": figure(moments.stdev)}
        return {"column": column, "z": limit, **figures, "count": count, "outliers": outliers}


def cells_of(source: Source, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of these columns, row by row. Raise ToolError for a column that the file has not."""

    def check() -> None:
        for name in names:
            if name not in source.columns:
                known = ", ".join(label(column) for column in list(source.columns)[:10])
                raise ToolError(f"{source.name} has no column {label(name)!r}; it has {known}")

    for place, row in enumerate(rows_of(source)):
        if place == 0 and source.format not in ("json", "jsonl"):  # there, columns may turn up in any row
            check()
        yield tuple(row.get(name) for name in names)
    check()


def left_out(what: str, number: int) -> Result:
    return {f"{what}_left_out": number} if number > 0 else {}


# -- the email tool -----------------------------------------------------------------------------------------
class EmailSender:
    """Send plain-text email: through the SMTP server in smtp_url, or, without one, as files in `outbox`."""

    name = "email_sender"

    def __init__(self, outbox: Path, smtp_url: str | None) -> None:
        self.outbox = outbox
        self.smtp_url = smtp_url

    def send(self, to: str | list[str], subject: str, body: str, message_id: str | None = None) -> Result:
        """Send an email. A second call with the same message_id sends nothing and says "already_sent".

        The file in the outbox is the memory of what was sent. Over SMTP a crash between the server's yes and
        the writing of that file sends twice, with one Message-ID, by which the recipient's server may tell.
        """
        message = compose(to, subject, body, message_id)
        number = str(message["Message-ID"])
        path = self.outbox / f"{safe_name(message_id or number.strip('<>'))}.eml"
        result = {"to": str(message["To"]), "subject": subject, "message_id": number, "file": str(path)}
        if message_id and path.exists():
            return {**result, "already_sent": True}
        if not self.smtp_url:
            write_whole(path, bytes(message))
            return result
        refused = send_by_smtp(message, self.smtp_url)
        with suppress(ToolUnavailable):  # it is sent: failing now would send it once more
            write_whole(path, bytes(message))
        return {**result, "refused": refused} if refused else result


def compose(to: Any, subject: Any, body: Any, message_id: Any) -> EmailMessage:
    """Return the message; raise ToolError for what could end up as a header of its own, or is no address."""
    recipients = to if isinstance(to, list) else [to]
    for text in recipients:
        require_text(to=text)
    require_text(subject=subject, body=body, message_id="" if message_id is None else message_id)
    if LINE_BREAK.search(subject) or any(LINE_BREAK.search(text) for text in recipients):
        raise ToolError("a line break or control character in to or subject; remove it")
    addresses = [address for _, address in getaddresses(recipients)]
    for address in addresses or [""]:
        if not ADDRESS.fullmatch(address):
            raise ToolError(f"not an email address: {address or to!r:.200}; expected name@example.org")
    message = EmailMessage()
    try:
        message["From"] = os.environ.get("MAIL_FROM", "agent@localhost")
        message["To"] = ", ".join(addresses)
        message["Subject"] = subject
        message["Date"] = formatdate(localtime=True)
        known = f"<{safe_name(message_id)}@task-streams>" if message_id else None
        message["Message-ID"] = known or make_msgid(domain="task-streams")
        message.set_content(body)
        bytes(message)  # what cannot be written shows now
    except ValueError as error:  # a line break in MAIL_FROM, half a surrogate pair in a text
        raise ToolError(f"cannot be written as an email: {error}") from error
    return message


def safe_name(text: str) -> str:
    """Return a file name for any text, different for different texts. "task/1" -> "task_1-e4f0a1c2" """
    name = re.sub(r"[^A-Za-z0-9.-]", "_", text)[:100]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ToolUnavailable(f"cannot write {path}: {error.strerror}; is the disk full?") from error


def send_by_smtp(message: EmailMessage, url: str) -> list[str]:
    """Hand a message to smtp://user:password@host:port?starttls=1 or smtps://…; return who was refused."""
    try:
        parts = urlsplit(url)
        secure, asked = parts.scheme == "smtps", parse_qs(parts.query, True).get("starttls", ["0"])[-1]
        starttls = asked == "1"
        host, port = parts.hostname, 465 if secure else 587 if starttls else 25
        port = port if parts.port is None else parts.port
        (host or "").encode("idna")  # what the socket does, too: "a..b" is no host
    except ValueError:  # subtle: its text may quote a part of the password
        host, port, secure = None, 0, False
    # subtle: starttls=yes must not mean "no", which would send the password in the clear
    if not host or not port or parts.scheme not in ("smtp", "smtps") or asked not in ("0", "1"):
        raise ToolError("SMTP_URL is not like smtp://user:password@host:587?starttls=1 or smtps://host")
    where = f"{parts.scheme}://{host}:{port}"
    tls = ssl.create_default_context()  # subtle: without it smtplib believes any certificate
    try:
        if secure:
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=tls)
        else:
            server = smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
        try:
            if starttls and not secure:
                server.starttls(context=tls)
            if parts.username:
                server.login(unquote(parts.username), unquote(parts.password or ""))
            return list(server.send_message(message))
        finally:
            # subtle: not `with server`, which raises on a bad answer to QUIT, when the message is long sent
            with suppress(smtplib.SMTPException, OSError):
                server.quit()
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        kind = ToolError if min(codes) >= 500 else ToolUnavailable
        raise kind(f"{where} refused {', '.join(error.recipients)} ({codes[0]}); check the address") from None
    except smtplib.SMTPAuthenticationError as error:  # subtle: some servers repeat the password, or its base64
        kind = ToolError if error.smtp_code >= 500 else ToolUnavailable
        raise kind(f"{where} answered {error.smtp_code} to the login; check user and password") from None
    except UnicodeError:  # subtle: it holds the whole login; smtplib sends ASCII
        raise ToolError(f"{where}: user or password in SMTP_URL is not ASCII; change it") from None
    except smtplib.SMTPResponseException as error:
        kind = ToolError if error.smtp_code >= 500 else ToolUnavailable
        said = str(error.smtp_error, "utf-8", "replace") if isinstance(error.smtp_error, bytes) else ""
        if parts.password:
            said = said.replace(unquote(parts.password), "***")
        raise kind(f"{where} answered {error.smtp_code}: {said}") from None
    except smtplib.SMTPNotSupportedError as error:
        raise ToolError(f"{where}: {error}; change SMTP_URL") from None
    except (smtplib.SMTPException, OSError) as error:
        raise ToolUnavailable(f"cannot reach {where}: {error}. Is SMTP_URL right, the server up?") from None


# -- all of them --------------------------------------------------------------------------------------------
def make_tools(data_root: Path, outbox: Path, smtp_url: str | None) -> Tools:
    """Return the tools by the names that the LLM uses; the first line of each docstring describes it."""
    data, email = DataProcessor(data_root), EmailSender(outbox, smtp_url)
    return {
        "data_processor.load_file": data.load_file,
        "data_processor.describe": data.describe,
        "data_processor.group_by": data.group_by,
        "data_processor.find_outliers": data.find_outliers,
        "email_sender.send": email.send,
    }
