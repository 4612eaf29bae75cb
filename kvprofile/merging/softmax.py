"""The facts of one layer's softmax, as one value."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """What a layer does to the products of queries and keys before it exponentiates them, and what joins them.

    scaling: what they are multiplied by. softcap: then capped to it by a hyperbolic tangent, where the model has one (Gemma 2).
    sinks `(heads,)`: logits that join the softmax and stand for no token, where the model has them (GPT-OSS).
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def cap_(self, logits: Tensor) -> Tensor:
        """Cap scaled products in place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
