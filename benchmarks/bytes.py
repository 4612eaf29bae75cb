"""What a plan does to the model's answers at its bytes, beside everything that keeps all tokens in fewer bits.

    python benchmarks/bytes.py profiles/smollm2-135m.json --bytes 0.5 0.25 0.1 --documents 2 \\
        --text essay=essays/ --text book=books/ --text code=longbench:lcc:longbench --text encyclopedia=synthwiki:madlibs1.csv

Contexts are read and stored, and only then do four 48-token passages of them (recall) and the next 256 tokens (continuation)
follow: KL(full || stored) of the next-token distribution, in nats per token, with 95% bootstrap intervals over documents, kinds
of text counting alike. Profiles are run by the real runtime cache, planned for every part of `--bytes` or, without, with their
own plan; the rivals are the codecs of the field over the whole stock cache (`shared/whole_cache.py`, `shared/kvtuner.py`), and
need no profile.

Bytes are over the stock cache's of the same model in 16 bits. A plan's are `nbytes()` of its cache in that model, filled with
the first document; what rivals keep in 16 bits counts two bytes an element. Finished rows are kept beside the output and used
again where nothing that decides them has changed. Prints the table, writes JSON and a picture.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shared import kvtuner, whole_cache
from shared.bytes_picture import picture
from shared.trials import make_trials
from shared.ways import of_plans, of_rival, rows_of

import kvprofile
from kvprofile.evaluate.figures import save
from kvprofile.evaluate.intervals import bootstrap, equal_groups
from kvprofile.evaluate.rows import Row, identity, open_store

MEASURES = ("recall KL", "continuation KL")


def summarised(rows: Sequence[Row], plans: Sequence[str]) -> list[dict[str, Any]]:
    """Every method by its bytes, from much to little: means, intervals over documents, and the mean of every kind."""
    found = []
    for name in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == name]
        weights = equal_groups([row.group for row in own])
        entry: dict[str, Any] = {"method": name, "plan": name in plans, "documents": len(own)}
        entry["bytes"] = float(np.mean([row.budget for row in own]))
        for measure in own[0].values:
            values = [row.values[measure] for row in own]
            kinds = {row.group: [] for row in own}
            for row in own:
                kinds[row.group].append(row.values[measure])
            entry[measure] = {
                "mean": float(np.average(values, weights=weights)),
                "interval": bootstrap(values, weights),
                "kinds": {kind: float(np.mean(of_kind)) for kind, of_kind in kinds.items()},
            }
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["bytes"])


def table(summary: Sequence[dict[str, Any]]) -> str:
    """In Markdown, plans in bold."""
    kinds = list(summary[0][MEASURES[0]]["kinds"])
    lines = [
        "| kept as | bytes | recall KL | continuation KL | " + " | ".join(kinds) + " |",
        "|---" * (4 + len(kinds)) + "|",
    ]
    for entry in summary:
        cells = [f"**{entry['method']}**" if entry["plan"] else entry["method"], f"{entry['bytes']:.1%}"]
        for measure in MEASURES:
            low, high = entry[measure]["interval"]
            cells.append(f"{entry[measure]['mean']:.2g} ({low:.2g}-{high:.2g})")
        cells += [" / ".join(f"{entry[measure]['kinds'][kind]:.2g}" for measure in MEASURES) for kind in kinds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, nargs="*", help="whose plans are run")
    parser.add_argument("--bytes", type=float, nargs="+", help="plan each profile for these; default: its own plan")
    parser.add_argument("--model", help="default: the first profile's, or smollm2-135m")
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--documents", type=int, default=2, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rivals", nargs="*", help="only rivals whose name contains one of these; none without a word")
    parser.add_argument(
        "--samples", type=int, default=2, help="of built-in text, on which KVTuner-like bits are chosen"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("bytes.json"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    profiles = {path.stem: kvprofile.load_profile(path) for path in arguments.profiles}
    model = arguments.model or next((profile.model.name for profile in profiles.values()), "smollm2-135m")
    loaded = kvprofile.load_model(model)
    texts = {"documents": arguments.documents, "tokens": arguments.tokens, "seed": arguments.seed}
    trials = make_trials(loaded, arguments.text, **texts)
    rivals = whole_cache.rivals_of(loaded.model.config)
    if arguments.rivals is None or any("KVTuner" in word for word in arguments.rivals):
        kept = arguments.output.with_suffix(".kvtuner.json")
        rivals += kvtuner.rivals_of(loaded, arguments.tokens, arguments.samples, kept)
    if arguments.rivals is not None:
        rivals = [rival for rival in rivals if any(word in rival.name for word in arguments.rivals)]
    plans = profiles
    if arguments.bytes:
        plans = {
            f"{name}, {part:.0%}": profile.replan(bytes=part)
            for name, profile in profiles.items()
            for part in arguments.bytes
        }
    ways = [*of_plans(loaded, plans, trials[0][1].context), *map(of_rival, rivals)]
    rows = rows_of(loaded, trials, ways, open_store(arguments.output.with_suffix(".rows.jsonl")))
    summary = summarised(rows, list(plans))
    facts = {
        **identity(loaded),
        "name": loaded.name,
        **texts,
        "texts": [text.split("=", 1)[0] for text in arguments.text],
    }
    arguments.output.write_text(json.dumps({"facts": facts, "methods": summary}, indent=1) + "\n", encoding="utf-8")
    save(picture(summary), arguments.output.with_suffix(".png"))
    print(table(summary))


if __name__ == "__main__":
    main()
