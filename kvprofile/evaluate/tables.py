"""The bench's results as Markdown: one table of everything, then the paired differences, then the parts."""

from collections.abc import Sequence
from typing import Any

from kvprofile.evaluate.bench import PARTS
from kvprofile.evaluate.methods import FULL
from kvprofile.evaluate.summary import lower_is_better

Entry = dict[str, Any]
OVER_MARK = " over"


def markdown(facts: dict[str, Any], summary: Sequence[Entry], groups: Sequence[Entry]) -> str:
    """The whole report as text."""
    parts = [
        f"# {facts['model']}: caches compared",
        "\n".join(f"- {line}" for line in fact_lines(facts)),
        "## All methods",
        "Mean with a 95% bootstrap interval over documents or questions. KL and NLL in nats per token, lower is better; top-1 "
        "and scores in percent. Slots and bytes are those stored right after the context. The best of each budget is bold; a "
        "method whose protected tokens alone take more than the budget is marked *over* and is not compared as an equal.",
        main_table(summary),
        "## Against the full cache",
        "Paired differences, method minus full cache, with 95% bootstrap intervals.",
        difference_table(summary, "against_full"),
    ]
    if any("against_best_rival" in estimate for entry in summary for estimate in entry["measures"].values()):
        parts += [
            "## Against the best rival",
            "Paired differences, method minus the best other method of the same budget (named), with 95% bootstrap intervals.",
            difference_table(summary, "against_best_rival"),
        ]
    for bench in dict.fromkeys(entry["bench"] for entry in groups):
        own = [entry for entry in groups if entry["bench"] == bench]
        if len({entry["group"] for entry in own}) > 1:
            parts += [f"## {bench}, by part", group_table(own)]
    return "\n\n".join(parts) + "\n"


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """The circumstances, one sentence each."""
    lines = [
        f"Model {facts['model']} from {facts['source']}, {facts['dtype']} on {facts['device']}; seed {facts['seed']}.",
        *(f"Profile {name}: {text}." for name, text in facts["profiles"].items()),
    ]
    if facts["fidelity"]:
        lines.append(
            f"Fidelity: {facts['fidelity']}. The context is read, compressed, and only then read from: passages of it again "
            "(recall), facts hidden in it (look-up), the text that follows (continuation)."
        )
    if facts["tasks"]:
        known = (
            "not known before the context was compressed"
            if facts["question"] == "after"
            else "compressed with the context"
        )
        lines.append(f"Tasks: the question is {known}; contexts of up to {facts['tokens']} tokens; greedy answers.")
        lines += [
            f"{name}: {task['examples']} questions, score is: {task['metric']}; "
            f"{'chat template applied' if task['chat_template'] else 'no chat template'}"
            + (f"; answer prefix {task['prefix']!r}" if task["prefix"] else "")
            + "."
            for name, task in facts["tasks"].items()
        ]
    return lines + facts["notes"]


def main_table(summary: Sequence[Entry]) -> str:
    """Every method with slots, bytes and its measures. The likelihoods of fidelity are among the differences."""
    measures = [name for name in _columns(summary) if not _of_fidelity(name, " NLL")]
    best = _best(summary, measures)
    rows = []
    for entry in summary:
        cells = [
            _cell(entry["measures"].get(name), name, (entry["method"], entry["slots_asked"]) in best[name])
            for name in measures
        ]
        rows.append([*_names(entry), *cells])
    return table(["budget", "method", "slots", "bytes", *measures], rows)


def difference_table(summary: Sequence[Entry], which: str) -> str:
    """Every method's paired differences."""
    hidden = (" KL", " top-1") if which == "against_full" else (" NLL", " top-1")
    measures = [name for name in _columns(summary) if not _of_fidelity(name, *hidden)]
    rows = []
    for entry in summary:
        if entry["method"] == FULL:
            continue
        cells = []
        for name in measures:
            estimate = entry["measures"].get(name, {})
            rival = f" {estimate['best_rival']}" if which == "against_best_rival" and "best_rival" in estimate else ""
            cells.append(_cell(estimate.get(which), name, False, signed=True) + rival)
        rows.append([*_names(entry)[:2], *cells])
    return table(["budget", "method", *measures], rows)


def group_table(groups: Sequence[Entry]) -> str:
    """Means of one bench's groups, a row for each method, a column for each group and measure."""
    names = list(dict.fromkeys(entry["group"] for entry in groups))
    measures = [
        name for name in _columns(groups) if " without " not in name and not _of_fidelity(name, " NLL", " top-1")
    ]
    rows = []
    for method in dict.fromkeys((entry["slots_asked"], entry["method"]) for entry in groups):
        own = {entry["group"]: entry for entry in groups if (entry["slots_asked"], entry["method"]) == method}
        cells = [
            " / ".join(_number(own[name]["measures"][measure]["mean"], measure) for measure in measures)
            if name in own
            else ""
            for name in names
        ]
        rows.append([f"{method[0]:g}", method[1], *cells])
    return f"Means of {' / '.join(measures)}.\n\n" + table(["budget", "method", *names], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _columns(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry["measures"]))


def _of_fidelity(measure: str, *kinds: str) -> bool:
    return measure.startswith(PARTS) and measure.endswith(kinds)


def _best(summary: Sequence[Entry], measures: Sequence[str]) -> dict[str, set[tuple[str, float]]]:
    found: dict[str, set[tuple[str, float]]] = {name: set() for name in measures}
    for budget in {entry["slots_asked"] for entry in summary if entry["method"] != FULL}:
        rivals = [
            entry
            for entry in summary
            if entry["slots_asked"] == budget and entry["method"] != FULL and not entry["over_budget"]
        ]
        for name in measures:
            means = [entry["measures"][name]["mean"] for entry in rivals if name in entry["measures"]]
            if len(set(means)) < 2:  # alone, or all alike
                continue
            top = min(means) if lower_is_better(name) else max(means)
            found[name] |= {
                (entry["method"], budget) for entry in rivals if entry["measures"].get(name, {}).get("mean") == top
            }
    return found


def _names(entry: Entry) -> list[str]:
    slots = f"{entry['slots']:.3f}{OVER_MARK if entry['over_budget'] else ''}"
    return [f"{entry['slots_asked']:g}", entry["method"], slots, f"{entry['bytes']:.3f}"]


def _cell(estimate: dict[str, Any] | None, measure: str, bold: bool, signed: bool = False) -> str:
    if estimate is None:
        return ""
    mean, (low, high) = estimate["mean"], estimate["interval"]
    number = _number(mean, measure, signed)
    text = f"**{number}**" if bold else number
    if low == high == mean:
        return text
    return f"{text} ({_number(low, measure, signed)} to {_number(high, measure, signed)})"


def _number(value: float, measure: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if measure.endswith("top-1"):
        return f"{100 * value:{sign}.1f}"
    return (
        f"{value:{sign}.4f}"
        if measure.endswith(" KL")
        else f"{value:{sign}.3f}"
        if measure.endswith(" NLL")
        else f"{value:{sign}.1f}"
    )
