"""All figures of a profile, by name, for a wide page or a narrow one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write
from kvprofile.names import NO_CODEC
from kvprofile.profile.profile import Profile
from kvprofile.report.budgets import Cost
from kvprofile.report.curves import damage_curve, distance_curves, ratio_curves
from kvprofile.report.heads import Arrays, seen_layers
from kvprofile.report.plan_maps import bits_map, policies_map, policy_names, slots_map, thresholds_map
from kvprofile.report.similarity import similarity_maps, similarity_wall
from kvprofile.report.style import WIDE, Plot, png, svg


@dataclass(frozen=True)
class Subject:
    """One profile of a report: its arrays, where they are at hand, what other budgets cost, the heads to look at."""

    name: str
    profile: Profile
    arrays: Arrays | None
    costs: list[Cost]
    chosen: list[tuple[int, int]]


def draw(subject: Subject, width: int, policies: Sequence[str]) -> dict[str, Plot]:
    """Every figure the profile has the numbers for, in the order of the report."""
    profile, arrays = subject.profile, subject.arrays
    plots = {"slots": slots_map(profile, width)}
    heads = [head for layer in profile.plan.layers for head in layer.heads]
    if {codec for pairs in profile.plan.codecs.values() for pair in pairs for codec in pair} != {NO_CODEC}:
        plots["bits"] = bits_map(profile, width)
    # One policy that goes by a threshold: its thresholds say more than its name in every cell.
    if len({head.policy for head in heads}) == 1 and any(head.epsilon is not None for head in heads):
        plots["thresholds"] = thresholds_map(profile, width)
    else:
        plots["policies"] = policies_map(profile, width, policies)
    if any(row.damage for row in subject.costs):
        plots["damage"] = damage_curve(profile, subject.costs, width)
    if arrays is not None:
        plots["similarity"] = similarity_maps(
            arrays["similarity_map"], subject.chosen, profile.calibration.measured.tokens, width
        )
        plots["wall"] = similarity_wall(arrays["similarity_map"], seen_layers(profile), width)
    plots["ratios"] = ratio_curves(profile, width)
    if arrays is not None:
        plots["distance"] = distance_curves(profile, arrays, subject.chosen, width)
    return plots


def write_figures(subjects: Sequence[Subject], folder: Path, *, force: bool = False) -> list[Path]:
    """Write every figure as PNG and as SVG into `folder`, which is made; returns the paths.

    Raises KVProfileError if a file exists and `force` is off, or cannot be written.
    """
    policies = policy_names([subject.profile for subject in subjects])
    files: dict[Path, Plot] = {}
    for subject in subjects:
        prefix = f"{subject.name}-" if len(subjects) > 1 else ""
        for name, plot in draw(subject, WIDE, policies).items():
            files[folder / f"{prefix}{name}"] = plot
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVProfileError(f"cannot write figures to {folder}: {error.strerror}; give another folder") from error
    paths = [path.with_name(f"{path.name}.{kind}") for path in files for kind in ("png", "svg")]
    for path in paths:
        if path.exists() and not force:
            raise KVProfileError(f"{path} exists; give --force to replace it, or another --figures")
    for path, plot in files.items():
        atomic_write(path.with_name(f"{path.name}.png"), png(plot))
        atomic_write(path.with_name(f"{path.name}.svg"), svg(plot))
    return paths
