"""What storing slots in fewer bits costs: the damage of every codec of keys and of values, for each layer and KV head.

A head's tokens are merged to a share of their number, and the very slots that come of it are stored and read by a codec: once
the keys, the values staying exact, once the values. The change of the attention output against the exact slots is weighed as
that of merging is (`damage`): E[(g . change)^2] / 2. It is measured by itself and not as what it adds to the damage of the
slots, whose cross term with it averages out: rounding errors of keys, of values and the merging's error know nothing of one
another, so that damages add up.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.damage import copies, padded, rows, together
from kvprofile.calibration.measure.keys_and_values import KeysAndValues
from kvprofile.calibration.measure.probed import Probed, Reading
from kvprofile.calibration.probe_mix import KINDS
from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS, Codec
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import Policy

# What a codec does hardly depends on the share, or on the policy.
SHARES = (0.1, 0.3, 1.0)
WORST = 1e6  # nats


class CodecDamage(KeysAndValues):
    """Mean over samples of the damage of storing keys, and values, in nats per token.

    `(layers, policies, kv_heads, shares, codecs, kinds)` each.
    """

    name = "codec_damage"

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        policies: Sequence[tuple[str, Policy]],
        kinds: Sequence[str],
        codecs: Sequence[str],
    ) -> None:
        self.policies, self.kinds, self.codecs = tuple(policies), tuple(kinds), tuple(codecs)
        super().__init__(layers, (len(self.policies), kv_heads, len(SHARES), len(self.codecs), len(self.kinds)))

    def update(self, layer: int, reading: Reading) -> None:
        """Add one sample's layer."""
        policies, codecs = [policy for _, policy in self.policies], [CODECS[name] for name in self.codecs]
        self.moments.update(layer, codec_damage(reading, policies, self.kinds, codecs))


def codec_damage(
    reading: Reading, policies: Sequence[Policy], kinds: Sequence[str], codecs: Sequence[Codec]
) -> NDArray[np.float64]:
    """Damage of one layer of one sample: `(2, policies, kv_heads, shares, codecs, kinds)`. Copied from the device once.

    A few queries tell the mean square of errors as many and as small as those of rounding.

    Keys are centred by their mean over this text; the runtime takes the mean over all samples, which is close to it.
    """
    places = [KINDS.index(kind) for kind in kinds]
    parts = []
    for part in reading.thinned().parts():
        probe = Probed(part, places)
        mean = part.context.keys[0].float().mean(1, keepdim=True)
        whole: dict[int, Tensor] = {}  # with every token kept policies differ in how many recent ones they hold apart
        parts.append(torch.stack([_of_policy(probe, policy, codecs, mean, whole) for policy in policies], dim=1))
    # What a codec has no numbers for is as bad as can be.
    return torch.cat(parts, dim=2).nan_to_num(nan=WORST, posinf=WORST).cpu().numpy().astype(np.float64)


def _of_policy(
    probe: Probed, policy: Policy, codecs: Sequence[Codec], mean: Tensor, whole: dict[int, Tensor]
) -> Tensor:
    """Damage `(2, kv_heads, shares, codecs, kinds)` of the codecs on one policy's slots."""
    context, recent, heavy = probe.split(policy)
    aged = context.keys.shape[2]
    beside = probe.recent(aged)
    if recent not in whole:
        keys, values = (part[0].float() for part in (context.keys, context.values))
        whole[recent] = _of_slots(probe, keys, values, keys.new_zeros(keys.shape[:2]), beside, codecs=codecs, mean=mean)
    least = policy.least(policy.protection.first + heavy)
    found = []
    for counts in together([max(least, round(share * (aged + recent)) - recent) for share in SHARES[:-1]], context):
        count = torch.tensor(counts)[:, None].expand(-1, probe.kv_heads)
        slots = merge_tokens(copies(context, len(counts)), policy, epsilon=None, count=count, heavy=heavy)
        found += [
            _of_slots(probe, *padded(row), beside, codecs=codecs, mean=mean) for row in rows(slots, probe.kv_heads)
        ]
    return torch.stack([*found, whole[recent]], dim=2)


def _of_slots(
    probe: Probed,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    beside: tuple[Tensor, Tensor],
    *,
    codecs: Sequence[Codec],
    mean: Tensor,
) -> Tensor:
    """Damage `(2, kv_heads, codecs, kinds)` of the codecs on slots `(kv_heads, slots, dim)`.

    `beside` are numerator and denominator of the attention to the recent tokens, which no codec touches.
    """
    above, below = probe.above + beside[0], probe.below + beside[1]
    weights = probe.weigh(keys, bias)
    mass = below + weights.sum(-1, keepdim=True)
    exact = (above + weights @ values) / mass
    of_keys = []
    for codec in codecs:
        coded = probe.weigh(stored(codec, keys, mean), bias)
        of_keys.append(probe.change((above + coded @ values) / (below + coded.sum(-1, keepdim=True)) - exact))
    # The weights stay: one product tells what all the codecs' errors come to.
    errors = torch.cat([stored(codec, values) - values for codec in codecs], dim=-1)
    changes = (weights @ errors / mass).split(values.shape[-1], dim=-1)
    return torch.stack([torch.stack(of_keys, dim=1), torch.stack([probe.change(one) for one in changes], dim=1)])


def stored(codec: Codec, vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Vectors `(..., dim)` as a codec gives them back, in their own basis: float32."""
    read = codec.decode(codec.encode(vectors, mean), vectors.shape[-1], mean)
    return turn_back(read) if codec.rotated else read
