"""Which back end serves a shelf: the first of the table that can, or the one that was asked for by name."""

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.runtime.backends.blockwise import FEW, blockwise_attention
from kvprofile.runtime.backends.compiled.backend import attend_layer, attend_slots, unfit
from kvprofile.runtime.backends.contract import Backend, Facts
from kvprofile.runtime.backends.headwise import headwise_attention
from kvprofile.runtime.backends.triton_decode import MOST_ASKED, triton_attention, triton_layer, unable
from kvprofile.runtime.backends.varlen import unsuited, varlen_attention

# In this order. One of your own is registered under a name that begins with `x-`, and serves where it is asked for.
BACKENDS: dict[str, Backend] = {
    "triton": Backend("Triton's kernels", triton_attention, unable, most=MOST_ASKED, whole=triton_layer),
    "varlen": Backend("CUDA's variable-length kernel", varlen_attention, unsuited, marked=True),
    "compiled": Backend("compiled code", attend_slots, unfit, most=FEW, whole=attend_layer),
    "blockwise": Backend("products over blocks", blockwise_attention, most=FEW),
    "headwise": Backend("products head by head", headwise_attention),
}


def check_backend(name: str | None) -> None:
    """Raise UsageError for a name that is not in the table; None asks for no back end in particular."""
    if name is not None and name not in BACKENDS:
        raise UsageError(f"unknown back end {name!r}; expected one of {', '.join(BACKENDS)}")


def able(facts: Facts, asked_for: str | None = None) -> list[str]:
    """The back ends that can serve a shelf, the first choice first; where one is asked for, that one alone.

    Raises KVProfileError if that one cannot.
    """
    if asked_for is None:
        return [name for name, one in BACKENDS.items() if not name.startswith("x-") and one.unable(facts) is None]
    why = BACKENDS[asked_for].unable(facts)
    if why is not None:
        raise KVProfileError(
            f"the back end {asked_for} cannot serve this layer: {why}; ask for another, or for none in particular"
        )
    return [asked_for]


def serving(names: list[str], queries: int) -> str:
    """Which of the back ends that are able serves so many queries of a KV head: a call may fall to a later one."""
    return next((name for name in names if queries <= (BACKENDS[name].most or queries)), names[-1])


def explained(facts: Facts, queries: int) -> str:
    """Which back end serves, and why none before it does."""
    name = serving(able(facts), queries)
    before = list(BACKENDS)[: list(BACKENDS).index(name)]
    why = dict.fromkeys(reason for other in before if (reason := BACKENDS[other].unable(facts)) is not None)
    return BACKENDS[name].told + (f" ({'; '.join(why)})" if why else "")
