"""Calibration of the layers of real models, random weights: time and peak memory, the estimate of --dry-run beside them.

    python benchmarks/real_shapes.py [--models llama2-7b:float32 llama3.1-8b:bfloat16] [--layers 2] [--samples 1]

Every model keeps its widths, heads and vocabulary and gets a few layers and random weights, in a folder that is removed
afterwards; nothing is fetched. The estimate is what the command line says, the run `kvprofile.calibrate` in a process of its
own: seconds on the clock and of CPU time (the same with one thread on a quiet machine), and the most memory it held.
The columns for all layers are extrapolated: what was measured, times what the estimate says all layers take over these.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30


def build(folder: Path, alias: str, dtype: str, layers: int) -> None:
    """Save a model with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from kvprofile.models.configurations import bundled_configuration

    fields = bundled_configuration(alias)
    if fields is None:
        raise SystemExit(f"no configuration of {alias} comes with kvprofile")
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][-layers:]
    config = AutoConfig.for_model(**{**fields, "num_hidden_layers": layers, "dtype": dtype})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run(folder: Path, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and say what it took: stages' seconds on the clock and of CPU time, bytes held at most."""
    import kvprofile

    loaded = kvprofile.load_model(str(folder), device=arguments.device, dtype=dtype)
    documents = kvprofile.load_documents("builtin")
    size = {"samples": arguments.samples, "held_out": arguments.held_out, "tokens": arguments.tokens}
    blocks = kvprofile.make_samples(documents, loaded.tokenizer, continuation=256, **size)
    from kvprofile.calibration.tracking import Track

    stages: dict[str, dict[str, float]] = {}

    class Timed(Track):
        def __call__(self, items: Sequence[Any], label: str) -> Iterable[Any]:
            wall, cpu = time.perf_counter(), time.process_time()
            yield from items
            stages[label] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kvprofile.calibrate(loaded, blocks, budget=0.5, track=Timed(), warn=lambda _message: None)
    return {"stages": stages, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "loading": loading}


def estimated(model: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What --dry-run says."""
    size = ("--samples", arguments.samples, "--held-out", arguments.held_out, "--tokens", arguments.tokens)
    command = [sys.executable, "-m", "kvprofile", "calibrate", model, "--dry-run", "--json", "--dtype", dtype]
    placed = ["--device", arguments.device, *map(str, size)]
    done = subprocess.run([*command, *placed], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def worker(arguments: argparse.Namespace, task: str, folder: Path, model: str) -> dict[str, Any]:
    """Run one task of this script in a process of its own."""
    own = [sys.executable, __file__, "--worker", task, str(folder), model]
    size = ("--samples", arguments.samples, "--held-out", arguments.held_out, "--tokens", arguments.tokens)
    command = [*own, *map(str, (*size, "--layers", arguments.layers, "--device", arguments.device))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Build, estimate, run one model."""
    alias, _, dtype = model.partition(":")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / alias
        worker(arguments, "build", folder, model)
        told = estimated(str(folder), dtype, arguments)
        found = worker(arguments, "run", folder, model)
    return {"model": model, "estimate": told, "run": found, "all_layers": estimated(alias, dtype, arguments)}


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterable[str]:
    yield (
        f"{arguments.layers} layers, {arguments.tokens} tokens, {arguments.samples} sample(s) and {arguments.held_out} held "
        f"out, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {arguments.device}"
    )
    yield ""
    yield (
        "| model | stage | seconds | CPU seconds | estimate | estimate / CPU | "
        "all layers, estimate | all layers, extrapolated |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        told, whole = row["estimate"], row["all_layers"]
        for stage in ("measure", "check"):
            if (took := row["run"]["stages"].get(stage)) is None:
                continue
            seconds, all_layers = told[f"{stage}_seconds"], whole[f"{stage}_seconds"]
            yield (
                f"| {row['model']} | {stage} | {took['wall']:.1f} | {took['cpu']:.1f} | {seconds:.1f} | "
                f"{seconds / took['cpu']:.2f} | {all_layers:.0f} s | {took['cpu'] * all_layers / seconds:.0f} s |"
            )
    yield ""
    yield "| model | peak GiB | after loading | estimate | estimate / peak | all layers, estimate | extrapolated |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        told, found = row["estimate"]["memory_total"], row["run"]
        whole = row["all_layers"]["memory_total"]
        yield (
            f"| {row['model']} | {found['peak'] / GIB:.2f} | {found['loading'] / GIB:.2f} | {told / GIB:.2f} | "
            f"{told / found['peak']:.2f} | {whole / GIB:.1f} | {found['peak'] * whole / told / GIB:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama2-7b:float32", "llama3.1-8b:bfloat16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", nargs=3, metavar=("TASK", "FOLDER", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("real_shapes.json"))
    arguments = parser.parse_args()
    if arguments.worker:
        task, folder, model = arguments.worker
        alias, _, dtype = model.partition(":")
        done = build(Path(folder), alias, dtype, arguments.layers) if task == "build" else None
        print(json.dumps(done if task == "build" else run(Path(folder), dtype, arguments)))
        return
    rows = []
    for model in arguments.models:
        rows.append(measured(arguments, model))
        print(json.dumps(rows[-1]), file=sys.stderr)
    arguments.output.write_text(json.dumps(rows, indent=1))
    print("\n".join(table(rows, arguments)))


if __name__ == "__main__":
    main()
