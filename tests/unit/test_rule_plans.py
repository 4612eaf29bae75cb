"""Budget rules from end to end on a tiny model: calibrate, plan, run; and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from kvprofile import load_arrays, load_profile, replan
from kvprofile.calibration.measuring import measure
from kvprofile.cli.options import PLAN_FLAGS
from kvprofile.errors import UsageError
from kvprofile.files import sha256_of
from kvprofile.models.load import load_model
from kvprofile.planning.rules import PUBLISHED, rule_shares
from kvprofile.profile.export import FORMATS
from kvprofile.runtime.merger import KVMerger
from kvprofile.samples import Sample
from tests.unit.conftest import run
from tests.unit.tiny_models import tiny_model, tiny_text

MEASURED = sorted({name for rule in PUBLISHED.values() for name in rule.needs} - {"depth"})


@pytest.fixture(name="loaded", scope="module")
def _loaded(tiny_folder):
    return load_model(str(tiny_folder))


def refused(result, code, *parts):
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_a_calibration_measures_what_the_rules_go_by(tiny_profile):
    arrays = load_arrays(load_profile(tiny_profile), tiny_profile)
    for name in MEASURED:
        assert len(arrays[name]) == 2
        assert np.isfinite(arrays[name]).all()
        assert arrays[name].any(axis=tuple(range(1, arrays[name].ndim))).all()
    assert (np.diff(arrays["mass_coverage"]) > -1e-6).all()
    assert arrays["mass_coverage"][:, -1] == pytest.approx([1, 1])
    # Three samples, two KV heads, the tokens before the window.
    assert arrays["window_histogram"].sum(axis=1).tolist() == [3 * 2 * (256 - 32)] * 2
    assert sum(arrays[name].nbytes for name in MEASURED) < 16384


@pytest.mark.parametrize("candidates", [(), ("h2o",)])
def test_only_merged_layers_are_measured_however_they_are_read(candidates, loaded):
    model = tiny_model("gemma3")
    samples = [Sample(tiny_text(128, seed=1)[0], tiny_text(64, seed=2)[0], kind="text", name="drawn")]
    loaded = replace(loaded, model=model)
    found = measure(loaded, samples, "gauss", candidates=candidates).finish()
    assert not found["mass_coverage"][0].any()
    assert found["window_entropy"][0] == 0
    assert found["window_entropy"][1] > 0
    assert np.isfinite(found["attention_cosine"]).all()
    assert measure(loaded, samples, "gauss", rules=()).finish().keys().isdisjoint({"window_entropy", "mass_coverage"})


@pytest.mark.parametrize("rule", PUBLISHED)
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "attention"])
def test_the_cache_holds_what_a_rule_planned(rule, policy, tiny_profile, loaded, tmp_path):
    path = tmp_path / "p.json"
    result = run("plan", tiny_profile, "--rule", rule, "--policy", policy, "--budget", "0.5", "-o", path)
    assert result.exit_code == 0, result.output
    profile = load_profile(path)
    assert (profile.plan.rule, profile.plan.policy, profile.plan.predicted_ratio) == (rule, policy, 0.5)
    assert profile.plan.damage_bound is None
    assert all(len({(head.share, head.policy) for head in layer.heads}) == 1 for layer in profile.plan.layers)
    arrays = load_arrays(profile, path)
    expected = rule_shares(rule, arrays, [0, 1], 0.5, floor=36 / 256)
    assert [layer.share for layer in profile.plan.layers] == pytest.approx(expected.tolist(), abs=1e-6)
    model = loaded.model
    merger = KVMerger.from_profile(profile).attach(model)
    cache = merger.cache()
    with torch.no_grad():
        model(tiny_text(512, vocabulary=100), past_key_values=cache)
    merger.detach()
    slots = np.array(cache.slots())[:, 0]
    assert slots.sum() == 0.5 * 512 * 4
    assert slots.sum(axis=1).tolist() == pytest.approx((expected * 512 * 2).tolist())


def test_rules_differ_and_a_plan_keeps_its_rule(tiny_profile):
    profile = load_profile(tiny_profile)
    arrays = load_arrays(profile, tiny_profile)
    plans = {
        rule: replan(profile, arrays["damage_mean"], 0.4, rule=rule, measured=arrays, policy="h2o")
        for rule in ("uniform", *PUBLISHED)
    }
    shares = {rule: tuple(layer.share for layer in plan.plan.layers) for rule, plan in plans.items()}
    assert len(set(shares.values())) > 3
    again = replan(plans["cake"], arrays["damage_mean"], 0.3, measured=arrays)
    assert (again.plan.rule, again.plan.policy, again.plan.predicted_ratio) == ("cake", "h2o", 0.3)
    assert again.policies.keys() == {*profile.policies, "h2o"}
    # auto under a rule is the one policy with the least damage under equal shares, as for uniform.
    auto = replan(profile, arrays["damage_mean"], 0.4, rule="pyramidkv", measured=arrays, policy="auto").plan
    even = replan(profile, arrays["damage_mean"], 0.4, rule="uniform", policy="auto").plan
    assert {head.policy for layer in auto.layers for head in layer.heads} == {even.layers[0].heads[0].policy}
    assert auto.predicted_damage > 0


def test_a_calibration_can_begin_with_a_rule(tiny_folder, tiny_text_file, tmp_path):
    path = tmp_path / "p.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 2, "--held-out", 0)
    result = run("calibrate", tiny_folder, "--policy", "gauss", "--rule", "squeeze", "-o", path, *size)
    assert result.exit_code == 0, result.output
    plan = load_profile(path).plan
    assert (plan.rule, plan.predicted_ratio) == ("squeeze", 0.5)
    assert plan.layers[0].share != plan.layers[1].share


# Profiles without what the rules go by.


@pytest.fixture(name="bare")
def _bare(tiny_profile, tmp_path):
    """A profile whose arrays lack what the published rules go by."""
    path = tmp_path / "bare.json"
    arrays = load_file(tiny_profile.with_suffix(".safetensors"))
    save_file({name: array for name, array in arrays.items() if name not in MEASURED}, path.with_suffix(".safetensors"))
    values = json.loads(tiny_profile.read_text())
    values["statistics"]["arrays"] = {
        "file": "bare.safetensors",
        "sha256": sha256_of(path.with_suffix(".safetensors")),
    }
    path.write_text(json.dumps(values))
    return path


def test_a_profile_without_them_is_planned_by_what_it_has(bare, tmp_path):
    for rule in ("damage", "uniform", "pyramidkv"):
        out = tmp_path / f"{rule}.json"
        assert run("plan", bare, "--rule", rule, "--budget", "0.4", "-o", out).exit_code == 0
        assert json.loads(out.read_text())["plan"]["rule"] == rule


@pytest.mark.parametrize("rule", ["cake", "dynamickv", "prefixkv", "squeeze"])
def test_a_rule_says_what_it_lacks(rule, bare, tmp_path):
    out = tmp_path / "p.json"
    refused(
        run("plan", bare, "--rule", rule, "--budget", "0.4", "-o", out),
        2,
        f"the rule {rule} goes by",
        "calibrate anew",
    )
    assert not out.exists()


# Refusals.


def test_budgets_below_the_protected_tokens(tiny_profile, tmp_path):
    out = tmp_path / "p.json"
    result = run("plan", tiny_profile, "--rule", "cake", "--policy", "h2o", "--budget", "0.1", "-o", out)
    refused(result, 3, "budget 0.1 is out of reach", "ask for a budget from 0.141")


def test_policies_that_no_other_calibration_can_plan(tiny_profile, tmp_path):
    out = tmp_path / "p.json"
    arguments = ("plan", tiny_profile, "--rule", "pyramidkv", "--budget", "0.5", "-o", out, "--policy")
    refused(run(*arguments, "kvmerger"), 2, "calibrate with --policy kvmerger")
    refused(run(*arguments, "magic"), 2, "unknown policy 'magic'")
    result = run("plan", tiny_profile, "--rule", "magic", "--budget", "0.5", "-o", out)
    assert result.exit_code == 2
    assert "'squeeze'" in result.stderr
    with pytest.raises(UsageError, match="unknown rule 'magic'; expected one of damage, uniform, common, pyramidkv"):
        replan(load_profile(tiny_profile), None, 0.5, rule="magic")


def test_the_command_line_knows_every_rule():
    assert set(PUBLISHED) < set(PLAN_FLAGS["rule"][0])


# Export.


def test_export_to_kvpress(tiny_profile, tmp_path):
    quarter, out = tmp_path / "quarter.json", tmp_path / "ratios.json"
    assert run("plan", tiny_profile, "--budget", "0.3", "-o", quarter).exit_code == 0
    result = run("export", quarter, "--to", "kvpress", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}" in result.stderr
    values, profile = json.loads(out.read_text()), load_profile(quarter)
    assert values["format"] == "kvpress.PerLayerCompressionPress"
    assert (values["model"], values["config_hash"]) == (profile.model.name, profile.model.config_hash)
    assert values["budget"] == 0.3
    for layer, removed in zip(profile.plan.layers, values["compression_ratios"], strict=True):
        kept = np.mean([head.share for head in layer.heads])
        assert removed == pytest.approx(1 - kept, abs=3e-6)
        # kvpress keeps int(tokens * (1 - ratio)) tokens: none is lost to rounding.
        assert int(1024 * (1 - removed)) == int(1024 * kept + 1e-3)
    refused(run("export", quarter, "--to", "kvpress", "-o", out), 1, "exists", "--force")
    assert run("export", quarter, "--to", "kvpress", "-o", out, "--force").exit_code == 0
    assert run("export", quarter, "--to", "elsewhere", "-o", out, "--force").exit_code == 2
    refused(run("export", tmp_path / "no.json", "--to", "kvpress", "-o", tmp_path / "x.json"), 1, "no profile at")


def test_layers_that_are_not_merged_lose_nothing(tiny_profile, tmp_path):
    values = json.loads(tiny_profile.read_text())
    values["model"]["attention"] = ["sliding_attention", "full_attention"]
    values["plan"]["layers"] = values["plan"]["layers"][1:]
    path = tmp_path / "sliding.json"
    path.write_text(json.dumps(values))
    shutil.copy(tiny_profile.with_suffix(".safetensors"), tmp_path)
    ratios = json.loads(FORMATS["kvpress"](load_profile(path)))["compression_ratios"]
    assert ratios[0] == 0
    assert ratios[1] > 0
    values["plan"]["layers"][0]["heads"] = [{**head, "share": 1.0} for head in values["plan"]["layers"][0]["heads"]]
    path.write_text(json.dumps(values))
    assert json.loads(FORMATS["kvpress"](load_profile(path)))["compression_ratios"] == [0.0, 0.0]
