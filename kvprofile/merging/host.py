"""What the host knows, brought to a device without making the host wait for it.

On CUDA a result whose size depends on numbers on the device (`nonzero`, a boolean index, `.tolist()`) makes the host wait for
all the work before it. Sizes that follow from counts known on the host need no such question.
"""

from itertools import pairwise

import torch
from torch import Tensor


def sent(numbers: list[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Python's numbers on a device. The copy is queued with the kernels that read it."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def places_of(marked: Tensor, number: int) -> Tensor:
    """Where the `number` True entries of a mask are, `(number,)`, in the order of the flattened mask."""
    flat = marked.reshape(-1)
    places = torch.zeros(number + 1, dtype=torch.long, device=flat.device)
    order = torch.where(flat, flat.cumsum(0) - 1, number)
    return places.scatter_(0, order, torch.arange(flat.numel(), device=flat.device))[:number]


def selector(indices: list[int]) -> slice | list[int]:
    """The indices as a slice where they are evenly spaced, so that selecting them is a view and no copy."""
    steps = {after - before for before, after in pairwise(indices)}
    if not indices or len(steps) > 1 or min(steps, default=1) < 1:
        return indices
    return slice(indices[0], indices[-1] + 1, steps.pop() if steps else 1)


def indexer(chosen: slice | list[int], device: torch.device) -> slice | Tensor:
    """What to index a tensor of the device with, to get what a `selector` chooses."""
    return chosen if isinstance(chosen, slice) else sent(chosen, device)


def select(tensor: Tensor, chosen: slice | list[int], dim: int) -> Tensor:
    """What a `selector` chooses of a dimension."""
    return tensor[(slice(None),) * dim + (indexer(chosen, tensor.device),)]
