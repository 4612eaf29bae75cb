"""Which codecs a plan may use, and what they do to its heads."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.choices import Curve
from kvprofile.planning.evidence import Decision, Evidence
from kvprofile.planning.sizes import NOTHING, Pair


def pairs_of(codec: str, evidence: Evidence, *, in_bytes: bool) -> list[Pair]:
    """The pairs that `none`, `auto`, a codec or `KEYS/VALUES` allow, the dearest first.

    Raises UsageError for a codec whose damage was not measured, and for `auto` where slots are counted: bits are free then.
    """
    measured = [] if evidence.statistics.damage is None else evidence.statistics.damage.codecs
    if codec == AUTO:
        if not in_bytes:
            raise UsageError("codec auto weighs bits against slots, so it needs --bytes; with --budget give one codec")
        if not measured:
            raise UsageError(
                "no codec's damage was measured, so bytes can only be spent on slots; calibrate anew, or give --codec none"
            )
        names = [NO_CODEC, *measured]
        return list(product(names, names))
    keys, _, values = codec.partition("/")
    pair = (keys, values or keys)
    for name in pair:
        if name not in (NO_CODEC, *measured):
            raise UsageError(
                f"no damage was measured for the codec {name!r}; expected none, auto, one of {', '.join(measured) or 'none'}, "
                "or KEYS/VALUES of them; others need a calibration with --codec"
            )
    return [pair]


def codec_curve(evidence: Evidence, policy: str, pair: Pair) -> Curve | None:
    """What a pair of codecs does to every head `(heads, shares)` on a policy's slots; None for the pair that does nothing.

    Where only another policy's slots were measured it is theirs: it hardly depends on the policy.
    """
    measured = evidence.statistics.damage
    if pair == NOTHING or measured is None:
        return None
    policies = measured.codec_policies
    index = policies.index(policy) if policy in policies else 0
    total: NDArray[np.float64] | None = None
    for curves, codec in zip(evidence.codec_curves, pair, strict=True):
        if codec != NO_CODEC:
            own = curves[:, index, :, :, measured.codecs.index(codec)].reshape(-1, len(measured.codec_shares))
            total = own if total is None else total + own
    assert total is not None  # one of them is a codec
    return Curve(np.array(measured.codec_shares), total)


def codec_damage(evidence: Evidence, chosen: Decision) -> NDArray[np.float64]:
    """What its codecs do to every head `(layers, kv_heads)`."""
    found = np.zeros(chosen.share.size)
    kinds = list(zip(chosen.policy.ravel().tolist(), chosen.pairs, strict=True))
    curves = {kind: codec_curve(evidence, *kind) for kind in set(kinds)}
    for head, (share, kind) in enumerate(zip(chosen.share.ravel(), kinds, strict=True)):
        if (curve := curves[kind]) is not None:
            found[head] = Curve(curve.shares, curve.damage[head : head + 1]).at(np.array([share]))[0, 0]
    return found.reshape(chosen.share.shape)
