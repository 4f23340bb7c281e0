"""Part 4: the stubbed LLM is deterministic, streams words and then a tool call, and decides by the conversation."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mock_llm
import mock_rules
from mock_llm import LLMError, MockLLM, Piece, ToolCall, Usage

FILE = {"type": "process_data", "payload": {"file": "shop.csv"}}
EMAIL: dict[str, Any] = {
    "type": "send_email",
    "payload": {"to": "a@example.org", "subject": "Hi", "body": "Hello.\nBye."},
}
LOADED = {"load_file": {"result": {"rows": 5}}}


def conversation(task: Any, **results: Any) -> list[dict[str, Any]]:
    """The messages about a task, with the results of the steps so far: load_file={"result": …}."""
    told = [{"role": "tool", "tool_call_id": step, "content": json.dumps(result)} for step, result in results.items()]
    return [{"role": "system", "content": "Do it."}, {"role": "user", "content": json.dumps(task)}, *told]


def pieces_of(llm: MockLLM, messages: list[dict[str, Any]]) -> list[Piece]:
    """The words and the tool call, without the usage."""

    async def collect() -> list[Piece]:
        return [piece async for piece in llm.chat(messages, []) if not isinstance(piece, Usage)]

    return asyncio.run(collect())


def decide(task: Any, **results: Any) -> tuple[str, ToolCall | None]:
    """The mock's words, and the tool that it wants to use."""
    *words, last = pieces_of(MockLLM(), conversation(task, **results))
    if isinstance(last, ToolCall):
        return "".join(map(str, words)), last
    return "".join(map(str, [*words, last])), None


def next_call(task: Any, **results: Any) -> tuple[str, dict[str, Any]]:
    _, call = decide(task, **results)
    assert call is not None
    return call.name, call.arguments


def number(**more: Any) -> dict[str, Any]:
    figures = {"count": 5, "missing": 0, "sum": 12.5, "mean": 2.5, "min": 1, "max": 5}
    return {"type": "number", **figures, **more}


def text(distinct: int) -> dict[str, Any]:
    return {"type": "text", "count": 40, "distinct": distinct}


def described(**columns: dict[str, Any]) -> dict[str, Any]:
    return {**LOADED, "describe": {"result": {"rows": 5, "columns": columns}}}


# How it speaks


def test_words_come_one_at_a_time_before_the_call() -> None:
    *words, call = pieces_of(MockLLM(), conversation(FILE))

    assert len(words) > 3
    assert all(isinstance(word, str) and len(word.split()) == 1 for word in words)
    assert isinstance(call, ToolCall)


def test_reply_is_the_same_in_another_process() -> None:
    """The same messages give the same words even if Python's hash() differs."""
    code = (
        "import asyncio\n"
        "from mock_llm import MockLLM\n"
        "async def main():\n"
        "    for n in range(9):\n"
        '        task = \'{"type": "process_data", "payload": {"file": "%s"}}\' % n\n'
        "        print([p async for p in MockLLM().chat([{'role': 'user', 'content': task}], [])])\n"
        "asyncio.run(main())"
    )
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
    assert "load_file" in outputs.pop()


def test_delay_is_spread_over_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """delay_seconds is the time of a whole answer, in equal parts before each word."""
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    monkeypatch.setattr(mock_llm.asyncio, "sleep", nap)

    pieces = pieces_of(MockLLM(delay_seconds=3), conversation(FILE))

    assert len(naps) == len(pieces) - 1
    assert sum(naps) == pytest.approx(3)


def failures(llm: MockLLM, calls: int) -> list[bool]:
    failed = []
    for _ in range(calls):
        try:
            pieces_of(llm, conversation(FILE))
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


@pytest.mark.parametrize(
    "asked", ["Hello", "{}", '{"type": "dance", "payload": {}}', '{"type": "process_data"}', "[1]"]
)
def test_other_messages_get_a_sentence(asked: str) -> None:
    """The mock has no rules for a task that it doesn't know, and says so."""
    pieces = pieces_of(MockLLM(), [{"role": "user", "content": asked}])

    assert "only a mock" in "".join(map(str, pieces))


