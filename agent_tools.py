"""The agent's real tools: look at data files, send email. No Redis, no LLM: plain functions that one can test alone.

A tool is a method that takes JSON values and returns a small JSON object. Its first docstring line is what the LLM is
told about it. Wrong input is a ToolError (trying again will not help), what may pass by itself a ToolUnavailable.

To add a tool: write such a method (or function), and name it in make_tools() at the end. The agent shows it to the LLM.
"""

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import smtplib
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, getaddresses, make_msgid
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO
from urllib.parse import parse_qs, unquote, urlsplit

import charset_normalizer

SAMPLE_BYTES = 64 * 1024  # what encoding and format are judged by
MAX_LINE_CHARS = 10_000_000  # a line, field or JSON element beyond this is no table; it would fill the memory
CHUNK_CHARS = 256 * 1024
MAX_DISTINCT = 1_000  # values counted exactly per column
MAX_COUNTED = 200_000  # values counted over all columns: 5,000 columns must not fill the memory
MAX_WORDS = 100_000
MAX_GROUPS = 10_000
MAX_COLUMNS_SHOWN = 100
MAX_OUTLIERS_SHOWN = 20
MAX_NAME_CHARS = 100  # of a column's name or a value that is counted
SMTP_SECONDS = 10.0

BOMS = [  # UTF-32 first: its little-endian mark begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
]
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".log": "text",
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

SEPARATORS = re.compile(r"[\s,]*")

Row = dict[str, Any]


class ToolError(Exception):
    """The input is wrong: the same call will fail again. The message is one line: what, value, what to do."""


class ToolUnavailable(Exception):
    """Something outside does not answer now: the same call may work later."""


# -- reading files ----------------------------------------------------------------------------------------------


@dataclass
class Source:
    """An opened data file: its text, and what was found out about it."""

    name: str
    text: TextIO
    format: str
    encoding: str
    compressed: bool
    size_bytes: int
    ragged: int = 0
    undecodable: int = 0
    columns: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        found = []
        if self.ragged:
            found.append(f"{self.ragged} row(s) have more or fewer cells than there are columns")
        if self.undecodable:
            found.append(f"{self.undecodable} character(s) are not {self.encoding}; they show as U+FFFD")
        return found


@contextmanager
def open_source(root: Path, file: str) -> Iterator[Source]:
    """Open a file below `root` for reading, as text of whatever encoding. Raises ToolError for what is no such file.

    The path is resolved first, symbolic links too. Somebody who can write below `root` may still exchange the file
    between that check and its opening.
    """
    path = _checked_path(root, file)
    try:
        with path.open("rb") as raw, _decompressed(raw, file) as (data, compressed):
            sample = data.read(SAMPLE_BYTES)
            if not sample:
                raise ToolError(f"{file} is empty")
            data.seek(0)
            encoding = _encoding(sample, file)
            text = io.TextIOWrapper(data, encoding=encoding, errors="replace", newline="")
            head = sample.decode(encoding, errors="ignore")
            yield Source(file, text, _format(path, head), encoding, compressed, path.stat().st_size)
            text.detach()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ToolError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise ToolError(f"cannot read {file}: {error.strerror or error}") from error


def _checked_path(root: Path, file: str) -> Path:
    if not isinstance(file, str) or not file or "\0" in file:
        raise ToolError(f"not a file name: {file!r:.200}")
    root = root.resolve()
    try:
        path = (root / file).resolve(strict=True)
        if not path.is_relative_to(root):
            raise ToolError(f"{file} is outside the data root {root}")
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not Path(os.path.normpath(root / file)).is_relative_to(root):
            raise ToolError(f"{file} is outside the data root {root}") from None
        raise ToolError(f"no such file: {file} (looked in {root})") from None
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, a folder that may not be read
        raise ToolError(f"cannot read {file:.200}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise ToolError(f"{file} is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise ToolError(f"{file} is not a regular file")
    return path


@contextmanager
def _decompressed(raw: BinaryIO, file: str) -> Iterator[tuple[BinaryIO, bool]]:
    magic = raw.read(2)
    raw.seek(0)
    if magic != b"\x1f\x8b":
        yield raw, False
        return
    with gzip.GzipFile(fileobj=raw) as unzipped:
        yield unzipped, True  # type: ignore[misc]  # a GzipFile reads and seeks as a BinaryIO does


def _encoding(sample: bytes, file: str) -> str:
    """Return the encoding: by its mark, else UTF-8 or UTF-16 if it is such, else as charset-normalizer guesses."""
    for mark, encoding in BOMS:
        if sample.startswith(mark):
            return encoding
    if b"\0" in sample:  # text has none, but UTF-16 of Latin text has one in every second place
        for encoding, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[0::2])):
            if zeros.count(0) > 0.6 * len(zeros) and sample.count(0) < 1.1 * zeros.count(0):
                return encoding
        raise ToolError(f"{file} is binary, not text (NUL at byte {sample.index(0)})")
    try:
        # subtle: a cut character at the sample's end is no error as long as more may come
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=False)
        return "utf-8"
    except UnicodeDecodeError:
        guess = charset_normalizer.from_bytes(sample).best()
    if guess is None:
        raise ToolError(f"{file} is binary, or text of an unknown encoding; save it as UTF-8")
    return str(guess.encoding)


