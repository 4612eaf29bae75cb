"""Any device, many queries at a time (a prompt read in pieces): every head by itself.

Here logits are what takes memory, not keys: a head's queries are taken in pieces whose logits stay in the cache of a processor.
"""

from typing import TYPE_CHECKING

import torch

from kvprofile.merging.host import sent
from kvprofile.runtime.backends.contract import Asked, Pieces

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf

LOGITS = 1 << 20  # logits alive at a time on a CPU
LOGITS_ON_GPU = 1 << 24  # elsewhere, where small products leave the device idle
LEAST = 64  # rows of a product, whatever the logits: fewer would leave its units idle


def headwise_attention(asked: Asked, shelf: "Shelf") -> Pieces:
    """See `contract.Backend`. Inputs are multiplied in float32, one head's at a time; a head is one piece."""
    lengths, rooms = shelf.blocks.lengths, shelf.blocks.rooms
    owners = [row for row, length in enumerate(lengths) if length]
    query, shift = shelf.queries(asked), shelf.shift(asked)
    output = query.new_empty(len(owners), query.shape[1], shelf.facts.value_dim)
    sums = query.new_empty(len(owners), query.shape[1], 1)
    budget = LOGITS if query.device.type == "cpu" else LOGITS_ON_GPU
    first = 0
    for place, row in enumerate(owners):
        part, held = slice(first, first + rooms[row]), lengths[row]
        first += rooms[row]
        keys, values = (read(part).flatten(0, 1)[:held] for read in (shelf.keys, shelf.values))
        bias = shelf.bias(part).flatten()[:held]
        step = max(budget // held, LEAST)
        for low in range(0, query.shape[1], step):
            here = slice(low, low + step)
            logits = query[row, here] @ keys.mT
            if shift is not None:
                logits.add_(shift[row, here])
            asked.softmax.cap_(logits).add_(bias)
            sums[place, here] = torch.logsumexp(logits, -1, keepdim=True)
            output[place, here] = torch.softmax(logits, -1, out=logits) @ values
    return Pieces(shelf.output(output), sums, sent(owners, query.device))
