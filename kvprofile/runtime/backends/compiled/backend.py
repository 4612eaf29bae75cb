"""The back end: a plan for every layer, kept until its slots move, and one call of the kernel a step."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.runtime.backends.compiled.formats import format_of
from kvprofile.runtime.backends.compiled.plan import Plan
from kvprofile.runtime.backends.compiled.threads import room_for, threads
from kvprofile.runtime.backends.contract import Asked, Facts, Pieces, Recent

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf

_compiling = threading.Lock()
INSTEAD = "pip install 'kvprofile[fast]' decodes faster on CPUs"


def unfit(facts: Facts) -> str | None:
    """Why the kernel cannot serve a shelf, in a clause; None if it can."""
    if facts.device.type != "cpu":
        return "compiled code is the CPU's"
    for codec in facts.codecs:
        if format_of(codec, facts.dtype) is None:
            return f"compiled code does not read {codec} slots of a {str(facts.dtype).removeprefix('torch.')} model"
    return missing()


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there is no compiled code here, in a clause; None if there is."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return INSTEAD if isinstance(error, ModuleNotFoundError) else f"numba cannot be loaded: {error}"
    return None


def _address() -> int:
    """Of the compiled kernel. One thread compiles it, the others wait."""
    with _compiling:
        return _compiled()


@lru_cache(maxsize=1)
def _compiled() -> int:
    """The first call on a machine compiles, and keeps the result on disk."""
    from kvprofile.runtime.backends.compiled.kernel import compiled

    try:
        return compiled(cache=True).address
    except RuntimeError:  # no folder that numba may write to
        return compiled(cache=False).address


def attend_slots(asked: Asked, shelf: "Shelf") -> Pieces:
    """See `contract.Backend`; for layers of which another back end serves a part."""
    plan = _plan([shelf], asked, with_tail=False)
    room, address = room_for(plan.piece_floats + plan.scratch_floats)
    plan.run(_address(), asked, {"pieces": address, "scratch": address + 4 * plan.piece_floats})
    count = asked.query.shape[1]
    pieces = torch.from_numpy(room[: plan.piece_floats]).view(plan.items, -1)
    tops, totals, sums = pieces.split([count, count, count * plan.value_dim], -1)
    output = sums.unflatten(-1, (count, -1)) / totals.unsqueeze(-1)
    return Pieces(shelf.output(output), (tops + totals.log()).unsqueeze(-1), torch.tensor(plan.owner))


def attend_layer(asked: Asked, shelves: "Sequence[Shelf]", recent: Recent, mass: bool) -> tuple[Tensor, Tensor | None]:
    """See `contract.Backend.whole`. Half-precision inputs are multiplied in float32."""
    plan = _plan(shelves, asked, with_tail=True)
    keys, values, sinks = _dense(recent.keys), _dense(recent.values), asked.softmax.sinks
    batch, kv_heads, tail, _ = keys.shape
    rows, count = asked.query.shape[:2]
    output = torch.empty(batch, asked.queries, rows * count // (batch * asked.queries), plan.value_dim)
    received = torch.empty(batch, kv_heads, tail) if mass else None
    _, room = room_for(plan.piece_floats + plan.scratch_floats + rows * count * tail)
    numbers = {
        "kv_heads": kv_heads,
        "tail": tail,
        "output": output.data_ptr(),
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "pieces": room,
        "scratch": room + 4 * plan.piece_floats,
        "weights": room + 4 * (plan.piece_floats + plan.scratch_floats),
    }
    numbers["key_row"], numbers["key_head"], numbers["key_token"], _ = keys.stride()
    numbers["value_row"], numbers["value_head"], numbers["value_token"], _ = values.stride()
    if received is not None:
        numbers["mass"] = received.data_ptr()
    if recent.unused is not None:
        unused = torch.tensor(recent.unused)
        numbers["unused"] = unused.data_ptr()
    if sinks is not None:
        sinks = sinks.float().contiguous()
        numbers["sinks"] = sinks.data_ptr()
    plan.run(_address(), asked, numbers)
    return output.to(recent.values.dtype), received


def _dense(vectors: Tensor) -> Tensor:
    """With the elements of a vector beside one another."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _plan(shelves: "Sequence[Shelf]", asked: Asked, with_tail: bool) -> Plan:
    """The layer's plan, made anew where it does not hold."""
    plan, wanted = shelves[0].plan, (asked.query.shape[1], threads(), with_tail)
    if plan is None or not plan.holds(shelves, *wanted):
        shelves[0].plan = plan = Plan(shelves, *wanted)
    return plan
