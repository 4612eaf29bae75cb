"""The budget a merged layer must keep at every step, written down once more, apart from the code that keeps it."""

import math

from kvprofile.merging.protect import Protection
from kvprofile.runtime.layer import MergedLayer

ROUNDING = 2


def slack_of(layer: MergedLayer) -> int:
    """Slots a head may have above its budget: those of tokens that have not been merged yet, and of rounding."""
    least = float(layer.setting.share.min())
    return (32 if least >= 1 / 32 else min(64, math.ceil(1 / max(least, 1 / 64)))) + ROUNDING


def stored_and_allowed(layer: MergedLayer) -> list[list[tuple[int, float]]]:
    """Slots stored and slots that the share or the protected tokens allow, by row and head (docs/architectures.md)."""
    setting = layer.setting
    protections = setting.protections
    of_head = {head: policy.protection for policy, heads in setting.policies for head in heads}
    rows = []
    for row, stored in zip(layer.state.rows, layer.lengths(), strict=True):
        seen = layer.state.seen - row.padding
        recent = min(seen, max(max(one.recent, math.ceil(one.recent_share * seen)) for one in protections))
        found = []
        for head, slots in enumerate(stored):
            own = of_head.get(head, Protection())
            protected = own.first + recent + math.ceil(own.heavy_share * seen)
            found.append((slots, min(seen, max(float(setting.share[head]) * seen, protected))))
        rows.append(found)
    return rows


def check_budget(layer: MergedLayer) -> None:
    """Fail unless every row and head of a layer stores what exact mode allows."""
    if layer.state is None or not layer.setting.exact or layer.setting.keeps_all:
        return
    slack = slack_of(layer)
    for row in stored_and_allowed(layer):
        for head, (slots, allowed) in enumerate(row):
            assert slots <= allowed + slack + 1e-6, (
                f"layer {layer.index}, head {head}: {slots} slots of {layer.state.seen} tokens, at most {allowed + slack:.1f}"
            )
