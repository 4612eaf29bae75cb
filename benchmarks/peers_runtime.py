"""What kvpress 0.5.5 keeps and costs on the same model and text: SnapKV, KeyDiff, AdaKV(ExpectedAttention).

    python benchmarks/peers_runtime.py                    # sets up an environment of its own on the first run
    python benchmarks/peers_runtime.py --tokens 2048 --environment kvpress-env

kvpress demands an older transformers than kvprofile does, so it lives in a virtual environment of its own, with the same torch;
it is no dependency of the package. Compression there is the fraction of slots removed: 0.5 is a budget of 0.5, 0.75 one of
0.25. Plain and compressed runs alternate, ratios are taken within a round, medians are printed. Bytes are those of the tensor
storages the cache holds after the prefill, over the plain run's. kvpress compresses the prompt only; its decode steps here are
given true positions, as its own pipeline does.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from shared.kvpress_environment import run_inside

STEPS = 32


def measure(model_folder: str, ids: list[int], repeats: int) -> list[dict[str, Any]]:
    """Run inside the environment of kvpress."""
    import torch
    from kvpress import AdaKVPress, ExpectedAttentionPress, KeyDiffPress, SnapKVPress
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokens = torch.tensor([ids])

    def timed(run: Any, steps: int = 1) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            run()
        return {"wall": (time.perf_counter() - wall) / steps, "cpu": (time.process_time() - cpu) / steps}

    def run(press: Any) -> tuple[dict[str, float], dict[str, float], int]:
        cache = DynamicCache()
        with press:
            prefill = timed(lambda: model(tokens, past_key_values=cache, logits_to_keep=1))
        storages = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        }
        position = tokens.shape[1]

        def step() -> None:
            nonlocal position
            place = torch.tensor([position])
            # A cache position past the prompt also tells kvpress that the prefill is over.
            model(tokens[:, :1], past_key_values=cache, position_ids=place[None], cache_position=place)
            position += 1

        step()
        return prefill, timed(step, STEPS), sum(storages.values())

    rows = []
    for compression in (0.5, 0.75):
        presses = {
            "SnapKV": SnapKVPress(compression),
            "KeyDiff": KeyDiffPress(compression),
            "AdaKV(ExpectedAttention)": AdaKVPress(ExpectedAttentionPress(compression)),
        }
        for name, press in presses.items():
            rounds = []
            for _ in range(repeats):
                plain = run(nullcontext())
                rounds.append((plain, run(press(model))))
            row: dict[str, Any] = {
                "press": name,
                "compression": compression,
                "bytes": rounds[0][1][2] / rounds[0][0][2],
            }
            for kind in ("wall", "cpu"):
                row[f"prefill_{kind}"] = median(pressed[0][kind] / plain[0][kind] for plain, pressed in rounds)
                row[f"decode_{kind}"] = median(plain[1][kind] / pressed[1][kind] for plain, pressed in rounds)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environment", type=Path, help="default: kvpress beside kvprofile's converted models")
    parser.add_argument("-o", "--output", type=Path, default=Path("peers_runtime.json"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        asked = json.loads(arguments.inside.read_text())
        print(json.dumps(measure(asked["model"], asked["ids"], asked["repeats"])))
        return
    import kvprofile

    loaded = kvprofile.load_model(arguments.model)
    text = "\n\n".join(document.text for document in kvprofile.load_documents("builtin"))
    ids = loaded.tokenizer(text)["input_ids"]
    ids = (ids * -(-arguments.tokens // len(ids)))[: arguments.tokens]
    folder = Path(loaded.model.config._name_or_path)
    environment = (arguments.environment or folder.parent / "kvpress").absolute()
    asked = {"model": str(folder), "ids": ids, "repeats": arguments.repeats}
    (rows,) = run_inside(environment, __file__, asked)
    arguments.output.write_text(json.dumps(rows, indent=1))
    print("| press | compression | bytes kept | decode speed-up, wall | CPU | prefill over plain, wall | CPU |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {press} | {compression} | {bytes:.3f} | {decode_wall:.2f} | {decode_cpu:.2f} | {prefill_wall:.2f} | "
            "{prefill_cpu:.2f} |".format(**row)
        )


if __name__ == "__main__":
    main()
