"""Figures one by one: what they show, how they are written, and that any size of model fits on a page."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from kvprofile.planning.plans import replan
from kvprofile.report import similarity, style
from kvprofile.report.budgets import GRID, costs
from kvprofile.report.figures import draw, write_figures
from kvprofile.report.heads import chosen_heads, median_cosine
from kvprofile.report.html import make_subject, report_html
from kvprofile.report.plan_maps import letter, policies_map, policy_colours, policy_names
from kvprofile.report.style import DARK, NARROW, WIDE, inline_svg, png, ramp, svg
from tests.unit.builders import THRESHOLDS, build_profile

BUDGETS = [0.1, 0.25, 0.5, 0.75]


def large(layers=4, kv_heads=2, policies=("gauss",), seed=0, attention=None):
    """A profile of so many layers and heads with random numbers, and its arrays."""
    random = np.random.default_rng(seed)
    base = build_profile().model_dump()
    attention = attention or ["full_attention"] * layers
    merged = [layer for layer in range(layers) if attention[layer] == "full_attention"]
    facts = base["policies"]["gauss"]
    shares = random.uniform(0.1, 1, (len(merged), kv_heads)).round(3).tolist()
    names = random.choice(policies, (len(merged), kv_heads)).tolist()
    for row, name in enumerate(policies):
        names[row // kv_heads % len(merged)][row % kv_heads] = name
    ratio = np.sort(random.uniform(0.02, 1, (layers, kv_heads, len(THRESHOLDS)))).round(4)
    ratio[..., -1] = 1.0
    profile = build_profile(
        model={
            **base["model"],
            "layers": layers,
            "kv_heads": kv_heads,
            "query_heads": kv_heads,
            "attention": attention,
        },
        policies=dict.fromkeys(policies, facts),
        statistics={
            **base["statistics"],
            "policy": policies[0],
            "layers": [
                {"layer": layer, "ratio": ratio[layer].tolist(), "ratio_std": np.full_like(ratio[layer], 0.02).tolist()}
                for layer in range(layers)
            ],
            "damage": {
                "policies": list(policies),
                "budgets": BUDGETS,
                "kinds": ["recall", "continuation"],
                "passages": 1,
                "passage_tokens": 4,
                "continuation_tokens": 4,
            },
        },
        plan={
            **base["plan"],
            "policy": "auto",
            "rule": "damage",
            "mode": "exact",
            "predicted_damage": 0.01,
            "layers": [
                {
                    "layer": layer,
                    "epsilon": 0.9,
                    "share": round(float(np.mean(shares[row])), 6),
                    "heads": [
                        {"policy": name, "epsilon": 0.7, "share": share, "damage": 0.001}
                        for name, share in zip(names[row], shares[row], strict=True)
                    ],
                }
                for row, layer in enumerate(merged)
            ],
        },
    )
    falling = np.sort(random.uniform(1e-6, 1e-2, (len(merged), len(policies), kv_heads, len(BUDGETS), 2)), axis=3)
    arrays = {
        "damage_mean": falling[:, :, :, ::-1].astype(np.float32),
        "key_histogram": random.integers(0, 50, (layers, kv_heads, 512)).astype(np.int32),
        "similarity_map": random.uniform(-1, 1, (layers, kv_heads, 40, 40)).astype(np.float16),
        "distances": np.array([1, 2, 4, 8, 16, 31], dtype=np.int32),
        "similarity_by_distance": random.uniform(-1, 1, (layers, kv_heads, 6)).astype(np.float32),
    }
    return profile, arrays


@pytest.fixture(scope="module")
def subject():
    return make_subject("tiny", *large(policies=("gauss", "h2o")))


def test_a_page_of_a_thousand_heads_stays_small():
    # Random maps are the worst case: noise does not compress.
    text = report_html([make_subject("large", *large(32, 32, tuple(f"policy-{index}" for index in range(20))))])
    assert len(text.encode()) < 3_000_000


def test_figures_are_written_as_png_and_as_svg_with_their_text(subject, tmp_path):
    paths = write_figures([subject], tmp_path / "figures")
    names = list(draw(subject, WIDE, ["gauss", "h2o"]))
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
            assert any(re.search("[a-z]{4}", text or "") for text in texts)


def test_the_same_profile_gives_the_same_bytes(subject):
    plots = [draw(subject, NARROW, ["gauss", "h2o"]) for _ in range(2)]
    for name in plots[0]:
        assert svg(plots[0][name]) == svg(plots[1][name])


def test_every_house_colour_has_a_dark_counterpart_and_cells_keep_theirs(subject):
    plot = draw(subject, WIDE, ["gauss", "h2o"])
    drawn = inline_svg(plot["damage"], "d", 'a "label" <here>')
    assert set(re.findall(r"#[0-9a-f]{6}", re.sub(r"light-dark\([^)]*\)", "", drawn))) <= {"#ffffff", "#000000"}
    assert 'aria-label="a &quot;label&quot; &lt;here&gt;"' in drawn
    assert all(f"light-dark({light},{DARK[light]})" in drawn for light in ("#0b6e99", "#b35900"))
    cells = re.findall(r"fill: (#[0-9a-f]{6})", inline_svg(plot["slots"], "s", ""))
    assert len(cells) >= 8


def test_rasters_are_smaller_and_the_same(subject, monkeypatch):
    plot = draw(subject, WIDE, ["gauss", "h2o"])["wall"]
    drawn = svg(plot)
    monkeypatch.setattr(style, "svg", lambda _figure: drawn)
    pattern = r'href="data:image/png;base64,([^"]*)"'
    pairs = list(zip(re.findall(pattern, drawn), re.findall(pattern, inline_svg(plot, "w", "")), strict=True))
    assert len(pairs) >= 2
    for before, after in pairs:
        first, second = (Image.open(io.BytesIO(base64.b64decode(part))).convert("RGBA") for part in (before, after))
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
        assert len(after) <= len(before)


def test_the_lower_triangle_is_drawn_on_a_scale_from_minus_one_to_one(subject):
    maps = subject.arrays["similarity_map"]
    plot = similarity.similarity_maps(maps, [(1, 0), (3, 1)], 2048, WIDE)
    for axis, (layer, head) in zip(plot.axes, [(1, 0), (3, 1)], strict=False):
        image = axis.images[0]
        assert (image.norm.vmin, image.norm.vmax) == (-1, 1)
        shown = np.ma.filled(image.get_array(), np.nan)
        for row in range(40):
            for column in range(40):
                if column > row:
                    assert np.isnan(shown[row, column])
                else:
                    assert shown[row, column] == np.float32(maps[layer, head, row, column])


def test_the_scale_is_one_sided_where_the_cosines_are(subject):
    maps = np.abs(subject.arrays["similarity_map"])
    upper = np.where(np.tri(40) > 0, maps, -maps)  # the other triangle is not shown
    for cells, low in ((maps, 0), (upper, 0), (-maps, -1)):
        for plot in (
            similarity.similarity_maps(cells, [(1, 0)], 2048, WIDE),
            similarity.similarity_wall(cells, [0, 1], WIDE),
        ):
            norm = plot.axes[0].images[0].norm
            assert (norm.vmin, norm.vmax) == (low, 1)
    axis = similarity.similarity_maps(maps, [(1, 0)], 2048, WIDE).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("earlier token", "token")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2,048"]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (18, 1), (30, 3), (32, 32), (80, 8), (61, 128)])
def test_the_wall_has_room_for_every_head(layers, heads, width):
    columns, tile = similarity.wall_columns(layers, heads, width)
    assert 1 <= columns <= layers
    assert columns * tile <= width
    assert -(-layers // columns) * columns < layers + columns


def test_twenty_policies_are_told_apart():
    names = [f"policy-{index}" for index in range(20)]
    profile, _ = large(8, 4, tuple(names))
    assert len(set(policy_colours(20))) == 20
    assert len({letter(index) for index in range(40)}) == 40
    order = policy_names([profile])
    assert sorted(order) == sorted(names)
    for width in (WIDE, NARROW):
        legend = policies_map(profile, width, order).legends[0]
        assert [text.get_text().split("  ")[0] for text in legend.get_texts()] == [letter(index) for index in range(20)]


def test_layers_without_full_attention_are_on_the_map_but_not_in_the_plan():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    profile, arrays = large(5, 1, ("gauss", "h2o"), attention=kinds)
    subject = make_subject("mixed", profile, arrays)
    assert [layer for layer, _ in subject.chosen] == [0, 1, 2, 3, 4]
    text = report_html([subject])
    assert "The 3 grey layers have no full attention" in text


def test_the_heads_of_the_maps_are_spread_or_as_asked():
    profile, _ = large(30, 3)
    assert chosen_heads(profile, None, None) == [(0, 0), (6, 1), (12, 2), (17, 0), (23, 1), (29, 2)]
    assert chosen_heads(profile, [4, 2, 4], None) == [(4, 0), (2, 0)]
    assert chosen_heads(profile, [4], [2, 1]) == [(4, 2), (4, 1)]


def test_the_median_of_a_histogram():
    random = np.random.default_rng(3)
    cosines = random.uniform(-1, 1, 999)
    counts = np.histogram(cosines, bins=512, range=(-1, 1))[0]
    assert median_cosine(counts[None])[0] == pytest.approx(np.median(cosines), abs=2 / 512)


def test_budgets_out_of_reach_are_left_out():
    profile, arrays = large(policies=("gauss",))
    rows = costs(profile, arrays)
    tokens = profile.calibration.measured.tokens
    protection = profile.policies["gauss"].protection
    least = (protection.first + max(protection.recent, protection.recent_share * tokens)) / tokens
    assert [row.budget for row in rows] == sorted(
        {budget for budget in (*GRID, profile.plan.budget) if budget >= least or budget == profile.plan.budget}
    )
    assert least > GRID[0]


def test_ramps_run_from_the_first_layer_to_the_last():
    assert len({ramp(place) for place in np.linspace(0, 1, 30)}) == 30
    assert png(draw(make_subject("tiny", *large()), NARROW, ["gauss"])["slots"]).startswith(b"\x89PNG")


def test_policies_have_the_colours_of_seaborns_palette_for_colour_blind_eyes():
    import seaborn

    assert policy_colours(10) == [tuple(colour) for colour in seaborn.color_palette("colorblind", 10)]


def test_what_other_budgets_cost_is_what_their_plans_predict():
    profile, arrays = large(policies=("gauss", "h2o"))
    rows = costs(profile, arrays)
    assert len(rows) >= 5
    for row in rows:
        own = row.budget == profile.plan.budget
        plan = profile.plan if own else replan(profile, arrays["damage_mean"], row.budget).plan
        even = replan(profile, arrays["damage_mean"], row.budget, rule="uniform", granularity="head", mode="exact").plan
        assert (row.damage, row.uniform) == (plan.predicted_damage, even.predicted_damage)
