"""Ways to keep a context, plans and rivals alike, each measured on the same documents: KL from the full cache, and bytes."""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvprofile.digests import code_digest
from kvprofile.evaluate.fidelity import Trial, distance, fill, read_parts
from kvprofile.evaluate.filled import Filled
from kvprofile.evaluate.rows import Row, Store, digest, identity
from kvprofile.models.load import LoadedModel
from kvprofile.profile.profile import Profile
from kvprofile.runtime.cache import held_bytes
from kvprofile.runtime.merger import KVMerger
from shared import whole_cache
from shared.whole_cache import Rival

PARTS = ("recall", "continuation")


class Document:
    """One trial; its stock cache and what is read from it are there once they are asked for."""

    def __init__(self, loaded: LoadedModel, trial: Trial) -> None:
        self.model, self.trial = loaded.model, trial
        self.parts = (trial.recall, trial.continuation)
        self.filled = Filled(loaded.model, trial.context)

    @cached_property
    def full(self) -> DynamicCache:
        """The stock cache."""
        return fill(self.model, DynamicCache(config=self.model.config), self.trial.context)

    @cached_property
    def stock(self) -> int:
        """Its bytes in a 16-bit model."""
        return sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in self.full.layers)

    @cached_property
    def reference(self) -> list[Tensor]:
        """Log-probabilities of the parts, read from it."""
        return read_parts(self.model, self.full, self.parts)


@dataclass(frozen=True)
class Way:
    """A name, what decides its numbers (JSON values), how it is read: log-probabilities, and bytes over stock's."""

    name: str
    settings: Any
    read: Callable[[Document], tuple[list[Tensor], float]]


def of_rival(rival: Rival) -> Way:
    """A rival; its cache is made anew for every part, as not all of them can be copied."""

    def read(document: Document) -> tuple[list[Tensor], float]:
        rows, size = [], 0.0
        with torch.inference_mode():
            for part in document.parts:
                held, size = rival.hold(document.full)
                logits = document.model(part[None], past_key_values=held).logits[0]
                rows.append(logits.float().log_softmax(-1))
        return rows, size / document.stock

    # The merged runtime decides nothing for a rival: its rows stay true when that changes.
    code = code_digest(
        "kvprofile.codecs.table", "kvprofile.evaluate.fidelity", but=("kvprofile.models", "kvprofile.errors")
    )
    source = Path(whole_cache.__file__).read_text(encoding="utf-8")
    return Way(rival.name, {"name": rival.name, "settings": rival.settings, "code": code, "source": source}, read)


def of_plans(loaded: LoadedModel, plans: Mapping[str, Profile], context: Tensor) -> list[Way]:
    """Profiles by name, each run by the real runtime cache.

    The bytes are those of the plan's cache in the model's 16-bit twin, filled with `context`.
    """
    if not plans:
        return []
    twin = copy.deepcopy(loaded.model).to(torch.bfloat16)
    stock = held_bytes(fill(twin, DynamicCache(config=twin.config), context))
    filled = Filled(twin, context)
    known = identity(loaded)["code"]

    def way(name: str, profile: Profile) -> Way:
        with filled.merged(KVMerger.from_profile(profile)) as own:
            size = own.nbytes() / stock

        def read(document: Document) -> tuple[list[Tensor], float]:
            with document.filled.merged(KVMerger.from_profile(profile)) as own:
                return read_parts(document.model, own, document.parts), size

        values = profile.model_dump(mode="json")
        return Way(name, {part: values[part] for part in ("plan", "policies", "statistics")} | {"code": known}, read)

    return [way(name, profile) for name, profile in plans.items()]


def rows_of(loaded: LoadedModel, trials: Sequence[tuple[str, Trial]], ways: Sequence[Way], store: Store) -> list[Row]:
    """A row for every way and document: finished ones from the store, the others measured and stored.

    A row's `budget` is its bytes over the stock cache's, its values are `recall KL`, `continuation KL` and both top-1.
    """
    # What code decides a number, each way says itself.
    known = {name: value for name, value in identity(loaded).items() if name not in ("code", "kvprofile")}
    rows = []
    for index, (kind, trial) in enumerate(trials):
        document = Document(loaded, trial)
        for way in ways:
            key = digest(known, trial.context, *document.parts, way.settings)
            about = {"key": key, "bench": "bytes", "unit": f"{index}: {kind}", "group": kind, "method": way.name}
            row = store.take(about)
            if row is None:
                read, size = way.read(document)
                gaps = {name: distance(*pair) for name, *pair in zip(PARTS, document.reference, read, strict=True)}
                values = {f"{name} KL": gap.kl for name, gap in gaps.items()}
                values |= {f"{name} top-1": gap.top1 for name, gap in gaps.items()}
                taken = round(size * document.stock)
                row = Row(**about, budget=size, tokens=len(trial.context), slots=1.0, nbytes=taken, values=values)
                store.add(row)
                print(json.dumps({"document": index, "method": way.name, "bytes": size} | values), file=sys.stderr)
            rows.append(row)
    return rows
