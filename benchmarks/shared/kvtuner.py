"""A rival after KVTuner (arXiv 2502.04420): bits of every layer's keys and values, chosen offline.

KVTuner measures each layer's error under every pair of precisions, keeps the good pairs and searches for a set of them that
serves a task at a mean number of bits. Here a layer's error is the KL of the model's own predictions when only that layer's
keys or only its values are read back from 8, 4 or 2 bits, on built-in text; errors are added up, and the best set at a mean
number of bits is found by a price per bit. The integers are kvprofile's: turned, which is better than KVTuner's plain ones.
"""

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

import kvprofile
from kvprofile.calibration.probes import ProbeMix, make_probe
from kvprofile.digests import code_digest
from kvprofile.evaluate.fidelity import distance, fill
from kvprofile.evaluate.rows import digest, identity
from kvprofile.models.load import LoadedModel
from shared.whole_cache import Half, Rival, by_codec, layered

BITS = (8, 4, 2)
MEAN_BITS = (6, 5, 4, 3.25)
MIX = ProbeMix(passages=8, passage_tokens=16, continuation_tokens=32)
KEYS, VALUES = range(2)


def rivals_of(loaded: LoadedModel, tokens: int, samples: int, kept: Path) -> list[Rival]:
    """A rival for every mean number of bits; what was measured is kept in a file and used again."""
    damage = _measured(loaded, tokens, samples, kept)
    made = []
    for mean in MEAN_BITS:
        chosen = choose(damage, mean)
        bits = [[BITS[place] for place in row] for row in chosen.tolist()]

        def of_layer(layer: int, bits: list[list[int]] = bits) -> tuple[Half, Half]:
            key, value = bits[layer]
            return by_codec(f"int{key}"), by_codec(f"int{value}")

        made.append(layered(f"KVTuner-like, {mean:g} bits", of_layer, bits))
    return made


def choose(damage: NDArray[np.floating], mean: float) -> NDArray[np.intp]:
    """Which of `BITS` every layer's keys and values get, `(layers, 2)`, from damages `(layers, 2, bits)`.

    The least sum of damages with at most `mean` bits, of those that a price per bit finds.
    """
    bits = np.array(BITS)
    low, high = 0.0, float(damage.max())
    for _ in range(100):
        price = (low + high) / 2
        chosen = (damage + price * bits).argmin(-1)
        low, high = (price, high) if bits[chosen].mean() > mean else (low, price)
    return (damage + high * bits).argmin(-1)


def _measured(loaded: LoadedModel, tokens: int, samples: int, kept: Path) -> NDArray[np.floating]:
    """Damages `(layers, 2, bits)` in nats per token, the mean over samples of built-in text."""
    blocks = kvprofile.make_samples(
        kvprofile.load_documents("builtin", seed=0),
        loaded.tokenizer,
        samples=samples,
        tokens=tokens,
        held_out=0,
        continuation=MIX.continuation_tokens,
        seed=0,
    )
    probes = [make_probe(sample.context, sample.continuation, 7, mix=MIX) for sample in blocks.calibration]
    known = {**identity(loaded), "code": code_digest("kvprofile.codecs.table"), "kvprofile": None}
    done: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    found = np.zeros((len(probes), loaded.model.config.get_text_config().num_hidden_layers, 2, len(BITS)))
    for sample, probe in enumerate(probes):
        full = fill(loaded.model, DynamicCache(config=loaded.model.config), probe.context)
        reference: Tensor | None = None
        for place in product(*map(range, found.shape[1:])):
            key = digest(known, probe.context, probe.tokens, place, BITS)
            if key not in done:
                reference = _read(loaded, full, None, probe.tokens) if reference is None else reference
                done[key] = distance(reference, _read(loaded, full, place, probe.tokens)).kl
                kept.write_text(json.dumps(done))
            found[sample][place] = done[key]
        print(f"KVTuner-like: layers measured on {sample + 1} of {len(probes)} samples", file=sys.stderr, flush=True)
    return found.mean(0)


def _read(loaded: LoadedModel, full: DynamicCache, place: tuple[int, ...] | None, tokens: Tensor) -> Tensor:
    """Log-probabilities with one layer's keys or values in fewer bits."""

    def as_they_are(vectors: Tensor) -> tuple[Tensor, float]:
        return vectors, 0.0

    def of_layer(layer: int) -> tuple[Half, Half]:
        if place is None or layer != place[0]:
            return as_they_are, as_they_are
        coded = by_codec(f"int{BITS[place[2]]}")
        return (coded, as_they_are) if place[1] == KEYS else (as_they_are, coded)

    held, _ = layered("", of_layer).hold(full)
    with torch.inference_mode():
        return loaded.model(tokens[None], past_key_values=held).logits[0].log_softmax(-1)
