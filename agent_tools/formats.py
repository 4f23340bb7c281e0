"""Find out how a data file is written: its encoding, its format, its delimiter. Pure functions on its first 64 KB."""

import codecs
import csv
import io
import json
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

import charset_normalizer

from .base import ToolError

BOMS = [  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]
UNLIKELY = ["utf_7", "utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"]  # never guessed by statistics
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # bytes that text doesn't have
FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text", ".md": "text", ".log": "text"}
FORMATS |= {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def detect_encoding(sample: bytes, file: str) -> tuple[str, bool]:
    """Return the encoding, and whether it is a guess. In this order: a mark, UTF-16, UTF-8, statistics."""
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

    # subtle: final=False, because the end of the sample may cut a character in two
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample, final=False)
    bad = len(re.findall("[\udc80-\udcff]", text))  # the bytes that aren't UTF-8
    good = len(re.findall("[^\0-\x7f]", text)) - bad
    if good >= 10 * bad:  # UTF-8, or UTF-8 with a little damage
        return "utf-8", False
    guesses = charset_normalizer.from_bytes(sample, cp_exclusion=UNLIKELY)
    best = guesses.best()
    if best is None:
        raise ToolError(f"{file} is binary, or text in an unknown encoding; save it as UTF-8")
    # A few accents fit many code pages. cp1252 is by far the most common: it wins unless another fits better.
    western = (m for m in guesses if "cp1252" in m.could_be_from_charset and m.coherence >= best.coherence)
    return ("cp1252" if any(western) else best.encoding), True


def detect_delimiter(head: str) -> tuple[str, bool]:
    r"""Return the likeliest delimiter, and whether the first records (two at least) have equally many cells.

    Example: 'a;b\n1,5;2\n' -> (";", True)
    """

    def rank(delimiter: str) -> tuple[bool, int]:
        records = csv.reader(io.StringIO(head, newline=None), delimiter=delimiter)
        widths = []
        with suppress(csv.Error):
            widths = [len(cells) for cells in islice(filter(None, records), 20)]
        is_table = len(widths) > 1 and widths[0] > 1 and len(set(widths)) == 1
        return is_table, widths[0] if widths else 0

    best = max(",;\t|", key=rank)  # of equals the first
    return best, rank(best)[0]


def detect_format(path: Path, head: str, is_table: bool) -> str:
    """Return csv, tsv, jsonl, json (an array), object (of JSON) or text: by the name, else by the beginning."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    known = FORMATS.get(suffixes[-1]) if suffixes else None
    first, _, rest = head.strip().partition("\n")
    if known in (None, "json") and first.startswith("{") and rest:  # many .json files are really JSON Lines
        with suppress(ValueError, RecursionError):
            json.loads(first)
            return "jsonl"
    known = known or ("json" if first[:1] in ("{", "[") else "csv" if is_table else "text")
    return "object" if known == "json" and first.startswith("{") else known


def unique(names: list[str]) -> list[str]:
    """Name the nameless columns and tell equal names apart; "A" and "a" are equal in SQL.

    Example: ["a", "", "A"] -> ["a", "column 2", "A (3)"]
    """
    given, result = {name.lower() for name in names}, dict[str, str]()
    for place, name in enumerate(names, start=1):
        new = name or f"column {place}"
        while new.lower() in result or (new != name and new.lower() in given):
            new += f" ({place})"
        result[new.lower()] = new
    return list(result.values())
