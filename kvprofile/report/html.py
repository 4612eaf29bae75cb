"""The report as one HTML file that fetches nothing."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.files import atomic_write
from kvprofile.profile.profile import Profile
from kvprofile.profile.storage import load_profile
from kvprofile.report import captions
from kvprofile.report.budgets import BYTES, arrays_beside, costs, merged_bytes
from kvprofile.report.compare import compared, difference_caption, differing
from kvprofile.report.facts import about, persistence_table
from kvprofile.report.figures import Subject, draw
from kvprofile.report.heads import Arrays, Head, chosen_heads, common_threshold, ranked, seen_layers
from kvprofile.report.judgement import judge
from kvprofile.report.numbers import number, percent, size
from kvprofile.report.page_data import page_data, sliding_layers
from kvprofile.report.plan_maps import policy_names, slots_map
from kvprofile.report.style import NARROW, WIDE, inline_svg, png
from kvprofile.report.verdict import check_table, evidence, tiles, verdict

LISTED = 10  # heads at each end of the ranking


def make_subject(
    name: str,
    profile: Profile,
    arrays: Arrays | None,
    *,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
) -> Subject:
    """What a report needs of one profile; `layers` and `heads` choose the similarity maps.

    Raises UsageError for a layer or head the model does not have, MismatchError for a profile that measured nothing.
    """
    for thing, indices, count in (("layer", layers, profile.model.layers), ("KV head", heads, profile.model.kv_heads)):
        for index in indices or ():
            if not 0 <= index < count:
                raise UsageError(f"{thing} {index} is out of range; {profile.model.name} has {thing}s 0 to {count - 1}")
    if not profile.attention_layers() or not seen_layers(profile):
        raise MismatchError(f"nothing was measured of {profile.model.name}, so there is nothing to show; calibrate it")
    return Subject(name, profile, arrays, costs(profile, arrays), chosen_heads(profile, layers, heads))


def read_subject(path: Path, *, layers: list[int] | None = None, heads: list[int] | None = None) -> Subject:
    """Read a profile and, where they lie beside it, its arrays.

    Raises KVProfileError if the profile cannot be read or the arrays are not those it was saved with.
    """
    profile = load_profile(path)
    return make_subject(path.stem, profile, arrays_beside(profile, path), layers=layers, heads=heads)


def write_report(subjects: Sequence[Subject], path: Path, *, force: bool = False) -> Path:
    """Write the report of one profile, or of two side by side.

    Raises UsageError for more than two, KVProfileError if the file exists and `force` is off, or cannot be written.
    """
    if path.exists() and not force:
        raise KVProfileError(f"{path} exists; give --force to replace it, or another -o")
    atomic_write(path, report_html(subjects))
    return path


def report_html(subjects: Sequence[Subject]) -> str:
    """The page's text."""
    if not 1 <= len(subjects) <= 2:
        raise UsageError(f"a report shows one profile or two side by side, not {len(subjects)}; give one or two")
    policies = policy_names([subject.profile for subject in subjects])
    sides = [_side(f"p{index}", subject, policies, alone=len(subjects) == 1) for index, subject in enumerate(subjects)]
    title = " and ".join(dict.fromkeys(side["model"] for side in sides))
    script = _script()
    return _template("template.html.j2").render(
        sides=sides,
        title=title,
        both=None if len(subjects) == 1 else _both(subjects),
        data=[page_data(subject, policies) for subject in subjects],
        dtypes=list(BYTES),
        windows=max(side["sliding"] for side in sides),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def card_html(profile: Profile) -> str:
    """A profile in a few lines and one picture, for a notebook's cell."""
    picture = base64.b64encode(png(slots_map(profile, WIDE), dpi=90)).decode()
    return _template("card.html.j2").render(
        model=profile.model.name,
        facts=about(profile)[1][1],
        verdict=verdict(profile),
        tiles=tiles(profile),
        picture=picture,
        caption=captions.slots_caption(profile),
    )


def _script() -> str:
    """The page's script, in a scope of its own."""
    parts = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("allocate.js", "page.js")]
    return "(() => {\n" + "\n".join(parts) + "})();\n"


def _template(name: str) -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _side(prefix: str, subject: Subject, policies: Sequence[str], *, alone: bool) -> dict[str, Any]:
    """What the template shows of one profile."""
    profile = subject.profile
    header, rows = check_table(profile)
    steady = persistence_table(profile)
    return {
        "name": subject.name,
        "model": profile.model.name,
        "budget": profile.plan.asked,
        "unit": "slots" if profile.plan.bytes is None else "bytes",
        "sliding": sliding_layers(profile),
        "day": profile.created.time[:10],
        "command": profile.created.command,
        "about": about(profile),
        "judgement": judge(profile, subject.costs),
        "evidence": evidence(profile),
        "tiles": tiles(profile),
        "check": {"header": header, "rows": rows},
        "missing": _missing(subject),
        "figures": _figures(prefix, subject, policies, alone=alone),
        "captions": _captions(subject),
        "heads": _head_tables(subject),
        "persistence": {"header": steady[0], "rows": steady[1]},
        "costs": _cost_table(subject),
        "memory": _memory(profile),
    }


