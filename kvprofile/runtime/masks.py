"""Masks for caches whose heads hold different numbers of slots.

transformers builds one mask per forward, sized from the first full-attention layer; no such tensor can describe ragged
heads. Our caches answer `get_mask_sizes` with a `LogicalLength`, and the mask function registered beside our attention
then keeps the recipe instead of a tensor. Any other cache gets the stock mask at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


class LogicalLength(int):
    """A number of tokens seen (not of slots stored) that comes from one of our caches."""


class MaskRecipe:
    """The arguments of one mask, built into a tensor only where stock attention needs it."""

    def __init__(self, implementation: str, arguments: dict[str, Any]) -> None:
        self._implementation = implementation
        self._arguments = arguments
        self._stock: torch.Tensor | None = None
        self._built = False
        self._causal: bool | None = None

    def stock(self) -> torch.Tensor | None:
        """The mask the stock attention of this implementation would get."""
        if not self._built:
            self._stock = ALL_MASK_ATTENTION_FUNCTIONS[self._implementation](**self._arguments)
            self._built = True
        return self._stock

    def is_causal(self) -> bool:
        """True if every query sees every token up to its own position and nothing is padded."""
        if self._causal is None:
            padding = self._arguments.get("attention_mask")
            self._causal = (
                self._arguments.get("mask_function") is causal_mask_function
                and self._arguments.get("local_size") is None
                and (padding is None or bool(padding.all()))
            )
        return self._causal

    def to(self, *_args: Any, **_kwargs: Any) -> "MaskRecipe":
        """Stay as it is: accelerate moves every argument of a layer with `.to`."""
        return self


def mask_function(implementation: str) -> Callable[..., "MaskRecipe | torch.Tensor | None"]:
    """Build the mask function to register beside an attention that falls back on the stock `implementation`."""

    def build(**arguments: Any) -> "MaskRecipe | torch.Tensor | None":
        if isinstance(arguments["kv_length"], LogicalLength):
            return MaskRecipe(implementation, arguments)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)

    return build
