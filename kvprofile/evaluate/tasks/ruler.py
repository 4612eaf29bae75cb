"""Generators in the manner of RULER (arXiv 2404.06654): several keys, several values, variables that point at variables.

Our own wording and text; a score is the share of the expected answers that stand in the output, as RULER counts.
"""

import random
import string
from collections.abc import Callable

from kvprofile.errors import UsageError
from kvprofile.evaluate.metrics import share_found
from kvprofile.evaluate.tasks.haystack import hide, sentences
from kvprofile.evaluate.tasks.task import Example, Request, Task
from kvprofile.samples.encyclopedia.pools import POOLS

KEYS = 6
VALUES = 4
HOPS = 4
CHAINS = 2
OPENING = "Some facts are hidden in the text. Remember them; there will be a question.\n\n"

Hide = Callable[[list[str]], str]


def _multi_key(draw: random.Random, hidden: Hide) -> Example:
    """One of several keys is asked for."""
    things = draw.sample(POOLS["noun"], KEYS)
    numbers = [str(draw.randrange(100_000, 1_000_000)) for _ in things]
    context = hidden([f"The number of the {thing} is {number}." for thing, number in zip(things, numbers, strict=True)])
    place = draw.randrange(KEYS)
    return Example(
        context,
        f"\n\nWhat is the number of the {things[place]}?",
        (numbers[place],),
        prefix=f"The number of the {things[place]} is",
        group="multi-key",
        max_new_tokens=12,
    )


def _multi_value(draw: random.Random, hidden: Hide) -> Example:
    """All values of one key are asked for."""
    thing = draw.choice(POOLS["noun"])
    numbers = [str(draw.randrange(100_000, 1_000_000)) for _ in range(VALUES)]
    return Example(
        hidden([f"One of the numbers of the {thing} is {number}." for number in numbers]),
        f"\n\nWhat are the {VALUES} numbers of the {thing}?",
        (", ".join(numbers), *numbers),
        prefix=f"The numbers of the {thing} are",
        group="multi-value",
        max_new_tokens=48,
    )


def _variables(draw: random.Random, hidden: Hide) -> Example:
    """Which variables have a value, directly or through others? A second chain of variables distracts."""
    names = ["".join(draw.choice(string.ascii_uppercase) for _ in range(4)) for _ in range(CHAINS * HOPS)]
    values = [str(draw.randrange(10_000, 100_000)) for _ in range(CHAINS)]
    chains = [names[chain * HOPS : (chain + 1) * HOPS] for chain in range(CHAINS)]
    statements = [
        f"Variable {name} has the value {value}." if not hop else f"Variable {name} has the value of {chain[hop - 1]}."
        for hop in range(HOPS)
        for chain, value in zip(chains, values, strict=True)
        for name in [chain[hop]]
    ]
    return Example(
        hidden(statements),
        f"\n\nWhich {HOPS} variables have the value {values[0]}, directly or through another variable?",
        (", ".join(chains[0]), *chains[0]),
        prefix=f"The variables with the value {values[0]} are",
        group="variable tracking",
        max_new_tokens=48,
    )


KINDS = {"multi-key": _multi_key, "multi-value": _multi_value, "variables": _variables}


def examples(request: Request) -> list[Example]:
    """`count` examples of each kind, or of the one `ruler:KIND` names."""
    if request.source and request.source not in KINDS:
        raise UsageError(f"ruler has no {request.source!r}; expected ruler or ruler: and one of {', '.join(KINDS)}")
    hay = sentences("", request.seed, request.tokens)
    room = request.tokens - request.length(OPENING)
    made = []
    for name in [request.source] if request.source else KINDS:
        draw = random.Random(f"{request.seed}/{name}")
        for _ in range(request.count):
            shift = draw.randrange(len(hay))

            def hidden(facts: list[str], shift: int = shift, draw: random.Random = draw) -> str:
                # In the order given: a variable is defined before it is used.
                depths = sorted(draw.random() for _ in facts)
                needles = list(zip(depths, facts, strict=True))
                return OPENING + hide(needles, hay, room, request.length, shift)

            made.append(KINDS[name](draw, hidden))
    return made


def score(prediction: str, example: Example) -> float:
    """Share of the single answers found; with several, the first of `answers` is all of them in one line."""
    return share_found(prediction, example.answers[1:] or example.answers)


RULER = Task("our own multi-key, multi-value and variable tracking", "share found", examples, score)
