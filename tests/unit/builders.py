"""Small inputs for tests: random tokens, profiles of two layers of two KV heads, and the slots of a cache layer."""

from dataclasses import replace

import torch
from torch import Tensor

from kvprofile.codecs.rotation import turn_back
from kvprofile.merging.policies import Policy
from kvprofile.merging.slots import Slots
from kvprofile.merging.softmax import Softmax
from kvprofile.merging.tokens import Tokens, newest_queries
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import SCHEMA_VERSION, PolicyFacts
from kvprofile.runtime.shelf import Shelf
from kvprofile.runtime.state import LayerState

WINDOWS = (32, 128)
GROUP, ASKED = 2, 12  # query heads of a KV head, and queries at hand
AGAIN = 9  # queries asked again of every query head
THRESHOLDS = [-1.0, 0.5, 0.8, 1.001]


def random_tokens(seed, *, batch=1, heads=2, count=24, head_dim=4, value_dim=3, position=0, drift=1.0, newer=5):
    """Keys that walk through space, so that neighbours are alike; attention received that is never equal.

    `newer` tokens have been seen after these. At the beginning of a text the newest queries are there too, and such as are
    asked again.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, heads, count, head_dim, generator=generator)
    keys = torch.randn(batch, heads, 1, head_dim, generator=generator) * 2 + drift * steps.cumsum(2) * 0.5
    values = torch.randn(batch, heads, count, value_dim, generator=generator)
    mass = torch.rand(batch, heads, count, generator=generator) + 0.05
    windows = {size: torch.rand(batch, heads, count, generator=generator) + 0.05 for size in WINDOWS}
    tokens = Tokens(keys, values, mass, windows, position, position + count + newer)
    if position:
        return tokens
    later = torch.randn(batch, heads, newer, head_dim, generator=generator)
    unseen = torch.randn(batch, heads, newer, value_dim, generator=generator)
    query = torch.randn(batch, heads * GROUP, min(ASKED, count + newer), head_dim, generator=generator)
    queries = newest_queries(query, keys, values, Softmax(0.6), count=ASKED)
    again = torch.randn(batch, heads, GROUP, AGAIN, head_dim, generator=generator)
    return replace(
        tokens,
        queries=replace(queries, keys=later, values=unseen),
        again=replace(queries, states=again, keys=later, values=unseen),
    )


def build_profile(*, name="tiny", command="kvprofile calibrate tiny", policy="gauss", **changes):
    """A profile written out by hand; `changes` replace whole top-level blocks."""
    curves = [[0.1, 0.3, 0.6, 1.0], [0.2, 0.5, 0.7, 1.0]]
    heads = [
        {"policy": policy, "epsilon": 0.7, "share": 0.5, "damage": None},
        {"policy": policy, "epsilon": None, "share": 1.0, "damage": None},
    ]
    fidelity = {
        "recall_kl": 0.01,
        "recall_kl_interval": (0.008, 0.013),
        "recall_top1": 0.98,
        "continuation_kl": 0.002,
        "continuation_kl_interval": (0.001, 0.003),
        "continuation_top1": 1.0,
    }
    checked = {"achieved": {"mean": 0.5, "std": 0.01, "worst": 0.52}, "fidelity": fidelity}
    text = {"samples": 2, "tokens": 64, "kinds": {"essay": 1, "table": 1}}
    values = {
        "schema_version": SCHEMA_VERSION,
        "created": {
            "time": "2025-01-02T03:04:05+00:00",
            "command": command,
            "seconds": 1.5,
            "kvprofile": "0.1.0",
            "python": "3.11.7",
            "torch": "2.8.0",
            "transformers": "5.23.0",
        },
        "model": {
            "name": name,
            "source": "made in memory",
            "revision": None,
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "layers": 2,
            "query_heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "attention": ["full_attention", "full_attention"],
            "rope": {"rope_theta": 10000.0, "rope_type": "default"},
            "config_hash": "0" * 64,
        },
        "calibration": {
            "text": "two samples",
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "digest": "a" * 64,
            "measured": text,
            "held_out": text,
        },
        "policies": {policy: PolicyFacts.model_validate(Policy().to_dict()).model_dump()},
        "statistics": {
            "rule": "chain",
            "policy": policy,
            "thresholds": THRESHOLDS,
            "layers": [
                {"layer": layer, "ratio": curves, "ratio_std": [[0.0, 0.01, 0.02, 0.0]] * 2} for layer in (0, 1)
            ],
            "persistence": [
                {
                    "threshold": 0.5,
                    "ratio": 0.4,
                    "between_samples": 0.01,
                    "between_kinds": None,
                    "between_layers": 0.02,
                    "head_between_samples": 0.015,
                    "head_between_kinds": None,
                    "between_heads": 0.1,
                    "rank_correlation": None,
                }
            ],
            "damage": None,
            "arrays": None,
        },
        "plan": {
            "budget": 0.75,
            "policy": policy,
            "rule": "uniform",
            "objective": "balanced",
            "granularity": "head",
            "mode": "threshold",
            "predicted_ratio": 0.75,
            "predicted_damage": None,
            "damage_bound": None,
            "layers": [{"layer": layer, "epsilon": 0.9, "share": 0.75, "heads": heads} for layer in (0, 1)],
        },
        "check": {
            "threshold": checked,
            "exact": checked,
            "uniform": checked,
            "uniform_policy": policy,
            "bytes_ratio": 0.55,
        },
    }
    return Profile.model_validate({**values, **changes})


def slots_in(state: LayerState | None) -> Slots:
    """The slots of a cache layer, without the room between them, as attention reads them; of any number of shelves."""
    assert state is not None
    rows = len(state.rows) * state.kv_heads
    found = [slots_of_row(shelf, row) for row in range(rows) for shelf in state.shelves if shelf.blocks.lengths[row]]
    keys, values, bias = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Slots(keys, values, bias, state.merged_lengths())


def slots_of_row(shelf: Shelf, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias of one row's slots in float32, in the model's own basis."""
    first, held = int((shelf.blocks.owner < row).sum()), shelf.blocks.lengths[row]
    part = slice(first, first + int((shelf.blocks.owner == row).sum()))
    keys, values, bias = (read(part).flatten(0, 1)[:held] for read in (shelf.keys, shelf.values, shelf.bias))
    keys = turn_back(keys) if shelf.key_codec.rotated else keys
    values = turn_back(values) if shelf.value_codec.rotated else values
    return keys if shelf.mean is None else keys + shelf.mean[row % len(shelf.mean)], values, bias
