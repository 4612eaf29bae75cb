"""Where a profile comes from, and how steady its ratios are: facts as rows of a table."""

from collections import Counter

from kvprofile.profile.profile import Profile
from kvprofile.report.numbers import count, duration, number
from kvprofile.report.plan_words import asked


def about(profile: Profile) -> list[tuple[str, str]]:
    """What was calibrated, on what, when and with what; the command is shown beside it."""
    facts, made, text, plan = profile.model, profile.created, profile.calibration, profile.plan
    kinds = Counter(facts.attention)
    attention = ", ".join(f"{times} {kind.replace('_', ' ')}" for kind, times in kinds.most_common())
    spread = ", ".join(f"{name} {times}" for name, times in text.measured.kinds.items())
    return [
        ("Model", f"{facts.name} from {facts.source}" + (f", revision {facts.revision}" if facts.revision else "")),
        (
            "Architecture",
            f"{facts.architecture}: {facts.layers} layers ({attention}), {count(facts.query_heads, 'query head')}, "
            f"{count(facts.kv_heads, 'KV head')} of {facts.head_dim} numbers",
        ),
        ("Text", text.text),
        (
            "Calibrated on",
            f"{text.measured.samples} samples of {text.measured.tokens:,} tokens ({spread}); "
            f"checked on {text.held_out.samples} others",
        ),
        (
            "Plan",
            f"{asked(plan)}, {plan.mode} mode, policy {plan.policy}, rule {plan.rule}, a share for every "
            f"{plan.granularity}, objective {plan.objective}",
        ),
        ("Numbers", f"{text.dtype} on {text.device}, seed {text.seed}"),
        (
            "Versions",
            f"kvprofile {made.kvprofile}, Python {made.python}, torch {made.torch}, transformers {made.transformers}",
        ),
        ("When", f"{made.time.replace('T', ' ').replace('+00:00', ' UTC')}, in {duration(made.seconds)}"),
        ("Fingerprints", f"model configuration {facts.config_hash[:12]}, token ids {text.digest[:12]}"),
    ]


def persistence_table(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """Standard deviations of the ratio, a column for each threshold of the profile's persistence table: header and rows."""
    columns = profile.statistics.persistence
    rows: dict[str, list[float | None]] = {
        "slots kept / tokens, mean": [column.ratio for column in columns],
        "a layer, between samples of one kind": [column.between_samples for column in columns],
        "a layer, between kinds of text": [column.between_kinds for column in columns],
        "between layers": [column.between_layers for column in columns],
        "a head, between samples of one kind": [column.head_between_samples for column in columns],
        "a head, between kinds of text": [column.head_between_kinds for column in columns],
        "between heads": [column.between_heads for column in columns],
    }
    if profile.model.kv_heads == 1:  # a layer is its only head
        rows = dict(list(rows.items())[:4])
    rows["rank correlation of layers"] = [column.rank_correlation for column in columns]
    header = ["standard deviation of the ratio", *(f"ε = {column.threshold:g}" for column in columns)]
    return header, [[name, *(number(value) for value in values)] for name, values in rows.items()] if columns else []
