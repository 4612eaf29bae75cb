"""The budget a merged layer must keep at every step, written down once more, apart from the code that keeps it."""

import math

from kvprofile.runtime.layer import MergedLayer

ROUNDING = 2


def check_budget(layer: MergedLayer) -> None:
    """Fail unless every row and head of a layer stores what exact mode allows (docs/architectures.md)."""
    setting = layer.setting
    if layer.state is None or not setting.exact or setting.keeps_all:
        return
    protections = [policy.protection for policy, _ in setting.policies]
    of_head = {head: policy.protection for policy, heads in setting.policies for head in heads}
    least = float(setting.share.min())
    slack = 32 if least >= 1 / 32 else min(64, math.ceil(1 / max(least, 1 / 64)))
    for row, stored in zip(layer.state.rows, layer.lengths(), strict=True):
        seen = layer.state.seen - row.padding
        recent = min(seen, max(max(one.recent, math.ceil(one.recent_share * seen)) for one in protections))
        for head, slots in enumerate(stored):
            protected = of_head[head].first + recent + math.ceil(of_head[head].heavy_share * seen)
            share = float(setting.share[head])
            most = min(seen, max(share * seen, protected) + slack + ROUNDING)
            assert slots <= most + 1e-6, (
                f"layer {layer.index}, head {head}: {slots} slots of {seen} tokens, at most {most:.1f} allowed"
            )
