"""What to see in a figure, in words and the profile's own numbers."""

from collections import Counter
from collections.abc import Sequence

from kvprofile.profile.profile import Profile
from kvprofile.report.budgets import Cost
from kvprofile.report.heads import common_threshold, seen_layers
from kvprofile.report.measured import measured_damage, own_check
from kvprofile.report.numbers import number


def slots_caption(profile: Profile) -> str:
    """How unequal the plan is, and where it keeps most."""
    heads = [head.share for layer in profile.plan.layers for head in layer.heads]
    whole, few = sum(share >= 1 for share in heads), sum(share < 0.1 for share in heads)
    text = f"Yellow heads keep nearly every token, dark blue ones few: of {len(heads)}, {whole or 'none'} keep all, "
    text += f"{few or 'none'} less than a tenth."
    layers = sorted(profile.plan.layers, key=lambda layer: layer.share)
    if len(layers) >= 6 and layers[-1].share > layers[0].share:
        most = ", ".join(str(layer.layer) for layer in layers[:-4:-1])
        least = ", ".join(str(layer.layer) for layer in layers[:3])
        text += f" Layers {most} keep most, layers {least} least."
    stock = profile.model.layers - len(profile.plan.layers)
    if stock:
        packed = len(profile.plan.windows)
        kept = "they keep their stock cache" if not packed else f"{packed} of them are packed, the others stock"
        text += f" The {stock} grey layers have no full attention: {kept} and are not merged."
    return text


def bits_caption(profile: Profile) -> str:
    """How bits are spread over the heads."""
    counts = Counter(pair for pairs in profile.plan.codecs.values() for pair in pairs)
    frequent = [keys if keys == values else f"{keys}/{values}" for (keys, values), _ in counts.most_common(3)]
    text = "Bits that a number takes: one figure where keys and values are alike, or keys/values. "
    if len(counts) == 1:
        return f"{text}All heads have {frequent[0]}."
    return f"{text}{len(counts)} pairs of codecs are in use, most often {', '.join(frequent)}."


def policies_caption(profile: Profile) -> str:
    """Which policies share the heads."""
    counts = Counter(head.policy for layer in profile.plan.layers for head in layer.heads)
    (name, count), *others = counts.most_common(2)
    if not others:
        return f"Every head follows {name}."
    most = f", {name} most often ({count} of {counts.total()} heads)" if count > others[0][1] else ""
    return f"How each head gives up its slots, a letter and a colour for each policy: {len(counts)} are in use{most}."


def thresholds_caption(profile: Profile) -> str:
    """What the thresholds of a plan with one policy show."""
    return f"{policies_caption(profile)[:-1]}; the darker, the lower its threshold and the more it merges."


def damage_caption(profile: Profile, rows: Sequence[Cost]) -> str:
    """What a smaller budget would cost, and whether the prediction held."""
    own = profile.plan.asked
    text = "Lower is better; a step on the scale is a factor of ten. "
    smaller = [row for row in rows if row.budget < own and row.damage]
    if smaller and profile.plan.predicted_damage:
        half = min(smaller, key=lambda row: abs(row.budget - own / 2))
        factor = number((half.damage or 0) / profile.plan.predicted_damage)
        what = "A budget of" if profile.plan.bytes is None else "Of the bytes"
        text += f"{what} {half.budget:g} instead of {own:g} would cost {factor} times the damage. "
    if profile.check is not None and profile.plan.predicted_damage is not None:
        found = measured_damage(own_check(profile).fidelity, profile.plan.objective)
        text += (
            f"Predicted for the plan: {number(profile.plan.predicted_damage)} nats per token, measured on held-out text: "
            f"{number(found)} (the diamonds)."
        )
    return text


def ratios_caption(profile: Profile) -> str:
    """Whether layers differ more than samples do: persistence."""
    threshold = profile.statistics.thresholds[common_threshold(profile)]
    text = (
        f"A line for each layer, over all thresholds ({profile.statistics.rule} sets); the band is one standard deviation "
        f"over samples, the mean over heads. The dots are the same layers at {_at(threshold)}, in the same colours. "
    )
    rows = [row for row in profile.statistics.persistence if row.between_layers > 0]
    if not rows or len(seen_layers(profile)) < 2:
        return text
    row = min(rows, key=lambda row: abs(row.threshold - threshold))
    return text + (
        f"If the dots lie further apart than their bars are long, the ratio belongs to the model, not to the text: at "
        f"{_at(row.threshold)} layers differ by {number(row.between_layers)}, samples of one kind by "
        f"{number(row.between_samples)}."
    )


def _at(threshold: float) -> str:
    return f"ε = {threshold:g}".replace(" ", "\N{NO-BREAK SPACE}")
