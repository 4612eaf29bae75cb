"""ZeroSCROLLS (arXiv 2305.14196) from its own files: `zeroscrolls:TASK,TASK:FOLDER` reads FOLDER/TASK/validation.jsonl.

The prompts are in the files. A document that is too long loses its end and gets the file's own note that it did. Answers of
the test files are private, so only validation files can be scored.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.evaluate.metrics import f1, letter, order, percentage, rouge_mean
from kvprofile.evaluate.tasks.task import Example, Request, Task, best
from kvprofile.samples.files import read_jsonl

METRICS: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(("gov_report", "summ_screen_fd", "qmsum", "squality"), rouge_mean),
    **dict.fromkeys(("qasper", "narrative_qa", "musique"), f1),
    "quality": letter,
    "space_digest": percentage,
    "book_sum_sort": order,
}
ANSWER_TOKENS: dict[Callable[[str, str], float], int] = {
    rouge_mean: 512,
    f1: 128,
    letter: 16,
    percentage: 32,
    order: 64,
}


def examples(request: Request) -> list[Example]:
    """`count` inputs, drawn by the seed, of every task asked for; several rows of one input are its references."""
    tasks, _, folder = request.source.partition(":")
    if not tasks or not folder:
        raise UsageError("zeroscrolls needs its tasks and a folder: zeroscrolls:qasper,quality:FOLDER")
    made = []
    for name in tasks.split(","):
        if name not in METRICS:
            raise UsageError(f"zeroscrolls has no task {name!r}; expected some of {', '.join(METRICS)}")
        path = Path(folder).expanduser() / name / "validation.jsonl"
        if not path.is_file():
            raise UsageError(
                f"no such file: {str(path)!r}; unpack {name}.zip of the hub's tau/zero_scrolls in {folder}"
            )
        inputs: dict[str, list[dict[str, Any]]] = {}
        for row in read_jsonl(path):
            inputs.setdefault(row["id"], []).append(row)
        for chosen in random.Random(f"{request.seed}/{name}").sample(list(inputs), min(request.count, len(inputs))):
            made.append(_example(name, inputs[chosen], request))
    return made


def _example(name: str, rows: list[dict[str, Any]], request: Request) -> Example:
    row = rows[0]
    if any(not row["output"] for row in rows):
        raise KVProfileError(
            f"ZeroSCROLLS' {name} has no answers in it: its test files keep them; give validation.jsonl"
        )
    text, end = row["input"], row["document_end_index"]
    document, question = text[:end], text[end:]
    limit = ANSWER_TOKENS[METRICS[name]]
    room = request.tokens - request.length(question) - limit
    if request.length(document) > room:
        note = row["truncation_seperator"]  # spelt so in the files
        room -= request.length(note)
        if room <= request.length(text[: row["document_start_index"]]):
            raise UsageError(
                f"--tokens {request.tokens} leaves no room for a document of ZeroSCROLLS' {name}; give more"
            )
        document = request.head(document, room) + note
    return Example(document, question, tuple(row["output"] for row in rows), group=name, max_new_tokens=limit)


def score(prediction: str, example: Example) -> float:
    """The task's own metric, the best over its references."""
    return best(METRICS[example.group])(prediction, example)


ZEROSCROLLS = Task("ZeroSCROLLS' validation files", "published score", examples, score)
