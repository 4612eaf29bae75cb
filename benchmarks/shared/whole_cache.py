"""Rivals that keep every token, in fewer bits: the stock cache as each of them reads it, and the bytes it takes.

A rival is given a filled stock cache `(batch, kv_heads, tokens, dim)` and returns a cache to read from that holds what would
be read back, with the bytes it would take in a 16-bit model: codes, scales, offsets, and the tokens that stay in 16 bits. Those
are the first 4 and the newest 32 for every rival but transformers' own, whatever its paper says of them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache

from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS

FIRST, NEWEST = 4, 32  # tokens in 16 bits
GROUP = 32

Half = Callable[[Tensor], tuple[Tensor, float]]
"""Keys or values `(batch, heads, tokens, dim)` to what is read instead, and the bytes they take."""


@dataclass(frozen=True)
class Rival:
    """A name, the settings that decide its numbers (JSON values), and what it makes of a filled stock cache."""

    name: str
    settings: Any
    hold: Callable[[DynamicCache], tuple[Cache, float]]


def by_codec(name: str, mean: Tensor | None = None) -> Half:
    """A codec of kvprofile's; `mean` `(heads, dim)` is taken off before."""
    codec = CODECS[name]

    def read(vectors: Tensor) -> tuple[Tensor, float]:
        dim = vectors.shape[-1]
        own = None if mean is None else mean[:, None]
        found = codec.decode(codec.encode(vectors, own), dim, own)
        found = turn_back(found) if codec.rotated else found
        return found.to(vectors.dtype), vectors[..., 0].numel() * codec.nbytes(dim)

    return read


def symmetric8(vectors: Tensor) -> tuple[Tensor, float]:
    """int8 with one scale a token and head, as serving engines have it."""
    scale = (vectors.abs().amax(-1, keepdim=True) / 127).half().clamp_min(1e-7).float()
    found = (vectors / scale).round().clamp(-127, 127) * scale
    return found.to(vectors.dtype), vectors.numel() + 2 * scale.numel()


def fp8_per_tensor(vectors: Tensor) -> tuple[Tensor, float]:
    """E4M3 with one scale for all keys or all values of a layer, as serving engines have it."""
    scale = vectors.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
    found = (vectors / scale).to(torch.float8_e4m3fn).float() * scale
    return found.to(vectors.dtype), vectors.numel() + 4


