"""The pretended devices themselves: right numbers, mixing refused, every wait seen and none invented."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import AuxRequest

from tests.pretend_cuda import MixedDevicesError, on_cuda, over_two
from tests.unit.architectures import SUPPORTED, build
from tests.unit.tiny_models import tiny_model, tiny_text

MIXES = {
    "a CPU tensor": lambda x: x + torch.ones(4),
    "another device": lambda x: x + x.to("cuda:1"),
    "a product": lambda x: x @ torch.ones(4, 2),
    "a product in autograd": lambda x: x.requires_grad_() @ torch.ones(4, 2),
    "a CPU number in a product": lambda x: torch.cat([x, torch.tensor(1.0)[None, None].expand(1, 4)]),
    "a copy in C++": lambda x: F.linear(x, torch.ones(2, 4)),
    "a mask": lambda x: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0.0),
    "the CPU indexed by the device": lambda x: torch.ones(4)[x.long()[0]],
    "an index of gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "new on the CPU": lambda x: x + torch.zeros_like(x, device="cpu"),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x[0, 0]),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "contains": lambda x: 3.0 in x,
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "to the host, not waiting": lambda x: x.to("cpu", non_blocking=True),
    "copied to the host": lambda x: torch.empty(3, 4).copy_(x),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "copied to the device": lambda x: x.copy_(torch.ones(3, 4)),
    "stored from the host": lambda x: x.__setitem__(0, torch.ones(4)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new tensor": lambda x: x.new_tensor(1.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean index of rows": lambda x: x[x[:, 0] > 0],
    "boolean store": lambda x: x.__setitem__(x > 0, x[:1, 0]),
    "list index": lambda x: x[[0, 2]],
    "host index": lambda x: x[:, torch.tensor([0, 2])],
    "repeat": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x[0].long().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "largest of Python": lambda x: max(x[0, :2]),
    "a solve that checks": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, device=x.device), x),
}
RUNS_ON = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1),
    "a number on the CPU": lambda x: x * torch.tensor(2.0),
    "device index": lambda x: x[torch.arange(2, device=x.device)],
    "a number through a mask": lambda x: x.__setitem__(x > 0, 1.0),
    "a number stored": lambda x: x.__setitem__((..., slice(2)), 0.5),
    "to another device": lambda x: x.to("cuda:1"),
    "sent along": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "sizes known": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0, output_size=3),
    "sorted": lambda x: x.argsort(-1).gather(-1, x.long() % 4),
    "nothing": lambda x: torch.tensor([], device=x.device),
    "zeros": lambda x: torch.zeros(3, 4, device="cuda") + x,
    "where of three": lambda x: torch.where(x > 0, 1.0, x),
    "padded in C++": lambda x: torch.nn.utils.rnn.pad_sequence([x[:2], x]),
    "einsum": lambda x: torch.einsum("ab,cb->ac", x, x),
}


def numbers():
    """All ones, so that what is counted or indexed with is valid."""
    return torch.ones(3, 4).to("cuda")


@pytest.mark.parametrize("name", MIXES)
def test_mixing_devices_is_refused(gpu, name):
    with pytest.raises(MixedDevicesError, match="several devices"):
        MIXES[name](numbers())


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted_by_its_place(gpu, name):
    x = numbers()
    gpu.forget()
    WAITS[name](x)
    assert gpu.syncs.total() == 1, gpu.syncs
    assert next(iter(gpu.syncs)).startswith("unit/test_pretend_cuda.py:")


@pytest.mark.parametrize("name", RUNS_ON)
def test_what_needs_no_wait_counts_none(gpu, name):
    x = numbers()
    gpu.forget()
    RUNS_ON[name](x)
    assert not gpu.syncs


def test_kernels_are_counted_and_views_are_not(gpu):
    x = numbers()
    gpu.forget()
    x.view(4, 3)[1:].transpose(0, 1).unsqueeze(0)
    torch.empty_like(x)
    assert not gpu.launches
    (x + 1).mul_(2)
    F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
    assert gpu.launches.total() == 3


def test_gradients_cross_devices(gpu):
    x = torch.randn(3, 4)
    weight = torch.randn(4, 4, requires_grad=True)
    wanted = torch.autograd.grad((x @ weight).tanh().sum(), weight)[0]
    near = torch.nn.Parameter(weight.detach().to("cuda:0"))
    out = (x.to("cuda:0") @ near).to("cuda:1").tanh()
    found = torch.autograd.grad(out.sum(), near)[0]
    assert found.device == torch.device("cuda:0")
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_models_give_the_same_on_one_device_and_on_two(gpu, name):
    text = tiny_text(40)
    model = build(name)
    wanted = model(text).logits
    for place in (on_cuda, over_two):
        found = place(copy.deepcopy(model))(text.to("cuda")).logits
        assert str(found.device) == "cuda:0"
        assert torch.equal(found.cpu(), wanted)


def test_without_hooks_a_model_on_two_devices_fails(gpu):
    model = on_cuda(tiny_model())
    model.model.layers[1].to("cuda:1")
    with pytest.raises(MixedDevicesError):
        model(tiny_text(8).to("cuda"))


def test_copies_stay_on_their_device(gpu):
    parameter = copy.deepcopy({"a": torch.nn.Parameter(numbers().to("cuda:1"))})["a"]
    assert isinstance(parameter, torch.nn.Parameter)
    assert str(parameter.device) == "cuda:1"
    assert torch.randn(2, generator=torch.Generator(device="cuda")).device == torch.device("cpu")


def attend(changes):
    query, key = (torch.randn(count, 1, 16, generator=torch.Generator().manual_seed(count)) for count in (4, 12))
    arguments = {
        "query": query.to("cuda", torch.bfloat16),
        "key": key.to("cuda", torch.bfloat16),
        "value": key.to("cuda", torch.bfloat16) * 2,
        "cu_seq_q": torch.tensor([0, 2, 4], dtype=torch.int32, device="cuda"),
        "cu_seq_k": torch.tensor([0, 8, 12], dtype=torch.int32, device="cuda"),
        "max_q": 2,
        "max_k": 5,
        "seqused_k": torch.tensor([5, 0], dtype=torch.int32, device="cuda"),
    }
    kernel = torch.nn.attention.varlen.varlen_attn
    return arguments, kernel(**{**arguments, **changes(arguments)}, return_aux=AuxRequest(lse=True), scale=0.5)


def test_the_kernel_keeps_its_contract(gpu):
    arguments, (output, total) = attend(lambda _: {})
    query, key, value = (arguments[name].cpu().float()[:, 0] for name in ("query", "key", "value"))
    logits = query[:2] @ key[:5].T * 0.5
    assert torch.allclose(total[0, :2].cpu(), logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(output[:2, 0].cpu().float(), logits.softmax(-1) @ value[:5], atol=2e-2)
    assert bool((output[2:] == 0).all())
    assert bool(total[0, 2:].isinf().all())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda given: {"seqused_k": given["seqused_k"].long()},
        lambda given: {"cu_seq_k": given["cu_seq_k"].to("cuda:1")},
        lambda given: {"cu_seq_k": given["cu_seq_k"].cpu()},
        lambda given: {"key": given["key"].float()},
        lambda given: {"query": given["query"][..., :12].contiguous()},
        lambda given: {"max_k": 4},
        lambda given: {"max_q": 1},
    ],
    ids=["long lengths", "two devices", "the CPU", "two dtypes", "12 dimensions", "too many keys", "too many queries"],
)
def test_the_kernel_checks_its_arguments(gpu, wrong):
    with pytest.raises(ValueError, match=r"must be|half precision|sequence 0"):
        attend(wrong)