# What it decides


def test_data_task_begins_with_loading_and_describing_the_file() -> None:
    words, call = decide(FILE)

    assert call is not None and (call.name, call.arguments) == ("data_processor.load_file", {"file": "shop.csv"})
    assert "shop.csv" in words
    assert next_call(FILE, **LOADED) == ("data_processor.describe", {"file": "shop.csv"})


@pytest.mark.parametrize(
    ("columns", "sql"),
    [
        (
            {"order": text(900), "shop": text(3), "kind": text(2), "revenue_eur": number(), "weight": number()},
            'SELECT "shop", sum("revenue_eur") AS sum FROM data GROUP BY 1 ORDER BY 2 DESC NULLS LAST',
        ),
        (
            {"shop": text(3), "height": number(stdev=1), 'we"ight': number(stdev=2)},
            'SELECT "shop", mean("we""ight") AS mean FROM data GROUP BY 1 ORDER BY 2 DESC NULLS LAST',
        ),
        (
            {"name": text(900), "only": text(1), "kg": number()},
            'SELECT "kg" FROM data WHERE abs("kg" - (SELECT avg("kg") FROM data)) > 3 * (SELECT stddev("kg") FROM data)'
            " ORDER BY 1 DESC",
        ),
    ],
    ids=["money of the first category", "mean of the number that varies most", "no category"],
)
def test_sql_is_written_for_the_columns(columns: dict[str, Any], sql: str) -> None:
    """It groups money by the first category; without money the mean of what varies most; else it looks for outliers."""
    assert next_call(FILE, **described(**columns)) == ("data_processor.query", {"file": "shop.csv", "sql": sql})


@pytest.mark.parametrize("groups", [{"result": {"columns": [], "rows": []}}, {"error": "too much memory"}])
def test_groups_are_followed_by_outliers(groups: dict[str, Any]) -> None:
    """A query that failed isn't repeated, and doesn't keep the mock from the rest."""
    results = described(shop=text(3), weight=number())

    assert "stddev" in next_call(FILE, **results, groups=groups)[1]["sql"]


@pytest.mark.parametrize("step", ["load_file", "describe"])
def test_error_that_leaves_no_way_on_gives_up_with_its_message(step: str) -> None:
    """If the file cannot be read, the mock gives up with the tool's own words."""
    before = {} if step == "load_file" else LOADED

    assert next_call(FILE, **before, **{step: {"error": "no file"}}) == ("give_up", {"reason": "no file"})


def test_email_is_sent_as_the_payload_says_then_finished() -> None:
    """The mock sends the email once, unchanged, and finishes when the tool reports success."""
    assert next_call(EMAIL) == ("email_sender.send", EMAIL["payload"])
    assert decide(EMAIL, send={"result": {}}) == ("Sent 'Hi' to a@example.org.", None)


def test_refused_email_gives_up() -> None:
    assert next_call(EMAIL, send={"error": "not an address"}) == ("give_up", {"reason": "not an address"})


@pytest.mark.parametrize(
    ("declined", "why"),
    [("a person said no: do not call it again", "you said no"), ("nobody has answered: …", "nobody has answered")],
)
def test_declined_tool_is_the_end_of_the_conversation(declined: str, why: str) -> None:
    """It says which of the two it was, and asks for nothing more."""
    outcome = {"declined": declined}

    assert decide(EMAIL, send=outcome) == (f"I did not send the email, because {why}.", None)
    assert decide(FILE, load_file=outcome) == (f"I did not look at shop.csv, because {why}.", None)


