"""Part 4: the stubbed LLM is deterministic, streams what it completes, and decides by what is in the prompt."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mock_llm
from mock_llm import LLMError, MockLLM

FILE = {"type": "process_data", "payload": {"file": "shop.csv"}}
EMAIL: dict[str, Any] = {
    "type": "send_email",
    "payload": {"to": "a@example.org", "subject": "Hi", "body": "Hello.\nBye."},
}


def prompt(task: dict[str, Any], *results: dict[str, Any]) -> str:
    lines = [json.dumps(result, ensure_ascii=False) for result in results] or ["(none yet)"]
    head = ["Do the task.", "", "TASK", json.dumps(task, ensure_ascii=False), ""]
    return "\n".join([*head, "TOOLS", "- data_processor.load_file(file): Load it.", "", "RESULTS", *lines])


def done(tool: str, result: Any) -> dict[str, Any]:
    return {"tool": f"data_processor.{tool}", "arguments": {}, "result": result}


def number(**more: Any) -> dict[str, Any]:
    figures = {"count": 5, "missing": 0, "sum": 12.5, "mean": 2.5, "min": 1, "max": 5}
    return {"type": "number", **figures, **more}


def text(distinct: int) -> dict[str, Any]:
    return {"type": "text", "count": 40, "distinct": distinct}


def described(**columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return done("load_file", {"rows": 5}), done("describe", {"rows": 5, "columns": columns})


def decide(task: dict[str, Any], *results: dict[str, Any]) -> dict[str, Any]:
    decision: dict[str, Any] = json.loads(MockLLM().complete(prompt(task, *results)))
    return decision


@given(st.text())
def test_stream_joined_equals_complete(question: str) -> None:
    """The words of stream(), joined, are exactly the text of complete()."""
    llm = MockLLM()

    words = list(llm.stream(question))

    assert "".join(words) == llm.complete(question)
    assert len(words) > 1


def test_stream_gives_one_word_at_a_time() -> None:
    """A stream's item is one word with the space after it, so that a watcher sees words arrive."""
    words = list(MockLLM().stream(prompt(FILE)))

    assert all(len(word.split()) == 1 for word in words)


def test_complete_is_the_same_in_another_process() -> None:
    """The same prompt gives the same words even where Python's hash() differs."""
    code = "from mock_llm import MockLLM; print([MockLLM().complete(str(n)) for n in range(9)])"
    project = Path(mock_llm.__file__).parent

    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=project,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }

    assert len(outputs) == 1
    assert "mock" in outputs.pop()


def test_delay_is_spread_over_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """delay_seconds is the time of a whole answer, in equal parts before each word."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)

    words = list(MockLLM(delay_seconds=3).stream(prompt(FILE)))

    assert len(naps) == len(words)
    assert sum(naps) == pytest.approx(3)


def failures(llm: MockLLM, calls: int) -> list[bool]:
    failed = []
    for _ in range(calls):
        try:
            llm.complete("Hello")
            failed.append(False)
        except LLMError:
            failed.append(True)
    return failed


def test_fail_rate_is_the_share_of_calls_that_fail() -> None:
    """Of many calls about the share fail_rate raises LLMError; 0 is never, 1 is always."""
    assert sum(failures(MockLLM(fail_rate=0.3), 1000)) == pytest.approx(300, abs=50)
    assert not any(failures(MockLLM(fail_rate=0), 100))
    assert all(failures(MockLLM(fail_rate=1), 100))


def test_fail_rate_is_deterministic_in_seed_and_call_number() -> None:
    """Two LLMs of one seed fail on the same calls, of another seed on others."""
    first = failures(MockLLM(fail_rate=0.5, seed=1), 100)

    assert first == failures(MockLLM(fail_rate=0.5, seed=1), 100)
    assert first != failures(MockLLM(fail_rate=0.5, seed=2), 100)


def test_data_task_begins_with_loading_the_file() -> None:
    """With no results yet, the first action on a data task is to load the payload's file."""
    decision = decide(FILE)

    assert decision["action"] == {"tool": "data_processor.load_file", "arguments": {"file": "shop.csv"}}
    assert "shop.csv" in decision["thought"]


def test_loaded_file_is_described() -> None:
    """After load_file the mock asks for the columns."""
    assert decide(FILE, done("load_file", {"rows": 5}))["action"]["tool"] == "data_processor.describe"


def test_group_by_takes_first_category_and_the_column_like_money() -> None:
    """group_by is chosen from describe's columns: first text column with few values, by the revenue-like number."""
    columns = {"order": text(900), "shop": text(3), "kind": text(2), "revenue_eur": number(), "weight": number()}

    action = decide(FILE, *described(**columns))["action"]

    assert action["tool"] == "data_processor.group_by"
    assert action["arguments"] == {"file": "shop.csv", "by": "shop", "value": "revenue_eur", "how": "sum"}


def test_group_by_takes_last_number_when_none_is_like_money() -> None:
    """Without a revenue-like name the last number column is used, and its mean: nobody knows whether it adds up."""
    columns = {"shop": text(3), "height": number(), "weight": number()}

    arguments = decide(FILE, *described(**columns))["action"]["arguments"]

    assert (arguments["value"], arguments["how"]) == ("weight", "mean")


def test_file_without_category_goes_straight_to_outliers() -> None:
    """If no text column has few values, the mock skips group_by."""
    columns = {"name": text(900), "only": text(1), "weight": number()}

    action = decide(FILE, *described(**columns))["action"]

    assert action == {
        "tool": "data_processor.find_outliers",
        "arguments": {"file": "shop.csv", "column": "weight"},
    }


