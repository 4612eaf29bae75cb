"""Where the rows of a batch stand."""

from dataclasses import dataclass

from kvprofile.merging.host import selector

# Rows of a batch: all of them without a copy, or some.
Places = slice | list[int]  # as `selector` gives them


@dataclass(frozen=True)
class Row:
    """Where one row of the batch stands; rows that stand alike go through every step together.

    padding: tokens of padding before its text. merged: tokens of its text that are slots by now. heavy: heavy hitters
    protected among them, for every policy of the layer.
    """

    padding: int
    merged: int
    heavy: tuple[int, ...]


def alike(rows: list[Row]) -> list[tuple[Row, Places]]:
    """Rows that stand alike, and where."""
    if all(row == rows[0] for row in rows):
        return [(rows[0], slice(None))]
    places: dict[Row, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row, []).append(place)
    return [(row, selector(found)) for row, found in places.items()]
