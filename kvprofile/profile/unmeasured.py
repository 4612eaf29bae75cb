"""A profile whose plan is written by hand: for experiments, benchmarks and tests, where nothing was measured."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kvprofile import __version__
from kvprofile.names import NO_CODEC
from kvprofile.profile.schema import SCHEMA_VERSION

# Of a head's part of a plan, where nothing else is said.
UNSAID = {"damage": None, "key_codec": NO_CODEC, "value_codec": NO_CODEC}
NOTHING = "nothing: the plan was written by hand"


def unmeasured_values(
    name: str,
    facts: Mapping[str, Any],
    policies: Mapping[str, Mapping[str, Any]],
    heads: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    mode: str = "exact",
) -> dict[str, Any]:
    """JSON values of a profile with this plan and no statistics.

    `facts` are the model's `fingerprint.model_facts`, `policies` JSON values by name (at least one), `heads` of every
    full-attention layer a `{"policy": ..., "epsilon": ..., "share": ...}` for each KV head, and its
    codecs where it has any.
    """
    text = {"samples": 0, "tokens": 0, "kinds": {}}
    # What is wrong with the plan is said by the schema; here it only has to be written down.
    shares = [head["share"] for layer in heads.values() for head in layer]
    kept = sum(shares) / len(shares) if shares and all(isinstance(share, (int, float)) for share in shares) else 1.0
    return {
        "schema_version": SCHEMA_VERSION,
        "created": {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "",
            "seconds": 0.0,
            "kvprofile": __version__,
            "python": "",
            "torch": "",
            "transformers": "",
        },
        "model": {"name": name, "source": NOTHING, "revision": None, **facts},
        "calibration": {
            "text": NOTHING,
            "seed": 0,
            "dtype": "",
            "device": "",
            "digest": "0" * 64,
            "measured": text,
            "held_out": text,
        },
        "policies": {policy: dict(values) for policy, values in policies.items()},
        "statistics": {
            "rule": "chain",
            "policy": next(iter(policies)),
            "thresholds": [],
            "layers": [
                {"layer": layer, "ratio": [[]] * facts["kv_heads"], "ratio_std": [[]] * facts["kv_heads"]}
                for layer in range(facts["layers"])
            ],
            "persistence": [],
            "damage": None,
            "arrays": None,
        },
        "plan": {
            "budget": min(1.0, max(kept, 1e-6)),
            "policy": "auto",
            "rule": "uniform",
            "objective": "balanced",
            "granularity": "head",
            "mode": mode,
            "predicted_ratio": min(1.0, max(kept, 0.0)),
            "predicted_damage": None,
            "damage_bound": None,
            "layers": [
                {
                    "layer": layer,
                    "epsilon": None,
                    "share": 1.0,
                    "heads": [{**UNSAID, **head} for head in own],
                }
                for layer, own in heads.items()
            ],
        },
        "check": None,
    }
