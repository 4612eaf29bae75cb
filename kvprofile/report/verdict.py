"""The verdict in words and tables: whether it is worth it, what was asked and achieved, and what uniform shares do."""

from collections.abc import Sequence

from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import Fidelity, Plan
from kvprofile.report.budgets import Cost
from kvprofile.report.judgement import judge, prediction_remark
from kvprofile.report.measured import kinds_of, measured_damage, own_check
from kvprofile.report.numbers import number, percent

READ = {"recall": "passages of the context repeated", "continuation": "the text that follows it"}


def verdict(profile: Profile, rows: Sequence[Cost] = ()) -> list[str]:
    """The judgement and what it rests on, a sentence or two an entry: for the terminal, the report and notebooks alike.

    `rows` are what other budgets would cost; without them only the plan's own budget is judged.
    """
    judgement = judge(profile, rows)
    return [f"{judgement.word}. {judgement.reason}", *evidence(profile)]


def evidence(profile: Profile) -> list[str]:
    """What was asked, achieved and measured, and what uniform shares do instead."""
    plan, check = profile.plan, profile.check
    if check is None:
        predicted = (
            "" if plan.predicted_damage is None else f", at a predicted damage of {number(plan.predicted_damage)} nats"
        )
        return [
            f"Keeps {percent(plan.predicted_ratio)} of the slots (asked {_asked(plan)}){predicted}; not "
            "checked on held-out text."
        ]
    own = own_check(profile)
    # What is asked for is a part of a 16-bit cache, what is measured one of the cache at hand.
    slots, stock = ("", "") if plan.bytes is None else (" of the slots", f" of a cache in {profile.calibration.dtype}")
    lines = [
        f"Asked to keep {percent(plan.asked)} of the {plan.unit}; held-out text keeps {percent(own.achieved.mean)}{slots} "
        f"(sd {percent(own.achieved.std)}, worst {percent(own.achieved.worst)}), {percent(check.bytes_ratio)} of the "
        f"bytes{stock}.",
        f"Against the full cache, in nats per token: {_kinds(own.fidelity)}.",
    ]
    if own == check.uniform:
        lines.append("Every head has the same share.")
    else:
        own_kl, even_kl = (measured_damage(mode.fidelity, plan.objective) for mode in (own, check.uniform))
        times = f", {_times(own_kl, even_kl)}" if own_kl > 0 else ""
        moved = ", ".join(f"{number(_kl(check.uniform.fidelity, kind))} on {kind}" for kind in kinds_of(own.fidelity))
        lines.append(f"Uniform shares of the same size ({check.uniform_policy}): KL {moved}{times}.")
    remark = prediction_remark(profile)
    return [*lines, remark] if remark else lines


def tiles(profile: Profile) -> list[tuple[str, str, str]]:
    """The check's figures as label, number and remark."""
    plan, check = profile.plan, profile.check
    if check is None:
        rows = [("slots kept, as planned", percent(plan.predicted_ratio), f"asked {_asked(plan)}")]
        if plan.predicted_bytes is not None:
            rows.append(("bytes, as planned", percent(plan.predicted_bytes), "of the planned layers' in 16 bits"))
        if plan.predicted_damage is not None:
            rows.append(("damage, predicted", number(plan.predicted_damage), "nats per token"))
        return rows
    own = own_check(profile)
    rows = [
        (
            "slots kept",
            percent(own.achieved.mean),
            f"asked {_asked(plan)}, sd {percent(own.achieved.std)}, worst {percent(own.achieved.worst)}",
        ),
        ("bytes", percent(check.bytes_ratio), "of the full cache, every layer counted"),
    ]
    for kind in kinds_of(own.fidelity):
        top = percent(getattr(own.fidelity, f"{kind}_top1"))
        rows.append(
            (f"KL, {kind}", number(getattr(own.fidelity, f"{kind}_kl")), f"nats per token; same top token {top}")
        )
    own_kl, even_kl = (measured_damage(mode.fidelity, plan.objective) for mode in (own, check.uniform))
    if own != check.uniform and own_kl > 0:
        rows.append(
            ("uniform shares", f"{number(even_kl / own_kl)}×", f"the KL, with {check.uniform_policy} in every head")
        )
    return rows


def check_table(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """The check, a column for the plan in each mode that was measured and one for uniform shares: header and rows."""
    check = profile.check
    if check is None:
        return [], []
    modes = {"the plan, exact mode": check.exact}
    if check.threshold is not None:
        modes["the plan, threshold mode"] = check.threshold
    modes[f"uniform, {check.uniform_policy}"] = check.uniform
    columns = modes.values()
    rows = [
        [
            "slots kept",
            *(f"{percent(mode.achieved.mean)} ±\N{NO-BREAK SPACE}{percent(mode.achieved.std)}" for mode in columns),
        ]
    ]
    for kind in kinds_of(check.exact.fidelity):
        rows.append([f"KL, {kind}", *(_divergence(mode.fidelity, kind) for mode in columns)])
    for kind in kinds_of(check.exact.fidelity):
        rows.append([f"same top token, {kind}", *(percent(getattr(mode.fidelity, f"{kind}_top1")) for mode in columns)])
    return ["", *modes], rows


def _asked(plan: Plan) -> str:
    return f"{percent(plan.asked)}{'' if plan.bytes is None else ' of the bytes'}"


def _times(own: float, even: float) -> str:
    return f"{number(even / own)} times as much" if even >= own else f"{number(own / even)} times less"


def _kinds(fidelity: Fidelity) -> str:
    parts = []
    for kind in kinds_of(fidelity):
        top = percent(getattr(fidelity, f"{kind}_top1"))
        parts.append(f"KL {number(_kl(fidelity, kind))} on {kind} ({READ[kind]}; same top token {top})")
    return ", ".join(parts)


def _kl(fidelity: Fidelity, kind: str) -> float:
    return float(getattr(fidelity, f"{kind}_kl"))


def _divergence(fidelity: Fidelity, kind: str) -> str:
    low, high = getattr(fidelity, f"{kind}_kl_interval")
    return f"{number(getattr(fidelity, f'{kind}_kl'))} [{number(low)},\N{NO-BREAK SPACE}{number(high)}]"
