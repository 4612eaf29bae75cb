"""What a back end is: attention of a layer's queries over the slots of one shelf.

Tail, padding, sinks and the attention that the tail receives are joined to it in one place, `runtime/join.py`; a back end that
can do all of that in the same kernel says so, and takes the whole layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.codecs.rotation import turn
from kvprofile.merging.softmax import Softmax

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf


@dataclass(frozen=True)
class Asked:
    """A layer's queries: of every row of the batch and KV head those of its group, one after the other.

    query `(rows, asked, head_dim)` in the model's dtype, `rows` = batch * kv_heads and `asked` = group * queries. Every query
    sees every slot. batch: rows of the batch. queries: of every head.
    """

    query: Tensor
    softmax: Softmax
    batch: int
    queries: int

    @cached_property
    def scaled(self) -> Tensor:
        """In float32, times the scaling: the product with a key is the logit, up to the soft cap."""
        return self.query.float() * self.softmax.scaling

    @cached_property
    def turned(self) -> Tensor:
        """The same, turned as the keys of codecs that turn them."""
        return turn(self.scaled)


@dataclass(frozen=True)
class Pieces:
    """Attention over some of a head's slots, each piece under a softmax of its own.

    output `(pieces, asked, value_dim)` float32, log_sum_exp `(pieces, asked, 1)` float32: the logarithm of the sum of the
    exponentials of the piece's logits, biases in. owner `(pieces,)`: the row that each piece is of. A head may come in any
    number of pieces (a block each, as flash decoding splits it), and in none if it has no slots.
    """

    output: Tensor
    log_sum_exp: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Recent:
    """A layer's unmerged tail, for back ends that take the whole layer.

    keys `(batch, kv_heads, tail, head_dim)` and values `(batch, kv_heads, tail, value_dim)` in the model's dtype, views of a
    larger store. The newest query sees all of it, query q up to position q + tail - queries. unused: of every row of the batch
    the first columns that are not tokens of its text, which nobody sees; None if there are none.
    """

    keys: Tensor
    values: Tensor
    unused: list[int] | None


@dataclass(frozen=True)
class Facts:
    """What is known of a shelf when it is made, and decides who can serve it.

    dtype: the model's own. codecs: of keys and of values, by name. group: query heads of a KV head.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    capped: bool
    codecs: tuple[str, str] = ("none", "none")


def always(_facts: Facts) -> None:
    """A back end that can serve every shelf."""


@dataclass(frozen=True)
class Backend:
    """One way to attend to a shelf.

    told: what it does, in a few words. attend: see above. unable: why it cannot serve a shelf, in a clause; None if it can.
    most: queries of a KV head up to which it is the faster, where more are left to the next; None: any number. marked: its
    slots need their bias in extra dimensions of the keys (`backends/varlen.py`); the others read such slots too. whole: where
    all shelves of a layer are its to serve, attention over them and the tail at once, with padding and sinks: what
    `join.ragged_attention` gives, the attention that the tail received only if the last argument is true.
    """

    told: str
    attend: "Callable[[Asked, Shelf], Pieces]"
    unable: Callable[[Facts], str | None] = always
    most: int | None = None
    marked: bool = False
    whole: "Callable[[Asked, Sequence[Shelf], Recent, bool], tuple[Tensor, Tensor | None]] | None" = None