def _figures(prefix: str, subject: Subject, policies: Sequence[str], *, alone: bool) -> dict[str, list[Any]]:
    """For every figure its drawings: one for wide and one for narrow pages, or, side by side, the narrow one alone."""
    texts = _captions(subject)
    found: dict[str, list[Any]] = {}
    for width, kind in ((WIDE, "wide"), (NARROW, "narrow")):
        if not alone and width == WIDE:
            continue
        for name, plot in draw(subject, width, policies).items():
            label = f"{subject.profile.model.name}: {texts[name]}"
            drawn = Markup(inline_svg(plot, f"{prefix}-{kind}-{name}", label))
            found.setdefault(name, []).append((kind if alone else "both", drawn))
    return found


def _both(subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the page says of two profiles together."""
    rows, same = differing(subjects)
    caption = difference_caption(subjects)
    figures: dict[str, list[Any]] = {}
    for width, kind in ((WIDE, "wide"), (NARROW, "narrow")):
        for name, plot in compared(subjects, width).items():
            label = caption if name == "difference" else "Damage against budget of both profiles"
            figures.setdefault(name, []).append((kind, Markup(inline_svg(plot, f"both-{kind}-{name}", label))))
    return {"about": rows, "same": same, "figures": figures, "difference": caption}


def _captions(subject: Subject) -> dict[str, str]:
    profile = subject.profile
    text = "Each square compares every token with every earlier one, the oldest at the top left, means over cells and samples."
    return {
        "slots": captions.slots_caption(profile),
        "bits": captions.bits_caption(profile),
        "policies": captions.policies_caption(profile),
        "thresholds": captions.thresholds_caption(profile),
        "damage": captions.damage_caption(profile, subject.costs),
        "similarity": f"{text} Strong colour along the diagonal: neighbouring keys are alike and can share a slot. Strong "
        "colour far from it: the head's keys hardly depend on the place. Stripes: a pattern that repeats.",
        "wall": "The same for every layer and head. Strongly coloured heads merge well; faint ones with a thin diagonal have "
        "keys of their own for nearly every token.",
        "ratios": captions.ratios_caption(profile),
        "distance": "A curve that falls fast merges only neighbours; one that stays up has keys alike at any distance. The "
        "grey band holds nine heads of ten.",
    }


def _missing(subject: Subject) -> str | None:
    """What the report lacks and how to get it."""
    if subject.arrays is not None:
        return None
    arrays = subject.profile.statistics.arrays
    lacking = "damage against budget, similarity maps, similarity against distance, costs of other budgets"
    if arrays is None:
        return f"The profile names no arrays file, so this report lacks: {lacking}. Calibrate anew to get them."
    return f"{arrays.file} is not beside the profile, so this report lacks: {lacking}. Put it there and run the command again."


def _head_tables(subject: Subject) -> dict[str, Any]:
    profile = subject.profile
    heads = ranked(profile, subject.arrays)
    threshold = profile.statistics.thresholds[common_threshold(profile)]
    measured = heads[0].damage is not None
    header = ["layer", "head"]
    header += ["damage"] if measured else []
    header += ["ratio"]
    header += ["cosine"] if heads[0].cosine is not None else []
    header += ["kept", "policy"]
    by = (
        f"the damage it would do to bring the head alone to {profile.plan.budget:g} of its slots by its cheapest policy, in "
        "nats per token"
        if measured
        else f"the share of slots left at the threshold {threshold:g}"
    )
    whole = len(heads) <= 2 * LISTED
    tables = (
        [("From most to least mergeable", heads)]
        if whole
        else [
            (f"The {LISTED} most mergeable", heads[:LISTED]),
            (f"The {LISTED} least mergeable", heads[: -LISTED - 1 : -1]),
        ]
    )
    return {
        "by": by,
        "threshold": f"{threshold:g}",
        "header": header,
        "tables": [(title, [_head_row(head, measured) for head in rows]) for title, rows in tables],
    }


def _head_row(head: Head, measured: bool) -> list[str]:
    row = [str(head.layer), str(head.head)]
    row += [number(head.damage)] if measured else []
    row += [f"{head.ratio:.2f}"]
    row += [] if head.cosine is None else [f"{head.cosine:.2f}"]
    return [*row, percent(head.share), head.policy]


def _cost_table(subject: Subject) -> dict[str, Any] | None:
    if not any(row.damage is not None for row in subject.costs):
        return None
    profile = subject.profile
    own, unit = profile.plan.predicted_damage, "budget" if profile.plan.bytes is None else "of the bytes"
    return {
        "header": [unit, "damage", "against the plan", "uniform shares", "bytes"],
        "rows": [
            (
                row.budget == profile.plan.asked,
                row.budget,
                [
                    f"{row.budget:g}",
                    number(row.damage),
                    "–" if not own or row.damage is None else f"{number(row.damage / own)}×",
                    number(row.uniform),
                    size(row.nbytes),
                ],
            )
            for row in subject.costs
        ],
    }


def _memory(profile: Profile) -> dict[str, Any]:
    """Sizes of the merged layers' cache at the calibration's length, which the page's script computes anew for others."""
    full, kept = merged_bytes(profile, 1.0), merged_bytes(profile, profile.plan.asked)
    return {
        "tokens": profile.calibration.measured.tokens,
        "dtype": profile.calibration.dtype,
        "stock": size(full),
        "plan": size(kept),
        "saved": size(None if full is None or kept is None else full - kept),
    }
