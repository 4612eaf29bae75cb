"""Masks for caches whose heads hold different numbers of slots.

transformers builds one mask per forward, sized from the first full-attention layer; no such tensor can describe ragged
heads. Our caches answer `get_mask_sizes` with a `LogicalLength`, and the mask function registered beside our attention
then keeps the recipe instead of a tensor. Any other cache gets the stock mask at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from kvprofile.errors import KVProfileError


class LogicalLength(int):
    """A number of tokens seen (not of slots stored) that comes from one of our caches."""


class MaskRecipe:
    """The arguments of one mask, built into a tensor only where stock attention needs it."""

    def __init__(self, implementation: str, arguments: dict[str, Any]) -> None:
        self._implementation = implementation
        self._arguments = arguments
        self._stock: torch.Tensor | None = None
        self._built = False
        self._padding: list[int] | None = None

    def stock(self) -> torch.Tensor | None:
        """The mask the stock attention of this implementation would get."""
        if not self._built:
            self._stock = ALL_MASK_ATTENTION_FUNCTIONS[self._implementation](**self._arguments)
            self._built = True
        return self._stock

    def padding(self) -> list[int]:
        """Tokens of padding before the text of every batch row.

        Raises KVProfileError where the mask is anything but causal attention to texts padded on the left.
        """
        if self._padding is None:
            self._padding = self._left_padding()
        return self._padding

    def _left_padding(self) -> list[int]:
        arguments = self._arguments
        if arguments["mask_function"] is not causal_mask_function or arguments.get("local_size") is not None:
            raise KVProfileError(
                "a merged cache knows causal attention only, and this model or call asks for another mask (packed texts, "
                "attention in both directions, ...); use the stock cache"
            )
        mask, seen = arguments["attention_mask"], int(arguments["kv_length"])
        if mask is None:
            return [0] * arguments["batch_size"]
        if mask.shape[-1] != seen:
            raise KVProfileError(
                f"attention_mask covers {mask.shape[-1]} tokens, but with these the cache has seen {seen}; pass the mask of "
                "the whole text, or start with a new merger.cache() if this is another text"
            )
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise KVProfileError(
                "attention_mask hides tokens after the text has begun, and a merged cache takes padding on the left only; "
                "set tokenizer.padding_side = 'left', or run the prompts one by one"
            )
        padding: list[int] = (~mask).sum(-1).tolist()
        return padding

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
