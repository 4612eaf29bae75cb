"""How a set becomes one slot: the pivot, the weights, and the merged key and value (arXiv 2407.08454, section 4.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.host import places_of
from kvprofile.merging.slots import Slots
from kvprofile.names import BIASES, SIGMAS


@dataclass(frozen=True)
class Members:
    """All tokens and their sets, as the weights see them; what comes out for sets of one is not used.

    keys `(members, head_dim)` float32; owner `(members,)`: the set of each; is_pivot `(members,)`; received `(members,)`: mean
    attention, where it was measured; pivot_keys `(sets, head_dim)`; size `(sets,)`; sigma: of the combination.
    """

    keys: Tensor
    owner: Tensor
    is_pivot: Tensor
    received: Tensor | None
    pivot_keys: Tensor
    size: Tensor
    sigma: float | str

    def shares(self, kernel: Tensor) -> Tensor:
        """Weights `(members,)` in proportion to the kernel that sum to one in every set."""
        return kernel / _sum_by(self.owner, kernel, self.size.numel())[self.owner]


def gaussian(members: Members) -> Tensor:
    """By distance to the pivot's key: exp(-|k - k_p|^2 / 2 sigma^2) (KVMerger, arXiv 2407.08454)."""
    owner, size = members.owner, members.size
    squared = (members.keys - members.pivot_keys[owner]).square().sum(-1)
    if members.sigma == "rms":
        variance = _sum_by(owner, squared, size.numel()) / size
    elif members.sigma == "mean":
        variance = (_sum_by(owner, squared.sqrt(), size.numel()) / size).square()
    else:
        variance = squared.new_full((size.numel(),), float(members.sigma) ** 2)
    # A set of equal keys has variance 0 and distances 0: the floor makes its weights equal instead of NaN.
    return members.shares(torch.exp(-squared / (2 * variance.clamp_min(1e-20))[owner]))


def attention(members: Members) -> Tensor:
    """By the attention received."""
    return members.shares(_measured(members.received).clamp_min(1e-20))


def average(members: Members) -> Tensor:
    """All alike."""
    return members.shares(torch.ones(len(members.keys), device=members.keys.device))


def similarity(members: Members) -> Tensor:
    """By exp(cos(k, k_p)), which is e for the pivot (D2O, arXiv 2406.13035)."""
    return members.shares(_cosines(members).exp())


def midpoints(members: Members) -> Tensor:
    """The mean of the pivot and of the others' midpoints with it (LOOK-M's pivotal merging, arXiv 2406.18139)."""
    size = members.size[members.owner]
    return torch.where(members.is_pivot, (1 + size) / 2, 0.5) / size


def cosines(members: Members) -> Tensor:
    """By cos(k, k_p), over the size of the set: less than one in sum (LOOK-M's weighted merging, arXiv 2406.18139)."""
    return _cosines(members) / members.size[members.owner]


# What `Combination.weights` can name; None: the pivot's key and value as they are.
WEIGHTS: dict[str, Callable[[Members], Tensor] | None] = {
    "gaussian": gaussian,
    "attention": attention,
    "average": average,
    "pivot": None,
    "similarity": similarity,
    "midpoints": midpoints,
    "cosines": cosines,
}


@dataclass(frozen=True)
class Combination:
    """How the members of a set are combined.

    weights: a name of `WEIGHTS`; `pivot` is the pivot alone.
    sigma: width of the Gaussian: a number (the paper uses 5), or `mean` or `rms`, the mean or root-mean-square distance
        to the pivot over the set, the pivot included.
    keep_pivot_key: store the pivot's key unmoved and combine the values only.
    scale_values: multiply the value by the size of the set, as printed in the paper; outputs inflate, so it is off.
    bias: what is added to the slot's attention logits, so that the softmax counts what the slot stands for: log of its
        `count` of tokens (ZeroMerge, arXiv 2503.10714; KeepKV, arXiv 2504.09936); log of the `attention` of all members
        over the pivot's, which is right for a slot with the pivot's key; or `none`.
    threshold: where lost tokens seek the most similar survivor, the least cosine at which they join it; those below are
        dropped. `mean`: the mean over the lost tokens of their best cosine (D2O, arXiv 2406.13035).
    """

    weights: str = "gaussian"
    sigma: float | str = "rms"
    keep_pivot_key: bool = False
    scale_values: bool = False
    bias: str = "count"
    threshold: float | str = -1.0

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}; expected one of {', '.join(WEIGHTS)}")
        if self.bias not in BIASES:
            raise ValueError(f"unknown bias {self.bias!r}; expected one of {', '.join(BIASES)}")
        if isinstance(self.sigma, str) and self.sigma not in SIGMAS:
            raise ValueError(f"unknown sigma {self.sigma!r}; expected a number or one of {', '.join(SIGMAS)}")
        if not isinstance(self.sigma, str) and not self.sigma > 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")
        if self.threshold != "mean" and (isinstance(self.threshold, str) or not -1 <= self.threshold <= 1):
            raise ValueError(f"threshold must be a cosine from -1 to 1 or mean, got {self.threshold!r}")

    @property
    def by_attention(self) -> bool:
        """True if weights or bias go by the attention received."""
        return "attention" in (self.weights, self.bias)

    @property
    def has_pivot(self) -> bool:
        """True if it matters which member of a set is the pivot."""
        return self.weights != "average" or self.bias == "attention" or self.keep_pivot_key


