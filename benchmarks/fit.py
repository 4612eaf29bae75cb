"""Is the cache as large as `kvprofile fit` says? Its arithmetic beside `nbytes()` of caches that were filled.

`python benchmarks/fit.py` prints a table, and exits 1 where one is off by more than 2%. At budget 1 it is the stock cache.
The text is random: only its length counts.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile import KVMerger, load_model, load_profile
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.fit import footprint_of
from kvprofile.planning.spendings import kept_of
from kvprofile.profile.profile import Profile
from kvprofile.runtime.cache import allocated_bytes

PROFILES = Path(__file__).parents[1] / "profiles"
ALLOWED = 0.02


@torch.no_grad()
def measured(model: PreTrainedModel, cache: Cache, tokens: int, batch: int) -> int:
    """Bytes of a cache that has read `tokens` of every row, and one more."""
    text = torch.randint(10, 1000, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
    for piece in (text[:, :-1], text[:, -1:]):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return allocated_bytes(cache)


def plans_of(profile: Profile, budgets: Sequence[float], parts: Sequence[float]) -> list[tuple[str, float, Profile]]:
    """Unit, amount and the planned profile, slots first."""
    slots = [("slots", budget, profile.replan(budget, codec=NO_CODEC)) for budget in budgets]
    return slots + [("bytes", part, profile.replan(bytes=part, codec=AUTO)) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--budgets", nargs="*", type=float, default=[1.0, 0.5, 0.25], help="of the slots")
    parser.add_argument("--bytes", nargs="*", type=float, default=[0.5, 0.25, 0.15], help="slots and bits together")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| model | keeps | tokens | batch | fit says, MiB | nbytes(), MiB | off |\n|---|---|---|---|---|---|---|")
    for name in arguments.models:
        loaded, profile = load_model(name, dtype=arguments.dtype), load_profile(PROFILES / f"{name}.json")
        config, dtype = loaded.model.config, loaded.model.dtype
        footprint = footprint_of(config, dtype)
        for unit, amount, planned in plans_of(profile, arguments.budgets, arguments.bytes):
            merger = KVMerger.from_profile(planned).attach(loaded.model)
            for tokens, batch in itertools.product(arguments.lengths, arguments.batches):
                if amount == 1:
                    said, cache = footprint.stock_bytes(tokens, batch), DynamicCache(config=config)
                else:
                    said = footprint.kept_bytes(tokens, batch, kept_of(planned, tokens))
                    cache = merger.cache()
                found = measured(loaded.model, cache, tokens, batch)
                off = said / found - 1
                row = {"model": name, "unit": unit, "amount": amount, "tokens": tokens, "batch": batch, "off": off}
                rows.append(row)
                sizes = f"{said / 2**20:.2f} | {found / 2**20:.2f} | {off:+.2%}"
                print(f"| {name} | {amount:.0%} of {unit} | {tokens:,} | {batch} | {sizes} |", flush=True)
            merger.detach()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    worst = max(abs(row["off"]) for row in rows)
    print(f"at most {worst:.2%} off, {ALLOWED:.0%} allowed")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