def _format(path: Path, head: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in FORMATS:
        return FORMATS[suffixes[-1]]
    start = head.lstrip()[:1]
    if start == "{":
        return "jsonl" if _is_json(head.partition("\n")[0]) else "json"
    if start == "[":
        return "json"
    return "csv" if any(delimiter in head.partition("\n")[0] for delimiter in ",;\t|") else "text"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def lines_of(source: Source) -> Iterator[str]:
    """Yield the lines, of bounded length; NULs are refused, undecodable characters counted."""
    number = 0
    while line := source.text.readline(MAX_LINE_CHARS):
        number += 1
        if len(line) == MAX_LINE_CHARS:
            raise ToolError(f"{source.name}, line {number} is longer than {MAX_LINE_CHARS:,} characters")
        if "\0" in line:
            raise ToolError(f"{source.name}, line {number} holds a NUL; it is binary or damaged")
        source.undecodable += line.count("\ufffd")
        yield line


def rows_of(source: Source) -> Iterator[Row]:
    """Yield the rows as {column: value}, one at a time: a file of any size takes the memory of one row."""
    try:
        if source.format in ("csv", "tsv"):
            yield from _delimited_rows(source)
        elif source.format == "json":
            for element in _json_elements(source):
                yield element if isinstance(element, dict) else {"value": element}
        elif source.format == "jsonl":
            for number, line in enumerate(lines_of(source), start=1):
                if line.strip():
                    element = _parse_json(line, f"{source.name}, line {number}")
                    yield element if isinstance(element, dict) else {"value": element}
        else:
            for line in lines_of(source):
                yield {"line": line.rstrip("\r\n")}
    except csv.Error as error:
        raise ToolError(f"{source.name} is no {source.format.upper()}: {error}") from error


def _delimited_rows(source: Source) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_CHARS)  # the default of 131,072 is less than some real fields have
    lines = lines_of(source)
    header = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if source.format == "tsv" else max(",;\t|", key=header.count)  # max: the first of equals
    reader = csv.reader(_chain(header, lines), delimiter=delimiter)
    source.columns = _unique([name.strip() for name in next(reader, [])])
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(source.columns):
            source.ragged += 1
            cells = cells[: len(source.columns)] + [""] * (len(source.columns) - len(cells))
        yield dict(zip(source.columns, cells, strict=True))


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _unique(names: list[str]) -> list[str]:
    """Name the nameless and tell equal names apart. ["a", "", "a"] -> ["a", "column 2", "a (3)"]"""
    seen: set[str] = set()
    result = []
    for place, name in enumerate(names, start=1):
        name = name or f"column {place}"
        name = name if name not in seen else f"{name} ({place})"
        seen.add(name)
        result.append(name)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse_json(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ToolError(f"{where}: the JSON is nested too deep") from None
    except ValueError as error:
        raise ToolError(f"{where}: not JSON: {error}") from error


def _json_elements(source: Source) -> Iterator[Any]:
    """Yield the elements of a top-level array one by one; of an object the rows in it, or the object itself."""
    text = source.text
    buffer = text.read(CHUNK_CHARS).lstrip("\ufeff \t\r\n")
    if not buffer.startswith("["):
        buffer += text.read(MAX_LINE_CHARS)
        if len(buffer) >= MAX_LINE_CHARS:
            raise ToolError(
                f"{source.name}: a JSON object over {MAX_LINE_CHARS:,} characters; use an array or JSON Lines"
            )
        whole = _parse_json(buffer, source.name)
        tables = [v for v in whole.values() if _is_table(v)] if isinstance(whole, dict) else []
        yield from tables[0] if len(tables) == 1 else [whole]
        return
    position, chunk, ended = 1, CHUNK_CHARS, False
    while True:
        match = SEPARATORS.match(buffer, position)
        position = match.end() if match else position
        if buffer.startswith("]", position):
            return
        try:
            element, end = _DECODER.raw_decode(buffer, position)
            if end < len(buffer) or ended:  # subtle: "12" at the buffer's end may be the start of "123"
                yield element
                position, chunk = end, CHUNK_CHARS
                continue
            problem: Exception = EOFError("it ends within a number")
        except RecursionError:
            raise ToolError(f"{source.name}: the JSON is nested too deep") from None
        except json.JSONDecodeError as error:
            problem = error
        except ValueError as error:
            raise ToolError(f"{source.name}: not JSON: {error}") from error
        if ended:
            raise ToolError(f"{source.name}: not JSON: {problem}")
        if len(buffer) - position > MAX_LINE_CHARS:
            raise ToolError(f"{source.name}: not JSON, or an element is over {MAX_LINE_CHARS:,} characters ({problem})")
        more = text.read(chunk)
        chunk *= 2  # so that a long element is not parsed anew for every little bit of it
        ended = not more
        buffer, position = buffer[position:] + more, 0


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)


