"""The rules of the stubbed LLM: which tool comes next, and what the results say. Pure functions, no surprises.

mock_llm.py speaks for them. To let the mock use a tool of yours, add a rule here.
"""

from typing import Any

ROWS_PER_GROUP = 4  # a text column with fewer rows per value than this is a name or a date, not a category
MONEY = ("revenue", "sales", "amount", "total", "price")  # names of an interesting column, the best first
NO_TOTAL = ("price", "mean", "average", "avg", "rate", "percent", "pct", "growth")  # adding these up means nothing

Results = dict[str, dict[str, Any]]  # step -> {"result": …}, {"error": …} or {"declined": …}
Decision = tuple[str, str, str, dict[str, Any]]  # words, step, tool, arguments; without a tool the words are the end


def decide(task: Any, results: Results) -> Decision:
    """Decide what to do next about a task. Raises KeyError or TypeError for one that it doesn't know."""
    return {"process_data": decide_data, "send_email": decide_email}[task["type"]](task["payload"], results)


def conclude(words: str) -> Decision:
    return words, "", "", {}


def stop(outcome: dict[str, Any], what: str) -> Decision:
    """End the conversation after a tool that did not do its work."""
    if "declined" in outcome:
        why = "nobody has answered" if "nobody" in outcome["declined"] else "you said no"
        return conclude(f"I did not {what}, because {why}.")
    return "The tool says that this cannot be done.", "give_up", "give_up", {"reason": outcome["error"]}


def decide_email(payload: dict[str, Any], results: Results) -> Decision:
    if "send" not in results:
        arguments = {field: payload[field] for field in ("to", "subject", "body")}
        return "The email is complete, so I send it as it is.", "send", "email_sender.send", arguments
    if "result" not in results["send"]:
        return stop(results["send"], "send the email")
    return conclude(f"Sent {payload['subject']!r} to {payload['to']}.")


def decide_data(payload: dict[str, Any], results: Results) -> Decision:
    """Load, describe, then write SQL for groups and outliers if describe() has told of columns that fit."""
    file = payload["file"]
    for step, words in (
        ("load_file", f"First I load {file} to see what is in it."),
        ("describe", "Which columns are numbers, which are categories?"),
    ):
        if step not in results:
            return words, step, f"data_processor.{step}", {"file": file}
        if "result" not in results[step]:
            return stop(results[step], f"look at {file}")

    described = results["describe"]["result"]
    columns = described["columns"] if isinstance(described, dict) else {}  # a result that was too long came as text
    category, number = choose_category(columns), choose_number(columns)
    if category and number and "groups" not in results:
        how = "sum" if adds_up(number) else "mean"
        sql = f"SELECT {name(category)}, {how}({name(number)}) AS {how} FROM data GROUP BY 1 ORDER BY 2 DESC NULLS LAST"
        words = f"{category} has few values: the {how} of {number} for each?"
        return words, "groups", "data_processor.query", {"file": file, "sql": sql}
    if number and "outliers" not in results:
        column = name(number)
        far = f"abs({column} - (SELECT avg({column}) FROM data)) > 3 * (SELECT stddev({column}) FROM data)"
        sql = f"SELECT {column} FROM data WHERE {far} ORDER BY 1 DESC"
        words = f"Is any value of {number} far from the others?"
        return words, "outliers", "data_processor.query", {"file": file, "sql": sql}
    return conclude(summarise(file, category, number, results))


def name(column: str) -> str:
    """Return a column's name as SQL writes it. name("unit price") -> '"unit price"'"""
    return '"' + column.replace('"', '""') + '"'


def choose_category(columns: dict[str, Any]) -> str | None:
    """Return the first text column with few distinct values: the one worth grouping by."""
    for column, found in columns.items():
        if found["type"] == "text" and 2 <= found.get("distinct", 0) <= found["count"] / ROWS_PER_GROUP:
            return column
    return None


def choose_number(columns: dict[str, Any]) -> str | None:
    """Return the number column that looks most like money, else the one that varies most, measured by its mean."""

    def interest(column: str) -> tuple[int, float]:
        words = [-place for place, word in enumerate(MONEY) if word in column.lower()]
        found = columns[column]
        return max(words, default=-len(MONEY)), (found.get("stdev") or 0) / abs(found.get("mean") or 1)

    return max((column for column in columns if columns[column]["type"] == "number"), key=interest, default=None)


def adds_up(column: str) -> bool:
    """Whether a column's total means something, as far as its name tells. "revenue" -> True; "mean_c" -> False"""
    return any(word in column.lower() for word in MONEY) and not any(word in column.lower() for word in NO_TOTAL)


def summarise(file: str, category: str | None, number: str | None, results: Results) -> str:
    """Say in a sentence or two what the results are. All numbers are theirs; missing ones are left out."""
    found = {step: call["result"] for step, call in results.items() if isinstance(call.get("result"), dict)}
    rows, described = found.get("load_file", {}).get("rows", "an unknown number of"), found.get("describe", {})
    if "words" in described:
        return f"{file}: {described['lines']:,} lines, {described['words']:,} words."
    text = f"{file}: {rows} rows"
    column = described["columns"][number] if number else {}
    if number and column.get("mean") is not None:  # a column without numbers has no figures
        figures = {figure: column[figure] for figure in ("mean", "min", "max")}
        figures |= {"total": column["sum"]} if adds_up(number) else {}
        text += f"; {number}: " + ", ".join(f"{figure} {in_words(value)}" for figure, value in figures.items())
        if column["missing"]:
            text += f" ({column['count']} of {rows} rows have a value)"
        groups = [row for row in found.get("groups", {}).get("rows", []) if row[1] is not None]
        if groups:
            name, value = groups[0][0] or "(missing)", groups[0][1]
            if adds_up(number) and column["min"] >= 0 and column["sum"] > 0:  # only then is there a share of a total
                text += f". Largest share by {category}: {name}, {100 * value / column['sum']:.3g} %"
            else:
                text += f". Highest {found['groups']['columns'][1]} by {category}: {name} ({in_words(value)})"
    if "rows" in found.get("outliers", {}):
        text += f". Outliers: {len(found['outliers']['rows']) + found['outliers'].get('rows_left_out', 0)}"
    return text + "."


def in_words(number: float) -> str:
    """Write a number for a person. 118107.0 -> "118,107"; 992.4957 -> "992.50"; 0.00123 -> "0.00123" """
    if number == int(number):
        return f"{number:,.15g}"
    return f"{number:,.2f}" if abs(number) >= 1 else f"{number:.3g}"
