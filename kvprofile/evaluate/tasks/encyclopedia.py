"""Questions on an encyclopedia of made-up things: SynthWiki's shape, with text of our own that needs no download."""

import random

from kvprofile.evaluate.metrics import contains
from kvprofile.evaluate.tasks.gold import at_places
from kvprofile.evaluate.tasks.task import Example, Request, Task, best
from kvprofile.samples.encyclopedia import entries

OPENING = "Here are some articles of an encyclopedia.\n\n"
QUESTION = "\n\nAnswer the question with the fewest words, from the articles.\nQuestion: {question}"
SEED_OFFSET = 7001  # entries that no calibration of the usual seeds has read


def examples(request: Request) -> list[Example]:
    """`count` facts of as many entries, each with its entry first, half-way and last."""
    draw = random.Random(request.seed)
    # An entry has some 250 tokens; more than needed, so that distractors do not run out.
    articles = entries(request.seed + SEED_OFFSET, request.count + request.tokens // 100 + 1)
    made = []
    for number, gold in enumerate(articles[: request.count]):
        question, answer = draw.choice(gold.facts)
        others = [entry.text for place, entry in enumerate(articles) if place != number]
        draw.shuffle(others)
        made += at_places(
            gold.text, others, QUESTION.format(question=question), (answer,), opening=OPENING, request=request
        )
    return made


ENCYCLOPEDIA = Task("facts of generated articles, first / half-way / last", "answer found", examples, best(contains))