# -- looking at data --------------------------------------------------------------------------------------------


def number_of(value: Any) -> float | None:
    """Return a cell as a number, or None. number_of(" 1.50 ") -> 1.5; number_of("1,234") -> None"""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if len(text) > 400 or not NUMBER.fullmatch(text):
            return None
        value = text
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def text_of(value: Any) -> str:
    """Return a cell as text to count and to show, cut where it is long."""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).strip()[:MAX_NAME_CHARS]


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


@dataclass
class Moments:
    """Count, mean and variance in one pass (Welford 1962), with the sum, the least and the greatest."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, x: float) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.squares += delta * (x - self.mean)
        self.total += x
        self.least, self.most = min(self.least, x), max(self.most, x)

    @property
    def stdev(self) -> float:
        """The sample's standard deviation; 0 for fewer than two numbers."""
        return math.sqrt(max(0.0, self.squares) / (self.count - 1)) if self.count > 1 else 0.0


def rounded(number: float) -> float | None:
    """Round for people: six places. What overflowed is None, since JSON has no infinity."""
    return round(number, 6) if math.isfinite(number) else None


@dataclass
class Column:
    """What is known of one column so far."""

    count: int = 0
    missing: int = 0
    numbers: Moments = field(default_factory=Moments)
    values: Counter[str] = field(default_factory=Counter)
    more_values: bool = False

    def add(self, value: Any, limit: int) -> None:
        if is_missing(value):
            self.missing += 1
            return
        self.count += 1
        number = number_of(value)
        if number is not None:
            self.numbers.add(number)
        text = text_of(value)
        if text in self.values or len(self.values) < limit:
            self.values[text] += 1
        else:
            self.more_values = True

    def described(self) -> dict[str, Any]:
        common: dict[str, Any] = {"count": self.count, "missing": self.missing}
        if self.count and self.numbers.count == self.count:
            n = self.numbers
            figures = {"min": n.least, "max": n.most, "mean": n.mean, "stdev": n.stdev, "sum": n.total}
            return {"type": "number", **common, **{name: rounded(value) for name, value in figures.items()}}
        distinct = {"distinct_at_least" if self.more_values else "distinct": len(self.values)}
        return {"type": "text", **common, **distinct, "top": dict(self.values.most_common(3))}