def combine(
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    mass: Tensor | None,
    combination: Combination,
    *,
    lengths: list[int] | None = None,
) -> Slots:
    """Merge every set of every head into one slot.

    `keys` is `(batch, kv_heads, tokens, head_dim)`, `values` `(batch, kv_heads, tokens, value_dim)`, `starts` and `mass`
    `(batch, kv_heads, tokens)`. The pivot of a set is its token with the largest mass (the newest of equals; without
    mass the newest token). Sets of one token are stored bit for bit. All heads at once, no loop over sets. `lengths`: sets
    of every head where the host knows them; asking the device makes the host wait for it.
    """
    lengths = starts.sum(-1).reshape(-1).tolist() if lengths is None else lengths
    group = starts.reshape(-1).long().cumsum(0) - 1
    pivot = _pivots(group, sum(lengths), None if mass is None else mass.reshape(-1))
    return _merged(keys, values, mass, _Sets(group, pivot, lengths), combination)


def combine_owned(
    keys: Tensor,
    values: Tensor,
    owner: Tensor,
    mass: Tensor | None,
    combination: Combination,
    *,
    lengths: list[int] | None = None,
    heaviest: Tensor | None = None,
) -> Slots:
    """Merge tokens into the survivors they were given to.

    `owner` `(batch, kv_heads, tokens)` names the token of the same head whose slot a token joins: itself if it survives, -1 if
    it is dropped. A survivor is the pivot of its set, or, with `heaviest` `(batch, kv_heads, tokens)`, the member that has most
    of it. The rest is as in `combine`.
    """
    places = torch.arange(owner.numel(), device=owner.device)
    tokens = owner.shape[-1]
    survives = owner == places[:tokens]
    lengths = survives.sum(-1).reshape(-1).tolist() if lengths is None else lengths
    slot = survives.reshape(-1).long().cumsum(0) - 1
    flat = owner.reshape(-1)
    of_owner = slot[(flat + places // tokens * tokens).clamp_min(0)]
    group = torch.where(flat < 0, sum(lengths), of_owner)
    pivot = places_of(survives, sum(lengths))
    if heaviest is not None:
        pivot = _pivots(group, len(pivot) + 1, heaviest.reshape(-1))[:-1]
    return _merged(keys, values, mass, _Sets(group, pivot, lengths), combination)


class _Sets(NamedTuple):
    """Every token's slot, `(tokens,)`, one past the last for dropped ones; every slot's pivot; slots of every head."""

    group: Tensor
    pivot: Tensor
    lengths: list[int]


def _merged(keys: Tensor, values: Tensor, mass: Tensor | None, sets: _Sets, combination: Combination) -> Slots:
    group, pivot, lengths = sets
    flat_keys = keys.reshape(-1, keys.shape[-1])
    flat_values = values.reshape(-1, values.shape[-1])
    slots = len(pivot)
    slot_keys, slot_values = flat_keys.index_select(0, pivot), flat_values.index_select(0, pivot)
    bias = torch.zeros(slots, device=keys.device)
    if slots == group.numel():
        return Slots(slot_keys, slot_values, bias, lengths)
    # What was dropped forms one more set, which is thrown away: how many those are nobody has to ask.
    size = torch.zeros(slots + 1, dtype=torch.long, device=keys.device).index_add_(0, group, torch.ones_like(group))
    joined = size[:slots] > 1

    weigh = WEIGHTS[combination.weights]
    if weigh is not None:
        pivots = F.pad(pivot, (0, 1))
        token = torch.arange(group.numel(), device=group.device)
        members = Members(
            flat_keys.float(),
            group,
            token == pivots[group],
            None if mass is None else mass.reshape(-1),
            flat_keys.index_select(0, pivots).float(),
            size,
            combination.sigma,
        )
        weight = weigh(members)[:, None]
        new_values = _sum_by(group, flat_values.float() * weight, slots + 1)[:slots]
        if combination.scale_values:
            new_values *= size[:slots, None]
        # Singletons stay exactly as they were.
        slot_values = torch.where(joined[:, None], new_values.to(values.dtype), slot_values)
        if not combination.keep_pivot_key:
            new_keys = _sum_by(group, members.keys * weight, slots + 1)[:slots]
            slot_keys = torch.where(joined[:, None], new_keys.to(keys.dtype), slot_keys)

    if combination.bias == "count":
        bias = size[:slots].float().log()
    elif combination.bias == "attention":
        share = _measured(mass).reshape(-1).clamp_min(1e-20)
        # Slots of one token get exactly 0.
        bias = torch.where(joined, (_sum_by(group, share, slots + 1)[:slots] / share[pivot]).log(), bias)
    return Slots(slot_keys, slot_values, bias, lengths)


def _cosines(members: Members) -> Tensor:
    cosine = F.cosine_similarity(members.keys, members.pivot_keys[members.owner], dim=-1)
    return torch.where(members.is_pivot, 1.0, cosine)


def _measured(mass: Tensor | None) -> Tensor:
    if mass is None:
        raise ValueError("weights and biases by attention need the attention mass")
    return mass


def _pivots(group: Tensor, slots: int, mass: Tensor | None) -> Tensor:
    """Row of the heaviest member of every set; the newest of equals."""
    row = torch.arange(group.numel(), device=group.device)
    if mass is not None:
        heaviest = mass.new_full((slots,), -torch.inf).scatter_reduce_(0, group, mass, "amax")
        row = torch.where(mass >= heaviest[group], row, -1)
    return torch.full((slots,), -1, device=group.device).scatter_reduce_(0, group, row, "amax")


def _sum_by(owner: Tensor, source: Tensor, sets: int) -> Tensor:
    return source.new_zeros((sets, *source.shape[1:])).index_add_(0, owner, source)
