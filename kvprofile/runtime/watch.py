"""What an attached model looks at before it runs with a merged cache: calls that would go wrong without a word are refused.

Both functions are put on the model when a merger is attached and taken off by the last detach. Neither holds the model, so that
a copy of it is not tied to the original.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache

# transformers treats names that contain "flash", "sdpa" or "flex_attention" specially; ours contain none of them.
IMPLEMENTATIONS = {"sdpa": "kvprofile", "eager": "kvprofile_plain"}
_PREPARE = "prepare_inputs_for_generation"
_MARK = "kvprofile_watching"


def watch(model: PreTrainedModel) -> None:
    """Look at every forward and every step of `generate` from now on."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    if _PREPARE not in model.__dict__ and hasattr(model, _PREPARE):
        model.__dict__[_PREPARE] = MethodType(_watching(getattr(type(model), _PREPARE)), model)


def unwatch(model: PreTrainedModel) -> None:
    """Undo `watch`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _before_forward]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    if getattr(model.__dict__.get(_PREPARE), _MARK, False):
        del model.__dict__[_PREPARE]


def refuse_compiled(model: PreTrainedModel) -> None:
    """Raise KVProfileError if the model is compiled, in any of the ways torch offers."""
    wrapped = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if wrapped or hasattr(model.forward, "_torchdynamo_orig_callable"):
        raise KVProfileError(
            "the model is compiled, and a merged cache changes its shapes as it merges; attach to and generate with the model "
            "as it was before torch.compile"
        )


def _before_forward(model: PreTrainedModel, _args: Any, options: dict[str, Any]) -> None:
    cache = options.get("past_key_values")
    if not isinstance(cache, MergedCache):
        return
    refuse_compiled(model)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if cache.attachment.active and implementation not in IMPLEMENTATIONS.values():
        raise KVProfileError(
            f"the model's attention was switched to {implementation!r} after it was attached; detach, switch, attach again and "
            "start with a new merger.cache()"
        )
    if options.get("use_cache") is False:
        raise KVProfileError(
            "use_cache=False was passed beside a merged cache, which would store the whole text again at every step; leave "
            "use_cache out, or pass no cache"
        )
    weights = options.get("output_attentions")
    if (model.config.output_attentions if weights is None else weights) and cache.merges:
        raise KVProfileError(
            "output_attentions was asked for, and a merged cache has no weights of single tokens to give; leave it out, or "
            "use the stock cache"
        )


def _watching(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """What a class prepares for every step of `generate`, its ids noted before; `generate` reads its signature."""

    @wraps(prepare)
    def watched(model: Any, input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if isinstance(cache, MergedCache):
            refuse_compiled(model)
            ids = None if options.get("inputs_embeds") is not None else input_ids
            cache.follow(
                ids,
                new=options.get("next_sequence_length"),
                positions=options.get("position_ids"),
                begins=bool(options.get("is_first_iteration")),
            )
        return prepare(model, input_ids, *arguments, **options)

    setattr(watched, _MARK, True)
    return watched
