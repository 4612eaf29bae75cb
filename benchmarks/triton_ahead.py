"""Compile Triton's kernels for GPUs that are not here, and say what they take: registers, shared memory, spills.

    python benchmarks/triton_ahead.py            # every kind of slot, for sm_80 and sm_90, about a minute
    python benchmarks/triton_ahead.py --few

Needs triton, which brings ptxas and cuobjdump along, and no GPU. What is compiled is what a decode step launches, with the
same arguments: the host's code runs on the CPU, and the launch is caught. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from shared.tables import table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvprofile.merging.slots import Slots
from kvprofile.merging.softmax import Softmax
from kvprofile.runtime.backends import triton_decode, triton_kernels
from kvprofile.runtime.backends.contract import Asked, Facts, Recent
from kvprofile.runtime.shelf import empty_shelf

TARGETS = (80, 90)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
NONE = ("none", "none")
HALF, FULL = torch.bfloat16, torch.float32
# dtype, head dimension, query heads a KV head, codecs.
FEW = ((HALF, 128, 4, NONE), (HALF, 64, 7, ("int8", "int4")), (FULL, 128, 4, NONE))
ALL = (
    *((HALF, dim, 4, NONE) for dim in (64, 80, 96, 128, 256)),
    *((FULL, dim, 4, NONE) for dim in (64, 128, 256)),
    *((HALF, 128, 7, (name, name)) for name in ("int8", "int6", "int4", "int3", "int2", "fp8-e4m3", "fp8-e5m2")),
    *((HALF, 128, 7, (name, name)) for name in ("turbo4", "turbo3", "turbo2")),
    *((HALF, dim, 7, ("int8", "int4")) for dim in (64, 128, 256)),
)
Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


def launches(dtype: torch.dtype, dim: int, group: int, codecs: tuple[str, str]) -> list[Launch]:
    """What a decode step of a layer launches: kernel, arguments, constants."""
    found: list[Launch] = []
    each, heads = 1024, 2
    slots = Slots(
        *(torch.randn(heads * each, dim).to(dtype) for _ in range(2)), torch.zeros(heads * each), [each] * heads
    )
    facts = Facts(torch.device("cpu"), dtype, dim, dim, group, False, codecs)
    shelf = empty_shelf(slots, facts, heads, 64, backend="blockwise", mean=torch.zeros(heads, dim), weighs=True)
    shelf.add(slots, list(range(heads)))
    asked = Asked(torch.randn(heads, group, dim).to(dtype), Softmax(dim**-0.5), 1, 1)
    tail = torch.randn(1, heads, 64, dim).to(dtype)
    with mock.patch.multiple(
        triton_decode,
        launch=lambda name, _grid, *arguments, **constants: found.append((name, arguments, constants)),
        _multiprocessors=lambda _device: 132,
    ):
        triton_decode.triton_layer(asked, [shelf], Recent(tail, tail, None), True)
    return found


def compiled(launch: Launch, target: int) -> Any:
    """The kernel of a launch for `sm_<target>`, specialised as a launch there would specialise it."""
    name, arguments, constants = launch
    kernel = getattr(triton_kernels, name)
    signature: dict[str, str] = {}
    known: dict[str, Any] = {key: value for key, value in constants.items() if key not in OPTIONS}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (key, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if value is None:
            signature[key], known[key] = "constexpr", None
            continue
        signature[key] = _type(value)
        whole = isinstance(value, int) and not kernel.params[place].do_not_specialize and value % 16 == 0
        if isinstance(value, Tensor) or whole:
            aligned[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kernel.arg_names[len(arguments) :], "constexpr")
    source = ASTSource(kernel, signature, known, aligned)
    options = {key: constants[key] for key in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _type(value: Any) -> str:
    return POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"


def usage(kernel: Any) -> dict[str, Any]:
    """What a program takes; products of matrices on tensor cores, and bytes that one load brings at most."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    counts = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": counts["REG"],
        "spilled": counts["STACK"] + counts["LOCAL"],
        "shared_kib": kernel.metadata.shared / 1024,
        "warps": kernel.metadata.num_warps,
        "tensor_cores": len(re.findall(r"mma\.sync|wgmma\.mma", ptx)),
        "wide_loads": len(re.findall(r"cp\.async\.cg|ld\.global\S*v4\.b32", ptx)),
        "byte_loads": len(re.findall(r"ld\.global\S*\.b8\b", ptx)),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--few", action="store_true", help="three kinds of layers instead of all")
    options.add_argument("-o", "--output", type=Path, default=Path("triton-ahead.json"))
    arguments = options.parse_args()
    rows = []
    for dtype, dim, group, codecs in FEW if arguments.few else ALL:
        for launch in launches(dtype, dim, group, codecs):
            if launch[0] == "layer_kernel" and codecs != NONE:
                continue  # as it is where slots are as they are
            for target in TARGETS:
                facts = {"dtype": str(dtype).removeprefix("torch."), "dim": dim, "codecs": "/".join(codecs)}
                row = {"what": "ahead", "kernel": launch[0], "target": f"sm_{target}"} | facts
                rows.append(row | usage(compiled(launch, target)))
    arguments.output.write_text(json.dumps(rows, indent=1))
    titles = (
        "target",
        "kernel",
        "dtype",
        "dim",
        "codecs",
        "warps",
        "registers",
        "spilled",
        "tensor_cores",
        "wide_loads",
    )
    table(
        rows,
        "ahead",
        {title.replace("_", " "): f"{{{title}}}" for title in titles} | {"shared KiB": "{shared_kib:.1f}"},
    )


if __name__ == "__main__":
    main()
