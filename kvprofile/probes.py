"""What is read after a context to find out which old tokens are needed.

Merging harms the answers that look back. Probes make the model look back at all of the context: passages of it repeated,
spread from its beginning to its end (*recall*), beside ordinary *continuation*.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("recall", "continuation")
PASSAGES = 16
PASSAGE_TOKENS = 20
CONTINUATION_TOKENS = 64


@dataclass(frozen=True)
class Probe:
    """Tokens to read after a context `(tokens,)`, and what each of them is: an index into `KINDS`, `(tokens,)`."""

    context: Tensor
    tokens: Tensor
    kind: Tensor


def make_probe(context: Tensor, continuation: Tensor, seed: int) -> Probe:
    """The continuation first, since it follows the context, then one passage from each stretch of the context.

    Passages lie at places drawn by the seed, one in each of `PASSAGES` equal stretches, in shuffled order.
    """
    random = np.random.default_rng(seed)
    stretch = len(context) // PASSAGES
    length = min(PASSAGE_TOKENS, stretch)
    starts = [part * stretch + int(random.integers(0, stretch - length + 1)) for part in range(PASSAGES)]
    following = continuation[:CONTINUATION_TOKENS]
    passages = [context[starts[part] : starts[part] + length] for part in random.permutation(PASSAGES)]
    tokens = torch.cat([following, *passages])
    kind = torch.tensor([1] * len(following) + [0] * (len(tokens) - len(following)))
    return Probe(context, tokens, kind)
