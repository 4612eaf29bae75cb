"""A gold document among distractors: the shape of SynthWiki (arXiv 2310.01427) and of our encyclopedia."""

from collections.abc import Callable, Iterable

PLACES = {"first": 0.0, "half-way": 0.5, "last": 1.0}


def among(gold: str, others: Iterable[str], place: str, room: int, length: Callable[[str], int]) -> str:
    """Documents with a blank line between, as many as fit in `room` tokens, the gold one at its place.

    The gold document is always there, even where it alone is longer than the room.
    """
    chosen: list[str] = []
    room -= length(gold) + 1
    for document in others:
        needed = length(f"\n\n{document}")
        if needed > room:
            break
        chosen.append(document)
        room -= needed
    chosen.insert(round(PLACES[place] * len(chosen)), gold)
    return "\n\n".join(chosen)