def test_what_people_say_is_repeated_once_in_the_next_words() -> None:
    """All that was said since its last reply, before a tool as well as in its last words. A long text is cut."""
    said = [{"role": "user", "content": text} for text in ("Be quick.", "x" * 1_000)]
    begun = [*conversation(FILE), *said]
    reply = {"role": "assistant", "content": "Well."}

    first = "".join(map(str, pieces_of(MockLLM(), begun)[:-1]))
    later = "".join(map(str, pieces_of(MockLLM(), [*begun, reply])[:-1]))
    last = "".join(map(str, pieces_of(MockLLM(), [*conversation(EMAIL, send={"result": {}}), reply, said[0]])))

    assert first.startswith(f'You tell me: "Be quick." You tell me: "{"x" * 200}" First I load')
    assert "You tell me" not in later
    assert last == "You tell me: \"Be quick.\" Sent 'Hi' to a@example.org."


# How it sums up


def summary(name: str, column: dict[str, Any], *groups: list[Any], how: str = "sum") -> str:
    grouped = {"result": {"columns": ["shop", how], "rows": list(groups)}}
    outliers = {"result": {"columns": [name], "rows": [[1], [2]]}}
    words, call = decide(FILE, **described(**{"shop": text(3), name: column}), groups=grouped, outliers=outliers)
    assert call is None
    return words


def test_summary_names_the_share_of_the_largest_group() -> None:
    """A total of money is shared among the groups: the largest has so many per cent of it, be it most or not."""
    assert summary("revenue", number(), ["north", 5.5], ["south", 4], ["west", 3]) == (
        "shop.csv: 5 rows; revenue: mean 2.50, min 1, max 5, total 12.50."
        " Largest share by shop: north, 44 %. Outliers: 2."
    )


def test_summary_gives_no_share_if_numbers_are_below_zero() -> None:
    """With returned goods in it, a group may have more than the whole: then there is no share to speak of."""
    told = summary("revenue", number(min=-50, sum=10), ["north", 60], ["south", -50])

    assert "Highest sum by shop: north (60)" in told
    assert "%" not in told


@pytest.mark.parametrize("name", ["mean_c", "unit_price", "weight", "sales_growth"])
def test_summary_adds_up_nothing_that_may_not_be_added(name: str) -> None:
    """Of temperatures, prices and all that is unknown it tells mean, min and max, never a total or a share."""
    told = summary(name, number(), ["west", -3.25], ["south", -4], ["north", None], how="mean")

    start = f"shop.csv: 5 rows; {name}: mean 2.50, min 1, max 5."
    assert told == f"{start} Highest mean by shop: west (-3.25). Outliers: 2."


def test_summary_tells_how_many_rows_have_a_value() -> None:
    """A mean of fewer rows than the file has is said to be so; a group may have no name."""
    told = summary("revenue", number(count=4, missing=1), [None, 12.5])

    assert "(4 of 5 rows have a value)" in told
    assert "(missing), 100 %" in told


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (described(shop=text(3)), "shop.csv: 5 rows."),
        ({**LOADED, "describe": {"result": '{"columns": {"a … (truncated'}}, "shop.csv: 5 rows."),
        ({**described(n={"type": "number", "sum": None}), "outliers": {"error": "no"}}, "shop.csv: 5 rows."),
        (
            {**LOADED, "describe": {"result": {"lines": 16, "words": 1272, "characters": 9000, "columns": {}}}},
            "shop.csv: 16 lines, 1,272 words.",
        ),
        (
            {
                **described(n=number()),
                "outliers": {"result": {"columns": ["n"], "rows": [[9]] * 100, "rows_left_out": 7}},
            },
            "shop.csv: 5 rows; n: mean 2.50, min 1, max 5. Outliers: 107.",
        ),
    ],
    ids=["no numbers", "cut description", "no figures", "text", "many outliers"],
)
def test_summary_leaves_out_what_the_results_lack(results: dict[str, Any], told: str) -> None:
    assert decide(FILE, **results) == (told, None)


@pytest.mark.parametrize(
    ("value", "words"), [(118107.0, "118,107"), (992.4957, "992.50"), (0.00123, "0.00123"), (0, "0"), (1e300, "1e+300")]
)
def test_numbers_are_written_for_people(value: float, words: str) -> None:
    """Whole numbers whole, others with two decimals, small ones with three digits rather than as 0.00."""
    assert mock_rules.in_words(value) == words
