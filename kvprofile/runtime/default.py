"""Gives every `generate` that was passed no cache a merged one, for callers that know nothing of kvprofile.

`GenerationMixin.generate` makes its cache in `_prepare_cache_for_generation`, whatever the decoding strategy; that method is
replaced on the model, and only there. What hands out caches is kept on the model too, and a copy of the model starts without.
"""

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache

_PREPARE = "_prepare_cache_for_generation"
_MAKERS = "_kvprofile_cache_makers"
_lock = threading.Lock()

CacheMaker = Callable[[], MergedCache]


class _Makers:
    """What hands out caches, the newest last, and the method that the model itself had of its own, if any."""

    def __init__(self, own: Callable[..., Any] | None) -> None:
        self.own = own
        self.makers: list[CacheMaker] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Makers, (self.own,)


def serve(model: PreTrainedModel, maker: CacheMaker) -> None:
    """Let `maker` hand out the caches of the model's generations, until `dismiss`. The newest maker is asked."""
    with _lock:
        if _MAKERS not in model.__dict__:
            model.__dict__[_MAKERS] = _Makers(model.__dict__.get(_PREPARE))
            model.__dict__[_PREPARE] = MethodType(_prepare_cache_for_generation, model)
        model.__dict__[_MAKERS].makers.append(maker)


def dismiss(model: PreTrainedModel, maker: CacheMaker) -> bool:
    """Undo one `serve` and return True, or False if there is none. After the last the model is as it was before the first."""
    with _lock:
        held: _Makers | None = model.__dict__.get(_MAKERS)
        if held is None or maker not in held.makers:
            return False
        held.makers.remove(maker)
        if not held.makers:
            del model.__dict__[_MAKERS], model.__dict__[_PREPARE]
            if held.own is not None:
                model.__dict__[_PREPARE] = held.own
        return True


def _prepare_cache_for_generation(
    model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
) -> None:
    """Put a merged cache where `generate` looks for one passed by the caller; bears the name of what it replaces."""
    held: _Makers | None = model.__dict__.get(_MAKERS)
    if held is None:  # another thread has just ended the last
        getattr(model, _PREPARE)(generation_config, model_kwargs, *arguments, **options)
        return
    newest = held.makers[-1:]  # none in a copy of the model
    # A model that drafts for another takes back most of what it reads: its stock cache is given up after each generation.
    if newest and model_kwargs.get("past_key_values") is None and not generation_config.is_assistant:
        _check(generation_config)
        model_kwargs["past_key_values"] = newest[0]()
    own = held.own or MethodType(getattr(type(model), _PREPARE), model)
    own(generation_config, model_kwargs, *arguments, **options)


def _check(generation_config: GenerationConfig) -> None:
    if generation_config.use_cache is False:
        raise KVProfileError(
            "use_cache=False was passed while every generation gets a merged cache; leave use_cache out, or generate "
            "outside of merger.generating()"
        )
    if generation_config.cache_implementation is not None:
        raise KVProfileError(
            f"the generation asks for cache_implementation={generation_config.cache_implementation!r} while every generation "
            "gets a merged cache; set it to None, or generate outside of merger.generating()"
        )
