"""Running text to hide things in, sentence by sentence."""

import random
import re
from collections.abc import Callable

from kvprofile.errors import KVProfileError
from kvprofile.samples.encyclopedia import entries
from kvprofile.samples.load import load_documents

SEED_OFFSET = 9001


def sentences(source: str, seed: int, tokens: int) -> list[str]:
    """Sentences of the text `source` names, as `--data` does, in another order of documents for every seed.

    Without a source, articles of our encyclopedia, enough for `tokens`.
    """
    if source:
        texts = [document.text for document in load_documents(source, seed=seed)]
        random.Random(seed).shuffle(texts)
    else:
        texts = [entry.text.partition("\n\n")[2] for entry in entries(seed + SEED_OFFSET, tokens // 100 + 2)]
    return [part for text in texts for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]


def hide(
    needles: list[tuple[float, str]], hay: list[str], room: int, length: Callable[[str], int], shift: int = 0
) -> str:
    """Sentences of the hay, as many as fit in `room` tokens, with every needle (depth, sentence) at its depth.

    A depth of 0 is before all of the hay, 1 is after it. `shift` is the sentence to begin with.
    Raises KVProfileError where the hay is too short.
    """
    room -= sum(length(f" {needle}") for _, needle in needles)
    chosen: list[str] = []
    for number in range(len(hay)):
        sentence = hay[(shift + number) % len(hay)]
        room -= length(f" {sentence}")
        if room < 0:
            break
        chosen.append(sentence)
    else:
        raise KVProfileError(f"the haystack is {room} tokens too short; give more text, or fewer --tokens")
    count = len(chosen)
    for depth, needle in sorted(needles, reverse=True):
        chosen.insert(round(depth * count), needle)
    return " ".join(chosen)