class DataProcessor:
    """Look at data files below data_root: CSV, TSV, JSON, JSON Lines and text, gzip too, in any encoding."""

    def __init__(self, data_root: Path) -> None:
        self.data_root = data_root

    def load_file(self, file: str) -> dict[str, Any]:
        """Read a data file once: its format, encoding, number of rows, columns."""
        columns: dict[str, None] = {}
        rows = 0
        with open_source(self.data_root, file) as source:
            for row in rows_of(source):
                rows += 1
                if len(columns) < MAX_COUNTED:
                    columns.update(dict.fromkeys(row))
            names = list(columns) or source.columns
            result = {
                "file": file,
                "format": source.format,
                "encoding": source.encoding,
                "compressed": source.compressed,
                "bytes": source.size_bytes,
                "rows": rows,
                "columns": [name[:MAX_NAME_CHARS] for name in names[:MAX_COLUMNS_SHOWN]],
                "warnings": source.warnings(),
            }
        if len(names) > MAX_COLUMNS_SHOWN:
            result["columns_left_out"] = len(names) - MAX_COLUMNS_SHOWN
        return result

    def describe(self, file: str) -> dict[str, Any]:
        """Describe each column: type, missing values, least, greatest, mean, sum or most common values."""
        with open_source(self.data_root, file) as source:
            if source.format == "text":
                return self._describe_text(source)
            columns: dict[str, Column] = {}
            rows = 0
            for row in rows_of(source):
                rows += 1
                limit = max(1, min(MAX_DISTINCT, MAX_COUNTED // max(len(columns), len(row), 1)))
                for name, value in row.items():
                    if name not in columns:
                        if len(columns) >= MAX_COUNTED:
                            raise ToolError(f"{file} has over {MAX_COUNTED:,} columns: it is no table")
                        columns[name] = Column(missing=rows - 1)
                    columns[name].add(value, limit)
                if len(row) < len(columns):
                    for name in columns.keys() - row.keys():
                        columns[name].missing += 1
            for name in source.columns:
                columns.setdefault(name, Column())
            shown = list(columns.items())[:MAX_COLUMNS_SHOWN]
            result: dict[str, Any] = {
                "file": file,
                "rows": rows,
                "columns": {name[:MAX_NAME_CHARS]: column.described() for name, column in shown},
                "warnings": source.warnings(),
            }
        if len(columns) > len(shown):
            result["columns_left_out"] = len(columns) - len(shown)
        return result

    def _describe_text(self, source: Source) -> dict[str, Any]:
        lines = characters = words = 0
        common: Counter[str] = Counter()
        for line in lines_of(source):
            lines += 1
            characters += len(line)
            for word in re.findall(r"\w+", line.lower()):
                words += 1
                if word in common or len(common) < MAX_WORDS:
                    common[word[:MAX_NAME_CHARS]] += 1
        top = dict(common.most_common(10))
        figures = {"rows": lines, "words": words, "characters": characters, "most_common": top}
        return {"file": source.name, **figures, "columns": {}, "warnings": source.warnings()}

    def group_by(self, file: str, by: str, value: str | None = None, how: str = "sum") -> dict[str, Any]:
        """Group the rows by a column, and count them, or take sum, mean, min or max of a number column."""
        if how not in ("count", "sum", "mean", "min", "max"):
            raise ToolError(f"how = {how!r}; known: count, sum, mean, min, max")
        if value is None and how != "count":
            raise ToolError(f"{how} needs the column to take it of: give value, or use how = count")
        groups: dict[str, Moments] = {}
        skipped = 0
        with open_source(self.data_root, file) as source:
            for row in rows_of(source):
                self._check_column(by, row, source)
                number: float | None = 1.0
                if value is not None and how != "count":
                    self._check_column(value, row, source)
                    number = number_of(row.get(value))
                if number is None:
                    skipped += 1
                    continue
                group = "(missing)" if is_missing(row.get(by)) else text_of(row[by])
                if group not in groups and len(groups) >= MAX_GROUPS:
                    raise ToolError(f"column {by} of {file} has over {MAX_GROUPS:,} values; group by another")
                groups.setdefault(group, Moments()).add(number)
        figure: Callable[[Moments], float] = {
            "count": lambda m: m.count,
            "sum": lambda m: m.total,
            "mean": lambda m: m.mean,
            "min": lambda m: m.least,
            "max": lambda m: m.most,
        }[how]
        ordered = sorted(groups, key=lambda group: (-figure(groups[group]), group))
        result: dict[str, Any] = {"by": by, "value": value, "how": how, "skipped": skipped}
        result["groups"] = {group: rounded(figure(groups[group])) for group in ordered[:MAX_COLUMNS_SHOWN]}
        if len(ordered) > MAX_COLUMNS_SHOWN:
            result["groups_left_out"] = len(ordered) - MAX_COLUMNS_SHOWN
        return result

    def find_outliers(self, file: str, column: str, z: float = 3.0) -> dict[str, Any]:
        """Find the rows whose number in a column is more than z standard deviations from the mean."""
        if number_of(z) is None or not z > 0:
            raise ToolError(f"z = {z!r}; expected a number above 0")
        moments = Moments()
        with open_source(self.data_root, file) as source:
            for row in rows_of(source):
                self._check_column(column, row, source)
                if (number := number_of(row.get(column))) is not None:
                    moments.add(number)
        if not moments.count:
            raise ToolError(f"column {column} of {file} has no numbers")
        outliers: list[dict[str, Any]] = []
        count = 0
        with open_source(self.data_root, file) as source:
            for place, row in enumerate(rows_of(source), start=1):
                number = number_of(row.get(column))
                if number is not None and abs(number - moments.mean) > z * moments.stdev > 0:
                    count += 1
                    if len(outliers) < MAX_OUTLIERS_SHOWN:
                        outliers.append({"row": place, "value": number})
        figures = {"mean": rounded(moments.mean), "stdev": rounded(moments.stdev)}
        return {"column": column, "z": z, **figures, "count": count, "outliers": outliers}

    @staticmethod
    def _check_column(name: str, row: Row, source: Source) -> None:
        if name not in row and source.format not in ("json", "jsonl"):
            raise ToolError(f"{source.name} has no column {name!r:.100}; it has {', '.join(list(row)[:20])}")


# -- sending email ----------------------------------------------------------------------------------------------


class EmailSender:
    """Send plain-text email: through the SMTP server in smtp_url, or, without one, as files in `outbox`."""

    def __init__(self, outbox: Path, smtp_url: str | None) -> None:
        self.outbox = outbox
        self.smtp_url = smtp_url

    def send(self, to: str | list[str], subject: str, body: str, message_id: str | None = None) -> dict[str, Any]:
        """Send an email. With a message_id (of the task, say) the outbox takes the same message only once."""
        message = self._message(to, subject, body, message_id)
        recipients = str(message["To"])
        if self.smtp_url:
            self._send_by_smtp(message, self.smtp_url)
            return {"to": recipients, "subject": subject, "message_id": message["Message-ID"], "sent_by": "smtp"}
        name = _safe(message_id or message["Message-ID"].strip("<>"))[:150]
        path = self.outbox / f"{name}.eml"
        result = {"to": recipients, "subject": subject, "message_id": message["Message-ID"], "file": str(path)}
        if message_id is not None and path.exists():
            return {**result, "already_sent": True}
        self._write(path, bytes(message))
        return result

    def _message(self, to: str | list[str], subject: str, body: str, message_id: str | None) -> EmailMessage:
        addresses = [address for _, address in getaddresses([to] if isinstance(to, str) else to)]
        for address in addresses or [""]:
            if not re.fullmatch(r"[^@\s<>,;]+@[^@\s<>,;]+", address):
                raise ToolError(f"not an email address: {address or to!r}")
        if re.search(r"[\r\n\0]", subject):
            raise ToolError("the subject has a line break")
        message = EmailMessage()
        message["From"] = os.environ.get("MAIL_FROM", "agent@localhost")
        message["Date"] = formatdate(localtime=True)
        message["Message-ID"] = (
            f"<{_safe(message_id)}@task-streams>" if message_id else make_msgid(domain="task-streams")
        )
        try:
            message["To"] = ", ".join(addresses)
            message["Subject"] = subject
            message.set_content(body)
            bytes(message)
        except (ValueError, UnicodeError) as error:
            raise ToolError(f"cannot be written as an email: {error}") from error
        return message

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as part:
                part.write(content)
            Path(part.name).replace(path)
        except OSError as error:
            raise ToolUnavailable(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def _send_by_smtp(message: EmailMessage, url: str) -> None:
        """Hand a message to a server: smtp://user:password@host:port?starttls=1, or smtps://…"""
        parts = urlsplit(url)
        where = f"{parts.scheme}://{parts.hostname}:{parts.port or ''}"
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise ToolError("SMTP_URL is not like smtp://user:password@host:port?starttls=1 or smtps://…")
        try:
            if parts.scheme == "smtps":
                server: smtplib.SMTP = smtplib.SMTP_SSL(parts.hostname, parts.port or 465, timeout=SMTP_SECONDS)
            else:
                server = smtplib.SMTP(parts.hostname, parts.port or 25, timeout=SMTP_SECONDS)
            with server:
                if parse_qs(parts.query).get("starttls") == ["1"]:
                    server.starttls()
                if parts.username:
                    server.login(unquote(parts.username), unquote(parts.password or ""))
                server.send_message(message)
        except smtplib.SMTPRecipientsRefused as error:
            codes = [code for code, _ in error.recipients.values()]
            kind = ToolError if all(code >= 500 for code in codes) else ToolUnavailable
            raise kind(f"{where} refused the recipients ({codes[0]})") from error
        except smtplib.SMTPResponseException as error:
            kind = ToolError if error.smtp_code >= 500 else ToolUnavailable
            raise kind(f"{where} answered {error.smtp_code}: {error.smtp_error!r:.200}") from error
        except (smtplib.SMTPException, OSError) as error:
            raise ToolUnavailable(f"cannot reach {where}: {error}") from error


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


# -- all of them ------------------------------------------------------------------------------------------------


def make_tools(data_root: Path, outbox: Path, smtp_url: str | None) -> dict[str, Callable[..., dict[str, Any]]]:
    """Return the tools by the names that the LLM uses."""
    data, email = DataProcessor(data_root), EmailSender(outbox, smtp_url)
    return {
        "data_processor.load_file": data.load_file,
        "data_processor.describe": data.describe,
        "data_processor.group_by": data.group_by,
        "data_processor.find_outliers": data.find_outliers,
        "email_sender.send": email.send,
    }
