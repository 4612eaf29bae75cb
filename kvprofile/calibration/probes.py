"""What is read after a context to find out which old tokens are needed.

Merging harms the answers that look back. Probes make the model look back at all of the context: passages of it repeated,
spread from its beginning to its end (*recall*), lines planted in it looked up again (*facts* and *lookup*), beside ordinary
*continuation*.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvprofile.calibration.planting import Question
from kvprofile.calibration.probe_mix import KINDS, ProbeMix

UNCOUNTED = -1


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
