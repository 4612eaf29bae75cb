"""What packing the window of a sliding layer costs, as generation reads it: every token but the newest as it is stored.

A full-attention layer is measured with the probe's own tokens exact. A window passes on: after a few hundred tokens all that it
shows are tokens of the text that goes on, packed but for the newest. So here a query of the probe reads every token of its
window that is older than the newest `RECENT` as the codec gives it back, tokens of the probe among them. Where the probe is
read in one piece, as in a check, that is more than happens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.codec_damage import WORST, stored
from kvprofile.calibration.measure.keys_and_values import KeysAndValues
from kvprofile.calibration.measure.weighing import Weighing
from kvprofile.calibration.probe_mix import KINDS
from kvprofile.codecs.codec import Codec
from kvprofile.codecs.table import CODECS
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.block_size import RECENT
from kvprofile.runtime.masks import MaskRecipe


@dataclass(frozen=True)
class WindowReading:
    """One sliding layer's attention of the probe, and how the answer depends on it.

    keys, values `(kv_heads, tokens, dim)`: the context's newest tokens that the probe sees. mean `(kv_heads, 1, head_dim)`: of
    the keys of the whole context. call: the probe's attention, its keys and values those of the probe alone. seen `(queries,
    tokens + probe)`: which token a query sees. gradients, kind, few: as in `probed.Reading`.
    """

    keys: Tensor
    values: Tensor
    mean: Tensor
    call: AttentionCall
    seen: Tensor
    gradients: Tensor
    kind: Tensor
    few: Tensor


def window_reading(
    call: AttentionCall,
    context: tuple[Tensor, Tensor],
    window: int,
    gradients: Tensor,
    *,
    kind: Tensor,
    few: Tensor,
) -> WindowReading:
    """The reading of a probe's `call` after keys and values `(1, kv_heads, tokens, dim)` of the whole `context`."""
    (keys, values), queries = (part[0] for part in context), call.query.shape[2]
    shown, mask = min(keys.shape[1], window - 1), call.mask
    mask = mask.stock() if isinstance(mask, MaskRecipe) else mask
    if mask is None:
        seen = torch.ones(queries, shown + queries, dtype=torch.bool, device=keys.device).tril(shown)
    else:
        part = mask[0, 0, :, -(shown + queries) :].to(keys.device)
        seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    mean = keys.float().mean(1, keepdim=True)
    return WindowReading(keys[:, -shown:], values[:, -shown:], mean, call, seen, gradients, kind, few)


class WindowDamage(KeysAndValues):
    """Mean over samples of the damage of storing keys, and values, in nats per token.

    `(layers, kv_heads, codecs, kinds)` each.
    """

    name = "window_damage"

    def __init__(self, layers: int, kv_heads: int, kinds: Sequence[str], codecs: Sequence[str]) -> None:
        self.kinds, self.codecs = tuple(kinds), tuple(codecs)
        super().__init__(layers, (kv_heads, len(self.codecs), len(self.kinds)))

    def update(self, layer: int, reading: WindowReading) -> None:
        """Add one sample's layer. One whose heads are not as many as the model's is as bad as can be: it stays as it is."""
        if reading.keys.shape[0] != self.shape[1]:
            self.moments.update(layer, np.full(self.shape, WORST))
            return
        self.moments.update(layer, window_damage(reading, self.kinds, [CODECS[name] for name in self.codecs]))


def window_damage(reading: WindowReading, kinds: Sequence[str], codecs: Sequence[Codec]) -> NDArray[np.float64]:
    """Damage of one layer of one sample: `(2, kv_heads, codecs, kinds)`. Copied from the device once, a few queries asked."""
    some, call = reading.few, reading.call
    kv_heads, group = len(reading.keys), call.query.shape[1] // len(reading.keys)
    weighing = Weighing(reading.gradients[:, some], reading.kind[some], [KINDS.index(kind) for kind in kinds], kv_heads)
    query = call.query[0, :, some].reshape(kv_heads, group * len(some), -1).float()
    keys = torch.cat([reading.keys, call.key[0]], dim=1).float()
    values = torch.cat([reading.values, call.value[0]], dim=1).float()
    places = torch.arange(keys.shape[1], device=keys.device)
    old = (places < some[:, None] + reading.keys.shape[1] - RECENT).repeat(group, 1)
    hidden = (~reading.seen[some]).repeat(group, 1)
    sinks = call.softmax.sinks
    if sinks is not None:
        sinks = sinks.float().view(kv_heads, group, 1).expand(-1, -1, len(some)).reshape(kv_heads, -1, 1)

    def logits(keys: Tensor) -> Tensor:
        return call.softmax.cap_((query @ keys.mT).mul_(call.softmax.scaling))

    def weights(logits: Tensor) -> Tensor:
        """Attention `(kv_heads, group * queries, tokens)`."""
        logits = logits.masked_fill(hidden, -torch.inf)
        if sinks is None:
            return logits.softmax(-1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]

    plain = logits(keys)
    attention = weights(plain)
    exact, aged = attention @ values, attention * old
    of_keys, of_values = [], []
    for codec in codecs:
        coded = torch.where(old, logits(stored(codec, keys, reading.mean)), plain)
        of_keys.append(weighing.damage(weights(coded) @ values - exact))
        of_values.append(weighing.damage(aged @ (stored(codec, values) - values)))
    found = torch.stack([torch.stack(of_keys, dim=1), torch.stack(of_values, dim=1)])
    # What a codec has no numbers for is as bad as can be.
    return found.nan_to_num(nan=WORST, posinf=WORST).cpu().numpy().astype(np.float64)
