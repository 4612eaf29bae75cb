"""One piece of text, the unit every source of text is read into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text with what it is and where it came from.

    Samples are cut per kind, so that the variation between kinds of text can be measured; whole documents are dealt to
    the calibration or to the held-out part, so that the two share no text.

    Attributes:
        text: the text itself, newlines as `\\n`.
        kind: "prose", "code" or "encyclopedia" for the built-in text, else a task, a folder's or a file's name.
        name: which document this is, for the record.
    """

    text: str
    kind: str
    name: str
