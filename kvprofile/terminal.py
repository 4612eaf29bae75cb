"""What the command line prints: tables and verdicts for people on stderr or stdout, JSON where asked."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvprofile.profile import Check, HeadPlan, Profile

if TYPE_CHECKING:
    from kvprofile.generate import Generation
    from kvprofile.model_names import Alias

BAR = 20


def as_json(profile: Profile) -> str:
    """Model, plan, check and persistence as JSON."""
    values = profile.model_dump(mode="json")
    chosen = {name: values[name] for name in ("model", "policies", "plan", "check")}
    return json.dumps({**chosen, "persistence": values["statistics"]["persistence"]}, indent=1)


def generation_as_json(generation: "Generation") -> str:
    """A generation's fields as JSON."""
    return json.dumps(asdict(generation), indent=1, ensure_ascii=False)


def show(profile: Profile) -> None:
    """Print the plan by layer with bars, the check and the persistence to stdout."""
    console = Console()
    plan, facts = profile.plan, profile.model
    console.print(
        f"[bold]{facts.name}[/] ({facts.architecture}, {facts.layers} layers x {facts.kv_heads} KV heads), "
        f"budget {plan.budget:g}, "
        f"{plan.mode} mode, policy {plan.policy}, shares by {plan.shares} for every {plan.granularity}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", min_width=BAR, no_wrap=True)
    table.add_column("heads", overflow="fold")
    for layer in plan.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.share:.3f}",
            "█" * round(layer.share * BAR) or "▏",
            _heads(layer.heads, plan.mode),
        )
    console.print(table)
    console.print(_verdict(profile))
    if profile.statistics.persistence:
        console.print(_persistence(profile))


def verdict(profile: Profile) -> None:
    """Print the check's figures in a sentence or two to stderr."""
    Console(stderr=True, soft_wrap=True).print(_verdict(profile))


def models(aliases: Sequence["Alias"], as_json: bool) -> None:
    """Print the alias table to stdout."""
    if as_json:
        rows = [
            {"name": alias.name, "source": alias.kind, "where": alias.where, "note": alias.note} for alias in aliases
        ]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("alias", "from", "note"):
        table.add_column(column)
    for alias in aliases:
        origin = "PyPI" if alias.kind == "wheel" else "hub"
        table.add_row(alias.name, f"{origin} {alias.where}", alias.note)
    Console().print(table)


def _verdict(profile: Profile) -> str:
    plan = profile.plan
    if profile.check is None:
        return f"Plan: keep {plan.predicted_ratio:.1%} of the slots (asked {plan.budget:.1%}). Not checked on held-out text."
    check = profile.check
    own = check.threshold if plan.mode == "threshold" and check.threshold else check.exact
    lines = [
        f"Asked to keep {plan.budget:.1%} of the slots; held-out text keeps {own.achieved.mean:.1%} "
        f"(sd {own.achieved.std:.1%}, worst {own.achieved.worst:.1%}), {check.bytes_ratio:.1%} of the bytes.",
        f"Against the full cache: KL {own.fidelity.recall_kl:.4f} nats on recall (same top token "
        f"{own.fidelity.recall_top1:.1%}), {own.fidelity.continuation_kl:.4f} on continuation "
        f"({own.fidelity.continuation_top1:.1%}).",
    ]
    if not _is_uniform(profile, check):
        lines.append(
            f"Uniform shares of the same size: KL {check.uniform.fidelity.recall_kl:.4f} on recall, "
            f"{check.uniform.fidelity.continuation_kl:.4f} on continuation."
        )
    return "\n".join(lines)


def _is_uniform(profile: Profile, check: Check) -> bool:
    return check.exact == check.uniform


def _persistence(profile: Profile) -> Table:
    table = Table(title="Persistence: standard deviation of the compression ratio", box=None, pad_edge=False)
    for name in ("threshold", "ratio", "samples", "kinds", "layers", "head: samples", "kinds", "heads"):
        table.add_column(name, justify="right")
    for row in profile.statistics.persistence:
        cells = (
            row.between_samples,
            row.between_kinds,
            row.between_layers,
            row.head_between_samples,
            row.head_between_kinds,
            row.between_heads,
        )
        table.add_row(
            f"{row.threshold:.2f}", f"{row.ratio:.2f}", *("-" if cell is None else f"{cell:.3f}" for cell in cells)
        )
    return table


def _heads(heads: Sequence[HeadPlan], mode: str) -> str:
    """What each head does, or, where there are many, how many follow which policy."""
    if len(heads) > 4:
        counts = Counter(head.policy for head in heads)
        shares = [head.share for head in heads]
        parts = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return f"{min(shares):.2f}-{max(shares):.2f}: {parts}"
    if mode == "threshold":
        return ", ".join(f"{head.policy} {'-' if head.epsilon is None else f'{head.epsilon:.3f}'}" for head in heads)
    return ", ".join(f"{head.share:.2f} {head.policy}" for head in heads)
