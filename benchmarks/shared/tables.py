"""Rows as a table in Markdown, on standard output."""

from typing import Any


def table(rows: list[dict[str, Any]], what: str, columns: dict[str, str]) -> None:
    """Print the rows whose `what` it is: a title and a format for every column."""
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        if row["what"] == what:
            print("| " + " | ".join(form.format(**row) for form in columns.values()) + " |", flush=True)
