"""The attention function that sees a layer's cache: stock attention until something is merged, ragged attention after.

`CacheLayer.update` marks the key tensor it returns with the layer itself, and the attention function finds the layer on
that tensor. The mark lives only as long as the tensor: nothing is kept per thread or per model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprofile.errors import KVProfileError
from kvprofile.merging.combine import Slots
from kvprofile.runtime.masks import MaskRecipe, mask_function

MARK = "kvprofile_layer"
# transformers treats names that contain "flash", "sdpa" or "flex_attention" specially; ours contain none of them.
_ATTACHED = "_kvprofile_attached"
IMPLEMENTATIONS = {"sdpa": "kvprofile", "eager": "kvprofile_plain"}


class AttendedLayer(Protocol):
    """What the attention function needs of a cache layer."""

    slots: Slots | None

    def check(self, call: "AttentionCall") -> None:
        """Raise KVProfileError where attending to the layer's slots would silently give wrong numbers."""

    def attended(self, call: "AttentionCall", output: Tensor, tail_mass: Tensor | None) -> None:
        """Take note that the layer's attention is done; this is where merging and measuring happen.

        `output` is `(batch, queries, heads, value_dim)`; `tail_mass` the attention the tail received, where known.
        """


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention as it happened: post-RoPE query, key and value, and how they were used.

    `query` is `(batch, heads, queries, head_dim)`, `key` and `value` `(batch, kv_heads, tokens, head_dim)`; for a merged
    layer key and value are those of the unmerged tail. `options` are the keywords the model passed.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        """What the logits are multiplied by."""
        scaling = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def softcap(self) -> float | None:
        """The logits' soft cap, where the model has one."""
        return self.options.get("softcap")

    def check_supported(self) -> None:
        """Raise KVProfileError where merging would silently give wrong numbers."""
        if not isinstance(self.mask, MaskRecipe):
            raise KVProfileError(
                "a merged cache cannot follow a custom 4D attention mask; pass a 2D attention_mask, or none"
            )
        if not self.mask.is_causal():
            raise KVProfileError(
                "a merged cache does not support padded batches or special masks yet; run the prompts one by one or in "
                "batches of equal length"
            )
        unsupported = [name for name in ("s_aux", "position_bias") if self.options.get(name) is not None]
        if unsupported:
            raise KVProfileError(
                f"this model's attention uses {', '.join(unsupported)}, which a merged cache does not support yet; "
                "generate with the stock cache"
            )


def ragged_attention(call: AttentionCall, slots: Slots, *, query_block: int = 512) -> tuple[Tensor, Tensor]:
    """Attention over the merged slots and the unmerged tail under one softmax.

    Two products per batch row and KV head, nothing padded and nothing copied. Returns the output
    `(batch, queries, heads, value_dim)` and the attention mass the tail received, `(batch, kv_heads, tail)` float32.
    """
    batch, heads, queries, head_dim = call.query.shape
    kv_heads, tail = call.key.shape[1], call.key.shape[2]
    group = heads // kv_heads
    output = call.query.new_empty(batch, kv_heads, group, queries, call.value.shape[-1])
    mass = torch.zeros(batch, kv_heads, tail, device=call.query.device)
    grouped = call.query.reshape(batch, kv_heads, group, queries, head_dim)
    positions = torch.arange(tail, device=call.query.device)
    for low in range(0, queries, query_block):
        high = min(queries, low + query_block)
        # The newest query sees the whole tail: query q sees the tail up to position q + tail - queries.
        hidden = None
        if queries > 1:
            newest = torch.arange(low, high, device=call.query.device) + (tail - queries)
            hidden = (positions[None, :] > newest[:, None]).repeat(group, 1)
        end = 0
        for row in range(batch):
            for head in range(kv_heads):
                begin, end = end, end + slots.lengths[row * kv_heads + head]
                chosen = grouped[row, head, :, low:high].reshape(-1, head_dim)
                old = _logits(chosen, slots.keys[begin:end], call) + slots.bias[begin:end]
                new = _logits(chosen, call.key[row, head], call)
                if hidden is not None:
                    new = new.masked_fill(hidden, -torch.inf)
                weights = torch.softmax(torch.cat([old, new], dim=-1), dim=-1)
                merged, recent = weights.split([end - begin, tail], dim=-1)
                mass[row, head] += recent.sum(0)
                result = merged.to(call.value.dtype) @ slots.values[begin:end]
                result += recent.to(call.value.dtype) @ call.value[row, head]
                output[row, head, :, low:high] = result.view(group, high - low, -1)
    return output.flatten(1, 2).transpose(1, 2).contiguous(), mass


def _logits(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    logits = (query @ key.T).float() * call.scaling
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


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


def _attention_function(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: AttendedLayer | None = getattr(key, MARK, None)
        call = AttentionCall(module, query, key, value, attention_mask, options) if layer is not None else None
        if layer is not None and call is not None and layer.slots is not None:
            layer.check(call)
            output, mass = ragged_attention(call, layer.slots)
            layer.attended(call, output, mass)
            return output, None
        mask = attention_mask.stock() if isinstance(attention_mask, MaskRecipe) else attention_mask
        result = _stock_attention(implementation, module)(module, query, key, value, mask, **options)
        if layer is not None and call is not None:
            layer.attended(call, result[0], None)
        return result

    return attention


def install(model: PreTrainedModel) -> None:
    """Switch the model to our attention; `restore` undoes it. Calls nest: the last `restore` gives the model back.

    Raises KVProfileError where the model's implementation has no counterpart of ours.
    """
    if not model._can_set_attn_implementation():
        raise KVProfileError(
            f"{type(model).__name__} does not use transformers' attention interface, so its keys cannot be reached; "
            "kvprofile supports models whose attention implementation can be switched"
        )
    attached: list[str] = model.__dict__.setdefault(_ATTACHED, [])
    previous = model.config._attn_implementation
    if previous not in IMPLEMENTATIONS.values():
        if previous not in IMPLEMENTATIONS:
            raise KVProfileError(
                f"the model uses the attention implementation {previous!r}; load it with attn_implementation='sdpa' or "
                "'eager'"
            )
        name = IMPLEMENTATIONS[previous]
        AttentionInterface.register(name, _attention_function(previous))
        AttentionMaskInterface.register(name, mask_function(previous))
        model.set_attn_implementation(name)
    attached.append(previous)


def restore(model: PreTrainedModel) -> None:
    """Undo one `install`. The implementation the model had is the one the first `install` found."""
    attached: list[str] = model.__dict__[_ATTACHED]
    own = attached[0]
    attached.pop()
    if not attached:
        model.set_attn_implementation(own)
