"""A profile's plan in the terms of other tools."""

import json

from kvprofile.errors import UsageError
from kvprofile.planning.objectives import codec_curves
from kvprofile.profile.export_kvtuner import kvtuner
from kvprofile.profile.profile import Profile

_ROUNDING = 1e-6


def kvpress(profile: Profile) -> str:
    """The plan as JSON for kvpress' `PerLayerCompressionPress`: the fraction of tokens *removed* in every layer.

    kvpress cuts all heads of a layer alike, with a press of its own choice, so a layer's ratio is 1 less the mean of its
    heads' shares; policies, thresholds and the slots' bias have no counterpart there. Layers that are not merged get 0.
    kvpress truncates the number of kept tokens: ratios are lowered by a millionth, so that rounding costs no token.
    """
    removed = dict.fromkeys(range(profile.model.layers), 0.0)
    for layer in profile.plan.layers:
        kept = sum(head.share for head in layer.heads) / len(layer.heads)
        removed[layer.layer] = max(0.0, round(1.0 - kept - _ROUNDING, 6))
    values = {
        "format": "kvpress.PerLayerCompressionPress",
        "model": profile.model.name,
        "config_hash": profile.model.config_hash,
        "budget": profile.plan.budget,
        "compression_ratios": list(removed.values()),
    }
    return json.dumps(values, indent=1) + "\n"


# Our codec that is nearest to a cache dtype of vLLM's, the better first. Theirs do not turn vectors: they do more harm.
VLLM_DTYPES = {"int8": "int8_per_token_head", "fp8-e4m3": "fp8_per_token_head"}
LEFT = 1e-3  # nats per token that the layers kept in 8 bits are predicted to cost at the most


def vllm(profile: Profile) -> str:
    """Which layers should keep 16 bits, as JSON: the arguments of a vLLM engine whose cache is in 8 bits.

    As few as leave the others' measured damage of 8 bits, keys and values, at `LEFT` or below; the worst first. Layers that
    were not measured (sliding windows) are not among them. vLLM has no eviction, so that the plan's shares stay behind.

    Raises UsageError where no codec like vLLM's was measured, KVProfileError where the arrays are not at hand.
    """
    measured = profile.statistics.damage
    codecs = [] if measured is None else [name for name in VLLM_DTYPES if name in measured.codecs]
    if measured is None or not codecs:
        raise UsageError(
            f"no damage was measured for {' or '.join(VLLM_DTYPES)}, by which layers are chosen; calibrate anew, with --codec "
            "auto or these names"
        )
    # At the largest share that was measured, where nothing is merged.
    keys, values = codec_curves(profile.arrays(), profile.statistics, profile.plan.objective)
    damage = (keys + values)[:, 0, :, -1, measured.codecs.index(codecs[0])].sum(axis=1)
    worst = sorted(range(len(damage)), key=lambda row: -damage[row])
    count = next(count for count in range(len(worst) + 1) if damage[worst[count:]].sum() <= LEFT)
    layers = profile.attention_layers()
    arguments = {
        "format": "vllm.EngineArgs",
        "model": profile.model.name,
        "config_hash": profile.model.config_hash,
        "kv_cache_dtype": VLLM_DTYPES[codecs[0]],
        "kv_cache_dtype_skip_layers": [str(layers[row]) for row in sorted(worst[:count])],
        "measured_with": codecs[0],
        "damage_left": float(f"{damage[worst[count:]].sum():.4g}"),
        "damage_by_layer": {str(layer): float(f"{one:.4g}") for layer, one in zip(layers, damage, strict=True)},
    }
    return json.dumps(arguments, indent=1) + "\n"


FORMATS = {"kvpress": kvpress, "vllm": vllm, "kvtuner": kvtuner}