def fp8_per_token(vectors: Tensor) -> tuple[Tensor, float]:
    """E4M3 with one scale a token and head."""
    scale = (vectors.abs().amax(-1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max).clamp_min(1e-30)
    found = (vectors / scale).to(torch.float8_e4m3fn).float() * scale
    return found.to(vectors.dtype), vectors.numel() + 2 * scale.numel()


def per_token(bits: int) -> Half:
    """KIVI's values (arXiv 2402.02750): a scale and an offset for every 32 channels of a token."""

    def read(vectors: Tensor) -> tuple[Tensor, float]:
        found = _asymmetric(vectors.unflatten(-1, (-1, GROUP)), bits, -1).flatten(-2)
        return found.to(vectors.dtype), vectors.numel() * (bits / 8 + 4 / GROUP)

    return read


def per_channel(bits: int) -> Half:
    """KIVI's keys: a scale and an offset for every channel of 32 tokens; tokens that fill no group stay in 16 bits."""

    def read(vectors: Tensor) -> tuple[Tensor, float]:
        whole = vectors.shape[2] // GROUP * GROUP
        grouped, rest = vectors[:, :, :whole], vectors[:, :, whole:]
        found = _asymmetric(grouped.unflatten(2, (-1, GROUP)), bits, 3).flatten(2, 3).to(vectors.dtype)
        size = grouped.numel() * (bits / 8 + 4 / GROUP) + 2 * rest.numel()
        return torch.cat([found, rest], 2), size

    return read


def _asymmetric(groups: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of 2**bits - 1 steps between least and largest along a dimension, scale and offset in float16, read back."""
    low = groups.amin(dim, keepdim=True).half().float()
    scale = ((groups.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    return ((groups - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def halves(name: str, key: Half, value: Half, settings: Any = None) -> Rival:
    """The same for all layers."""
    return layered(name, lambda _layer: (key, value), settings)


def layered(name: str, of_layer: Callable[[int], tuple[Half, Half]], settings: Any = None) -> Rival:
    """Keys and values of every layer by `of_layer(layer)`."""

    def hold(full: DynamicCache) -> tuple[Cache, float]:
        # Layers of their own, tensors shared: an update makes new ones. Sliding layers still know how much they have seen.
        held, size = copy.copy(full), 0.0
        held.layers = [copy.copy(layer) for layer in full.layers]
        for index, layer in enumerate(held.layers):
            pair = []
            for vectors, half in zip((layer.keys, layer.values), of_layer(index), strict=True):
                middle = slice(FIRST, vectors.shape[2] - NEWEST)
                found, taken = half(vectors[:, :, middle])
                pair.append(torch.cat([vectors[:, :, :FIRST], found, vectors[:, :, -NEWEST:]], 2))
                size += taken + 2 * (FIRST + NEWEST) * vectors[:, :, 0].numel()
            layer.keys, layer.values = pair
        return held, size

    return Rival(name, settings, hold)


def transformers_own(name: str, config: Any, backend: str, **options: Any) -> Rival:
    """The QuantizedCache of transformers. It quantises the whole prompt; the bytes are those of the tensors it then holds."""

    def hold(full: DynamicCache) -> tuple[Cache, float]:
        cache = QuantizedCache(backend, config, **options)
        for index, layer in enumerate(full.layers):
            cache.update(layer.keys, layer.values, index)
        return cache, float(sum(_bytes_of(vars(layer)) for layer in cache.layers))

    return Rival(name, {"backend": backend, **options}, hold)


def _bytes_of(held: Any) -> int:
    """Bytes of all tensors in there; floating point counts two bytes an element at most, as in a 16-bit model."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            return sum(_bytes_of(getattr(held, name)) for name in held.__tensor_flatten__()[0])
        return held.numel() * (min(2, held.itemsize) if held.is_floating_point() else held.itemsize)
    if isinstance(held, Mapping):
        return sum(map(_bytes_of, held.values()))
    return sum(map(_bytes_of, held)) if isinstance(held, list | tuple) else 0


def rivals_of(config: Any) -> list[Rival]:
    """Every rival that needs no calibration; backends of transformers that are not installed are left out."""
    made = [
        halves("int8 per token", symmetric8, symmetric8),
        halves("int8, turned", by_codec("int8"), by_codec("int8")),
        halves("fp8 e4m3 per tensor", fp8_per_tensor, fp8_per_tensor),
        halves("fp8 e4m3 per token", fp8_per_token, fp8_per_token),
        halves("fp8 e4m3, turned", by_codec("fp8-e4m3"), by_codec("fp8-e4m3")),
        halves("int6, turned", by_codec("int6"), by_codec("int6")),
        halves("K8 V4, turned", by_codec("int8"), by_codec("int4")),
        halves("int4, turned", by_codec("int4"), by_codec("int4")),
        *(halves(f"KIVI {bits}", per_channel(bits), per_token(bits)) for bits in (4, 2)),
        *(halves(f"TurboQuant {bits}", by_codec(f"turbo{bits}"), by_codec(f"turbo{bits}")) for bits in (4, 3, 2)),
        transformers_own("transformers fp8", config, "fp8"),
    ]
    for backend, axis, widths in (("quanto", 0, (4, 2)), ("hqq", 1, (8, 4, 2))):
        for bits in widths:
            options = {"nbits": bits, "axis_key": axis, "axis_value": axis, "q_group_size": 64}
            rival = transformers_own(f"transformers {backend} {bits}", config, backend, **options)
            try:
                QuantizedCache(backend, config, **options)
            except ImportError:
                continue
            made.append(rival)
    return made