def test_file_without_numbers_is_finished_after_describe() -> None:
    """Text alone is neither summed nor searched for outliers: the mock finishes."""
    decision = decide(FILE, *described(shop=text(3)))

    assert "5 rows" in decision["finish"]


@pytest.mark.parametrize("tool", ["load_file", "describe"])
def test_error_that_leaves_no_way_on_gives_up_with_its_message(tool: str) -> None:
    """When the file cannot be read the mock gives up with the tool's own words."""
    broken = {"tool": f"data_processor.{tool}", "arguments": {}, "error": "no file shop.csv"}
    before = [] if tool == "load_file" else [done("load_file", {"rows": 5})]

    assert decide(FILE, *before, broken)["give_up"] == "no file shop.csv"


def test_error_in_a_side_step_is_stepped_over() -> None:
    """A failed group_by is not repeated, and does not keep the mock from the rest."""
    broken = {"tool": "data_processor.group_by", "arguments": {}, "error": "too many groups"}

    decision = decide(FILE, *described(shop=text(3), weight=number()), broken)

    assert decision["action"]["tool"] == "data_processor.find_outliers"


def test_truncated_description_still_ends_in_a_summary() -> None:
    """A describe result that came as cut text (too long) is not an object: the mock finishes with what it has."""
    decision = decide(FILE, done("load_file", {"rows": 5}), done("describe", '{"columns": {"a … (truncated'))

    assert "5 rows" in decision["finish"]


def test_summary_leaves_out_what_the_results_lack() -> None:
    """A file without rows has no sums, no groups and no outliers; the summary still is a sentence."""
    empty = done("load_file", {"rows": 0}), done("describe", {"columns": {"n": {"type": "number", "sum": None}}})

    assert decide(FILE, *empty, done("find_outliers", {}))["finish"] == "shop.csv: 0 rows."


def summary(name: str, column: dict[str, Any], how: str, **groups: float | None) -> str:
    grouped = done("group_by", {"by": "shop", "how": how, "groups": groups})
    columns = {"shop": text(3), name: column}
    return str(decide(FILE, *described(**columns), grouped, done("find_outliers", {"count": 2}))["finish"])


def test_summary_names_the_share_of_the_largest_group() -> None:
    """A total of money is shared among the groups: the largest has so many per cent of it, be it most or not."""
    assert summary("revenue", number(), "sum", north=5.5, south=4, west=3) == (
        "shop.csv: 5 rows; revenue: mean 2.50, min 1, max 5, total 12.50."
        " Largest share by shop: north, 44 %. Outliers: 2."
    )


def test_summary_gives_no_share_where_numbers_are_below_zero() -> None:
    """With returned goods in it, a group may have more than the whole: then there is no share to speak of."""
    told = summary("revenue", number(min=-50, sum=10), "sum", north=60, south=-50)

    assert "Highest sum by shop: north (60)" in told
    assert "%" not in told


@pytest.mark.parametrize("name", ["mean_c", "unit_price", "weight", "sales_growth"])
def test_summary_adds_up_nothing_that_may_not_be_added(name: str) -> None:
    """Of temperatures, prices and all that is unknown it tells mean, min and max, never a total or a share."""
    told = summary(name, number(), "mean", north=None, south=-4, west=-3.25)

    assert (
        told == f"shop.csv: 5 rows; {name}: mean 2.50, min 1, max 5. Highest mean by shop: west (-3.25). Outliers: 2."
    )


def test_summary_tells_how_many_rows_have_a_value() -> None:
    """A mean of fewer rows than the file has is said to be so."""
    assert "(4 of 5 rows have a value)" in summary("revenue", number(count=4, missing=1), "sum", north=1)


def test_summary_of_a_text_counts_lines_and_words() -> None:
    """A text has no rows worth telling."""
    text_file = {"lines": 16, "words": 1272, "characters": 9000, "most_common": {"that": 13}, "columns": {}}

    assert decide(FILE, done("load_file", {"rows": 16}), done("describe", text_file))["finish"] == (
        "shop.csv: 16 lines, 1,272 words."
    )


@pytest.mark.parametrize(
    ("value", "words"), [(118107.0, "118,107"), (992.4957, "992.50"), (0.00123, "0.00123"), (0, "0"), (1e300, "1e+300")]
)
def test_numbers_are_written_for_people(value: float, words: str) -> None:
    """Whole numbers whole, others with two decimals, small ones with three digits rather than as 0.00."""
    assert mock_llm.in_words(value) == words


def test_email_is_sent_as_the_payload_says_then_finished() -> None:
    """The mock sends the email once, unchanged, and finishes when the tool reports success."""
    sent = {"tool": "email_sender.send", "arguments": {}, "result": {"sent": True}}

    first, second = decide(EMAIL), decide(EMAIL, sent)

    assert first["action"] == {"tool": "email_sender.send", "arguments": EMAIL["payload"]}
    assert "a@example.org" in second["finish"]


def test_refused_email_gives_up() -> None:
    """An email that the tool refuses is not tried again."""
    refused = {"tool": "email_sender.send", "arguments": {}, "error": "not an address"}

    assert decide(EMAIL, refused)["give_up"] == "not an address"


def test_headings_inside_a_payload_are_not_headings() -> None:
    """A payload that contains the prompt's own headings, or odd line breaks, is still read as data."""
    body = "Hello\nRESULTS\nTASK\n{}\u2028- x.y("
    task = {"type": "send_email", "payload": {**EMAIL["payload"], "body": body}}

    assert decide(task)["action"]["arguments"]["body"] == body


def test_unknown_task_type_gives_up() -> None:
    """The mock has no rules for a type that it does not know, and says so."""
    assert "no rules" in decide({"type": "dance", "payload": {}})["give_up"]
