"""Two profiles set against each other: what differs, their damage on one scale, and where the second keeps more slots."""

from collections.abc import Sequence

from kvprofile.report.curves import overlaid_damage
from kvprofile.report.facts import about
from kvprofile.report.figures import Subject
from kvprofile.report.plan_maps import difference_map
from kvprofile.report.style import Plot


def differing(subjects: Sequence[Subject]) -> tuple[list[list[tuple[str, str]]], list[str]]:
    """Of each profile the facts that are not the same in all of them, and the names of those that are."""
    told = [about(subject.profile) for subject in subjects]
    same = [rows[0][0] for rows in zip(*told, strict=True) if len({text for _, text in rows}) == 1]
    return [[row for row in rows if row[0] not in same] for rows in told], same


def compared(subjects: Sequence[Subject], width: int) -> dict[str, Plot]:
    """The figures that show both profiles at once, where their numbers allow it."""
    first, second = subjects
    plots = {}
    if all(any(row.damage for row in subject.costs) for subject in subjects):
        plots["damage"] = overlaid_damage(
            [(subject.name, subject.profile, subject.costs) for subject in subjects], width
        )
    difference = difference_map(first.profile, second.profile, width)
    if difference is not None:
        plots["difference"] = difference
    return plots


def difference_caption(subjects: Sequence[Subject]) -> str:
    """How far the two plans are from each other; or why they cannot be laid over each other."""
    profiles = [subject.profile for subject in subjects]
    shapes = [f"{profile.model.layers} x {profile.model.kv_heads}" for profile in profiles]
    if shapes[0] != shapes[1] or profiles[0].attention_layers() != profiles[1].attention_layers():
        return f"The two have not the same heads ({' and '.join(shapes)}), so their plans cannot be subtracted."
    heads = [[head for layer in profile.plan.layers for head in layer.heads] for profile in profiles]
    pairs = list(zip(*heads, strict=True))
    more = sum(other.share > own.share for own, other in pairs)
    less = sum(other.share < own.share for own, other in pairs)
    changed = sum(other.policy != own.policy for own, other in pairs)
    return (
        f"Blue heads keep more in {subjects[1].name} than in {subjects[0].name}, red ones less: {more} of {len(pairs)} keep "
        f"more, {less} less, and {changed} follow another policy."
    )
