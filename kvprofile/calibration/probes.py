"""What is read after a context to find out which old tokens are needed.

Merging harms the answers that look back. Probes make the model look back at all of the context: passages of it repeated,
spread from its beginning to its end (*recall*), lines planted in it looked up again (*facts* and *lookup*), beside ordinary
*continuation*.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from kvprofile.calibration.planting import Question
from kvprofile.errors import UsageError

KINDS = ("recall", "continuation", "facts", "lookup")
UNCOUNTED = -1


@dataclass(frozen=True)
class ProbeMix:
    """How much of each kind is read: passages and their length, tokens of continuation, planted facts and look-ups."""

    passages: int = 16
    passage_tokens: int = 20
    continuation_tokens: int = 64
    facts: int = 0
    lookups: int = 0

    def __post_init__(self) -> None:
        if min(self.passages, self.passage_tokens, self.continuation_tokens, self.facts, self.lookups) < 0:
            raise UsageError(f"a probe mix has no negative numbers, got {self}")
        if not self.kinds:
            raise UsageError("the probe mix is empty; ask for at least one of passages, continuation, facts, lookups")

    @classmethod
    def parse(cls, text: str) -> "ProbeMix":
        """Read `passages=16,lookups=8`; what is not named keeps its default. Raises UsageError."""
        names = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, number = part.partition("=")
            if name not in names or not number.isdecimal():
                raise UsageError(
                    f"--probes has {part!r}, expected a name and a whole number such as lookups=8; names are {', '.join(names)}"
                )
            given[name] = int(number)
        return cls(**given)

    @property
    def tokens(self) -> int:
        """Tokens of passages and continuation; those of planted questions come on top."""
        return self.passages * self.passage_tokens + self.continuation_tokens

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are read, in the order of `KINDS`."""
        amounts = (self.passages * self.passage_tokens, self.continuation_tokens, self.facts, self.lookups)
        return tuple(kind for kind, amount in zip(KINDS, amounts, strict=True) if amount)


@dataclass(frozen=True)
class Probe:
    """Tokens to read after a context `(tokens,)`, and what each of them is: an index into `KINDS`, or `UNCOUNTED`."""

    context: Tensor
    tokens: Tensor
    kind: Tensor


def make_probe(
    context: Tensor, continuation: Tensor, seed: int, *, mix: ProbeMix | None = None, questions: Sequence[Question] = ()
) -> Probe:
    """The continuation first, since it follows the context, then one passage from each stretch of it, then questions.

    Passages lie at places drawn by the seed, one in each of `mix.passages` equal stretches, in shuffled order. Of a question
    only the tokens that predict its answer count.
    """
    mix = mix or ProbeMix()
    random = np.random.default_rng(seed)
    parts = [continuation[: mix.continuation_tokens]]
    kinds = [torch.full((len(parts[0]),), KINDS.index("continuation"))]
    if mix.passages:
        stretch = len(context) // mix.passages
        length = min(mix.passage_tokens, stretch)
        starts = [part * stretch + int(random.integers(0, stretch - length + 1)) for part in range(mix.passages)]
        for part in random.permutation(mix.passages):
            parts.append(context[starts[part] : starts[part] + length])
            kinds.append(torch.full((length,), KINDS.index("recall")))
    for question in questions:
        parts.append(question.tokens)
        kind = torch.full((len(question.tokens),), UNCOUNTED)
        # A token is predicted by the one before it.
        kind[-question.answer - 1 : -1] = KINDS.index(question.kind)
        kinds.append(kind)
    return Probe(context, torch.cat(parts), torch.cat(kinds))
