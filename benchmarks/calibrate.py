"""What a calibration costs over a plain prefill of the same tokens: time, CPU time and peak memory.

    python benchmarks/calibrate.py [--model smollm2-135m] [--tokens 2048] [--repeats 3]

Every measurement runs in a process of its own, in turn (plain, similarity, everything, plain, ...), so that peak memory is
that of one kind of run and a drifting machine touches all alike. Prints medians and ratios, writes calibrate.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

KINDS = ("plain", "similarity", "everything", "damage", "codecs")


def worker(kind: str, model_name: str, samples: int, tokens: int) -> None:
    import torch

    import kvprofile
    from kvprofile.calibration.calibrate import CANDIDATES, MEASURED_CODECS
    from kvprofile.calibration.measuring import measure
    from kvprofile.merging.sets import SET_RULES

    loaded = kvprofile.load_model(model_name)
    documents = kvprofile.load_documents("builtin")
    blocks = kvprofile.make_samples(
        documents, loaded.tokenizer, samples=samples, tokens=tokens, held_out=0, continuation=64
    ).calibration
    with torch.inference_mode():  # warm up: the first forward allocates and compiles
        loaded.model(blocks[0].context[None, :256], logits_to_keep=1)
    wall, cpu = time.perf_counter(), time.process_time()
    if kind == "plain":
        with torch.inference_mode():
            for block in blocks:
                loaded.model(block.context[None], use_cache=True, logits_to_keep=1)
    else:
        measure(
            loaded,
            blocks,
            "gauss",
            rules=() if kind == "similarity" else SET_RULES,
            candidates=CANDIDATES if kind in ("damage", "codecs") else (),
            codecs=MEASURED_CODECS if kind == "codecs" else (),
        )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "SAMPLES"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("calibrate.json"))
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], arguments.model, int(arguments.worker[1]), arguments.tokens)
        return
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for samples in arguments.samples:
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
        for _ in range(arguments.repeats):
            for kind in arguments.kinds:
                command = [sys.executable, __file__, "--model", arguments.model, "--tokens", str(arguments.tokens)]
                done = subprocess.run(
                    [*command, "--worker", kind, str(samples)], check=True, capture_output=True, text=True
                )
                runs[kind].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{samples:3} samples {kind:11} {runs[kind][-1]}", file=sys.stderr)
        results[str(samples)] = runs
    arguments.output.write_text(json.dumps(results, indent=1))
    print(
        f"\n{arguments.model}, {arguments.tokens} tokens a sample, median of {arguments.repeats}, over plain prefill\n"
    )
    print("| samples | run | wall s | wall | CPU | peak memory |\n|---|---|---|---|---|---|")
    for samples, runs in results.items():
        middle = {
            kind: {name: statistics.median(run[name] for run in rows) for name in rows[0]}
            for kind, rows in runs.items()
        }
        plain = middle[arguments.kinds[0]]
        for kind in arguments.kinds:
            row = middle[kind]
            ratios = " | ".join(f"{row[name] / plain[name]:.2f}" for name in ("wall", "cpu", "peak_mib"))
            print(f"| {samples} | {kind} | {row['wall']:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
