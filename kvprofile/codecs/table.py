"""The codecs by name. Register one of your own under a name that begins with `x-`: `CODECS["x-mine"] = Mine()`."""

import torch

from kvprofile.codecs.codec import Codec
from kvprofile.codecs.floats import Floats
from kvprofile.codecs.integers import Integers
from kvprofile.codecs.plain import Plain
from kvprofile.codecs.turbo import Turbo

_OWN: tuple[Codec, ...] = (
    Plain("none", None),
    Plain("bfloat16", torch.bfloat16),
    Plain("float16", torch.float16),
    *(Integers(f"int{bits}", bits) for bits in (8, 6, 4, 3, 2)),
    Floats("fp8-e4m3", torch.float8_e4m3fn),
    Floats("fp8-e5m2", torch.float8_e5m2),
    *(Turbo(f"turbo{bits}", bits) for bits in (4, 3, 2)),
)

CODECS: dict[str, Codec] = {codec.name: codec for codec in _OWN}
