"""A needle in a haystack: one sentence at every depth of contexts of several lengths."""

import random

from kvprofile.evaluate.metrics import contains
from kvprofile.evaluate.tasks.haystack import hide, sentences
from kvprofile.evaluate.tasks.task import Example, Request, Task, best
from kvprofile.samples.encyclopedia.pools import POOLS

LENGTHS = (0.25, 0.5, 1.0)  # of the tokens asked for
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
OPENING = "Read the text and remember the code in it.\n\n"
QUESTION = "\n\nWhat is the six-digit code of the {thing}?"


def examples(request: Request) -> list[Example]:
    """`count` needles for every length and depth of the grid; `needle:SOURCE` takes the hay from a file or folder."""
    draw = random.Random(request.seed)
    hay = sentences(request.source, request.seed, request.tokens)
    opening = request.length(OPENING)
    made = []
    for _ in range(request.count):
        thing = f"{draw.choice(POOLS['adjective'])} {draw.choice(POOLS['noun'])}"
        code, shift = str(draw.randrange(100_000, 1_000_000)), draw.randrange(len(hay))
        for part in LENGTHS:
            for depth in DEPTHS:
                tokens = round(part * request.tokens)
                needle = (depth, f"The six-digit code of the {thing} is {code}.")
                made.append(
                    Example(
                        OPENING + hide([needle], hay, tokens - opening, request.length, shift),
                        QUESTION.format(thing=thing),
                        (code,),
                        prefix=f"The six-digit code of the {thing} is",
                        group=f"{tokens} tokens, depth {depth:.0%}",
                        max_new_tokens=12,
                        place=(tokens, depth),
                    )
                )
    return made


NEEDLE = Task("one fact at five depths of three lengths, drawn as a grid", "code found", examples, best(contains))
