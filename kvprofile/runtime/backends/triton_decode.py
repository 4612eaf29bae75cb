"""CUDA, a few queries at a time: Triton kernels over slots as any codec stores them, and over a whole layer.

One launch for every shelf, over pieces of its heads' slots, and one that joins the pieces, the tail and sinks: nothing else
runs where slots are not packed. Where a head's slots begin and how many there are lies on the device, and between two merges it
is the same memory that is read and the same grid that is launched. The host never waits.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvprofile.codecs.floats import Floats
from kvprofile.codecs.integers import Integers
from kvprofile.codecs.plain import Plain
from kvprofile.codecs.table import CODECS
from kvprofile.codecs.turbo import Turbo, levels
from kvprofile.merging.host import sent
from kvprofile.merging.softmax import Softmax
from kvprofile.runtime.backends.contract import Asked, Facts, Pieces, Recent

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf

PLAIN, INTEGERS, E4M3, E5M2, LEVELS = range(5)  # how vectors are stored, as the kernels are told
MOST_ASKED = 32  # queries of a head, those of its group together: the rows of a tile
LARGEST = 256  # head dimension: with more a tile leaves the registers
NUMBERS = 8192  # of a tile of keys: slots times dimensions
PROGRAMS = 2  # for every multiprocessor, where there are slots enough
MOST = 64  # pieces of a head's slots


def unable(facts: Facts) -> str | None:
    """Why the kernels cannot serve a shelf, in a clause; None if they can."""
    if facts.device.type != "cuda":
        return "the kernel is CUDA's"
    if not installed():
        return "triton is not installed"
    if max(facts.head_dim, facts.value_dim) > LARGEST:
        return f"Triton's kernels take head dimensions up to {LARGEST}"
    if (name := next((name for name in facts.codecs if _format(name) is None), None)) is not None:
        return f"Triton's kernels do not read {name}"
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "Triton's kernels take float32, float16 and bfloat16"
    capability = torch.cuda.get_device_capability(facts.device)
    if capability < (8, 0):
        return f"Triton's kernels need capability 8.0, this is {'{}.{}'.format(*capability)}"
    return trouble(facts.device)


def installed() -> bool:
    """Whether triton can be imported; it comes with torch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=16)
def trouble(device: torch.device) -> str | None:
    """Why no kernel can be built and launched here (Triton needs a C compiler), in a clause; None if one was.

    Tried once for every device, on one key.
    """
    try:
        like = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device=device)
        asked = Asked(like[0], Softmax(1.0), 1, 1)
        _layer(asked, Recent(like, like, None), *_room(asked, 16, 0), True)
    except Exception as error:  # whatever it is, another back end serves
        return f"Triton cannot build kernels here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def triton_attention(asked: Asked, shelf: "Shelf") -> Pieces:
    """See `contract.Backend`. Every head comes in equally many pieces; those of few slots are empty."""
    rows, splits = len(asked.query), splits_of(shelf, asked)
    output, sums = _room(asked, shelf.facts.value_dim, splits)
    _slots(asked, shelf, output, sums, 0, splits)
    owner = torch.arange(rows, device=output.device).repeat_interleave(splits, output_size=rows * splits)
    return Pieces(output.flatten(0, 1), sums.flatten(0, 1).unsqueeze(-1), owner)


def triton_layer(asked: Asked, shelves: Sequence["Shelf"], recent: Recent, mass: bool) -> tuple[Tensor, Tensor | None]:
    """See `contract.Backend.whole`."""
    splits = [splits_of(shelf, asked) for shelf in shelves]
    output, sums = _room(asked, recent.values.shape[-1], sum(splits))
    first = 0
    for shelf, number in zip(shelves, splits, strict=True):
        _slots(asked, shelf, output, sums, first, number)
        first += number
    return _layer(asked, recent, output, sums, mass)


