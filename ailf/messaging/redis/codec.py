"""The field codec: any JSON value as one Redis string that a person can read.

Text that is not itself valid JSON is stored as it is; everything else is stored as JSON. So redis-cli shows
`Process this data...` without quotes, and decode(encode(x)) == x for every JSON value.
"""

import json
import math
from typing import Any

# A JSON document begins with one of these (RFC 8259, section 2, after white space): a cheap first look.
_JSON_START = frozenset('{["-0123456789tfn')


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


# Made once: json.loads and json.dumps make one at each call that is told any options.
_syntax = json.JSONDecoder(parse_constant=_no_constant)
_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Any:
    """Parse JSON strictly: NaN, Infinity and numbers too large for a float, which Python's json accepts, are a
    ValueError too."""
    return _decoder.decode(text)


def _looks_like_json(text: str) -> bool:
    return text.lstrip(" \t\n\r")[:1] in _JSON_START


def encode(value: Any) -> str:
    """Return a JSON value as text for a Redis field.

    encode("hello") -> 'hello';  encode("7") -> '"7"';  encode(7) -> '7';  encode({"a": [1]}) -> '{"a": [1]}'

    Raises ValueError or TypeError, with the reason, for what JSON cannot hold: NaN, Infinity, bytes, objects, nesting
    deeper than Python's recursion limit.
    """
    if isinstance(value, str):
        try:
            value.encode()
            if not _looks_like_json(value):
                return value
            _syntax.decode(value)  # not from_json: 1e999 is JSON, if out of range
        except UnicodeEncodeError:
            pass  # a lone surrogate has no UTF-8: store it escaped, as JSON
        except RecursionError:
            pass  # subtle: too deep to parse here, but perhaps not where it is decoded; so store it quoted
        except ValueError:
            return value
    return str(value) if type(value) is int else to_json(value)  # the encoder takes its time


def to_json(value: Any) -> str:
    """Return a JSON value as JSON text that UTF-8 can hold. Raises as encode does. to_json("hello") -> '"hello"'"""
    try:
        text = _encoder.encode(value)
    except RecursionError:
        raise ValueError("the value is nested too deep for JSON") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, ensure_ascii=True)
        if from_json(text) != value:
            raise ValueError("text holds a surrogate pair as two code points: decode it as UTF-16 first") from None
    return text


def decode(text: str) -> Any:
    """Return the value of a field: JSON if it is valid JSON, else the text itself. decode('"7"') -> '7'"""
    if not _looks_like_json(text):
        return text
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        return text
