"""The report as text: everything in it, in order, its numbers those of the profile, and nothing it would have to fetch."""

import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kvprofile import load_profile
from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.profile.profile import Profile
from kvprofile.report.html import make_subject, read_subject, report_html, write_report
from kvprofile.report.judgement import judge
from kvprofile.report.plan_maps import bits_map, bits_of, difference_map
from kvprofile.report.style import WIDE, part
from kvprofile.report.verdict import evidence
from tests.unit.builders import build_profile
from tests.unit.conftest import run

PROFILES = Path(__file__).parents[2] / "profiles"
REAL = ["smollm2-135m", "gemma3-270m"]
SECTIONS = ["verdict", "plan", "damage", "budgets", "heads", "similarity", "ratios", "distance", "what"]
FIGURES = ["slots", "policies", "damage", "similarity", "wall", "ratios", "distance"]


class Page(HTMLParser):
    """Sections, figures, text, tables and every address of a page."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.figures, self.addresses, self.tables = [], [], [], []
        self.words = {}
        self.open, self.section = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.section = attributes["id"]
            self.sections.append(self.section)
        elif tag == "figure":
            self.figures.append(attributes["id"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.addresses += [
            attributes[name] for name in ("href", "src", "srcset", "action", "data") if attributes.get(name)
        ]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.words[self.section] = self.words.get(self.section, "") + data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first_cell):
        return next(table for table in self.tables if table[0][0] == first_cell)


@pytest.fixture(scope="module", params=REAL)
def real(request):
    path = PROFILES / f"{request.param}.json"
    subject = read_subject(path)
    return path, subject, report_html([subject])


def close(text, value):
    """Printed with two significant digits."""
    return float(text) == pytest.approx(value, rel=0.051)


def test_the_page_asks_for_nothing(real):
    text = real[2]
    assert "://" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in Page(text).addresses)
    assert not re.search(r"@import|url\((?!#)|//[a-z]+\.", re.sub(r"base64,[^\"]*", "", text))
    assert len(text.encode()) < 3_000_000


def test_sections_and_figures_come_in_order(real):
    page = Page(real[2])
    assert page.sections == SECTIONS
    assert page.figures == [f"figure-0-{name}" for name in FIGURES]


def test_what_and_when(real):
    values = json.loads(real[0].read_text())
    words = Page(real[2]).words["what"]
    created, model = values["created"], values["model"]
    told = [created["command"], created["torch"], created["transformers"], created["kvprofile"], created["time"][:10]]
    told += [model["name"], model["source"], model["architecture"], values["calibration"]["text"], "budget 0.5"]
    for word in told:
        assert word in words


def test_the_verdict_tells_what_the_check_measured(real):
    values = json.loads(real[0].read_text())
    check, words = values["check"], Page(real[2]).words["verdict"]
    own, even = check["exact"], check["uniform"]
    judgement = judge(real[1].profile, real[1].costs)
    assert judgement.word in words
    for line in (judgement.reason, *evidence(real[1].profile)):
        assert line in words
    assert f"held-out text keeps {100 * own['achieved']['mean']:.1f}%" in words
    assert f"{100 * check['bytes_ratio']:.1f}% of the bytes" in words
    moved = re.search(r"KL (\S+) on recall .*, KL (\S+) on continuation", words)
    assert close(moved[1], own["fidelity"]["recall_kl"])
    assert close(moved[2], own["fidelity"]["continuation_kl"])
    assert f"same top token {100 * own['fidelity']['recall_top1']:.1f}%" in words
    times = re.search(r"uniform.*, (\S+) times as much", words, re.IGNORECASE)
    totals = [mode["fidelity"]["recall_kl"] + mode["fidelity"]["continuation_kl"] for mode in (even, own)]
    assert close(times[1], totals[0] / totals[1])
    rows = {row[0]: row[1:] for row in Page(real[2]).table("")}
    assert rows["same top token, recall"] == [f"{100 * mode['fidelity']['recall_top1']:.1f}%" for mode in (own, even)]


def test_the_heads_are_ranked_by_their_cheapest_damage_at_the_budget(real):
    path, subject, text = real
    values = json.loads(path.read_text())
    measured, budget = values["statistics"]["damage"], values["plan"]["budget"]
    layers = [layer["layer"] for layer in values["plan"]["layers"]]
    damage = subject.arrays["damage_mean"].astype(np.float64)
    costs = {}
    for row, layer in enumerate(layers):
        for head in range(values["model"]["kv_heads"]):
            at = measured["budgets"].index(budget)
            costs[layer, head] = min(damage[row, policy, head, at].sum() for policy in range(len(measured["policies"])))
    order = sorted(costs, key=lambda place: costs[place])
    tables = [table for table in Page(text).tables if table[0][:3] == ["layer", "head", "damage"]]
    listed = [[(int(row[0]), int(row[1])) for row in table[1:]] for table in tables]
    assert listed == ([order] if len(order) <= 20 else [order[:10], order[:-11:-1]])
    shares = {
        (layer["layer"], head): entry for layer in values["plan"]["layers"] for head, entry in enumerate(layer["heads"])
    }
    for table in tables:
        for row in table[1:]:
            place = int(row[0]), int(row[1])
            assert close(row[2], costs[place])
            assert row[-2:] == [f"{100 * shares[place]['share']:.1f}%", shares[place]["policy"]]


def test_other_budgets_cost_what_the_plan_command_says(real, tmp_path):
    path, _, text = real
    values = json.loads(path.read_text())
    rows = {row[0]: row for row in Page(text).table("budget")[1:]}
    own = values["plan"]["predicted_damage"]
    assert close(rows["0.5"][1], own)
    result = run("plan", path, "--budget", "0.25", "-o", tmp_path / "quarter.json", "--json")
    predicted = json.loads(result.stdout)["plan"]["predicted_damage"]
    assert close(rows["0.25"][1], predicted)
    assert close(rows["0.25"][2].removesuffix("×"), predicted / own)
    model, slots = values["model"], 0.25 * values["calibration"]["measured"]["tokens"]
    nbytes = slots * len(values["plan"]["layers"]) * model["kv_heads"] * model["head_dim"] * 2 * 4
    assert rows["0.25"][4] == f"{nbytes / 2**20:.1f}\N{NO-BREAK SPACE}MiB"


def test_persistence_is_told(real):
    values = json.loads(real[0].read_text())
    table = Page(real[2]).table("standard deviation of the ratio")
    first = values["statistics"]["persistence"][0]
    rows = {row[0]: row[1] for row in table[1:]}
    assert close(rows["between layers"], first["between_layers"])
    assert close(rows["a layer, between samples of one kind"], first["between_samples"])


@pytest.fixture(scope="module")
def both():
    subjects = [read_subject(PROFILES / f"{name}.json") for name in REAL]
    return subjects, report_html(subjects)


def test_two_profiles_side_by_side(both):
    subjects, text = both
    page = Page(text)
    assert page.sections == SECTIONS
    both_at_once = {"damage": ["figure-both-damage"]}
    apart = {name: [f"figure-{side}-{name}" for side in (0, 1)] for name in FIGURES}
    assert page.figures == [place for name in FIGURES for place in (apart | both_at_once)[name]]
    assert "have not the same heads (30 x 3 and 18 x 1)" in page.words["plan"]
    for name in REAL:
        assert f"{name} from pypi:" in page.words["what"]
    with pytest.raises(UsageError, match="one profile or two"):
        report_html([*subjects, subjects[0]])


def test_two_plans_of_one_model_are_subtracted_and_only_what_differs_is_told():
    half = read_subject(PROFILES / "gemma3-270m.json")
    plan = half.profile.replan(0.4, rule="uniform")
    uniform = make_subject("uniform", plan, half.arrays)
    page = Page(report_html([half, uniform]))
    words = page.words["what"]
    assert "Only what differs; the same in both: Model, Architecture, Text" in words
    assert words.count("rule damage") == words.count("rule uniform") == 1
    assert "Gemma3ForCausalLM" not in words
    assert "figure-both-difference" in page.figures
    shares = [[head.share for layer in side.profile.plan.layers for head in layer.heads] for side in (half, uniform)]
    more = sum(other > own for own, other in zip(*shares, strict=True))
    assert f"{more} of 3 keep more, {3 - more} less" in page.words["plan"]
    plot = difference_map(half.profile, uniform.profile, WIDE)
    labels = {text.get_gid(): text.get_text() for text in plot.axes[0].texts}
    for layer, own, other in zip((5, 11, 17), *shares, strict=True):
        assert float(labels[f"data-label.{layer}-0"]) == pytest.approx(other - own, abs=0.00501)


def test_ids_are_unique(real, both):
    for text in (real[2], both[1]):
        ids = re.findall(r'\sid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_the_json_alone_still_gives_a_report_that_says_what_it_lacks(tmp_path):
    path = shutil.copy(PROFILES / "gemma3-270m.json", tmp_path)
    page = Page(report_html([read_subject(Path(path))]))
    assert "gemma3-270m.safetensors is not beside the profile" in page.words["verdict"]
    assert page.sections == SECTIONS
    assert page.figures == [f"figure-0-{name}" for name in ("slots", "policies", "ratios")]
    assert "cannot be priced" in page.words["budgets"]


def test_arrays_of_another_profile_are_refused(tmp_path):
    shutil.copy(PROFILES / "gemma3-270m.json", tmp_path)
    shutil.copy(PROFILES / "smollm2-135m.safetensors", tmp_path / "gemma3-270m.safetensors")
    with pytest.raises(KVProfileError, match="SHA-256"):
        read_subject(tmp_path / "gemma3-270m.json")


def test_nothing_measured_is_a_dash_or_a_sentence():
    profile = build_profile(check=None)
    profile = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"persistence": []})})
    text = report_html([make_subject("tiny", profile, None)])
    page = Page(text)
    assert "not checked on held-out text" in page.words["verdict"]
    assert "no persistence table" in page.words["ratios"]
    assert "names no arrays file" in page.words["verdict"]
    for word in ("nan", "None", "inf"):
        assert not re.search(rf"\b{word}\b", " ".join(page.words.values()))


def test_a_plan_that_is_the_uniform_one_is_not_set_against_itself():
    page = Page(report_html([make_subject("tiny", build_profile(), None)]))
    assert "Every head has the same share" in page.words["verdict"]
    assert "times as much" not in page.words["verdict"]


def test_names_are_text_not_markup():
    name = """<script>alert("1")</script>&'$x^2$"""
    profile = build_profile(name=name, command=f"kvprofile calibrate '{name}'", policy=name)
    text = report_html([make_subject(name, profile, None)])
    assert text.count("<script>") == 1
    assert Page(text).words["what"].count(name) >= 2
    assert not [address for address in Page(text).addresses if "alert" in address]


