"""In exact mode every head keeps its budget at every step, whatever the policy, the share and the text.

`tests/conftest.py` checks the bound after every forward of every test; here are the cases that try to break it.
`python -m tests.unit.test_runtime_budgets` prints what they come to.
"""

from collections.abc import Iterator

import pytest
import torch

from kvprofile import KVMerger
from kvprofile.merging.policies import POLICIES
from kvprofile.runtime.layer import MergedLayer
from tests.unit.budgets import slack_of, stored_and_allowed
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

SHARES = (0.015, 0.05, 0.15, 0.3, 0.5)
TOKENS = 480
LONG = 2048


@torch.no_grad()
def steps(policy: str, prompt: int, tokens: int = TOKENS) -> Iterator[MergedLayer]:
    """A layer with a head for every share, after a prompt and after every piece that follows it."""
    heads = [head(policy, epsilon=0.6, share=share) for share in SHARES]
    model = tiny_model(
        num_hidden_layers=1, num_attention_heads=len(SHARES), num_key_value_heads=len(SHARES), hidden_size=40
    )
    text = tiny_text(tokens)
    cache = KVMerger.from_profile(profile_values(model, heads)).attach(model).cache()
    model(text[:, :prompt], past_key_values=cache, logits_to_keep=1)
    yield cache.merged[0]
    for low in range(prompt, tokens, 17):
        model(text[:, low : low + 17], past_key_values=cache, logits_to_keep=1)
        yield cache.merged[0]


@pytest.mark.parametrize("prompt", [64, 250])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_every_share(policy, prompt):
    for layer in steps(policy, prompt):
        assert layer.setting.exact


def main() -> None:
    """Print, by policy, the slots kept of all tokens at the end, and how far above what is allowed any step was."""
    asked = " | ".join(f"{share:.1%}" for share in SHARES)
    print(f"| policy | {asked} | most above | bound |\n|---|{'---|' * (len(SHARES) + 2)}")
    for policy in POLICIES:
        above = 0.0
        for last in steps(policy, LONG // 2, LONG):
            row = stored_and_allowed(last)[0]
            above = max(above, *(slots - allowed for slots, allowed in row))
        kept = " | ".join(f"{slots / LONG:.1%}" for slots in last.lengths()[0])
        print(f"| {policy} | {kept} | {above:.0f} | {slack_of(last)} |")


if __name__ == "__main__":
    main()
