"""Masks for caches whose heads hold different numbers of slots.

transformers builds one mask per forward, sized from the first full-attention layer; no such tensor can describe ragged
heads. Our caches answer `get_mask_sizes` with a `LogicalLength`, and the mask function registered beside our attention
then keeps the recipe instead of a tensor. Any other cache gets the stock mask at once.
"""

import copy
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
        # None: where transformers builds the mask. The rest is shared by the recipes of all devices.
        self._device: torch.device | None = None
        self._masks: dict[torch.device | None, torch.Tensor | None] = {}
        self._paddings: list[list[int]] = []

    def stock(self) -> torch.Tensor | None:
        """The mask the stock attention of this implementation would get: built once, and copied once to every device."""
        if None not in self._masks:
            self._masks[None] = ALL_MASK_ATTENTION_FUNCTIONS[self._implementation](**self._arguments)
        if self._device not in self._masks:
            built = self._masks[None]
            self._masks[self._device] = None if built is None else built.to(self._device)
        return self._masks[self._device]

    def padding(self) -> list[int]:
        """Tokens of padding before the text of every batch row.

        Raises KVProfileError where the mask is anything but causal attention to texts padded on the left.
        """
        if not self._paddings:
            self._paddings.append(self._left_padding())
        return self._paddings[0]

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
        # One question to the device for both: is any token hidden after the text has begun, and how many are before it.
        ends = (mask[:, 1:] < mask[:, :-1]).any()[None]
        found: list[int] = torch.cat([ends, (~mask).sum(-1)]).tolist()
        if found[0]:
            raise KVProfileError(
                "attention_mask hides tokens after the text has begun, and a merged cache takes padding on the left only; "
                "set tokenizer.padding_side = 'left', or run the prompts one by one"
            )
        return found[1:]

    def to(self, device: Any = None, *_args: Any, **_options: Any) -> "MaskRecipe":
        """The same mask for a layer on another device: accelerate moves every argument of a layer with `.to`."""
        if device is None or isinstance(device, torch.dtype):
            return self
        moved = copy.copy(self)
        moved._device = torch.device(device)
        return moved


def mask_function(implementation: str) -> Callable[..., "MaskRecipe | torch.Tensor | None"]:
    """Build the mask function to register beside an attention that falls back on the stock `implementation`."""

    def build(**arguments: Any) -> "MaskRecipe | torch.Tensor | None":
        if isinstance(arguments["kv_length"], LogicalLength):
            return MaskRecipe(implementation, arguments)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)

    return build
