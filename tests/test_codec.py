"""The field codec: decode(encode(x)) == x for every JSON value, readable for a person where x is plain text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ailf.messaging.redis import decode, encode

# st.text() draws no surrogates by default; characters(codec=None) with an explicit list brings lone ones too
text = st.text() | st.text(st.sampled_from('\ud800\udfffa" \n\0\\7[{é\U0001f600'), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
)


@settings(deadline=None)  # the machine may be busy
@given(json_values)
def test_round_trip_of_any_json_value(value: object) -> None:
    """Every JSON value comes back equal and of the same type; what cannot (a split surrogate pair) is a ValueError."""
    try:
        stored = encode(value)
    except ValueError as error:
        assert "surrogate pair" in str(error)
        return

    stored.encode()
    assert decode(stored) == value
    assert type(decode(stored)) is type(value)


@pytest.mark.parametrize(
    "plain", ["Process this data...", "", "two\nlines", "a\0b", "é", "NaN", "None", "{not json", "01"]
)
def test_text_that_is_not_json_is_stored_as_it_is(plain: str) -> None:
    """So redis-cli shows it as a person wrote it."""
    assert encode(plain) == plain
    assert decode(plain) == plain


@pytest.mark.parametrize("like_json", ["7", "null", " [1]", "true", '"quoted"', "1e999", "{}", "-0", "\t1"])
def test_text_that_looks_like_json_is_quoted(like_json: str) -> None:
    """Text that is itself valid JSON comes back as text, not as the value that it spells."""
    assert encode(like_json) != like_json
    assert decode(encode(like_json)) == like_json


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5_000])
def test_text_that_python_cannot_parse_comes_back(text: str) -> None:
    """Nesting of 100,000 and a number of 5,000 digits are text like any other."""
    assert decode(encode(text)) == text


def test_depth_at_which_text_is_encoded_does_not_matter() -> None:
    """Text that can be parsed at one depth of the stack, but not at another, still comes back as text."""
    nested = "[" * 900 + "]" * 900

    def encode_at(depth: int) -> str:
        return encode(nested) if depth == 0 else encode_at(depth - 1)

    assert decode(encode_at(300)) == nested
    assert decode(encode_at(0)) == nested


def test_lone_surrogate_comes_back() -> None:
    """Half a character, as a broken UTF-16 source gives it, is escaped, and comes back."""
    assert encode("\ud800") == '"\\ud800"'
    assert decode(encode({"a": "\udc00"})) == {"a": "\udc00"}


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "JSON"),
        ([float("inf")], "JSON"),
        ("\ud83d\ude00", "surrogate pair as two code points"),
        (nested(100_000), "nested too deep"),
    ],
)
def test_what_json_cannot_hold_is_a_value_error(value: object, message: str) -> None:
    """NaN, Infinity, a split surrogate pair and bottomless nesting are refused, with the reason."""
    with pytest.raises(ValueError, match=message):
        encode(value)


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}])
def test_other_types_are_a_type_error(value: object) -> None:
    """Only JSON values are taken."""
    with pytest.raises(TypeError):
        encode(value)
