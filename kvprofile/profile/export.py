"""A profile's plan in the terms of other tools."""

import json

from kvprofile.profile.schema import Profile

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


FORMATS = {"kvpress": kvpress}
