"""Switches a model to our attention and back."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from kvprofile.errors import KVProfileError
from kvprofile.runtime.attention import attention_function
from kvprofile.runtime.masks import mask_function
from kvprofile.runtime.support import find_readers
from kvprofile.runtime.watch import IMPLEMENTATIONS, refuse_compiled, unwatch, watch

_INSTALLED = "_kvprofile_installed"

Readers = dict[int, list[torch.nn.Module]]


@dataclass
class _Installed:
    """What an attached model needs to become itself again."""

    times: int
    model: "weakref.ref[PreTrainedModel]"
    own: list[tuple[PretrainedConfig, str]]
    readers: Readers


def install(model: PreTrainedModel) -> Readers:
    """Switch the model to our attention; `restore` undoes it. Calls nest: the last `restore` gives the model back.

    Only the language model's own configuration is switched: vision and audio towers keep theirs. Returns, for every
    layer that can be followed, the modules that attend to its keys. Raises KVProfileError where the model cannot be followed.
    """
    installed: _Installed | None = model.__dict__.get(_INSTALLED)
    if installed is not None and installed.model() is not model:
        # A copy of an attached model: what was installed is the original's.
        _give_back(model, installed)
        installed = None
    if installed is not None:
        installed.times += 1
        return installed.readers
    _check_class(model)
    own = _switch(model)
    try:
        readers = find_readers(model)
    except BaseException:
        _switch_back(own)
        raise
    model.__dict__[_INSTALLED] = _Installed(1, weakref.ref(model), own, readers)
    watch(model)
    return readers


def restore(model: PreTrainedModel) -> None:
    """Undo one `install`; the last one leaves the model exactly as the first `install` found it."""
    installed: _Installed = model.__dict__[_INSTALLED]
    installed.times -= 1
    if not installed.times:
        _give_back(model, installed)


def _give_back(model: PreTrainedModel, installed: _Installed) -> None:
    unwatch(model)
    _switch_back(installed.own)
    del model.__dict__[_INSTALLED]


def check_kind(model: Any) -> None:
    """Raise KVProfileError unless this is a transformers model with attention heads, whose cache holds keys and values."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise KVProfileError(f"attach takes a transformers model, not {kind}; load one with kvprofile.load_model(name)")
    if not hasattr(config.get_text_config(decoder=True), "num_attention_heads"):
        raise KVProfileError(
            f"{kind} has no attention heads (a state-space or recurrent model), so there are no keys and values to merge; "
            "use it as it is"
        )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise KVProfileError(
            f"{kind} puts learned keys before every text (prompt or prefix tuning), which a merged cache cannot hold; attach "
            "to a model without it, or merge other adapters into the weights"
        )


def _check_class(model: PreTrainedModel) -> None:
    refuse_compiled(model)
    if not model._can_set_attn_implementation():
        raise KVProfileError(
            f"{type(model).__name__} does not use transformers' attention interface, so its keys cannot be reached; "
            "kvprofile supports models whose attention implementation can be switched"
        )
    if model.config.is_encoder_decoder:
        raise KVProfileError(
            f"{type(model).__name__} is an encoder-decoder; kvprofile supports decoder-only language models"
        )
    if model.training:
        raise KVProfileError("the model is in training; call model.eval() first")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise KVProfileError(
            f"the model uses the attention implementation {implementation!r}; load it with attn_implementation='sdpa' or "
            "'eager'"
        )


def _switch(model: PreTrainedModel) -> list[tuple[PretrainedConfig, str]]:
    """Give the model and its language model our counterpart of the implementation each has."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    own = [(config, config._attn_implementation) for config in configs.values()]
    for config, implementation in own:
        if implementation in IMPLEMENTATIONS:
            name = IMPLEMENTATIONS[implementation]
            AttentionInterface.register(name, attention_function(implementation))
            AttentionMaskInterface.register(name, mask_function(implementation))
            # The setter would hand the name on to the configurations of vision and audio towers.
            config._attn_implementation_internal = name
    return own


def _switch_back(own: list[tuple[PretrainedConfig, str]]) -> None:
    for config, implementation in own:
        config._attn_implementation_internal = implementation
