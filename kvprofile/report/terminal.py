"""What the command line prints: tables and verdicts for people on stderr or stdout, JSON where asked."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import HeadPlan
from kvprofile.report.plan_words import asked, codecs_of, kept

if TYPE_CHECKING:
    from kvprofile.calibration.estimate import Estimate
    from kvprofile.doctor.environment import Examination
    from kvprofile.doctor.selftest import SelfTest
    from kvprofile.generation import Generation
    from kvprofile.models.names import Alias
    from kvprofile.report.budgets import Cost

BAR = 20
EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
FEW_HEADS = 4
PLAIN_WIDTH = 120  # columns where the output is no terminal, whose width could be asked


def as_json(profile: Profile) -> str:
    """Model, plan, check and persistence as JSON."""
    values = profile.model_dump(mode="json")
    chosen = {name: values[name] for name in ("model", "policies", "plan", "check")}
    return json.dumps({**chosen, "persistence": values["statistics"]["persistence"]}, indent=1)


def generation_as_json(generation: "Generation") -> str:
    """A generation's fields as JSON."""
    return json.dumps(asdict(generation), indent=1, ensure_ascii=False)


def show(profile: Profile, rows: Sequence["Cost"] = ()) -> None:
    """Print plan, verdict and persistence to stdout; `rows` are what other budgets would cost."""
    console = _console()
    plan, facts = profile.plan, profile.model
    console.print(
        f"[bold]{escape(facts.name)}[/] ({facts.architecture}, {facts.layers} layers x {facts.kv_heads} KV heads), "
        f"{asked(plan)}, "
        f"{plan.mode} mode, policy {plan.policy}, rule {plan.rule}, a share for every {plan.granularity}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right", min_width=5, no_wrap=True)
    table.add_column("slots kept", justify="right", min_width=10, no_wrap=True)
    # Codecs' names take the room of the bars.
    bars = not any(codecs_of(head) for layer in plan.layers for head in layer.heads)
    if bars:
        table.add_column("", min_width=BAR, no_wrap=True, style="cyan")
    if few := facts.kv_heads <= FEW_HEADS:
        for head in range(facts.kv_heads):
            table.add_column(f"head {head}", no_wrap=True)
    else:
        table.add_column("each head", no_wrap=True, style="cyan")
        table.add_column("policies")
    for layer in plan.layers:
        cells = [_head(head, plan.mode) for head in layer.heads] if few else _heads(layer.heads)
        filled = [bar(layer.share)] if bars else []
        table.add_row(str(layer.layer), f"{layer.share:.1%}", *filled, *cells)
    console.print(table)
    console.print(f"The plan {kept(plan)}.")
    if plan.windows:
        counts = Counter(codecs_of(head).strip() or "16 bits" for entry in plan.windows for head in entry.heads)
        told = ", ".join(f"{count} in {name}" for name, count in counts.most_common())
        console.print(
            f"{len(plan.windows)} sliding layers keep their window packed, but for the newest tokens: heads {told}."
        )
    if stock := facts.layers - len(plan.layers) - len(plan.windows):
        console.print(f"{stock} other layers (sliding or linear attention) keep their stock cache.")
    _say_verdict(console, profile, rows)
    if profile.statistics.persistence:
        console.print(_persistence(profile))


def verdict(profile: Profile, rows: Sequence["Cost"] = ()) -> None:
    """Print the judgement and the check's figures in a few sentences to stderr; `rows` are what other budgets would cost."""
    _say_verdict(Console(stderr=True, soft_wrap=True), profile, rows)


