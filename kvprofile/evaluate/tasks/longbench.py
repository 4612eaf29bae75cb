"""LongBench's English and code tasks (arXiv 2308.14508): official prompts, answer lengths and metrics.

`longbench:TASK,TASK:FOLDER` reads FOLDER/TASK.jsonl, `longbench:TASK` fetches the archive from the hub; `all` for TASK
takes every known task there is. TASK_e is LongBench-E's. As published, a context that is too long loses its middle;
few-shot and code tasks take no chat template; the answer of a few-shot task is its first line.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.evaluate.metrics import classification, edit_similarity, f1, numbers, paragraph_number, rouge_l
from kvprofile.evaluate.tasks.longbench_prompts import ANSWER_TOKENS, PROMPTS
from kvprofile.evaluate.tasks.task import Example, Request, Task, best
from kvprofile.samples.files import read_jsonl
from kvprofile.samples.hub import longbench_rows

FIRST_LINE = ("trec", "triviaqa", "samsum")
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")


def _named_class(prediction: str, example: Example) -> float:
    return max(classification(prediction, answer, example.classes) for answer in example.answers)


METRICS: dict[str, Callable[[str, Example], float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), best(f1)),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), best(rouge_l)),
    "trec": _named_class,
    "triviaqa": best(f1),
    "passage_count": best(numbers),
    "passage_retrieval_en": best(paragraph_number),
    **dict.fromkeys(("lcc", "repobench-p"), best(edit_similarity)),
}


def examples(request: Request) -> list[Example]:
    """`count` rows, drawn by the seed, of every task asked for."""
    tasks, _, folder = request.source.partition(":")
    if not tasks:
        raise UsageError(
            "longbench needs its tasks: longbench:qasper,trec:FOLDER, longbench:all:FOLDER or longbench:qasper"
        )
    if folder and not Path(folder).expanduser().is_dir():
        raise UsageError(f"no such folder: {folder!r}; give longbench:TASKS:FOLDER, where FOLDER holds TASK.jsonl")
    names = tasks.split(",")
    if tasks == "all":
        names = [
            name for name in PROMPTS if not folder or Path(folder).expanduser().joinpath(f"{name}.jsonl").is_file()
        ]
    made = []
    for name in names:
        if name.removesuffix("_e") not in PROMPTS:
            raise UsageError(
                f"longbench has no English or code task {name!r}; expected all or some of {', '.join(PROMPTS)}"
            )
        rows = list(_rows(name, folder))
        for row in random.Random(f"{request.seed}/{name}").sample(rows, min(request.count, len(rows))):
            made.append(_example(name, row, request))
    if not made:
        raise KVProfileError(f"no LongBench task in {folder}; expected files such as {next(iter(PROMPTS))}.jsonl")
    return made


def _rows(name: str, folder: str) -> Iterator[dict[str, Any]]:
    if not folder:
        return longbench_rows(name)
    path = Path(folder).expanduser() / f"{name}.jsonl"
    if not path.is_file():
        raise UsageError(f"no such file: {str(path)!r}; give longbench:TASKS:FOLDER, where FOLDER holds TASK.jsonl")
    return read_jsonl(path)


def _example(name: str, row: dict[str, Any], request: Request) -> Example:
    task = name.removesuffix("_e")
    before, after = PROMPTS[task].split("{context}")
    # The question counts as well: the whole prompt has to fit, and the answer after it.
    after = after.replace("{input}", row["input"])
    room = request.tokens - request.length(before) - request.length(after) - ANSWER_TOKENS[task]
    if room <= 0:
        raise UsageError(f"--tokens {request.tokens} leaves no room for a context of LongBench's {name}; give more")
    return Example(
        before + request.cut(row["context"], room),
        after,
        tuple(row["answers"]),
        group=name,
        max_new_tokens=ANSWER_TOKENS[task],
        stop="\n" if task in FIRST_LINE else None,
        chat=task not in NO_CHAT,
        classes=tuple(row["all_classes"] or ()),
    )


def score(prediction: str, example: Example) -> float:
    """The task's own metric, the best over its references."""
    task = example.group.removesuffix("_e")
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return METRICS[task](prediction, example)


LONGBENCH = Task("LongBench's English and code tasks", "published score", examples, score, apart=("trec",))
