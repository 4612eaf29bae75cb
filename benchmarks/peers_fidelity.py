"""What kvpress 0.5.5's own presses lose, on the documents and probes of rivals.py, at the bytes they really keep.

    python benchmarks/peers_fidelity.py --documents 2 \\
        --text essay=essays/ --text book=books/ --text code=longbench:lcc:longbench --text encyclopedia=synthwiki:madlibs1.csv

kvpress runs in a virtual environment of its own, made on the first run, with the same model, contexts and probes; its full
cache is read there too, and must be as likely as kvprofile's. Budgets are what is kept: 1 less kvpress' compression ratio.
`slots` are those that can still be read. `bytes` are those of the tensor storages in the cache once the first token after the
context has been read, less that token's: AdaKV and KVzip free nothing, they hide keys in the attention, and are read that way.
Rows are rivals.py's, in a file beside the output from which an interrupted run goes on. Prints the table, writes JSON.
"""

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from shared import kvpress_reading
from shared.kvpress_environment import KVPRESS, run_inside

PRESSES = (
    "SnapKV",
    "ExpectedAttention",
    "KeyDiff",
    "Compactor",
    "Merging(SnapKV)",
    "AdaKV(ExpectedAttention)",
    "KVCompose",
    "KVzip",
)
AGREE = 1e-3  # nats per token between the two environments' full caches

Method = tuple[str | None, float]
"""A press, or None for the full cache, and the budget."""
Job = tuple[dict[str, Any], dict[Method, dict[str, Any]]]
"""A document with its probes, and what the rows of its methods are called."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=PRESSES)
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--documents", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--environment", type=Path, help="default: kvpress beside kvprofile's converted models")
    parser.add_argument("-o", "--output", type=Path, default=Path("peers_fidelity.json"))
    compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Run inside what is not finished, then write and print everything."""
    import kvprofile
    from kvprofile.evaluate.bench import run_fidelity
    from kvprofile.evaluate.results import results_of
    from kvprofile.evaluate.rows import Store, open_store
    from kvprofile.evaluate.run import Choices, facts_of, make_documents
    from kvprofile.evaluate.tables import main_table
    from kvprofile.files import atomic_write

    loaded = kvprofile.load_model(arguments.model, device="cpu", dtype="float32")
    choices = Choices(
        profiles=(),
        texts=tuple(arguments.text) or ("builtin",),
        documents=arguments.documents,
        tokens=arguments.tokens,
        seed=arguments.seed,
    )
    samples = make_documents(loaded, choices)
    methods = [(None, 1.0), *((press, budget) for budget in arguments.budgets for press in arguments.presses)]
    jobs = [make_job(loaded, index, sample, choices.seed, methods) for index, sample in enumerate(samples)]
    path = arguments.output.with_suffix(".rows.jsonl")
    folder = Path(loaded.model.config._name_or_path)
    environment = (arguments.environment or folder.parent / "kvpress").absolute()
    left_out = run_unfinished(jobs, str(folder), environment, choices, open_store(path))
    store = open_store(path)
    rows = [store.take(names[method]) for _, names in jobs for method in methods if method not in left_out]
    # kvprofile's own reading of the first document: the same contexts, probes and weights, or nothing can be compared.
    (ours,) = run_fidelity(loaded, samples[:1], [], Store(None), seed=choices.seed)
    gaps = {name: abs(ours.values[name] - rows[0].values[name]) for name in ours.values if name.endswith(" NLL")}
    if max(gaps.values()) > AGREE:
        raise SystemExit(f"the two environments' full caches differ in nats per token: {gaps}")
    facts = facts_of(loaded, choices, {}, {})
    facts["kvpress"] = KVPRESS
    facts["full_cache_gap"] = gaps
    facts["left_out"] = [f"{press} at {budget:g}: {why}" for (press, budget), why in left_out.items()]
    results = results_of(rows, facts)
    atomic_write(arguments.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(main_table(results["methods"]))


def make_job(loaded: Any, index: int, sample: Any, seed: int, methods: list[Method]) -> Job:
    """A sample's context and probes as run_fidelity makes them, for the other environment, and what its rows are called."""
    from kvprofile.evaluate.bench import FIDELITY, PARTS, make_probes
    from kvprofile.evaluate.methods import FULL
    from kvprofile.evaluate.rows import digest, identity

    context, probes = make_probes(loaded, sample, (seed + 1) * 1_000_003 + index)
    document = {
        "index": index,
        "parts": PARTS,
        "context": context.tolist(),
        "probes": [
            {
                "name": probe.name,
                "tokens": probe.tokens.tolist(),
                "scored": [probe.scored.start, probe.scored.stop],
                "foretold": probe.targets().tolist(),
            }
            for probe in probes
        ],
    }
    known = {name: value for name, value in identity(loaded).items() if name not in ("code", "kvprofile")}
    code = inspect.getsource(kvpress_reading)
    names = {
        (press, budget): {
            "key": digest(known, KVPRESS, code, seed, document, press, budget),
            "bench": FIDELITY,
            "unit": f"{index}: {sample.name}",
            "group": sample.kind,
            "method": FULL if press is None else f"kvpress {press}",
            "budget": budget,
            "tokens": len(context),
        }
        for press, budget in methods
    }
    return document, names


def run_unfinished(jobs: list[Job], model: str, environment: Path, choices: Any, store: Any) -> dict[Method, str]:
    """Run inside what the store lacks and add it there; returns the presses that failed, and why."""
    from kvprofile.evaluate.rows import Row

    documents = []
    for document, names in jobs:
        wanted: dict[str | None, list[float]] = {}
        for (press, budget), about in names.items():
            if store.take(about) is None:
                wanted.setdefault(press, []).append(budget)
        if wanted:
            wanted.pop(None, None)  # the full cache is read anyway
            documents.append({**document, "wanted": wanted})
    # The first of every text before the second of any: an interrupted run has something of all.
    documents.sort(key=lambda document: document["index"] % choices.documents)
    asked = {"model": model, "seed": choices.seed, "documents": documents}
    left_out: dict[Method, str] = {}
    for found in run_inside(environment, kvpress_reading.__file__, asked) if documents else ():
        method = (found["press"], found["budget"])
        about = jobs[found["document"]][1][method]
        what = f"{about['unit']}: {about['method']} at {about['budget']:g}, {found['seconds']:.1f} s"
        if "error" in found:
            left_out[method] = found["error"]
            what += f", left out: {found['error']}"
        elif store.take(about) is None:
            store.add(Row(**about, slots=found["slots"], nbytes=found["bytes"], values=found["values"]))
            if found["held"] != found["bytes"]:
                what += f", {found['held'] / found['bytes']:.3f} times the bytes until the first token is read"
        print(what, file=sys.stderr, flush=True)
    return left_out


if __name__ == "__main__":
    main()
