"""The search for the most similar survivor: a loop over every pair, and over windows where there are many survivors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvprofile.merging import nearest
from kvprofile.merging.losses import Losses
from kvprofile.merging.nearest import _most_similar
from kvprofile.merging.tokens import Tokens

HEAD_DIM = 8


def drawn(shares, tokens, *, batch=1, seed=0, dtype=torch.float32):
    """Keys, and which tokens are lost and which may take them in: head h loses `shares[h]`, a tenth is neither."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, len(shares), tokens, HEAD_DIM, generator=generator).to(dtype)
    chance = torch.rand(batch, len(shares), tokens, generator=generator)
    lost = chance < torch.tensor(shares)[:, None]
    return keys, lost, ~lost & (torch.rand(lost.shape, generator=generator) > 0.1)


def search(keys, lost, receivers):
    """Cosine and owner of every lost token."""
    kept = (~lost).sum(-1).flatten().tolist()
    tokens = Tokens(keys, keys, None, {}, 0, keys.shape[2])
    return _most_similar(Losses(tokens, keys[..., 0], lost, ~lost & ~receivers, kept, 0, strained=False), receivers)


def in_windows(keys, lost, receivers, blocks, window):
    """One head, token by token: `{lost token: its receiver}`."""
    asking, offering = lost.nonzero().flatten().tolist(), receivers.nonzero().flatten().tolist()
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    owner = {}
    for block in range(blocks):
        begin, end = (len(asking) * part // blocks for part in (block, block + 1))
        for token in asking[begin:end]:
            middle = asking[(begin + end) // 2]
            centre = sum(place < middle for place in offering)
            first = max(0, min(centre - window // 2, len(offering) - window))
            near = offering[first : first + window]
            owner[token] = max(near, key=lambda place: float(unit[token] @ unit[place]), default=None)
    return owner


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.03, 0.0], [1.0, 0.2]], ids=str)
@pytest.mark.parametrize("window", [16, 32, 10_000])
def test_every_lost_token_finds_the_most_similar_receiver_of_its_window(monkeypatch, window, shares):
    monkeypatch.setattr(nearest, "BLOCK", 12)
    monkeypatch.setattr(nearest, "WINDOW", window)
    keys, lost, receivers = drawn(shares, 300, batch=2)
    best, owner = search(keys, lost, receivers)
    most_lost, most_kept = int(lost.sum(-1).max()), int((~lost).sum(-1).max())
    blocks = max(math.ceil(most_lost / 12), math.ceil(4 * most_kept / window))
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(len(shares))).tolist():
        expected = in_windows(keys[row, head], lost[row, head], receivers[row, head], blocks, window)
        for token in range(300):
            if expected.get(token) is None:
                assert best[row, head, token] == -torch.inf
                continue
            assert int(owner[row, head, token]) == expected[token]
            pair = keys[row, head, [token, expected[token]]]
            cosine = torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0)
            assert float(best[row, head, token]) == pytest.approx(float(cosine), abs=1e-6)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_a_window_reaches_far_to_both_sides(monkeypatch, share):
    """A survivor that equals a lost token is found wherever it is among the 16 nearest on either side."""
    monkeypatch.setattr(nearest, "BLOCK", 12)
    monkeypatch.setattr(nearest, "WINDOW", 64)
    tokens = 4000
    lost = (torch.arange(tokens) * share).floor().diff(append=torch.tensor([tokens * share])) > 0
    keys = torch.randn(tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    before = (~lost).long().cumsum(0)
    kept = (~lost).nonzero().flatten()
    for offset in (-16, 15):
        twin = kept[(before + offset).clamp(0, len(kept) - 1)]
        chosen = lost.nonzero().flatten()[::7][:40]
        texts = torch.arange(len(chosen))
        own = keys.repeat(len(chosen), 1, 1)
        own[texts, chosen] = own[texts, twin[chosen]]
        marked = lost.expand(len(chosen), 1, -1)
        owner = search(own[:, None], marked, ~marked)[1]
        assert owner[texts, 0, chosen].tolist() == twin[chosen].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keys_are_compared_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(nearest, "WINDOW", 32)
    keys, lost, receivers = drawn([0.5, 0.3], 300, dtype=dtype)
    for half, single in zip(search(keys, lost, receivers), search(keys.float(), lost, receivers), strict=True):
        torch.testing.assert_close(half, single, rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts the multiplications of batched products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.count += args[0].numel() * args[1].shape[-1]
        return function(*args, **(kwargs or {}))


def test_the_cost_grows_with_the_text_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 16)
    monkeypatch.setattr(nearest, "WINDOW", 64)
    costs = []
    for tokens in (1000, 2000, 4000):
        keys, lost, receivers = drawn([0.5, 0.1], tokens)
        with Products() as products:
            search(keys, lost, receivers)
        costs.append(products.count)
        assert products.count < 1.3 * 2 * (0.5 * tokens) * 64 * HEAD_DIM
    assert costs[2] < 2.2 * costs[1] < 5 * costs[0]
