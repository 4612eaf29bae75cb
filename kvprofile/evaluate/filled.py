"""A context read once and compressed by every method that is compared.

A prompt's attention is exact whatever becomes of it afterwards, so reading it once serves all methods: what the readers
asked is recorded, and every method's own cache merges from the record as it would have merged from its own forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.evaluate.fidelity import fill
from kvprofile.evaluate.methods import Method
from kvprofile.runtime.cache import MergedCache
from kvprofile.runtime.merger import KVMerger


class Filled:
    """Caches filled with the context `(tokens,)`, one for each method.

    Holds, from the first compressed cache on, the full cache and the queries of every layer.
    """

    def __init__(self, model: PreTrainedModel, context: Tensor) -> None:
        self.model = model
        self.context = context
        self.recorded: MergedCache | None = None

    @contextmanager
    def cache(self, method: Method) -> Iterator[Cache]:
        """A method's cache, filled; to be read while the block runs, in which the model is attached."""
        if method.plan is None:
            yield fill(self.model, DynamicCache(config=self.model.config), self.context)
            return
        arrays = None if method.key_mean is None else {"key_mean": method.key_mean}
        with self.merged(KVMerger.from_profile(method.plan, arrays=arrays)) as cache:
            yield cache

    @contextmanager
    def merged(self, merger: KVMerger) -> Iterator[MergedCache]:
        """The same for a merger that is not attached yet."""
        merger.attach(self.model)
        try:
            cache = merger.cache()
            if self.recorded is None:
                self.recorded = self._record(merger)
            with torch.inference_mode():
                cache.adopt(self.recorded)
            yield cache
        finally:
            merger.detach()

    def _record(self, merger: KVMerger) -> MergedCache:
        """The context read under settings that would merge every layer, with nothing merged."""
        layers = {
            index: replace(layer, share=torch.zeros_like(layer.share), exact=True)
            for index, layer in merger.settings.layers.items()
        }
        recorded = MergedCache(self.model.config, layers, merger.attachment)
        for layer in recorded.merged:
            layer.activate_past_recording()
        fill(self.model, recorded, self.context)
        return recorded
