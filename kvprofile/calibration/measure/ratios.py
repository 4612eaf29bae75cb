"""Compression ratio against threshold, per layer and head, for the three set rules and by kind of text."""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments
from kvprofile.merging.sets import SET_RULES, adjacent_cosine, banded_cosine, mergeable_links, oldest_members

# From "everything merges" to "nothing does", finest where the cosines of real models lie.
THRESHOLDS: NDArray[np.float64] = np.round(
    np.concatenate([[-1.0, -0.5], np.arange(0.0, 0.5, 0.05), np.arange(0.5, 1.0001, 0.01), [1.001]]), 3
)


class CompressionRatios:
    """Slots over tokens at every threshold of `THRESHOLDS`; mean and spread over samples, by kind of text.

    Ratios are those of the policy: protected tokens keep slots of their own and count. The moments are of arrays
    `(rules, kv_heads + 1, thresholds)`: the last row is the mean over the heads, the layer as a whole.
    """

    def __init__(self, layers: int, kv_heads: int, rules: tuple[str, ...] = SET_RULES) -> None:
        self.rules = rules
        self.shape = (len(rules), kv_heads + 1, len(THRESHOLDS))
        self.layers = layers
        self.kinds: dict[str, Moments] = {}

    def update(self, layer: int, kind: str, keys: Tensor, protected: Tensor, apart: int) -> None:
        """Add one sample's layer.

        `keys` is `(kv_heads, tokens, head_dim)`, `protected` `(kv_heads, tokens)`; `apart` recent tokens follow them in
        the text and keep a slot each.
        """
        total = keys.shape[1] + apart
        counts = torch.stack([count_sets(keys, protected, rule) for rule in self.rules])
        ratio = (counts.cpu().numpy() + apart) / total
        self.of_kind(kind).update(layer, np.concatenate([ratio, ratio.mean(axis=1, keepdims=True)], axis=1))

    def of_kind(self, kind: str) -> Moments:
        """The moments of one kind of text, begun when it is first met."""
        return self.kinds.setdefault(kind, Moments(self.layers, self.shape))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by kind of text and name: what is kept on disk."""
        return {
            f"{kind}/{name}": array for kind, moments in self.kinds.items() for name, array in moments.state().items()
        }

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        for kind, moments in other.kinds.items():
            self.of_kind(kind).merge(moments)

    def overall(self) -> Moments:
        """The moments over all samples of every kind: arrays `(layers, rules, kv_heads + 1, thresholds)`."""
        total = Moments(self.layers, self.shape)
        for kind in sorted(self.kinds):
            total.merge(self.kinds[kind])
        return total

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """For every rule `ratio_mean.RULE` and `ratio_std.RULE`, `(layers, kv_heads, thresholds)`."""
        overall = self.overall()
        mean, std = overall.mean, overall.std()
        arrays: dict[str, NDArray[np.generic]] = {}
        for index, rule in enumerate(self.rules):
            arrays[f"ratio_mean.{rule}"] = mean[:, index, :-1].astype(np.float32)
            arrays[f"ratio_std.{rule}"] = std[:, index, :-1].astype(np.float32)
        return arrays


def count_sets(keys: Tensor, protected: Tensor, rule: str) -> Tensor:
    """Number of sets at every threshold: `keys` `(kv_heads, tokens, head_dim)` -> `(kv_heads, thresholds)` int64."""
    # Sent along with the work: nothing waits for it.
    thresholds = torch.as_tensor(THRESHOLDS, dtype=torch.float32).to(keys.device, non_blocking=True)
    if rule == "chain":
        links = adjacent_cosine(keys).masked_fill(~mergeable_links(protected), -torch.inf).sort(-1).values
        below = torch.searchsorted(links, thresholds.expand(len(links), -1).contiguous())
        return keys.shape[1] - (links.shape[1] - below)
    # Along the band the running minimum falls, so one sorted search finds how far every token reaches at every threshold.
    lowest = banded_cosine(keys, protected).cummin(-1).values
    heads, tokens = lowest.shape[:2]
    reach = torch.searchsorted(-lowest, (-thresholds).expand(heads, tokens, -1).contiguous(), right=True)
    return _count(oldest_members(rule, reach.transpose(1, 2)))


def _count(oldest: Tensor) -> Tensor:
    """Number of sets where token t closes a set that begins at `oldest[..., t]`: `(..., tokens)` -> `(...)`.

    The newest token closes the first set, the token before its oldest member the next, and so on. Within blocks of tokens,
    all blocks at once, every token learns where it leaves its block and how many sets it closes on the way; then the blocks
    are passed one after the other: twice the root of as many steps as there are tokens.
    """
    tokens = oldest.shape[-1]
    if not tokens:
        return oldest.sum(-1)
    size = max(1, round(tokens**0.5))
    room = -tokens % size
    following = F.pad(oldest - 1, (0, room)).unflatten(-1, (-1, size)).movedim((-1, -2), (0, 1)).contiguous()
    blocks = following.shape[1]
    first = (torch.arange(blocks, device=oldest.device) * size).view(-1, *(1,) * (following.dim() - 2))
    left, closed = torch.empty_like(following), torch.zeros_like(following)
    for place in range(size):
        to = following[place]
        inside = to >= first
        within = (to - first).clamp_(0, max(0, place - 1))[None]
        left[place] = torch.where(inside, left.gather(0, within)[0], to) if place else to
        closed[place] = torch.where(inside, closed.gather(0, within)[0], 0) + 1 if place else 1
    at = torch.full_like(following[0, 0], tokens - 1)
    total = torch.zeros_like(at)
    for block in range(blocks - 1, -1, -1):
        here = at >= block * size
        within = (at - block * size).clamp_(0, size - 1)[None]
        total += torch.where(here, closed[:, block].gather(0, within)[0], 0)
        at = torch.where(here, left[:, block].gather(0, within)[0], at)
    return total
