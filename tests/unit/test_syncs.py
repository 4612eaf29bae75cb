"""How often the host waits for the device, on pretended CUDA: what a merge may ask it, and that the slots are the same."""

from dataclasses import replace

import pytest
import torch

from kvprofile.merging.host import places_of, select, selector
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.scores import attention_mass
from kvprofile.merging.softmax import Softmax
from tests.unit.builders import random_tokens


def sent(tokens):
    """The tokens on the pretended device."""

    def asked(queries):
        if queries is None:
            return None
        return replace(queries, **{name: getattr(queries, name).to("cuda") for name in ("states", "keys", "values")})

    parts = {name: getattr(tokens, name).to("cuda") for name in ("keys", "values", "mass")}
    windows = {size: received.to("cuda") for size, received in tokens.windows.items()}
    return replace(tokens, **parts, windows=windows, queries=asked(tokens.queries), again=asked(tokens.again))


@pytest.mark.parametrize("position", [0, 50])
@pytest.mark.parametrize("name", POLICIES)
def test_slots_counted_on_the_host_need_no_question(gpu, name, position):
    tokens = random_tokens(3, batch=2, heads=3, count=60, position=position, newer=40)
    far, epsilon = sent(tokens), torch.full((3,), 0.6)
    # Heavy tokens may be among the first, and thresholds let slots emerge: how many there are is asked once.
    for heavy, count, asked in ((0, 20, 0), (0, 60, 0), (0, 1, 0), (5, 20, 1), (0, None, 1)):
        if count is None and POLICIES[name].rule == "residual":
            continue
        wanted = {"epsilon": epsilon, "count": None if count is None else torch.full((2, 3), count), "heavy": heavy}
        gpu.forget()
        found = merge_tokens(far, POLICIES[name], **wanted)
        assert gpu.syncs.total() <= asked, gpu.syncs
        expected = merge_tokens(tokens, POLICIES[name], **wanted)
        assert found.lengths == expected.lengths
        assert len(found.keys) == sum(found.lengths)
        for part in ("keys", "values", "bias"):
            assert torch.equal(getattr(found, part).cpu(), getattr(expected, part))


@pytest.mark.parametrize("stride", [1, 7, 16, 400])
def test_attention_received_is_added_up_without_a_question(gpu, stride):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 90, 16, generator=generator) for heads in (4, 2))
    expected = attention_mass(query, key, Softmax(0.3, sinks=torch.arange(4.0)), stride=stride)
    far = query.to("cuda"), key.to("cuda"), torch.arange(4.0).to("cuda")
    gpu.forget()
    found = attention_mass(far[0], far[1], Softmax(0.3, sinks=far[2]), stride=stride)
    assert not gpu.syncs
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("chosen", [[], [0], [2], [0, 1], [0, 2, 4], [4, 2], [1, 1], [0, 1, 3], [4, 0, 3]])
def test_a_selection_is_that_of_the_list(gpu, chosen):
    tensor = torch.arange(30).view(2, 5, 3)
    far = tensor.to("cuda")
    gpu.forget()
    found = select(far, selector(chosen), 1)
    assert not gpu.syncs
    assert torch.equal(found.cpu(), tensor[:, chosen])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_are_those_of_nonzero(gpu, share):
    marked = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < share
    wanted = marked.flatten().nonzero()[:, 0]
    assert torch.equal(places_of(marked, len(wanted)), wanted)
