"""What one sample's statistics take on disk and in memory, for models of several shapes: nothing is measured or loaded.

    python benchmarks/partials.py

Fills the accumulators with one sample's worth of numbers of the kinds they hold, writes the file that `calibrate` would
write, and prints its size, the time to write and to fold it, and the memory of the statistics.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.partials import Partial, join
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.runs import Run
from kvprofile.merging.policies import POLICIES
from kvprofile.profile.schema import Calibration, ModelFacts, PolicyFacts, TextFacts

# Layers, KV heads, tokens of a sample.
SHAPES = {
    "SmolLM2-135M": (30, 3, 2048),
    "32 layers x 8 KV heads (Llama-3.1-8B)": (32, 8, 2048),
    "32 layers x 32 KV heads (Llama-2-7B)": (32, 32, 2048),
    "80 layers x 8 KV heads (70B)": (80, 8, 2048),
    "32 layers x 8 KV heads, 32k tokens": (32, 8, 32768),
}


def run_of(layers: int, heads: int, tokens: int, samples: int) -> Run:
    text = TextFacts(samples=samples, tokens=tokens, kinds={"prose": samples})
    return Run(
        codecs=(),
        model=ModelFacts(
            name="any",
            source="any",
            revision=None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            layers=layers,
            query_heads=heads,
            kv_heads=heads,
            head_dim=128,
            attention=["full_attention"] * layers,
            rope=None,
            config_hash="0" * 64,
        ),
        calibration=Calibration(
            text="any", seed=0, dtype="float32", device="cpu", digest="0" * 64, measured=text, held_out=text
        ),
        policy="auto",
        base="gauss",
        candidates=CANDIDATES,
        policies={name: PolicyFacts.model_validate(POLICIES[name].to_dict()) for name in (*CANDIDATES, "gauss")},
        mix=ProbeMix(),
        depends={},
    )


def fill(statistics: Measurements, seed: int) -> None:
    """One sample: sums of float32 numbers, small counts, and moments in float64."""
    random = np.random.default_rng(seed)
    statistics.ratios.of_kind("prose")
    for name, array in statistics.state().items():
        if name.endswith("squares"):
            continue  # of one sample
        if name.endswith("count"):
            array[...] = 1
        elif array.dtype.kind == "i":
            array[...] = random.integers(0, 2048, array.shape)
        elif name.endswith("sums"):
            array[...] = random.random(array.shape, dtype=np.float32)
        else:
            array[...] = random.random(array.shape)


def main() -> None:
    print("| model | file of a sample | statistics in memory | write s | fold s a sample |\n|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        run = run_of(*shape, samples=3)
        with tempfile.TemporaryDirectory() as folder:
            partial = Partial(Path(folder) / "p.partial", run)
            started = time.process_time()
            for index in range(run.samples):
                statistics = run.statistics()
                fill(statistics, index)
                partial.save(index, statistics)
            writing = (time.process_time() - started) / run.samples
            size = sum(file.stat().st_size for file in partial.folder.iterdir()) / run.samples
            memory = sum(array.nbytes for array in statistics.state().values())
            started = time.process_time()
            join([partial.folder])
            folding = (time.process_time() - started) / run.samples
        print(f"| {name} | {size / 2**20:.1f} MiB | {memory / 2**20:.1f} MiB | {writing:.2f} | {folding:.2f} |")


if __name__ == "__main__":
    main()
