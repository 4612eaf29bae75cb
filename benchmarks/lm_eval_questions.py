"""Fifty questions through lm-evaluation-harness, which knows nothing of kvprofile: the stock cache, and merged ones.

    pip install lm-eval==0.4.13
    python benchmarks/lm_eval_questions.py profiles/smollm2-135m.json [--budgets 0.5 0.25] [--bytes 0.25 0.1]

A local task of one code hidden in 2,048 tokens at five depths, answered (`generate_until`) and scored by likelihood
(`loglikelihood`). The harness calls `generate` without a cache; `merger.generating()` gives it a merged one. A likelihood is
one forward without a cache, so it must be the same to the last digit. Prints a table, writes lm_eval_questions.json.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import kvprofile
from kvprofile.evaluate.tasks.needle import NEEDLE
from kvprofile.evaluate.tasks.task import Request
from kvprofile.planning.plans import replan

STOP = "\n"


def write_questions(tokenizer: Any, count: int, tokens: int, file: Path) -> None:
    """`count` lines of {"question", "answer"}, the needle task's own at its full length."""

    def length(text: str) -> int:
        return len(tokenizer(text).input_ids)

    def uncut(text: str, tokens: int) -> str:
        return text  # the needle task cuts nothing

    each = -(-count // 5)
    request = Request("", count=each, tokens=tokens, seed=1, length=length, cut=uncut, head=uncut)
    full = [example for example in NEEDLE.examples(request) if example.place and example.place[0] == tokens]
    lines = [
        {"question": f"{example.context}{example.question}\n{example.prefix}", "answer": f" {example.answers[0]}"}
        for example in full[:count]
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def tasks(file: Path) -> list[dict[str, Any]]:
    """The same questions, to be answered and to be scored."""
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    answered = {
        "task": "answered",
        "output_type": "generate_until",
        "target_delimiter": "",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": 12},
        "process_results": lambda row, results: {"found": float(row["answer"].strip() in results[0])},
        "metric_list": [{"metric": "found", "aggregation": "mean", "higher_is_better": True}],
    }
    scored = {
        "task": "scored",
        "output_type": "loglikelihood",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}],
    }
    return [shared | answered, shared | scored]


def ask(loaded: Any, merger: Any, file: Path, tokens: int) -> dict[str, float]:
    """The harness' own figures, and what the caches of its last generation took."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=tokens + 256, batch_size=1)
    with merger.generating() if merger else nullcontext():
        results = lm_eval.simple_evaluate(harness, tasks=tasks(file), bootstrap_iters=1000)["results"]
    row = {
        "found": results["answered"]["found,none"],
        "stderr": results["answered"]["found_stderr,none"],
        "perplexity": results["scored"]["perplexity,none"],
    }
    return row | ({"bytes": merger.last_cache.nbytes()} if merger else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--bytes", type=float, nargs="*", default=[])
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, default=Path("lm_eval_questions.json"))
    arguments = parser.parse_args()
    loaded = kvprofile.load_model(arguments.model)
    profile = kvprofile.load_profile(arguments.profile)
    arrays = kvprofile.load_arrays(profile, arguments.profile)
    plans = {f"{budget:.0%} of the slots": {"budget": budget} for budget in arguments.budgets}
    plans |= {f"{part:.0%} of the bytes": {"bytes": part} for part in arguments.bytes}
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        write_questions(loaded.tokenizer, arguments.questions, arguments.tokens, file)
        rows["stock"] = ask(loaded, None, file, arguments.tokens)
        for name, asked in plans.items():
            plan = replan(profile, arrays.get("damage_mean"), measured=arrays, **asked)
            merger = kvprofile.KVMerger.from_profile(plan, arrays=arrays).attach(loaded.model)
            rows[name] = ask(loaded, merger, file, arguments.tokens)
            merger.detach()
            print(name, rows[name], flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1))
    print("cache | codes found | standard error | perplexity of the codes")
    for name, row in rows.items():
        print(f"{name} | {row['found']:.0%} | {row['stderr']:.1%} | {row['perplexity']:.4f}")


if __name__ == "__main__":
    main()
