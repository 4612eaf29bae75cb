"""What the page's script needs: the damage curves to solve for other budgets, the plan as saved, colours, and sizes."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from kvprofile.names import AUTO, CODECS, NO_CODEC
from kvprofile.planning.allocate import STEPS
from kvprofile.planning.by_damage import policy_choices
from kvprofile.planning.choices import lower_envelope
from kvprofile.planning.evidence import protected_share
from kvprofile.planning.objectives import OBJECTIVES, damage_curves
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import Plan
from kvprofile.report.budgets import BYTES, windows_planned
from kvprofile.report.byte_plans import byte_plans
from kvprofile.report.figures import Subject
from kvprofile.report.heads import median_cosine
from kvprofile.report.judgement import DAMAGE, SAVING, covered_bytes, missed_by
from kvprofile.report.plan_maps import BITS, SCALE, bits_of, candidates, letter, policy_colours


def page_data(subject: Subject, policies: Sequence[str]) -> dict[str, Any]:
    """The page's facts as JSON values; `policies` are all names of the report, in the order of their colours."""
    profile, arrays = subject.profile, subject.arrays
    facts, plan = profile.model, profile.plan
    cosine = None if arrays is None else median_cosine(arrays["key_histogram"])
    colours = [to_hex(colour) for colour in policy_colours(len(policies))]
    return {
        "name": subject.name,
        "budget": plan.asked,
        "layers": facts.layers,
        "kv_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "merged": profile.attention_layers(),
        "sliding": sliding_layers(profile),
        "windows": profile.model.windowed_layers(),
        "held": (facts.window or 1) - 1 if windows_planned(profile) else None,
        "saved": {
            "share": [[head.share for head in layer.heads] for layer in plan.layers],
            "policy": [[head.policy for head in layer.heads] for layer in plan.layers],
            "damage": [[head.damage for head in layer.heads] for layer in plan.layers],
            "codecs": _codecs(plan),
            "windows": window_pairs(profile),
            "total": plan.predicted_damage,
        },
        "cosine": None if cosine is None else np.round(cosine[profile.attention_layers()], 3).tolist(),
        "policies": [
            {"name": name, "colour": colour, "letter": letter(index)}
            for index, (name, colour) in enumerate(zip(policies, colours, strict=True))
        ],
        "scale": [to_hex(colormaps[SCALE](step)) for step in range(256)],
        "bytes": BYTES,
        "limits": {"damage": DAMAGE, "saving": SAVING},
        "covered": covered_bytes(profile),
        "missed": missed_by(profile),
        "bits": {"of": {name: bits_of(name) for name in CODECS}, "ends": BITS},
        "unit": plan.unit,
        "solver": _solver(subject),
        "byte_plans": byte_plans(subject, policies),
    }


def _codecs(plan: Plan) -> list[list[tuple[str, str]]] | None:
    """Codec of keys and of values of every head; None where no head has one."""
    pairs = [[(head.key_codec, head.value_codec) for head in layer.heads] for layer in plan.layers]
    return pairs if any(pair != (NO_CODEC, NO_CODEC) for layer in pairs for pair in layer) else None


def window_pairs(profile: Profile) -> list[list[tuple[str, str]]]:
    """Codecs of every head of every layer with a window."""
    stock, codecs = [(NO_CODEC, NO_CODEC)] * profile.model.kv_heads, profile.plan.codecs
    return [codecs.get(layer, stock) for layer in profile.model.windowed_layers()]


def sliding_layers(profile: Profile) -> int:
    """How many layers keep a window of tokens instead of all, and are no part of the plan's bytes."""
    if windows_planned(profile):
        return 0
    return sum(kind.startswith(("sliding", "chunked")) for kind in profile.model.attention)


def _solver(subject: Subject) -> dict[str, Any] | None:
    """The curves and settings that `allocate` goes by; None where no damage is at hand, or bytes are what is spent.

    Of every head, or of every layer where a plan has a share for each, only the policies are there that its envelope takes
    somewhere: `candidates`. `curves` are float64, little-endian, in base64: group, candidate, head, budget.
    """
    profile, measured = subject.profile, subject.profile.statistics.damage
    if (
        subject.arrays is None
        or profile.plan.bytes is not None
        or measured is None
        or not OBJECTIVES[profile.plan.objective].keys() <= set(measured.kinds)
    ):
        return None
    names = candidates(profile)
    cost = damage_curves(subject.arrays["damage_mean"].astype(np.float64), profile.statistics, profile.plan.objective)
    groups = cost[:, [measured.policies.index(name) for name in names]]  # (layers, policies, heads, budgets)
    if profile.plan.granularity == "head":
        groups = groups.transpose(0, 2, 1, 3).reshape(-1, len(names), 1, groups.shape[-1])
    tokens = profile.calibration.measured.tokens
    floor = [protected_share(profile.policies[name].protection, tokens) for name in names]
    budgets = np.array(measured.budgets)
    taken = lower_envelope(policy_choices(budgets, groups.sum(axis=2), floor), STEPS).choice
    chosen = [sorted(set(row.tolist())) for row in taken]
    curves = [group[some] for group, some in zip(groups, chosen, strict=True)]
    return {
        "steps": STEPS,
        "budgets": budgets.tolist(),
        "policies": names,
        "floor": floor,
        "granularity": profile.plan.granularity,
        "flags": _flags(profile, names),
        "candidates": chosen,
        "curves": _encoded(np.concatenate([curve.ravel() for curve in curves])),
    }


def _flags(profile: Profile, names: Sequence[str]) -> list[str]:
    """What `kvprofile plan` has to be told beside the budget to solve as the page does: by damage, among these policies."""
    plan = profile.plan
    flags = [] if plan.policy in (AUTO, *names) else ["--policy", AUTO]
    flags += [] if plan.rule == "damage" else ["--rule", "damage"]
    cosine = all(profile.policies[name].affinity == "cosine" for name in names)
    return flags if plan.mode == "exact" or cosine else [*flags, "--mode", "exact"]


def _encoded(numbers: NDArray[np.float64]) -> str:
    return base64.b64encode(numbers.astype("<f8").tobytes()).decode()
