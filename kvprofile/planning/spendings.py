"""How a profile spends any amount of slots or of bytes, and what it predicts for it: what `fit.py` looks for room for."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.evidence import Decision
from kvprofile.planning.fit import BUDGETS, BYTES, STEPS, Kept, Spending, smallest
from kvprofile.planning.plans import solver_of
from kvprofile.planning.sizes import NOTHING, recent_tokens
from kvprofile.planning.solver import Solver, total
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import PolicyFacts

Arrays = Mapping[str, NDArray[np.generic]]


def spendings_of(profile: Profile, arrays: Arrays, context: int) -> list[Spending]:
    """Slots alone, and bytes where codecs were measured, for texts of `context` tokens.

    Raises KVProfileError where no damage was measured.
    """
    measured = profile.statistics.damage
    found = [spending_of(profile, arrays, context, in_bytes=False, codec=NO_CODEC)]
    if measured is not None and measured.codecs:
        found.append(spending_of(profile, arrays, context, in_bytes=True, codec=AUTO))
    return found


def spending_of(
    profile: Profile, arrays: Arrays, context: int, *, in_bytes: bool, codec: str, **settings: str | None
) -> Spending:
    """How a profile spends slots or bytes; `settings` are as in `plans.Settings`."""
    if profile.statistics.damage is None:
        raise KVProfileError(
            f"the profile of {profile.model.name} has no damage to predict by; calibrate anew, or leave it out"
        )
    # A published rule deals out slots: bytes are spent by damage then.
    rule = "damage" if in_bytes and profile.plan.rule not in ("damage", "uniform") else None
    solver = solver_of(
        profile,
        arrays["damage_mean"].astype(np.float64),
        measured=arrays,
        in_bytes=in_bytes,
        codec=codec,
        **{"rule": rule, **settings},
    )

    @lru_cache(maxsize=64)
    def decide(amount: float) -> Decision:
        return solver.decide(amount)

    def works(step: int) -> bool:
        try:
            decide(step / STEPS)
        except MismatchError:
            return False
        return True

    return Spending(
        kept=lambda amount: _kept(solver, decide(amount), context),
        lowest=smallest(works, 1, STEPS) / STEPS,
        unit="bytes" if in_bytes else "slots",
        cost=lambda amount: 0.0 if amount >= 1 else total(decide(amount)),
        amounts=BYTES if in_bytes else BUDGETS,
    )


def kept_of(profile: Profile, context: int) -> Kept:
    """What a profile's own plan keeps of texts of `context` tokens."""
    layers = [
        (
            [(head.share, (head.key_codec, head.value_codec)) for head in layer.heads],
            _recent(profile.policies, [head.policy for head in layer.heads], context),
        )
        for layer in profile.plan.layers
    ]
    codecs, stock = profile.plan.codecs, [NOTHING] * profile.model.kv_heads
    return Kept(layers, [codecs.get(layer, stock) for layer in profile.model.windowed_layers()])


def _kept(solver: Solver, found: Decision, context: int) -> Kept:
    heads, pairs = solver.model.kv_heads, iter(found.pairs)
    layers = [
        ([(float(one), next(pairs)) for one in share], _recent(solver.policies, names.tolist(), context))
        for share, names in zip(found.share, found.policy, strict=True)
    ]
    windows = [found.windows[low : low + heads] for low in range(0, len(found.windows), heads)]
    return Kept(layers, windows)


def _recent(policies: Mapping[str, PolicyFacts], names: Sequence[str], context: int) -> int:
    """How many of the newest tokens a layer whose heads follow these policies keeps as they are."""
    return max(recent_tokens(policies[name].protection, context) for name in names)
