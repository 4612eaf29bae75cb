"""Numbers that are stored once a vector, in bfloat16: it has float32's range, so that no key is too large for it or too small.

What bfloat16 lacks is digits. A scale is therefore rounded up, by less than 1%: nothing it divides leaves the range of codes.
"""

import torch
from torch import Tensor

NBYTES = 2
SMALLEST = torch.finfo(torch.bfloat16).tiny


def rounded_up(scale: Tensor) -> Tensor:
    """Scales in bfloat16, none smaller than they were and none zero, so that they divide."""
    return (scale * (1 + 2**-8)).clamp_min(SMALLEST).bfloat16()
