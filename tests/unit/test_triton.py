"""Triton's kernels in its interpreter, on the CPU: every codec, many pieces, and what a decode step asks of the device.

`test_backends.py` runs them beside the others over dtypes, groups, soft caps, sinks and padding.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvprofile import KVMerger
from kvprofile.codecs.table import CODECS
from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends import triton_decode, varlen
from kvprofile.runtime.backends.contract import Asked, Facts, always
from kvprofile.runtime.backends.table import BACKENDS, able, explained, serving
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.settings import CHUNK
from kvprofile.runtime.shelf import empty_shelf
from tests.pretend_cuda import PretendCuda, on_cuda
from tests.unit.architectures import build
from tests.unit.builders import slots_of_row
from tests.unit.merge_reference import relative_error
from tests.unit.test_backends import SINKS, TOLERANCE, packed_reference, reference
from tests.unit.test_packed_places import merger_of
from tests.unit.test_runtime_cuda import forwards, padded, planned
from tests.unit.tiny_models import tiny_model, tiny_text

pytest.importorskip("triton")
from kvprofile.runtime.backends import triton_kernels

HEADS = 2


@pytest.fixture(autouse=True)
def _few_multiprocessors(monkeypatch):
    monkeypatch.setattr(triton_decode, "_multiprocessors", lambda _device: 8)


@pytest.fixture
def served(monkeypatch):
    """The back end serves on the CPU as well."""
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], unable=always))


def a_call(*, dim=64, group=3, queries=1, tail=9, dtype=torch.float32, **options) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, tokens, dim, generator=generator).to(dtype)
        for heads, tokens in ((HEADS * group, queries), (HEADS, tail), (HEADS, tail))
    )
    return AttentionCall(None, query, key, value, None, {"scaling": dim**-0.5, **options})


def a_shelf(call, codecs=("none", "none"), lengths=(70, 23), *, weighs=True, backend="triton", size=16):
    """Slots of two heads, that have come in two goes: some blocks wait for more."""
    generator = torch.Generator().manual_seed(2)
    dim = call.key.shape[-1]
    facts = Facts(call.key.device, call.key.dtype, dim, dim, call.query.shape[1] // HEADS, False, codecs)
    mean = torch.randn(HEADS, dim, generator=generator)

    def some(counts):
        keys, values = (torch.randn(sum(counts), dim, generator=generator).to(call.key.dtype) for _ in range(2))
        bias = torch.rand(sum(counts), generator=generator) * 3 * weighs
        return Slots(keys + 1, values, bias, list(counts))

    first = [max(length - 17, 0) for length in lengths]
    slots = some(first)
    shelf = empty_shelf(slots, facts, HEADS, size, backend=backend, mean=mean, weighs=weighs)
    shelf.add(slots, [0, 1])
    shelf.add(some([length - before for length, before in zip(lengths, first, strict=True)]), [0, 1])
    return shelf


def decoded(shelves) -> Slots:
    """What the shelves hold, as `codecs/` reads it."""
    found = [[slots_of_row(shelf, row) for shelf in shelves if shelf.blocks.lengths[row]] for row in range(HEADS)]
    parts = [torch.cat(part) for part in zip(*(one for row in found for one in row), strict=True)]
    return Slots(*parts, [sum(len(one[0]) for one in row) for row in found])


def check(call, shelves, tolerance=None) -> None:
    """The layer at once and by pieces, against the float64 loop."""
    expected, expected_mass = reference(call, decoded(shelves))
    tolerance = tolerance or TOLERANCE[call.query.dtype]
    for whole in (triton_decode.triton_layer, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], whole=whole))
            output, mass = ragged_attention(call, shelves)
        assert output.dtype == call.value.dtype
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(output.double(), expected, rtol=0, atol=atol)
        np.testing.assert_allclose(mass.double(), expected_mass, rtol=0, atol=tolerance * expected_mass.max())


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_every_codec_is_read_as_its_own_decode_reads_it(name):
    # Seven query heads a KV head; keys and values in the same codec, and values alone.
    call = a_call(group=7)
    for codecs in ((name, name), ("none", name)):
        check(call, [a_shelf(call, codecs, weighs=name[-1] != "8")], tolerance=2e-5)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codecs", [("int8", "int4"), ("int3", "turbo2")])
def test_packed_slots_of_models_in_half_precision(codecs, dtype):
    call = a_call(dtype=dtype)
    check(call, [a_shelf(call, codecs)])


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("codecs", [("none", "none"), ("int8", "int4"), ("int6", "int3"), ("int2", "turbo3")])
@pytest.mark.parametrize("dim", [16, 80, 96, 256])
def test_heads_of_many_sizes(dim, codecs):
    call = a_call(dim=dim, group=1)
    check(call, [a_shelf(call, codecs)], tolerance=1e-4 if dim == 256 else 2e-5)


@pytest.mark.usefixtures("served")
def test_shelves_of_two_codecs_with_a_soft_cap_sinks_and_several_queries():
    call = a_call(queries=3, softcap=2.0, s_aux=SINKS)
    shelves = [a_shelf(call, ("int8", "int4")), a_shelf(call, lengths=(5, 40))]
    check(call, shelves, tolerance=2e-5)


def asked_of(call) -> Asked:
    return Asked(call.query.reshape(HEADS, -1, call.query.shape[-1]), call.softmax, 1, call.query.shape[2])


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("lengths", [(1, 1), (700, 3), (64, 128), (0, 300)])
def test_pieces_that_are_full_uneven_or_empty(lengths):
    call = a_call(group=1)
    shelf = a_shelf(call, lengths=lengths)
    splits = triton_decode.splits_of(shelf, asked_of(call))
    assert (splits > 1) == (max(lengths) >= 256)
    assert splits * HEADS <= triton_decode.PROGRAMS * 8 + HEADS
    pieces = triton_decode.triton_attention(asked_of(call), shelf)
    assert pieces.owner.tolist() == [row for row in range(HEADS) for _ in range(splits)]
    check(call, [shelf], tolerance=1e-5)


def test_slots_that_carry_their_bias_in_the_keys_are_read_too(monkeypatch):
    call = a_call()
    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], unable=always))
    shelf = a_shelf(call, backend="varlen")
    assert shelf.blocks.keys[0].shape[-1] == 64 + varlen.EXTRA
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], unable=always))
    shelf.servers = ["triton"]
    check(call, [shelf], tolerance=1e-5)


FACTS = Facts(torch.device("cuda", 0), torch.bfloat16, 64, 64, 3, False)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": torch.device("cpu")}, "the kernel is CUDA's"),
        ({"head_dim": 288}, "Triton's kernels take head dimensions up to 256"),
        ({"value_dim": 288}, "Triton's kernels take head dimensions up to 256"),
        ({"codecs": ("none", "x-mine")}, "Triton's kernels do not read x-mine"),
        ({"dtype": torch.float64}, "Triton's kernels take float32, float16 and bfloat16"),
    ],
)
def test_what_the_kernels_cannot_serve_goes_to_another(changes, why):
    with PretendCuda(triton=True):
        assert BACKENDS["triton"].unable(FACTS) is None
        facts = replace(FACTS, **changes)
        assert BACKENDS["triton"].unable(facts) == why
        assert "triton" not in able(facts)
        assert why in explained(facts, 3)


def test_old_devices_and_missing_compilers_are_told(monkeypatch):
    with PretendCuda(triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert BACKENDS["triton"].unable(FACTS) == "Triton's kernels need capability 8.0, this is 7.5"
    with PretendCuda() as gpu:
        assert gpu.triton is False
        assert BACKENDS["triton"].unable(FACTS) == "triton is not installed"

    def broken(*_arguments, **_constants):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(triton_decode, "launch", broken)
    triton_decode.trouble.cache_clear()
    told = triton_decode.trouble(torch.device("cpu"))
    triton_decode.trouble.cache_clear()
    assert told == (
        "Triton cannot build kernels here: RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    )


def test_one_kernel_is_built_to_see_whether_any_can():
    assert triton_decode.trouble(torch.device("cpu")) is None
    triton_decode.trouble.cache_clear()


def test_a_few_queries_are_triton_s_and_a_prompt_s_piece_is_varlen_s():
    with PretendCuda(triton=True):
        names = able(FACTS)
    assert names == ["triton", "varlen", "blockwise", "headwise"]
    assert [serving(names, queries) for queries in (1, 32, 33, 1000)] == ["triton", "triton", "varlen", "varlen"]


@pytest.mark.parametrize("weighs", [False, True])
def test_varlen_reads_slots_that_were_not_made_for_it(monkeypatch, weighs):
    monkeypatch.setattr(varlen, "packed_attention", packed_reference)
    call = a_call(queries=20, tail=30, dtype=torch.float16)
    shelf = a_shelf(call, backend="blockwise", weighs=weighs)
    assert shelf.blocks.keys[0].shape[-1] == 64
    shelf.servers = ["varlen"]
    expected, _ = reference(call, decoded([shelf]))
    output, _ = ragged_attention(call, [shelf])
    np.testing.assert_allclose(output.double(), expected, rtol=0, atol=3e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "packed"), [("Llama", False), ("Llama", True), ("Gemma 2", True), ("GPT-OSS", True)])
@torch.no_grad()
def test_a_model_on_a_pretended_gpu_gives_the_processor_s_numbers(name, packed):
    model = build(name)
    text, mask = padded(150, 2, "cpu")  # a batch of which one row is padded

    def attached(to, backend=None):
        if packed:
            return merger_of(to, backend=backend).attach(to)
        return KVMerger.from_profile(planned(to), backend=backend).attach(to)

    merger = attached(model, "blockwise")
    expected = torch.cat(list(forwards(model, merger, text, mask)), 1)
    merger.detach()
    with PretendCuda(triton=True) as gpu:
        there = on_cuda(copy.deepcopy(model))
        merger = attached(there)
        found = torch.cat(list(forwards(there, merger, text.to("cuda"), mask.to("cuda"))), 1)
        assert any("slots_kernel" in where for where in gpu.launches)
        assert relative_error(found.cpu(), expected) < 1e-4


STORED = {"slots_kernel": ("keys", "values", "bias", "ends", "held"), "layer_kernel": ("keys", "values")}


@torch.no_grad()
def test_between_two_merges_a_step_launches_the_same_on_the_same_memory():
    """Two kernels a layer, the same grids and shapes and the same addresses of all that is stored; only the tail gets longer.

    So it is what a CUDA graph replays, but for the tail: its length is a number of the launch, and new tokens are written
    behind it. The pieces and the output are allocated anew, in the same sizes.
    """
    steps, bytes_held = [], []
    with PretendCuda(triton=True) as gpu, pytest.MonkeyPatch.context() as patch:
        launch = triton_decode.launch

        def recorded(name, grid, *arguments, **constants):
            kernel = getattr(triton_kernels, name)
            steps[-1].append((name, grid, dict(zip(kernel.arg_names, arguments, strict=False)), constants))
            launch(name, grid, *arguments, **constants)

        patch.setattr(triton_decode, "launch", recorded)
        model = on_cuda(tiny_model(num_hidden_layers=1).to(torch.bfloat16))
        merger = KVMerger.from_profile(planned(model)).attach(model)
        cache, text = merger.cache(), tiny_text(200).to("cuda")
        model(text[:, :160], past_key_values=cache, logits_to_keep=1)
        state = cache.merged[0].state
        merged = state.merged_lengths()
        for at in range(160, 160 + CHUNK):
            steps.append([])
            gpu.forget()
            model(text[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
            assert not [where for where in gpu.syncs if not where.startswith("models/")]
            if state.merged_lengths() == merged:
                held = (*state.tail.stored, *(part for shelf in state.shelves for part in shelf.blocks.tensors()))
                bytes_held.append(sum(part.untyped_storage().nbytes() for part in held))
    assert len(bytes_held) == CHUNK - 1  # the last step merges
    assert len(set(bytes_held)) == 1
    assert [name for name, *_ in steps[0]] == ["slots_kernel", "layer_kernel"]
    tails = [step[1][2]["tail"] for step in steps]
    assert tails == list(range(33, 33 + CHUNK))
    for step in steps:
        for (name, grid, given, constants), (*same, first, alike) in zip(step, steps[0], strict=True):
            assert ([name, grid], constants) == (same, alike)
            for argument, value in given.items():
                if argument in STORED[name]:
                    assert value.data_ptr() == first[argument].data_ptr()
                    assert value.stride() == first[argument].stride()
                elif isinstance(value, torch.Tensor) and argument != "mass":
                    assert value.shape == first[argument].shape
                elif argument not in ("tail", "mass"):
                    assert value == first[argument]


def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    """For sm_80 and sm_90, by triton's own ptxas, in a process where its interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "benchmarks" / "triton_ahead.py"
    command = [sys.executable, str(script), "--few", "-o", str(tmp_path / "ahead.json")]
    subprocess.run(command, check=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True)
    rows = json.loads((tmp_path / "ahead.json").read_text())
    assert {(row["target"], row["kernel"]) for row in rows} == {
        (f"sm_{target}", kernel) for target in (80, 90) for kernel in ("slots_kernel", "layer_kernel")
    }
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared_kib"] < 99, row  # what a program may have on every device from 8.0 on
        assert row["tensor_cores"] > 0 or row["dtype"] == "float32", row