def estimate(model: str, told: "Estimate", as_json: bool) -> None:
    """Print what a calibration would cost to stdout."""
    total = sum(told.memory.values())
    if as_json:
        print(json.dumps({"model": model, **asdict(told), "seconds": told.seconds, "memory_total": total}, indent=1))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("model", f"{model}, {told.parameters / 1e6:,.0f}M parameters, {told.dtype} on {told.device}")
    table.add_row("text", f"{told.tokens:,} tokens")
    table.add_row(
        "time",
        f"about {_duration(told.seconds)}: measuring {_duration(told.measure_seconds)}, check "
        f"{_duration(told.check_seconds)} (on a machine as busy as now; loading and fetching the model not counted)",
    )
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in told.memory.items())
    table.add_row("memory", f"about {total / 2**30:.1f} GiB: {parts}")
    for name, size in told.devices.items():
        table.add_row(f"  {name}", f"{size / 2**30:.1f} GiB")
    if told.note:
        table.add_row("placement", told.note)
    Console(soft_wrap=True).print(table)


def doctor(found: "Examination", as_json: bool) -> None:
    """Print versions, devices, caches, what is reachable and the problems to stdout."""
    if as_json:
        print(json.dumps(asdict(found), indent=1, default=str))
        return
    console = _console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, text in {**found.versions, **found.devices}.items():
        table.add_row(name, escape(text))
    for name, cache in found.caches.items():
        table.add_row(name, escape(f"{cache.folder}: {_size(cache.size)}, {_size(cache.free)} free on its disk"))
        for model, size in cache.models.items():
            table.add_row("", escape(f"{model}: {_size(size)}"))
    for name, answer in found.reachable.items():
        table.add_row(f"{name} reachable", escape(answer))
    table.add_row("hub token", escape(found.token))
    console.print(table)
    _problems(console, found.problems)
    console.print("To try a device out: kvprofile doctor --device auto")


def self_test(found: "SelfTest", as_json: bool) -> None:
    """Print a device, which back end serves which layer, what was tried on it and what failed to stdout."""
    if as_json:
        print(json.dumps({**asdict(found), "problems": found.problems}, indent=1))
        return
    console = _console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("device", escape(found.device))
    for name, text in {**found.facts, **found.serves}.items():
        table.add_row(name, escape(text))
    for step in found.steps:
        mark = "[green]ok[/]" if step.passed else "[bold red]failed[/]"
        table.add_row(f"{mark} {step.what}, {step.dtype}", escape(step.told))
    console.print(table)
    console.print(f"{len(found.steps)} checks in {found.seconds:.0f} s.")
    _problems(console, found.problems)


def _problems(console: Console, problems: Sequence[str]) -> None:
    if not problems:
        console.print("No problems found.")
    for problem in problems:
        console.print(f"[bold red]Problem:[/] {escape(problem)}")


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
    _console().print(table)


def named(rows: Sequence[dict[str, str]], as_json: bool) -> None:
    """Print a table of names, its columns those of the rows, to stdout."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    _console().print(table)


def _say_verdict(console: Console, profile: Profile, rows: Sequence["Cost"]) -> None:
    from kvprofile.report.verdict import verdict as lines

    for line in lines(profile, rows):
        console.print(escape(line), highlight=False)


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


def bar(share: float, width: int = BAR) -> str:
    """A bar of `width` cells for a share of 1, to an eighth of a cell."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _head(head: HeadPlan, mode: str) -> str:
    """One head's share as a level and a number, and its policy; in threshold mode the threshold instead of the share."""
    level = LEVELS[min(len(LEVELS) - 1, int(head.share * len(LEVELS)))]
    if mode == "threshold":
        return f"{level} {'-' if head.epsilon is None else f'{head.epsilon:.3f}'} {head.policy}"
    return f"{level} {head.share:.2f} {head.policy}{codecs_of(head)}"


def _heads(heads: Sequence[HeadPlan]) -> tuple[str, str]:
    """Where there are many: a level for each head, and how many follow which policy."""
    levels = "".join(LEVELS[min(len(LEVELS) - 1, int(head.share * len(LEVELS)))] for head in heads)
    counts = Counter(f"{head.policy}{codecs_of(head)}" for head in heads)
    return levels, ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _console() -> Console:
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PLAIN_WIDTH)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
