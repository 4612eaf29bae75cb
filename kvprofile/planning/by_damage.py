"""Shares, policies and codecs by measured damage: the rule `damage`, for slots or for bytes; and alike for all heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.allocate import STEPS, Allocation, check_slots, spend
from kvprofile.planning.choices import Choice, Curve, Envelope, lower_envelope
from kvprofile.planning.codecs import codec_curve
from kvprofile.planning.evidence import Decision, Evidence, decision
from kvprofile.planning.reach import check_reach
from kvprofile.planning.sizes import NOTHING, Pair, Sizes, recent_tokens, sizes_of
from kvprofile.planning.windows import Windows

BYTE_STEPS = 512  # of the grid of costs where bytes are counted: a slot may cost a sixth of a token
TRIES = 8  # at meeting the bytes from below; heads' blocks fill up in steps
NEAR = 5e-4  # of the bytes asked for


def policy_choices(budgets: NDArray[np.float64], damage: NDArray[np.float64], floors: Sequence[float]) -> list[Choice]:
    """One choice for every policy of `damage` `(heads, policies, budgets)`, in whose slots a share costs itself."""
    return [Choice(Curve(budgets, damage[:, index]), float(floor)) for index, floor in enumerate(floors)]


@dataclass(frozen=True, eq=False)
class ByDamage:
    """What can be given, and what it costs: every policy with every one of `pairs`, codecs of keys and of values.

    in_bytes: a budget is of bytes, not of slots. alike: all heads get the same.
    """

    evidence: Evidence
    pairs: Sequence[Pair]
    in_bytes: bool = False
    alike: bool = False

    def decide(self, amount: float) -> Decision:
        """Every head's share, policy and codecs for the least damage.

        Raises MismatchError where the amount is out of reach.
        """
        if not self.in_bytes:
            check_slots(self.envelope, amount)
            return self._decision(spend(self.envelope, amount))
        lowest, highest = self._reach
        check_reach(amount, lowest, max(1.0, highest), what="bytes", because=self._least)
        # As much as can be spent, from below: what a plan really takes is told by its blocks, which fill up in steps.
        target, margin = min(amount, highest), 0.0
        best, taken = None, np.inf
        for _ in range(TRIES):
            found = self._decision(spend(self.envelope, target * self._part))
            size = self.size(found)
            fits = size <= amount
            if best is None or (size > taken if fits and taken <= amount else size < taken):
                best, taken = found, size
            if fits and (size >= (1 - NEAR) * amount or target >= highest):
                break
            margin = margin / 2 if fits else 2 * margin + NEAR * amount
            target = float(np.clip(target + amount - size - margin, lowest, highest))
        assert best is not None  # it was tried
        return best

    def size(self, found: Decision) -> float:
        """The fraction of a 16-bit cache's bytes that the planned layers take, to the block."""
        stock = (found.share.size + self.windows.heads * self.windows.unit) * self.evidence.tokens * self._sizes.stock
        return self.nbytes(found, self._sizes) / stock

    def nbytes(self, found: Decision, sizes: Sizes) -> float:
        """Bytes of one text's cache of such sizes in the planned layers."""
        total, policies, pairs = 0.0, self.evidence.policies, iter(found.pairs)
        for share, names in zip(found.share, found.policy, strict=True):
            recent = max(recent_tokens(policies[str(name)].protection, sizes.tokens) for name in names)
            total += sizes.layer_bytes([(float(own), next(pairs)) for own in share], recent)
        return total + self.windows.nbytes(found.windows, sizes)

    @cached_property
    def windows(self) -> Windows:
        """The sliding layers."""
        return Windows(self.evidence, self._sizes, self.pairs)

    @property
    def _part(self) -> float:
        """What a row of the envelope takes on average in the stock cache: rows of sliding layers take less than others."""
        return 1.0 if self.alike else self.windows.part(self.evidence.size[0] * self.evidence.size[1])

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """The least fraction of the bytes, and the largest that can be spent to any use."""
        costs, damage = self.envelope.costs, self.envelope.damage
        least, most = (costs[place].mean() for place in (np.isfinite(damage).argmax(axis=1), damage.argmin(axis=1)))
        return float(least) / self._part, float(most) / self._part

    @cached_property
    def envelope(self) -> Envelope:
        """What every cost does at least, of every head or of all heads that share alike."""
        choices = [self._choice(name, pair) for name, pair in self._options]
        layers, heads = self.evidence.size
        groups = 1 if self.alike else layers if self.evidence.granularity == "layer" else layers * heads
        if groups < layers * heads:
            choices = [choice.in_groups(groups) for choice in choices]
        if not self.in_bytes or not self.windows.layers:
            return lower_envelope(choices, BYTE_STEPS if self.in_bytes else STEPS)
        if self.alike:
            options = zip(choices, self._options, strict=True)
            choices = [self.windows.within(choice, pair, layers * heads) for choice, (_, pair) in options]
            return lower_envelope(choices, BYTE_STEPS)
        return self.windows.beside(lower_envelope(choices, BYTE_STEPS), groups // layers * len(self.windows.layers))

    @cached_property
    def _options(self) -> list[tuple[str, Pair]]:
        """A policy and a pair of codecs for every choice."""
        return [(name, pair) for pair in self.pairs for name in self.evidence.names]

    @cached_property
    def _sizes(self) -> Sizes:
        return sizes_of(self.evidence.tokens, self.evidence.model.head_dim)

    def _choice(self, name: str, pair: Pair) -> Choice:
        evidence = self.evidence
        measured, curves = evidence.statistics.damage, evidence.curves
        assert measured is not None  # there are names
        assert curves is not None
        shares = np.array(measured.budgets)
        damage = curves[:, measured.policies.index(name)].reshape(-1, len(shares))
        coded, whole = codec_curve(evidence, name, pair), np.zeros((len(damage), 1))
        if coded is not None:
            damage, whole = damage + coded.at(shares), coded.at(np.ones(1))
        choice = Choice(Curve(shares, damage), evidence.protected(name), whole)
        if not self.in_bytes:
            return choice
        recent = recent_tokens(evidence.policies[name].protection, evidence.tokens)
        slot, apart = self._sizes.slot(pair), self._sizes.apart(pair, recent)
        return Choice(choice.curve, choice.floor, whole, slot, apart, slot + apart, bridged=False)

    def _decision(self, found: Allocation) -> Decision:
        size = self.evidence.size
        # Rows of merged layers come first, then those of sliding ones, which have a pair and no policy.
        rows = len(found.share) * size[0] // (size[0] + len(self.windows.layers)) if self._apart else len(found.share)
        heads = size[0] * size[1] // rows
        share, chosen = np.repeat(found.share[:rows], heads), np.repeat(found.choice[:rows], heads)
        options = [self._options[index] for index in chosen]
        names = np.array([name for name, _ in options])
        made = decision(share.reshape(size), names.reshape(size), [pair for _, pair in options], found.bound)
        if self._apart:
            pairs = [self.pairs[index - len(self._options)] for index in np.repeat(found.choice[rows:], heads).tolist()]
        else:
            pairs = [options[0][1]] * self.windows.heads
        return replace(made, windows=tuple(pairs))

    @property
    def _apart(self) -> bool:
        """True where sliding layers are rows of their own: bytes are spent on them as on others."""
        return self.in_bytes and not self.alike and bool(self.windows.layers)

    @property
    def _least(self) -> str:
        name, pair = self._options[int(np.argmin([choice.least_cost for choice in self.envelope.choices]))]
        codec = "as they are" if pair == NOTHING else f"in {told(pair)}"
        recent = recent_tokens(self.evidence.policies[name].protection, self.evidence.tokens)
        return (
            f"the newest {recent} tokens in 16 bits, the protected ones {codec} and half a block of every head take at least "
            "{lowest} of the bytes"
        )


def told(pair: Pair) -> str:
    """A pair of codecs as it is asked for."""
    return pair[0] if pair[0] == pair[1] else "/".join(pair)
