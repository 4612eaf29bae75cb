"""How a set becomes one slot: the pivot, the weights, and the merged key and value (arXiv 2407.08454, section 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = ("gaussian", "attention", "average", "pivot")
SIGMAS = ("mean", "rms")
BIASES = ("count", "attention", "none")


@dataclass(frozen=True)
class Combination:
    """How the members of a set are combined.

    weights: `gaussian` (by distance to the pivot's key), `attention` (by attention mass), `average`, or `pivot` (the pivot
        alone).
    sigma: width of the Gaussian: a number (the paper uses 5), or `mean` or `rms`, the mean or root-mean-square distance
        to the pivot over the set, the pivot included.
    keep_pivot_key: store the pivot's key unmoved and combine the values only.
    scale_values: multiply the value by the size of the set, as printed in the paper; outputs inflate, so it is off.
    bias: what is added to the slot's attention logits, so that the softmax counts what the slot stands for: log of its
        `count` of tokens (ZeroMerge, arXiv 2503.10714; KeepKV, arXiv 2504.09936); log of the `attention` of all members
        over the pivot's, which is right for a slot with the pivot's key; or `none`.
    """

    weights: str = "gaussian"
    sigma: float | str = "rms"
    keep_pivot_key: bool = False
    scale_values: bool = False
    bias: str = "count"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}; expected one of {', '.join(WEIGHTS)}")
        if self.bias not in BIASES:
            raise ValueError(f"unknown bias {self.bias!r}; expected one of {', '.join(BIASES)}")
        if isinstance(self.sigma, str) and self.sigma not in SIGMAS:
            raise ValueError(f"unknown sigma {self.sigma!r}; expected a number or one of {', '.join(SIGMAS)}")
        if not isinstance(self.sigma, str) and not self.sigma > 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")


@dataclass
class Slots:
    """What is stored for the merged tokens: head (b, h) owns `lengths[b * kv_heads + h]` consecutive rows.

    keys `(slots, head_dim)`, values `(slots, value_dim)`, bias `(slots,)` float32: what is added to a slot's logits.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    lengths: list[int]


def combine(keys: Tensor, values: Tensor, starts: Tensor, mass: Tensor | None, combination: Combination) -> Slots:
    """Merge every set of every head into one slot.

    `keys` is `(batch, kv_heads, tokens, head_dim)`, `values` `(batch, kv_heads, tokens, value_dim)`, `starts` and `mass`
    `(batch, kv_heads, tokens)`. The pivot of a set is its token with the largest mass (the newest of equals; without
    mass the newest token). Sets of one token are stored bit for bit. All heads at once, no loop over sets.
    """
    flat_keys = keys.reshape(-1, keys.shape[-1])
    flat_values = values.reshape(-1, values.shape[-1])
    group = starts.reshape(-1).long().cumsum(0) - 1
    slots = int(group[-1]) + 1
    size = torch.bincount(group, minlength=slots)
    pivot = _pivots(group, slots, None if mass is None else mass.reshape(-1))
    slot_keys, slot_values = flat_keys[pivot], flat_values[pivot]

    members = (size > 1)[group].nonzero().squeeze(1)
    if combination.weights != "pivot" and members.numel():
        # Only members of true sets are touched: singletons stay exactly as they were.
        merged = (size > 1).nonzero().squeeze(1)
        index = torch.empty_like(size)
        index[merged] = torch.arange(merged.numel(), device=size.device)
        owner = index[group[members]]
        member_keys, member_values = flat_keys[members].float(), flat_values[members].float()
        if combination.weights == "attention":
            kernel = _measured(mass).reshape(-1)[members].clamp_min(1e-20)
        else:
            kernel = _kernel(member_keys, flat_keys[pivot[merged]].float(), owner, size[merged], combination)
        weight = kernel / _sum_by(owner, kernel, merged.numel())[owner]
        new_values = _sum_by(owner, member_values * weight[:, None], merged.numel())
        if combination.scale_values:
            new_values *= size[merged, None]
        slot_values[merged] = new_values.to(values.dtype)
        if not combination.keep_pivot_key:
            new_keys = _sum_by(owner, member_keys * weight[:, None], merged.numel())
            slot_keys[merged] = new_keys.to(keys.dtype)

    bias = torch.zeros(slots, device=keys.device)
    if combination.bias == "count":
        bias = size.float().log()
    elif combination.bias == "attention":
        share = _measured(mass).reshape(-1).clamp_min(1e-20)
        # Slots of one token get exactly 0.
        bias = torch.where(size > 1, (_sum_by(group, share, slots) / share[pivot]).log(), bias)
    return Slots(slot_keys, slot_values, bias, starts.sum(-1).reshape(-1).tolist())


def _kernel(keys: Tensor, pivot_keys: Tensor, owner: Tensor, size: Tensor, combination: Combination) -> Tensor:
    """Unnormalised weights of the members: `keys` `(members, head_dim)`, `owner` `(members,)` the set of each."""
    if combination.weights == "average":
        return torch.ones(len(keys), device=keys.device)
    squared = (keys - pivot_keys[owner]).square().sum(-1)
    if combination.sigma == "rms":
        variance = _sum_by(owner, squared, size.numel()) / size
    elif combination.sigma == "mean":
        variance = (_sum_by(owner, squared.sqrt(), size.numel()) / size).square()
    else:
        variance = squared.new_full((size.numel(),), float(combination.sigma) ** 2)
    # A set of equal keys has variance 0 and distances 0: the floor makes its weights equal instead of NaN.
    return torch.exp(-squared / (2 * variance.clamp_min(1e-20))[owner])


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


def append_slots(old: Slots, new: Slots) -> Slots:
    """Put each head's new slots after its old ones."""

    def interleave(first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first.split(old.lengths), second.split(new.lengths), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])

    return Slots(
        interleave(old.keys, new.keys),
        interleave(old.values, new.values),
        interleave(old.bias, new.bias),
        [first + second for first, second in zip(old.lengths, new.lengths, strict=True)],
    )


def select_rows(slots: Slots, rows: list[int], kv_heads: int) -> Slots:
    """Take the slots of the batch rows `rows`, in that order."""
    heads = [row * kv_heads + head for row in rows for head in range(kv_heads)]

    def take(source: Tensor) -> Tensor:
        pieces = source.split(slots.lengths)
        return torch.cat([pieces[head] for head in heads])

    return Slots(take(slots.keys), take(slots.values), take(slots.bias), [slots.lengths[head] for head in heads])