def splits_of(shelf: "Shelf", asked: Asked) -> int:
    """Into how many pieces every head's slots are split: so many that all multiprocessors have work, none too small."""
    longest, block = max(shelf.blocks.lengths), _block(shelf.facts)
    wanted = -(-PROGRAMS * _multiprocessors(asked.query.device) // len(asked.query))
    return max(1, min(MOST, wanted, longest // (2 * block)))


def _slots(asked: Asked, shelf: "Shelf", output: Tensor, sums: Tensor, first: int, splits: int) -> None:  # noqa: PLR0917
    """Attention over a shelf's slots, as the pieces `first` to `first + splits` of every row."""
    blocks, facts, device = shelf.blocks, shelf.facts, output.device
    rotated, shift = shelf.key_codec.rotated, shelf.shift(asked)
    query = shelf.queries(asked) if rotated else asked.query.contiguous()
    (key_kind, key_bits), (value_kind, value_bits) = (_known(name) for name in facts.codecs)
    launch(
        "slots_kernel",
        (len(query), splits),
        query,
        shift,
        *(blocks.keys[0], blocks.keys[-1], _levels(key_kind, key_bits, device)),
        *(blocks.values[0], blocks.values[-1], _levels(value_kind, value_bits, device)),
        blocks.bias,
        blocks.ends,
        blocks.held,
        output,
        sums,
        1.0 if rotated else asked.softmax.scaling,
        asked.softmax.softcap or 0.0,
        sums.shape[1],
        first,
        splits,
        key_width=blocks.keys[0].shape[-1],
        value_width=blocks.values[0].shape[-1],
        key_kind=key_kind,
        key_bits=key_bits,
        value_kind=value_kind,
        value_bits=value_bits,
        shifted=shift is not None,
        biased=blocks.bias is not None,
        capped=asked.softmax.softcap is not None,
        **_tile(query.shape[1], facts),
    )
    if shelf.value_codec.rotated:
        piece = slice(first, first + splits)
        output[:, piece] = shelf.output(output[:, piece])


def _layer(asked: Asked, recent: Recent, partial: Tensor, sums: Tensor, weighed: bool) -> tuple[Tensor, Tensor | None]:
    """The tail, sinks and the pieces under one softmax; see `contract.Backend.whole`."""
    keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in (recent.keys, recent.values))
    batch, kv_heads, tail, _ = keys.shape
    softmax, device = asked.softmax, keys.device
    heads = kv_heads * asked.query.shape[1] // asked.queries
    output = values.new_empty(batch, asked.queries, heads, values.shape[-1])
    mass = torch.empty(batch, kv_heads, tail, device=device) if weighed else None
    launch(
        "layer_kernel",
        (batch * kv_heads,),
        asked.query.contiguous(),
        keys,
        values,
        None if recent.unused is None else sent(recent.unused, device, torch.int32),
        softmax.sinks,
        partial,
        sums,
        output,
        mass,
        softmax.scaling,
        softmax.softcap or 0.0,
        sums.shape[1],
        tail,
        *keys.stride()[:3],
        *values.stride()[:3],
        kv_heads=kv_heads,
        queries_count=asked.queries,
        padded=recent.unused is not None,
        sunk=softmax.sinks is not None,
        capped=softmax.softcap is not None,
        weighed=weighed,
        **_tile(asked.query.shape[1], Facts(device, values.dtype, keys.shape[-1], values.shape[-1], 1, False)),
    )
    return output, mass


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel of `triton_kernels.py`."""
    from kvprofile.runtime.backends import triton_kernels

    getattr(triton_kernels, name)[grid](*arguments, **constants)


def _room(asked: Asked, value_dim: int, pieces: int) -> tuple[Tensor, Tensor]:
    """Where the pieces of every row go: means `(rows, pieces, asked, value_dim)`, log-sum-exps `(rows, pieces, asked)`."""
    rows, count = asked.query.shape[:2]
    device = asked.query.device
    return torch.empty(rows, pieces, count, value_dim, device=device), torch.empty(rows, pieces, count, device=device)


def _tile(asked: int, facts: Facts) -> dict[str, Any]:
    """What the shapes of a program's tiles are; one choice for all devices."""
    whole = facts.dtype == torch.float32
    return {
        "asked": asked,
        "dim": facts.head_dim,
        "value_dim": facts.value_dim,
        # Models in float32 get float32's products; what codecs give has no more digits than tf32.
        "precision": "ieee" if whole else "tf32",
        "rows_block": _power(asked),
        "slots_block": _block(facts),
        "dim_block": _power(facts.head_dim),
        "value_block": _power(facts.value_dim),
        "num_warps": 8 if whole or max(facts.head_dim, facts.value_dim) > 128 else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _power(number: int) -> int:
    """The least power of two that a product's sides may have and that is no less."""
    return max(16, 1 << (number - 1).bit_length())


def _block(facts: Facts) -> int:
    """Slots of a tile: half as many where they are float32, or become it."""
    plain = facts.dtype != torch.float32 and facts.codecs == ("none", "none")
    return min((NUMBERS if plain else NUMBERS // 2) // _power(max(facts.head_dim, facts.value_dim)), 64)


def _format(name: str) -> tuple[int, int] | None:
    """How a codec stores vectors, in the kernels' numbers, and the bits of its codes; None where they cannot read it."""
    codec = CODECS.get(name)
    if isinstance(codec, Plain):
        return PLAIN, 0
    if isinstance(codec, Integers):
        return INTEGERS, codec.bits
    if isinstance(codec, Floats):
        return (E4M3 if codec.dtype == torch.float8_e4m3fn else E5M2), 8
    return (LEVELS, codec.bits) if isinstance(codec, Turbo) else None


def _known(name: str) -> tuple[int, int]:
    found = _format(name)
    assert found is not None  # `unable` asks first
    return found


@lru_cache(maxsize=32)
def _levels(kind: int, bits: int, device: torch.device) -> Tensor | None:
    """The levels that TurboQuant's codes stand for."""
    if kind != LEVELS:
        return None
    with torch.inference_mode(False):
        return levels(bits).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
