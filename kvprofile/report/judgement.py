"""Is the plan worth it? One judgement and one reason, from what the check measured and what other budgets would cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvprofile.profile.profile import Profile
from kvprofile.report.budgets import Cost, windows_planned
from kvprofile.report.measured import kinds_of, measured_damage, own_check
from kvprofile.report.numbers import number, rough

DAMAGE = 0.01  # nats per token: perplexity rises by about 1%
SAVING = 0.1  # of the cache's bytes: below, a stock cache is simpler
LIMIT = f"below {DAMAGE:g} nats per token"
MISSED = 1.5  # a prediction further off than this factor is remarked on, and other predictions are corrected by it


@dataclass(frozen=True)
class Judgement:
    """`word` for the heading, `reason` as one sentence. good: worth it as it is; None where it cannot be told."""

    word: str
    reason: str
    good: bool | None


def judge(profile: Profile, rows: Sequence[Cost] = ()) -> Judgement:
    """Worth it, worth it at another budget, or not worth it.

    Worth it: the damage is at most `DAMAGE` nats per token and at least `SAVING` of the cache's bytes are saved. `rows` are
    what other budgets would cost (`costs`); without them only the plan's own budget is judged.
    """
    budget, covered = profile.plan.asked, covered_bytes(profile)
    damage, saved = _own(profile, covered)
    if damage is None:
        return Judgement("Not judged", "Neither a check nor damage curves are at hand.", None)
    factor = max(1.0, missed_by(profile) or 1.0)
    fitting = [
        row.budget
        for row in rows
        if row.damage is not None and row.damage * factor <= DAMAGE and covered * (1 - row.budget) >= SAVING
    ]
    paid, predicted = _paid(profile, damage), "" if profile.check else ", as predicted"
    if damage <= DAMAGE and saved >= SAVING:
        smaller = [other for other in fitting if other < budget]
        further = (
            f" Down to {_called(profile, min(smaller))} the damage is predicted to stay {LIMIT}." if smaller else ""
        )
        return Judgement(
            f"Worth it{predicted}", f"It saves {rough(saved)} of {_whole(profile)}, and {paid}.{further}", True
        )
    if fitting:
        other = min(fitting)
        why = paid if damage > DAMAGE else f"only {rough(saved)} of the bytes are saved"
        return Judgement(
            f"Worth it at {other:g}, as predicted",
            f"At {budget:g} {why}; at {other:g} the damage is predicted to stay {LIMIT}, with "
            f"{rough(covered * (1 - other))} of the bytes saved.",
            False,
        )
    price = f"{rough(saved)} of the bytes for {_price(profile, damage)}"
    return Judgement(f"Not worth it: {price}", _hopeless(profile, rows, covered), False)


def _whole(profile: Profile) -> str:
    return "the bytes" if profile.plan.bytes is None else "a 16-bit cache's bytes"


def _called(profile: Profile, amount: float) -> str:
    return f"a budget of {amount:g}" if profile.plan.bytes is None else f"{amount:g} of the bytes"


def covered_bytes(profile: Profile) -> float:
    """The planned layers' part of the cache's bytes at the calibration's length: measured, or their part of the layers."""
    check = profile.check
    if windows_planned(profile):
        return 1.0
    # Where bits are planned too, the slots that are gone say nothing of the bytes.
    if profile.plan.bytes is None and check is not None and (gone := 1 - own_check(profile).achieved.mean) > 0.01:
        return min(1.0, max(0.0, (1 - check.bytes_ratio) / gone))
    return len(profile.attention_layers()) / profile.model.layers


def missed_by(profile: Profile) -> float | None:
    """Measured damage over predicted damage of the plan; None where one of them is missing or 0."""
    predicted = profile.plan.predicted_damage
    if profile.check is None or not predicted:
        return None
    return measured_damage(own_check(profile).fidelity, profile.plan.objective) / predicted or None


def prediction_remark(profile: Profile) -> str | None:
    """One sentence where the check measured more than `MISSED` times what was predicted, or less by as much."""
    times = missed_by(profile)
    if times is None or 1 / MISSED <= times <= MISSED:
        return None
    found = number(measured_damage(own_check(profile).fidelity, profile.plan.objective))
    told = f"Predicted {number(profile.plan.predicted_damage)} nats per token, measured {found}: "
    if times > 1:
        return f"{told}{number(times)} times as much, so take the predictions for other budgets with that factor."
    return f"{told}{number(1 / times)} times less, so the predictions for other budgets are cautious."


def tokens_changed(profile: Profile) -> float | None:
    """How often the most likely token is another one than with the full cache, on the kind of text where it is oftenest."""
    if profile.check is None:
        return None
    fidelity = own_check(profile).fidelity
    return 1 - min(getattr(fidelity, f"{kind}_top1") for kind in kinds_of(fidelity))


def _own(profile: Profile, covered: float) -> tuple[float | None, float]:
    """Damage in nats per token, measured or else predicted, and the part of the bytes that is saved."""
    plan = profile.plan
    if plan.bytes is None:
        saved = covered * (1 - plan.asked) if profile.check is None else 1 - profile.check.bytes_ratio
    else:  # what the check measured may be of a 32-bit cache, of which packed slots are a smaller part than of what is served
        saved = covered * (1 - (plan.predicted_bytes or plan.bytes))
    if profile.check is None:
        return plan.predicted_damage, saved
    return measured_damage(own_check(profile).fidelity, plan.objective), saved


def _paid(profile: Profile, damage: float) -> str:
    changed = tokens_changed(profile)
    if changed is None:
        return f"a damage of {number(damage)} nats per token is predicted, not measured"
    return f"{rough(changed)} of the most likely tokens change"


def _price(profile: Profile, damage: float) -> str:
    changed = tokens_changed(profile)
    return f"{number(damage)} nats per token (predicted)" if changed is None else f"{rough(changed)} of the tokens"


def _hopeless(profile: Profile, rows: Sequence[Cost], covered: float) -> str:
    merged, layers = len(profile.attention_layers()), profile.model.layers
    few = (
        f"Only {merged} of {layers} layers are merged, {rough(covered)} of the bytes at "
        f"{profile.calibration.measured.tokens:,} tokens. "
        if merged < layers
        else ""
    )
    if any(row.damage is not None for row in rows):
        return f"{few}No budget saves {SAVING:.0%} of the bytes and keeps the damage {LIMIT}."
    return f"{few}Expected were {SAVING:.0%} of the bytes and a damage {LIMIT}; other budgets were not tried."
