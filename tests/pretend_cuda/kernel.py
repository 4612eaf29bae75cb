"""A stand-in for `torch.nn.attention.varlen.varlen_attn`: its contract, checked, one sequence at a time in float32."""

from typing import Any

import torch
from torch import Tensor

from tests.pretend_cuda.tensor import PretendTensor

LARGEST = 256


def varlen_attn(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """See torch. Nothing to see gives zeros, and a log-sum-exp of +inf."""
    parts = [query, key, value, cu_seq_q, cu_seq_k] + ([] if seqused_k is None else [seqused_k])
    _check(parts, max_q, max_k)
    places = {part.place for part in parts}
    query, key, value, query_ends, key_ends = (part.inner for part in parts[:5])
    lengths = (key_ends.diff() if seqused_k is None else seqused_k.inner).tolist()
    if PretendTensor.watcher is not None:
        PretendTensor.watcher.launched("varlen_attn")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = torch.zeros_like(query)
    total = torch.full((query.shape[1], query.shape[0]), torch.inf)
    for sequence, length in enumerate(lengths):
        first, last = query_ends[sequence : sequence + 2].tolist()
        begin, end = key_ends[sequence : sequence + 2].tolist()
        if last - first > max_q or length > max_k or length > end - begin:
            raise ValueError(f"sequence {sequence}: {last - first} queries of {max_q}, {length} keys of {max_k}")
        if not length:
            continue
        seen = slice(begin, begin + length)
        logits = torch.einsum("qhd,khd->hqk", query[first:last].float(), key[seen].float()) * scale
        total[:, first:last] = logits.logsumexp(-1)
        output[first:last] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[seen].float()).to(query.dtype)
    place = places.pop()
    shown = PretendTensor(output, place)
    return (shown, PretendTensor(total, place)) if return_aux is not None and return_aux.lse else shown


def _check(parts: list[Tensor], max_q: Any, max_k: Any) -> None:
    """Raise ValueError where the kernel would refuse its arguments."""
    query, key, value = parts[:3]
    if not all(isinstance(part, PretendTensor) for part in parts) or len({part.place for part in parts}) > 1:
        raise ValueError(f"all tensors must be on one CUDA device, got {[str(part.device) for part in parts]}")
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"half precision of one kind, got {query.dtype}, {key.dtype}, {value.dtype}")
    if any(part.dtype != torch.int32 for part in parts[3:]):
        raise ValueError(f"lengths must be int32, got {[part.dtype for part in parts[3:]]}")
    dims = query.shape[-1]
    if dims % 8 or dims > LARGEST or not dims == key.shape[-1] == value.shape[-1]:
        raise ValueError(f"head dimensions must be equal multiples of 8 up to {LARGEST}, got {dims}, {key.shape[-1]}")
    if not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous()):
        raise ValueError("query, key and value must be contiguous")
    if type(max_q) is not int or type(max_k) is not int:
        raise ValueError(f"the largest lengths are Python numbers, got {type(max_q)}, {type(max_k)}")