def test_a_report_is_not_overwritten_unasked(tmp_path):
    subject = make_subject("tiny", build_profile(), None)
    path = tmp_path / "report.html"
    assert write_report([subject], path) == path
    before = path.read_bytes()
    with pytest.raises(KVProfileError, match="--force"):
        write_report([subject], path)
    write_report([subject], path, force=True)
    assert path.read_bytes() == before


def test_the_commands_write_it(tiny_profile, tiny_folder, tiny_text_file, tmp_path):
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    result = run("report", tiny_profile, "-o", page, "--figures", figures, "--layers", "0,1", "--heads", "1")
    assert result.exit_code == 0, result.output
    assert f"Wrote {page}" in result.stderr
    drawn = [place.removeprefix("figure-0-") for place in Page(page.read_text()).figures]
    assert {path.name for path in figures.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert set(FIGURES) - set(drawn) <= {"policies"}
    assert run("report", tiny_profile, "-o", page).exit_code == 1
    assert run("report", tiny_profile, "--layers", "0,9", "-o", tmp_path / "q.html").exit_code == 2
    assert run("report", tiny_profile, "--heads", "one", "-o", tmp_path / "q.html").exit_code == 2
    path = tmp_path / "p.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 2, "--held-out", 1)
    result = run("calibrate", tiny_folder, "-o", path, "--report", *size)
    assert result.exit_code == 0, result.output
    assert Page((tmp_path / "p.html").read_text()).sections == SECTIONS
    assert load_profile(path).created.command in Page((tmp_path / "p.html").read_text()).words["what"]


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_curves_that_are_flat_are_drawn(ratio, tmp_path):
    values = build_profile().model_dump()
    values["statistics"]["thresholds"][-1] = 1.0
    for layer in values["statistics"]["layers"]:
        layer["ratio"] = [[ratio] * 4] * 2
    subject = make_subject("flat", Profile.model_validate(values), None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*singular")
        assert write_report([subject], tmp_path / "flat.html").stat().st_size


def test_a_profile_that_measured_nothing_is_not_shown():
    nothing = build_profile().model_dump()
    for layer in nothing["statistics"]["layers"]:
        layer["ratio"] = [[0.0] * 4] * 2
    unmerged = build_profile().model_dump()
    unmerged["model"]["attention"] = ["sliding_attention"] * 2
    unmerged["plan"]["layers"] = []
    for values in (nothing, unmerged):
        with pytest.raises(MismatchError, match="nothing was measured of tiny, so there is nothing to show"):
            make_subject("nothing", Profile.model_validate(values), None)


def test_a_plan_for_bytes_shows_bits_and_prices_other_fractions_of_the_bytes(tiny_profile, tmp_path):
    path, page = tmp_path / "small.json", tmp_path / "small.html"
    assert run("plan", tiny_profile, "--bytes", "0.6", "-o", path).exit_code == 0
    assert run("report", path, "-o", page).exit_code == 0
    found = Page(page.read_text())
    assert found.sections == SECTIONS
    assert "figure-0-bits" in found.figures
    assert found.figures.index("figure-0-slots") < found.figures.index("figure-0-bits")
    assert "for 60% of the bytes" in found.words[None]
    assert "--bytes B" in found.words["budgets"]
    rows = {row[0]: row for row in found.table("of the bytes")[1:]}
    plan = json.loads(path.read_text())["plan"]
    assert close(rows["0.6"][1], plan["predicted_damage"])
    result = run("plan", tiny_profile, "--bytes", "0.8", "-o", tmp_path / "more.json", "--json")
    assert close(rows["0.8"][1], json.loads(result.stdout)["plan"]["predicted_damage"])
    # Every head's bits are drawn, as its codecs are named.
    drawn = {text.get_gid(): text.get_text() for axis in bits_map(load_profile(path), WIDE).axes for text in axis.texts}
    for layer in plan["layers"]:
        for index, head in enumerate(layer["heads"]):
            keys, values = (bits_of(head[name]) for name in ("key_codec", "value_codec"))
            assert drawn[part("label", f"{layer['layer']}-{index}")] == (
                f"{keys}" if keys == values else f"{keys}/{values}"
            )


@pytest.mark.parametrize(
    ("codec", "bits"), [("none", 16), ("int6", 6), ("turbo3", 3), ("fp8-e4m3", 8), ("bfloat16", 16), ("x-mine", 16)]
)
def test_bits_are_read_from_a_codec_s_name(codec, bits):
    assert bits_of(codec) == bits
