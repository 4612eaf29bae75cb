"""A gold document among distractors: the shape of SynthWiki (arXiv 2310.01427) and of our encyclopedia."""

from collections.abc import Callable, Iterable, Sequence

from kvprofile.evaluate.tasks.task import Example, Request

PLACES = {"first": 0.0, "half-way": 0.5, "last": 1.0}


def at_places(
    gold: str, others: Sequence[str], question: str, answers: tuple[str, ...], *, opening: str, request: Request
) -> list[Example]:
    """One question with its gold document first, half-way and last among the others."""
    room = request.tokens - request.length(opening)
    return [
        Example(
            opening + _among(gold, others, place, room, request.length),
            question,
            answers,
            prefix="Answer:",
            group=place,
            max_new_tokens=24,
            stop="\n",
        )
        for place in PLACES
    ]


def _among(gold: str, others: Iterable[str], place: str, room: int, length: Callable[[str], int]) -> str:
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
