"""Any device, a few queries at a time: one product over many blocks of slots, each block a piece under its own softmax.

Nothing is padded but a head's last block, and nothing is copied but logits. The queries of a group share one read of their
head's keys and values. Slots that are not float32 are read a bounded number of blocks at a time.
"""

from typing import TYPE_CHECKING

import torch

from kvprofile.runtime.backends.contract import Asked, Pieces

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf

FEW = 16  # queries of a head, those of its group together, up to which one product over all blocks is faster
NUMBERS = 1 << 20  # of keys in float32 at a time on a CPU; in smaller pieces a step takes longer
NUMBERS_ON_GPU = 1 << 24  # elsewhere, where small products leave the device idle


def blockwise_attention(asked: Asked, shelf: "Shelf") -> Pieces:
    """See `contract.Backend`. Half-precision inputs are multiplied in float32."""
    if shelf.ready:
        return _pieces(asked, shelf, None)
    blocks = shelf.blocks
    most = NUMBERS if blocks.owner.device.type == "cpu" else NUMBERS_ON_GPU
    number, step = len(blocks.owner), max(1, most // (blocks.size * shelf.facts.head_dim))
    if number <= step:
        return _pieces(asked, shelf, None)
    found = [_pieces(asked, shelf, slice(low, low + step)) for low in range(0, number, step)]
    parts = ([getattr(one, name) for one in found] for name in ("output", "log_sum_exp", "owner"))
    return Pieces(*(torch.cat(part) for part in parts))


def _pieces(asked: Asked, shelf: "Shelf", part: slice | None) -> Pieces:
    """A piece of every block, or of a part of them."""
    owner = shelf.blocks.owner if part is None else shelf.blocks.owner[part]
    query = shelf.queries(asked).index_select(0, owner)
    keys, bias, shift = shelf.keys(part).mT, shelf.bias(part).unsqueeze(1), shelf.shift(asked)
    if asked.softmax.softcap is None and shift is None:
        logits = torch.baddbmm(bias, query, keys)
    else:
        logits = torch.bmm(query, keys)
        if shift is not None:
            logits.add_(shift.index_select(0, owner))
        asked.softmax.cap_(logits).add_(bias)
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    output = torch.bmm(logits.div_(total), shelf.values(part))
    return Pieces(shelf.output(output), largest.add_(total.log_()), owner)
