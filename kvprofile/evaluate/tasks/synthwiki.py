"""SynthWiki (arXiv 2310.01427): a question on one made-up article among others, from the authors' own file.

The file has no licence to pass it on under, so it has to be brought: `synthwiki:madlibs1.csv`.
"""

import random
from pathlib import Path

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.evaluate.metrics import contains
from kvprofile.evaluate.tasks.gold import at_places
from kvprofile.evaluate.tasks.task import Example, Request, Task, best
from kvprofile.samples.files import read_csv

OPENING = "Here are some documents.\n\n"
QUESTION = "\n\nAnswer the question with the fewest words, from the documents.\nQuestion: {question}"
COLUMNS = ("context", "question", "answer")


def examples(request: Request) -> list[Example]:
    """`count` questions on different articles, each with its article first, half-way and last."""
    path = Path(request.source).expanduser()
    if not request.source or not path.is_file():
        raise UsageError(
            f"no such file: {request.source!r}; give synthwiki:FILE with madlibs1.csv of github.com/adamlerer/synthwiki"
        )
    rows = list(read_csv(path))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise KVProfileError(f"{path} has no column {', '.join(missing)}; expected SynthWiki's {', '.join(COLUMNS)}")
    draw = random.Random(request.seed)
    by_article: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_article.setdefault(row["context"], []).append(row)
    made = []
    for gold in draw.sample(list(by_article), min(request.count, len(by_article))):
        row = draw.choice(by_article[gold])
        others = [article for article in by_article if article != gold]
        draw.shuffle(others)
        answers = tuple(answer.strip() for answer in row["answer"].split("|"))
        made += at_places(
            gold, others, QUESTION.format(question=row["question"]), answers, opening=OPENING, request=request
        )
    return made


SYNTHWIKI = Task("SynthWiki from its file, first / half-way / last", "answer found", examples, best(contains))
