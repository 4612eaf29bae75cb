"""Profiles of many layers and heads: file size, and how long `plan`, `show`, `validate` and `report` take with them.

    python benchmarks/large_profiles.py [--shapes 32x32 80x8] [--repeats 3]

The profiles are real ones of random models with so many layers and KV heads, each head of eight dimensions, calibrated on two
samples of 256 tokens. Every command runs as a process of its own; the table has the fastest run, on the clock and in CPU time.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIM = 8
TOKENS = 256
COMMANDS = {
    "plan": ("plan", "{profile}", "--budget", "0.25", "-o", "{folder}/quarter.json", "--force"),
    "show": ("show", "{profile}"),
    "validate": ("validate", "{profile}"),
    "report": ("report", "{profile}", "-o", "{folder}/report.html", "--force"),
}


def make(layers: int, kv_heads: int, path: Path) -> None:
    """Calibrate a random model and save its profile."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvprofile
    from kvprofile.calibration.probe_mix import ProbeMix
    from kvprofile.models.load import LoadedModel
    from kvprofile.samples import Sample, SampleSet

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=DIM,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    drawn = torch.randint(0, 512, (3, TOKENS + 32))
    samples = [Sample(text[:TOKENS], text[TOKENS:], "random", "random") for text in drawn]
    blocks = SampleSet(samples[:2], samples[2:], "random tokens", "0" * 64)
    loaded = LoadedModel(model, None, f"{layers}x{kv_heads}", "made in memory", None)
    mix = ProbeMix(passages=4, passage_tokens=8, continuation_tokens=16)
    profile, arrays = kvprofile.calibrate(loaded, blocks, budget=0.5, mix=mix, warn=lambda _message: None)
    kvprofile.save_profile(profile, arrays, path)


def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds on the clock and of CPU time of one run of the command line."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvprofile", *arguments], check=True, capture_output=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x32", "80x8"], metavar="LAYERSxHEADS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="Keep the profiles in this folder, and use those that are there.")
    arguments = parser.parse_args()
    print(
        "| layers x KV heads | JSON MB | arrays MB | " + " | ".join(f"`{name}` s (CPU s)" for name in COMMANDS) + " |"
    )
    print("|---|---|---|" + "---|" * len(COMMANDS))
    with tempfile.TemporaryDirectory() as place:
        for shape in arguments.shapes:
            folder = arguments.keep or Path(place)
            path = folder / f"{shape}.json"
            if not path.exists():
                make(*map(int, shape.split("x")), path)
            sizes = [file.stat().st_size / 1e6 for file in (path, path.with_suffix(".safetensors"))]
            cells = []
            for words in COMMANDS.values():
                command = [word.format(profile=path, folder=place) for word in words]
                wall, cpu = min(timed(command) for _ in range(arguments.repeats))
                cells.append(f"{wall:.2f} ({cpu:.2f})")
            print(f"| {shape} | {sizes[0]:.2f} | {sizes[1]:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
