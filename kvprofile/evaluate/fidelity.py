"""How much a merged cache changes the next-token distribution.

The cache is filled with a context, compressed, and only then read: by passages of the context repeated (*recall*, which
needs the old tokens) and by the text that follows (*continuation*, which mostly does not).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.models.offloading import input_device

PASSAGES = 4
PASSAGE_TOKENS = 48


@dataclass(frozen=True)
class Trial:
    """A context `(tokens,)` and what is read after it: `recall` and `continuation`, each `(tokens,)`."""

    context: Tensor
    recall: Tensor
    continuation: Tensor


@dataclass(frozen=True)
class Distance:
    """KL(full || merged) in nats per token, and how often the most likely token is the same."""

    kl: float
    top1: float


def make_trial(context: Tensor, continuation: Tensor, seed: int) -> Trial:
    """Draw one passage from each quarter of the context, early to late, at places drawn by the seed."""
    random = np.random.default_rng(seed)
    quarter = len(context) // PASSAGES
    length = min(PASSAGE_TOKENS, quarter)
    starts = [part * quarter + int(random.integers(0, quarter - length + 1)) for part in range(PASSAGES)]
    recall = torch.cat([context[start : start + length] for start in starts])
    return Trial(context, recall, continuation)


def fill(model: PreTrainedModel, cache: Cache, context: Tensor) -> Cache:
    """Read a context `(tokens,)` into a cache and return it."""
    with torch.inference_mode():
        model(context[None].to(input_device(model)), past_key_values=cache, logits_to_keep=1)
    return cache


def read_parts(model: PreTrainedModel, filled: Cache, parts: Sequence[Tensor]) -> list[Tensor]:
    """Read every part `(tokens,)` from a filled cache on its own; the cache stays as it is.

    Returns the parts' log-probabilities `(tokens, vocabulary)`: row i predicts the token after i.
    """
    with torch.inference_mode():
        rows = []
        for tokens in parts:
            own = copy.deepcopy(filled)
            logits = model(tokens[None].to(input_device(model)), past_key_values=own).logits[0]
            rows.append(F.log_softmax(logits.float(), dim=-1))
    return rows


def read_through(
    model: PreTrainedModel, cache: Cache, trial: Trial, after_context: Callable[[Cache], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a trial's recall and continuation, each read from the cache filled with its context.

    `after_context` sees the filled cache.
    """
    fill(model, cache, trial.context)
    if after_context is not None:
        after_context(cache)
    recall, continuation = read_parts(model, cache, (trial.recall, trial.continuation))
    return recall, continuation


def distance(reference: Tensor, candidate: Tensor) -> Distance:
    """Compare two sets of log-probabilities `(tokens, vocabulary)`."""
    terms = reference.exp() * (reference - candidate)
    # A token that is impossible in the reference adds nothing, whatever the candidate says of it.
    kl = torch.where(reference == -torch.inf, 0.0, terms).sum() / len(reference)
    top1 = (reference.argmax(-1) == candidate.argmax(-1)).float().mean()
    return Distance(float(kl.clamp(min=0)), float(top1))


def negative_log_likelihood(rows: Tensor, following: Tensor) -> float:
    """Mean of -log p in nats of the tokens `following` `(tokens,)` under log-probabilities `(tokens, vocabulary)`."""
    chosen = rows.gather(-1, following.to(rows.device)[:, None])
    return float(-chosen.mean())
