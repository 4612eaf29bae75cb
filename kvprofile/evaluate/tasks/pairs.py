"""Key-value retrieval: the value of one key of a long JSON object (Lost in the Middle, arXiv 2307.03172)."""

import json
import random

from kvprofile.errors import UsageError
from kvprofile.evaluate.metrics import contains
from kvprofile.evaluate.tasks.task import Example, Request, Task, best

OPENING = "Extract the value of a key from this JSON object.\n\n"
DIGITS = 8  # of keys and values, hexadecimal: the paper's 32 are beyond small models even with the full cache
QUARTERS = 4


def examples(request: Request) -> list[Example]:
    """`count` keys from each quarter of an object that fills the context."""
    draw = random.Random(request.seed)
    room = request.tokens - request.length(OPENING + "{\n\n}")
    made = []
    for quarter in range(QUARTERS):
        for _ in range(request.count):
            pairs = _object(draw, room, request)
            place = int((quarter + draw.random()) * len(pairs) / QUARTERS)
            key, value = list(pairs.items())[place]
            made.append(
                Example(
                    OPENING + json.dumps(pairs, indent=0),
                    f'\n\nWhat is the value of the key "{key}"?',
                    (f'"{value}"',),
                    prefix=f'"{key}":',
                    group=f"quarter {quarter + 1}",
                    max_new_tokens=16,
                    stop=",",
                )
            )
    return made


def _object(draw: random.Random, room: int, request: Request) -> dict[str, str]:
    pairs: dict[str, str] = {}
    while True:
        key, value = (f"{draw.getrandbits(4 * DIGITS):0{DIGITS}x}" for _ in range(2))
        if (room := room - request.length(f'"{key}": "{value}",\n')) < 0:
            break
        pairs[key] = value
    if len(pairs) < QUARTERS:
        raise UsageError(f"--tokens {request.tokens} is too short for {QUARTERS} pairs of key and value; give more")
    return pairs


PAIRS = Task("the value of one key of a JSON object, by quarter", "value found", examples, best(contains))
