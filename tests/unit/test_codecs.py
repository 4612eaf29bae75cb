"""Every codec against its definition in float64, its bytes, its errors' bounds, and numbers that try to break it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from kvprofile import names
from kvprofile.codecs import rotation
from kvprofile.codecs.packing import BITS, look_up, pack, packed_bytes, symbol_table, unpack
from kvprofile.codecs.rotation import turn, turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.codecs.turbo import levels
from tests.unit import codec_reference as reference
from tests.unit.reference import PROPERTY

DIMS = [1, 3, 16, 31, 64, 80, 96]
INTEGERS = [name for name in CODECS if name.startswith("int")]
TURBO = [name for name in CODECS if name.startswith("turbo")]
FLOATS = {"fp8-e4m3": 4, "fp8-e5m2": 5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def vectors(*shape, seed=0, outliers=True):
    """Gaussian, each vector of a size of its own, one channel far off as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    if outliers:
        made[..., shape[-1] // 3] += 30
    return made


def read(name, given, mean=None):
    """Stored, read, and turned back."""
    codec = CODECS[name]
    found = codec.decode(codec.encode(given, mean), given.shape[-1], mean)
    assert found.dtype == torch.float32
    return turn_back(found) if codec.rotated else found


def test_every_codec_has_its_name_in_the_list():
    assert tuple(CODECS) == names.CODECS
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize("dim", [*DIMS, 2, 5, 24, 128, 192, 256])
def test_the_rotation_is_its_definition_and_keeps_products(dim):
    rows = vectors(3, dim)
    found = turn(rows)
    for row, own in zip(rows.tolist(), found.tolist(), strict=True):
        np.testing.assert_allclose(own, reference.turned(row), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found @ found.mT, rows @ rows.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(turn_back(found), rows, rtol=1e-4, atol=1e-4)
    for dtype in DTYPES:
        assert turn(rows.to(dtype)).dtype == turn_back(rows.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_a_constant_vector_is_spread_over_all_elements_alike(dim):
    torch.testing.assert_close(turn(torch.full((dim,), 2.0)).abs(), torch.full((dim,), 2.0))


@PROPERTY
@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(0, 3), st.randoms(use_true_random=False))
def test_codes_of_every_width_and_length_come_back(bits, dim, rows, random):
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(dim)] for _ in range(rows)], dtype=torch.uint8)
    codes = codes.view(rows, dim)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(dim, bits))
    assert packed.dtype == torch.uint8
    # Not a bit to spare, but for what fills the last group.
    group = {2: 4, 3: 8, 4: 2, 6: 4, 8: 1}[bits]
    assert packed_bytes(dim, bits) == -(-dim // group) * group * bits // 8
    assert [reference.codes_of(row, bits, dim) for row in packed.tolist()] == codes.tolist()
    if bits in (6, 8):
        assert torch.equal(unpack(packed, bits, dim), codes.float())
    else:
        values = torch.arange(2.0**bits) ** 2 - 7
        found = look_up(packed, bits, dim, symbol_table(values, bits))
        assert torch.equal(found, values[codes.long()])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_their_definition(name, dim):
    codec, rows = CODECS[name], vectors(5, dim)
    packed, facts = codec.encode(rows)
    found = codec.decode((packed, facts), dim)
    steps = 2**codec.bits - 1
    for row, stored, (scale, centre), own in zip(
        rows.tolist(), packed.tolist(), facts.tolist(), found.tolist(), strict=True
    ):
        exact = reference.turned(row)
        middle, reach = (max(exact) + min(exact)) / 2, max(abs(x - centre) for x in exact)
        assert centre == pytest.approx(reference.bfloat16(middle), rel=2**-7, abs=1e-6 * reach)
        assert reach * 2 / steps * (1 - 1e-5) <= scale <= reach * 2 / steps * 1.01 + 1e-37
        values = [centre + (code - steps / 2) * scale for code in reference.codes_of(stored, codec.bits, dim)]
        np.testing.assert_allclose(own, values, rtol=1e-5, atol=1e-5 * reach + 1e-37)
        # The nearest of all values there are, none out of reach.
        np.testing.assert_allclose(values, exact, rtol=0, atol=scale * 0.5001 + 1e-5 * max(map(abs, exact)))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_their_definition(name, dim):
    codec, rows = CODECS[name], vectors(5, dim)
    elements, scales = codec.encode(rows)
    found = codec.decode((elements, scales), dim)
    finite = [
        reference.float8(byte, FLOATS[name]) for byte in range(256) if byte % 128 < {4: 127, 5: 124}[FLOATS[name]]
    ]
    for row, stored, (scale,), own in zip(
        rows.tolist(), elements.tolist(), scales.tolist(), found.tolist(), strict=True
    ):
        exact = reference.turned(row)
        largest = max(map(abs, exact))
        assert largest / max(finite) * (1 - 1e-5) <= scale <= largest / max(finite) * 1.01
        values = [reference.float8(byte, FLOATS[name]) * scale for byte in stored]
        np.testing.assert_allclose(own, values, rtol=1e-5, atol=1e-5 * largest)
        for element, value in zip(exact, values, strict=True):
            best = min(abs(element - scale * number) for number in finite)
            assert abs(element - value) <= best * (1 + 1e-4) + 1e-5 * largest


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", TURBO)
def test_turbo_is_its_definition(name, dim):
    codec, rows = CODECS[name], vectors(5, dim)
    packed, scales = codec.encode(rows)
    found = codec.decode((packed, scales), dim)
    known = levels(codec.bits).tolist()
    for row, stored, (scale,), own in zip(rows.tolist(), packed.tolist(), scales.tolist(), found.tolist(), strict=True):
        exact = reference.turned(row)
        length = np.linalg.norm(exact)
        codes = reference.codes_of(stored, codec.bits, dim)
        for element, code in zip(exact, codes, strict=True):
            unit = element / length * dim**0.5
            best = min(abs(unit - level) for level in known)
            assert abs(unit - known[code]) <= best + 2 / 512
        chosen = [known[code] for code in codes]
        assert scale == pytest.approx(length / np.linalg.norm(chosen), rel=2**-8)
        np.testing.assert_allclose(own, [level * scale for level in chosen], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turbo_s_levels_are_lloyd_max_levels(bits):
    """Each level is the mean of the Gaussian between its borders, which lie half way to its neighbours."""
    known = levels(bits).double().numpy()
    borders = np.concatenate([[-np.inf], (known[1:] + known[:-1]) / 2, [np.inf]])
    for level, (low, high) in zip(known, pairwise(borders), strict=True):
        mean = (norm.pdf(low) - norm.pdf(high)) / (norm.cdf(high) - norm.cdf(low))
        assert level == pytest.approx(mean, abs=1e-6)


# Errors relative to the length, of Gaussian vectors of 64 elements with an outlier, as a user would see them.
EXPECTED = {
    "none": 0,
    "bfloat16": 0.003,
    "float16": 0.0005,
    "int8": 0.008,
    "int6": 0.03,
    "int4": 0.12,
    "int3": 0.25,
    "int2": 0.6,
    "fp8-e4m3": 0.04,
    "fp8-e5m2": 0.08,
    "turbo4": 0.11,
    "turbo3": 0.2,
    "turbo2": 0.38,
}


@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_near(name):
    given = vectors(200, 64)
    lost = ((read(name, given) - given).norm(dim=-1) / given.norm(dim=-1)).mean()
    assert EXPECTED[name] / 10 <= lost <= EXPECTED[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_those_of_the_tensors_kept(name, dim, dtype):
    given = vectors(4, 2, 7, dim).to(dtype)
    parts = CODECS[name].encode(given)
    assert all(part.shape[:-1] == given.shape[:-1] for part in parts)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    # What has no codec stays in the model's own dtype; the count is a 16-bit model's.
    wide = dtype.itemsize // 2 if name == "none" else 1
    assert sum(held.values()) == 4 * 2 * 7 * CODECS[name].nbytes(dim) * wide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_vectors_are_stored_one_by_one_whatever_their_dtype(name, dtype):
    codec, given = CODECS[name], vectors(3, 4, 40, outliers=False).to(dtype)
    parts = codec.encode(given)
    if name != "none":
        wide = codec.encode(given.float())
        assert all(torch.equal(part, other) for part, other in zip(parts, wide, strict=True))
    chosen = torch.tensor([2, 0])
    found = codec.decode([part[chosen, 1:3] for part in parts], 40)
    torch.testing.assert_close(found, codec.decode(parts, 40)[chosen, 1:3], rtol=0, atol=0)
    assert codec.decode([part[:0] for part in parts], 40).shape == (0, 4, 40)
    assert all(part.shape[0] == 0 for part in codec.encode(given[:0]))


@pytest.mark.parametrize("name", CODECS)
def test_a_mean_is_taken_off_and_put_back(name):
    mean = vectors(2, 1, 64, seed=1) * 20
    given = mean + vectors(3, 2, 5, 64, seed=2, outliers=False)
    with_mean, without = ((read(name, given, own) - given).norm() / given.norm() for own in (mean, None))
    assert with_mean <= without * (1.01 if name in ("none", "bfloat16", "float16") else 0.3)
    # Half precision of the mean itself is the caller's affair.
    assert read(name, given.bfloat16(), mean.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", CODECS)
def test_vectors_without_range_come_back(name):
    constants = [0.0, 1.0, -3.7, 1e4, 1e-4]
    given = torch.tensor(constants)[:, None].expand(-1, 64).contiguous()
    found = read(name, given)
    # One code for all, or spread by the rotation: in any case within the codec's step.
    error = (found - given).abs().amax(-1)
    assert (error <= given.abs().amax(-1) * max(EXPECTED[name], 1e-6) + 1e-37).all()
    single = torch.zeros(64)
    single[5] = 12.0
    lost = (read(name, single) - single).norm() / 12
    assert lost <= max(2 * EXPECTED[name], 1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("name", [name for name in CODECS if name != "float16"])
def test_no_size_overflows_and_none_vanishes_but_the_smallest(name, scale):
    given = vectors(3, 64, outliers=False)[1:] * scale
    found = read(name, given)
    if name in TURBO and scale > 1e18:  # a length's square is no float32 any more
        assert not found.isfinite().any()
        return
    assert found.isfinite().all()
    if scale > 1e-30:
        lost = (found - given).double().norm() / given.double().norm()
        assert lost <= max(EXPECTED[name] * 1.2, 1e-6)


def test_float16_says_what_it_cannot_hold():
    assert read("float16", torch.tensor([[70000.0, 1.0]])).tolist() == [[float("inf"), 1.0]]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_shows_in_its_own_vector_only(name, bad):
    given = vectors(4, 33)
    spoilt = given.clone()
    spoilt[2, 7] = bad
    found, expected = read(name, spoilt), read(name, given)
    assert not found[2].isfinite().all()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("name", CODECS)
def test_room_never_written_to_reads_as_finite(name):
    codec = CODECS[name]
    parts = [torch.zeros_like(part) for part in codec.encode(vectors(2, 24))]
    assert codec.decode(parts, 24).isfinite().all()


@pytest.mark.parametrize("name", CODECS)
def test_the_host_never_waits(gpu, name):
    codec, given, mean = CODECS[name], vectors(2, 3, 40), vectors(3, 40, seed=3)
    far, far_mean = given.to("cuda"), mean.to("cuda")
    gpu.forget()
    parts = codec.encode(far, far_mean)
    found = codec.decode(parts, 40, far_mean)
    turned = turn_back(turn(found))
    assert not gpu.syncs
    expected = codec.encode(given, mean)
    assert all(torch.equal(part.cpu(), other) for part, other in zip(parts, expected, strict=True))
    assert torch.equal(found.cpu(), codec.decode(expected, 40, mean))
    assert turned.device.type == "cuda"


@pytest.mark.parametrize("name", CODECS)
def test_what_was_made_under_inference_serves_gradients(name):
    rotation.rotation_matrix.cache_clear()
    codec = CODECS[name]
    with torch.inference_mode():
        read(name, vectors(2, 48))
    query = torch.ones(48, requires_grad=True)
    (turn(query) @ codec.decode(codec.encode(vectors(2, 48)), 48).mT).sum().backward()
    assert query.grad is not None


def test_a_codec_of_one_s_own_is_an_entry_in_the_table(monkeypatch):
    class Signs:
        """One element's sign and nothing else."""

        name, rotated = "x-signs", False

        def nbytes(self, dim):
            return dim

        def encode(self, vectors, mean=None):
            return (vectors.sign().to(torch.int8),)

        def decode(self, parts, dim, mean=None):
            return parts[0].float()

    monkeypatch.setitem(CODECS, "x-signs", Signs())
    assert read("x-signs", torch.tensor([[-2.0, 3.0]])).tolist() == [[-1.0, 1.0]]
