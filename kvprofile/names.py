"""Every name a policy or a plan can be written with, once: for the schema, the command line, the solver and the runtime.

No import here but `typing`: `kvprofile --help` reads these names and loads no torch. The functions behind a policy's names are
in the tables of `merging/`, codecs in `codecs/table.py`; tests keep them in step.
"""

from typing import Literal, get_args

Affinity = Literal[
    "cosine",
    "displacement",
    "mass",
    "idle",
    "value-attention",
    "window",
    "long-window",
    "age",
    "keydiff",
    "nested",
    "expected",
    "decayed",
    "again",
    "random",
]
Join = Literal["chain", "anchor", "complete", "drop", "nearest", "residual", "spread", "spread-drawn"]
Weights = Literal["gaussian", "attention", "average", "pivot", "similarity", "midpoints", "cosines"]
Sigma = Literal["mean", "rms"]
Bias = Literal["count", "attention", "none"]
Codec = Literal[
    "none",
    "bfloat16",
    "float16",
    "int8",
    "int6",
    "int4",
    "int3",
    "int2",
    "fp8-e4m3",
    "fp8-e5m2",
    "turbo4",
    "turbo3",
    "turbo2",
]

SetRule = Literal["chain", "anchor", "complete"]
BudgetRule = Literal["damage", "uniform", "common", "pyramidkv", "dynamickv", "prefixkv", "cake", "squeeze"]
Objective = Literal["balanced", "recall", "continuation", "all"]
Granularity = Literal["head", "layer"]
Mode = Literal["exact", "threshold"]

BUDGET_RULES: tuple[str, ...] = get_args(BudgetRule)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
MODES: tuple[str, ...] = get_args(Mode)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
SIGMAS: tuple[str, ...] = get_args(Sigma)
BIASES: tuple[str, ...] = get_args(Bias)
CODECS: tuple[str, ...] = get_args(Codec)

NO_CODEC = "none"
"""The codec that keeps a slot in the model's own dtype."""

AUTO = "auto"
"""Not a policy but a choice: every head takes its own."""

# `auto`, and what `merging/policies.py` has, in its order.
POLICY_NAMES = (
    AUTO,
    "gauss",
    "attention",
    "absorb",
    "gather",
    "gather-mended",
    "gather-matched",
    "again-matched",
    "window-matched",
    "average",
    "pivot",
    "pivot-key",
    "kvmerger",
    "kvmerger-printed",
    "h2o",
    "value-attention",
    "snapkv",
    "snapkv-128",
    "streaming",
    "cam",
    "cam-drawn",
    "d2o",
    "look-m-average",
    "look-m-pivot",
    "look-m-weighted",
    "keepkv",
    "zsmerge",
    "keydiff",
    "nestedkv",
    "expected-attention",
    "grkv",
    "random",
    "gauss-off",
    "absorb-off",
    "pivot-off",
    "kvmerger-off",
    "zsmerge-off",
)
