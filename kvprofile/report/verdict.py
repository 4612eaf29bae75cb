"""The check in words and tables: what was asked, what was achieved, at what cost, against uniform shares."""

from kvprofile.profile import Fidelity, Profile
from kvprofile.report.measured import kinds_of, measured_damage, own_check
from kvprofile.report.numbers import number, percent


def verdict(profile: Profile) -> str:
    """The check in one sentence."""
    plan, check = profile.plan, profile.check
    if check is None:
        predicted = (
            "" if plan.predicted_damage is None else f", at a predicted damage of {number(plan.predicted_damage)} nats"
        )
        return (
            f"Keeps {percent(plan.predicted_ratio)} of the KV slots (asked {percent(plan.budget)}){predicted}; "
            "not checked on held-out text."
        )
    own = own_check(profile)
    kept = (
        f"Keeps {percent(own.achieved.mean)} of the KV slots (asked {percent(plan.budget)}) and "
        f"{percent(check.bytes_ratio)} of the bytes; on held-out text the answers move by KL {_kinds(own.fidelity, 'kl')} "
        f"and keep the same top token {_kinds(own.fidelity, 'top1')} of the time"
    )
    if own == check.uniform:
        return f"{kept}; every head has the same share."
    own_kl, even_kl = (measured_damage(mode.fidelity, plan.objective) for mode in (own, check.uniform))
    times = f", {_times(own_kl, even_kl)}" if own_kl > 0 else ""
    moved = f"move them by {_kinds(check.uniform.fidelity, 'kl')}{times}"
    return f"{kept}; uniform shares of the same size ({check.uniform_policy}) {moved}."


def tiles(profile: Profile) -> list[tuple[str, str, str]]:
    """The check's figures as label, number and remark."""
    plan, check = profile.plan, profile.check
    if check is None:
        rows = [("slots kept, as planned", percent(plan.predicted_ratio), f"asked {percent(plan.budget)}")]
        if plan.predicted_damage is not None:
            rows.append(("damage, predicted", number(plan.predicted_damage), "nats per token"))
        return rows
    own = own_check(profile)
    rows = [
        (
            "slots kept",
            percent(own.achieved.mean),
            f"asked {percent(plan.budget)}, sd {percent(own.achieved.std)}, worst {percent(own.achieved.worst)}",
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


def _times(own: float, even: float) -> str:
    return f"{number(even / own)} times as far" if even >= own else f"{number(own / even)} times less far"


def _kinds(fidelity: Fidelity, figure: str) -> str:
    shown = percent if figure == "top1" else number
    parts = [f"{shown(getattr(fidelity, f'{kind}_{figure}'))} ({kind})" for kind in kinds_of(fidelity)]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _divergence(fidelity: Fidelity, kind: str) -> str:
    low, high = getattr(fidelity, f"{kind}_kl_interval")
    return f"{number(getattr(fidelity, f'{kind}_kl'))} [{number(low)},\N{NO-BREAK SPACE}{number(high)}]"
