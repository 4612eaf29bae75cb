"""In exact mode every head keeps its budget at every step, whatever the policy, the share and the text.

`conftest.py` checks the bound after every forward of every test; here are the cases that try to break it.
"""

import pytest
import torch

from kvprofile import KVMerger
from kvprofile.merging.policies import POLICIES
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

SHARES = (0.015, 0.05, 0.15, 0.3, 0.5)


@pytest.mark.parametrize("prompt", [64, 250])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_policy_keeps_every_share(policy, prompt):
    model = tiny_model(
        num_hidden_layers=1, num_attention_heads=len(SHARES), num_key_value_heads=len(SHARES), hidden_size=40
    )
    text = tiny_text(480)
    heads = [head(policy, epsilon=0.6, share=share) for share in SHARES]
    cache = KVMerger.from_profile(profile_values(model, heads)).attach(model).cache()
    model(text[:, :prompt], past_key_values=cache, logits_to_keep=1)
    for low in range(prompt, 480, 17):
        model(text[:, low : low + 17], past_key_values=cache, logits_to_keep=1)
