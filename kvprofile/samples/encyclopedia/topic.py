"""What an entry on one topic is made from."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """How entries on one topic are worded.

    Data only; changing any line changes the built-in text, and with it the digest of every calibration on it.

    Attributes:
        fields: name of a field -> how it is drawn, in this order: "word" and "person" are made-up names, "year A B" and
            "count A B" numbers, anything else a list of `POOLS`, or, with braces, made of the fields before it. The
            field `name` is the entry's title.
        opening: wordings of the first sentence.
        statements: sentences that hold the facts, each with its wordings; all are in every entry.
        remarks: sentences without a fact, each with its wordings; some are in an entry.
        questions: (question, name of the field that answers it).
    """

    fields: dict[str, str]
    opening: tuple[str, ...]
    statements: tuple[tuple[str, ...], ...]
    remarks: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, str], ...]
