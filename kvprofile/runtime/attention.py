"""The attention function that sees a layer's cache: stock attention until something is merged, ragged attention after.

`CacheLayer.update` marks the key tensor it returns with the layer itself, and the attention function finds the layer on
that tensor. The mark lives only as long as the tensor: nothing is kept per thread or per model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprofile.errors import KVProfileError
from kvprofile.merging.softmax import Softmax
from kvprofile.runtime.masks import MaskRecipe
from kvprofile.runtime.rotary import Rotary, rotary_of

MARK = "kvprofile_layer"


class UnmarkedKeysError(KVProfileError):
    """A layer attends to keys that did not come from the cache, so nothing is known of its slots."""


class AttendedLayer(Protocol):
    """What the attention function needs of a cache layer."""

    def check(self, call: "AttentionCall") -> None:
        """Raise KVProfileError where attending to the layer would silently give wrong numbers."""

    def attend(self, call: "AttentionCall") -> tuple[Tensor, Tensor | None] | None:
        """Where the layer attends in its own way, the output and the attention the tail received; None: the stock way.

        The output is `(batch, queries, heads, value_dim)`.
        """

    def attended(self, call: "AttentionCall", output: Tensor, tail_mass: Tensor | None) -> None:
        """Take note that the layer's attention is done; this is where merging and measuring happen."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention as it happened: post-RoPE query, key and value, and how they were used.

    `query` is `(batch, heads, queries, head_dim)`, `key` and `value` `(batch, kv_heads, tokens, head_dim)`; for a merged
    layer key and value are those of the unmerged tail. `options` are the keywords the model passed. rotary: how its queries
    are turned on to later positions, where that is known.
    """

    module: torch.nn.Module | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    rotary: Rotary | None = None

    def remembered(self) -> "AttentionCall":
        """What was asked, without what belongs to the model."""
        return AttentionCall(None, self.query, self.key, self.value, None, self.options, self.rotary)

    @cached_property
    def softmax(self) -> Softmax:
        """What the model does to products of queries and keys, in transformers' keywords."""
        scaling = self.options.get("scaling")
        scaling = self.query.shape[-1] ** -0.5 if scaling is None else scaling
        return Softmax(scaling, self.options.get("softcap"), self.options.get("s_aux"))

    def check_gradients(self) -> None:
        """Raise KVProfileError where a gradient is asked for that would miss what the cache holds."""
        if torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad or self.value.requires_grad):
            raise KVProfileError(
                "a merged cache is for inference and passes no gradient; run the model under torch.no_grad(), or train without "
                "the cache"
            )

    def check_supported(self) -> None:
        """Raise KVProfileError where merging would silently give wrong numbers."""
        if not isinstance(self.mask, MaskRecipe):
            raise KVProfileError(
                "a merged cache cannot follow a custom 4D attention mask; pass a 2D attention_mask, or none"
            )
        self.check_inference()

    def check_inference(self) -> None:
        """Raise KVProfileError where the model adds what a merged cache does not know of, or leaves something out at random."""
        if self.options.get("position_bias") is not None:
            raise KVProfileError(
                "this model's attention adds a position bias, which a merged cache does not support; generate with the stock "
                "cache"
            )
        if self.options.get("dropout") or _drops(self.module):
            raise KVProfileError("a merged cache is for inference, and this model is in training; call model.eval()")


def _drops(module: torch.nn.Module | None) -> bool:
    """Whether the model leaves something out at random now, as far as its configuration or the module's own parts say.

    Attention's own dropout comes with the call; this is layerdrop, dropout of hidden states, and that of adapters.
    """
    if module is None or not module.training:
        return False
    own = any(isinstance(part, torch.nn.Dropout) and part.p for part in module.modules())
    settings = vars(module.config).items() if hasattr(module, "config") else ()
    return own or any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings)


def _stock_attention(implementation: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    # Eager attention is a plain function of each modelling file, not a registered one.
    for ancestor in type(module).__mro__:
        function = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise KVProfileError(
        f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'"
    )


def attention_function(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Build the attention function to register beside the stock `implementation` it falls back on."""

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: AttendedLayer | None = getattr(key, MARK, None)
        call = AttentionCall(module, query, key, value, attention_mask, options, rotary_of(module))
        if layer is not None:
            layer.check(call)
            own = layer.attend(call)
            if own is not None:
                layer.attended(call, *own)
                return own[0], None
        elif isinstance(attention_mask, MaskRecipe):
            # Stock attention would see the tail alone, without a word.
            raise UnmarkedKeysError(
                f"{type(module).__name__} attends to keys that no cache holds: over several devices, keys that layers share "
                "are copied; put the model on one device, or use the stock cache"
            )
        mask = attention_mask.stock() if isinstance(attention_mask, MaskRecipe) else attention_mask
        result = _stock_attention(implementation, module)(module, query, key, value, mask, **options)
        if layer is not None:
            layer.attended(call, result[0], None)
        return result

    return attention
