"""What a plan keeps of its worth on other text, other lengths and other questions than it was calibrated on.

    python benchmarks/transfer.py profiles/smollm2-135m.json --text essay=ESSAYS --text book=PG19 \\
        --text code=longbench:lcc:LONGBENCH --text encyclopedia=synthwiki:madlibs1.csv -o transfer/

Damage is measured once for every calibration sample, with probes of all kinds (passages, continuation, planted facts and
key-value lines), and kept in the output folder; an interrupted run goes on from there. Plans are then made from parts of it:

    samples   the first 1, 2, 4, 8, 16 samples
    kinds     samples of one kind of text only
    probes    one kind of probe only, and mixes
    lengths   all samples, tried on contexts of 1,024 to 8,192 tokens

and every plan is tried on text that was not used, through the real runtime cache: KL(full || compressed) in nats per token on
passages, continuation, planted facts and key-value lines. Prints Markdown tables, writes JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

import kvprofile
from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.measuring import measure
from kvprofile.calibration.planting import Question, plant
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.evaluate.fidelity import distance, fill, make_trial, read_parts
from kvprofile.planning.plans import replan
from kvprofile.runtime.merger import KVMerger

MIX = ProbeMix(facts=4, lookups=8)
MIXES: dict[str, dict[str, float]] = {
    "recall": {"recall": 1},
    "continuation": {"continuation": 1},
    "recall + continuation": {"recall": 1, "continuation": 1},
    "facts": {"facts": 1},
    "lookup": {"lookup": 1},
    "all, equal weights": dict.fromkeys(MIX.kinds, 1.0),
    "all, planted at a tenth": {"recall": 1, "continuation": 1, "facts": 0.1, "lookup": 0.1},
}


@dataclass(frozen=True)
class Case:
    """One context to try plans on, what is read after it, and the full cache's answers by kind."""

    text: str
    context: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]  # tokens, and which rows count
    reference: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="for the model's facts and its statistics")
    parser.add_argument("--tables", nargs="+", default=["samples", "kinds", "probes", "lengths"])
    parser.add_argument("--text", action="append", default=[], metavar="KIND=SPEC", help="text to try plans on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=1, help="of each kind of text")
    parser.add_argument("-o", "--output", type=Path, default=Path("transfer"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    profile = kvprofile.load_profile(arguments.profile)
    loaded = kvprofile.load_model(profile.model.name)
    texts, damage = curves(loaded, arguments)
    profile = prepared(profile)
    cases = [case for text in arguments.text or ["builtin=builtin"] for case in made(loaded, text, arguments)]
    rows: list[dict[str, Any]] = []
    everything = dict.fromkeys(("recall", "continuation"), 1.0)

    def attempt(table: str, label: str, chosen: Sequence[int], weights: dict[str, float], tried: list[Case]) -> None:
        for budget in arguments.budgets:
            scaled = damage[list(chosen)].mean(axis=0) * np.array([weights.get(kind, 0.0) for kind in MIX.kinds])
            for case in tried:
                row = {"table": table, "plan": label, "budget": budget, "text": case.text, "tokens": len(case.context)}
                row |= tried_out(loaded.model, replan(profile, scaled, budget), case)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        (arguments.output / "rows.json").write_text(json.dumps(rows, indent=1))

    if "samples" in arguments.tables:
        for count in (1, 2, 4, 8, 16):
            if count <= len(texts):
                attempt("samples", str(count), range(count), everything, cases)
    if "kinds" in arguments.tables:
        for kind in dict.fromkeys(texts):
            attempt("kinds", kind, [index for index, text in enumerate(texts) if text == kind], everything, cases)
    if "probes" in arguments.tables:
        for label, weights in MIXES.items():
            attempt("probes", label, range(len(texts)), weights, cases)
    if "lengths" in arguments.tables:
        for tokens in (1024, 2048, 4096, 8192 - 512):
            long = [case for text in arguments.text for case in made(loaded, text, arguments, tokens)]
            attempt("lengths", f"{tokens} tokens", range(len(texts)), everything, long)
    for table in arguments.tables:
        show([row for row in rows if row["table"] == table])


def curves(loaded: Any, arguments: argparse.Namespace) -> tuple[list[str], NDArray[np.float64]]:
    """The kind of text of every sample, and its damage `(samples, layers, policies, kv_heads, budgets, kinds)`."""
    samples = kvprofile.make_samples(
        kvprofile.load_documents("builtin"),
        loaded.tokenizer,
        samples=arguments.samples,
        tokens=arguments.tokens,
        held_out=0,
        continuation=256,
    ).calibration
    found = []
    for index, sample in enumerate(samples):
        path = arguments.output / f"damage-{arguments.tokens}-{index}.npy"
        if not path.exists():
            statistics = measure(loaded, [sample], "gauss", rules=(), candidates=CANDIDATES, mix=MIX, seed=index)
            np.save(path, statistics.damage.moments.mean)
            print(f"measured sample {index}, {sample.kind}", file=sys.stderr, flush=True)
        found.append(np.load(path))
    return [sample.kind for sample in samples], np.stack(found)


def prepared(profile: Any) -> Any:
    """The profile as if its damage had been measured with `MIX` for today's candidates."""
    from dataclasses import asdict

    from kvprofile.merging.policies import POLICIES
    from kvprofile.profile.schema import PolicyFacts

    facts = profile.statistics.damage.model_copy(
        update={"policies": list(CANDIDATES), "kinds": list(MIX.kinds), **asdict(MIX)}
    )
    policies = profile.policies | {name: PolicyFacts.model_validate(POLICIES[name].to_dict()) for name in CANDIDATES}
    statistics = profile.statistics.model_copy(update={"damage": facts})
    plan = profile.plan.model_copy(update={"objective": "all"})
    return profile.model_copy(update={"policies": policies, "statistics": statistics, "plan": plan})


def made(loaded: Any, text: str, arguments: argparse.Namespace, tokens: int | None = None) -> list[Case]:
    """Contexts of one kind of text with planted lines, and what the full cache answers."""
    kind, spec = text.split("=", 1)
    samples = kvprofile.make_samples(
        kvprofile.load_documents(spec, seed=1001),
        loaded.tokenizer,
        samples=arguments.documents,
        tokens=tokens or arguments.tokens,
        held_out=0,
        continuation=256,
        seed=1,
    ).calibration
    return [case(loaded, kind, sample, 7000 + index) for index, sample in enumerate(samples)]


def case(loaded: Any, kind: str, sample: Any, seed: int) -> Case:
    context, questions = plant(sample.context, loaded.tokenizer, facts=8, lookups=16, seed=seed)
    trial = make_trial(context, sample.continuation, seed)
    parts = {name: (tokens, np.arange(len(tokens))) for name, tokens in vars(trial).items() if name != "context"}
    parts |= {name: asked([one for one in questions if one.kind == name]) for name in ("facts", "lookup")}
    cache = DynamicCache(config=loaded.model.config)
    read = read_parts(loaded.model, fill(loaded.model, cache, context), [tokens for tokens, _ in parts.values()])
    return Case(kind, context, parts, dict(zip(parts, read, strict=True)))


def asked(questions: list[Question]) -> tuple[Tensor, NDArray[np.int64]]:
    """Questions one after another, and the rows that predict the tokens of their answers."""
    import torch

    tokens = torch.cat([question.tokens for question in questions])
    ends = np.cumsum([len(question.tokens) for question in questions])
    rows = [np.arange(end - question.answer, end) - 1 for end, question in zip(ends, questions, strict=True)]
    return tokens, np.concatenate(rows)


def tried_out(model: Any, plan: Any, case: Case) -> dict[str, float]:
    """KL of every kind, answers still exact among the look-ups, and the slots that were kept."""
    layers = plan.attention_layers()
    merger = KVMerger.from_profile(plan).attach(model)
    try:
        cache = merger.cache()
        fill(model, cache, case.context)
        slots = float(np.mean([cache.slots()[layer] for layer in layers])) / len(case.context)
        read = read_parts(model, cache, [tokens for tokens, _ in case.parts.values()])
    finally:
        merger.detach()
    found: dict[str, float] = {"slots": slots}
    for (name, (_, counted)), rows in zip(case.parts.items(), read, strict=True):
        result = distance(case.reference[name][counted], rows[counted])
        found |= {name: result.kl, f"{name}_top1": result.top1}
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """One line for every plan and budget: the mean of the texts, then recall / continuation of each text."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    print(
        f"\n| {rows[0]['table'] if rows else ''} | budget | slots | recall | continuation | facts | lookup | "
        + " | ".join(texts)
        + " |"
    )
    print("|" + "---|" * (7 + len(texts)))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for plan in dict.fromkeys(row["plan"] for row in rows):
            chosen = [row for row in rows if row["plan"] == plan and row["budget"] == budget]
            means = [np.mean([row[name] for row in chosen]) for name in ("recall", "continuation", "facts", "lookup")]
            cells = [
                " / ".join(
                    f"{np.mean([row[name] for row in chosen if row['text'] == text]):.4f}"
                    for name in ("recall", "continuation")
                )
                for text in texts
            ]
            slots = np.mean([row["slots"] for row in chosen])
            print(
                f"| {plan} | {budget:g} | {slots:.3f} | "
                + " | ".join([*(f"{mean:.4f}" for mean in means), *cells])
                + " |"
            )


if __name__ == "__main__":
    main()
