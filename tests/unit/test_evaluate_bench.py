"""The bench's numbers against plain forwards, and finished rows that are used again exactly where they are still true."""

import json

import pytest
import torch

from kvprofile import load_model
from kvprofile.errors import KVProfileError
from kvprofile.evaluate import rows
from kvprofile.evaluate.bench import FULL_METHOD, make_probes, run_fidelity, run_task
from kvprofile.evaluate.check import run_merged
from kvprofile.evaluate.fidelity import Trial, distance
from kvprofile.evaluate.filled import Filled
from kvprofile.evaluate.methods import FULL, Method
from kvprofile.evaluate.rows import Store, open_store
from kvprofile.evaluate.tasks import TASKS, Example, Request, Task
from kvprofile.runtime.merger import KVMerger
from kvprofile.samples import Sample
from tests.unit.tiny_models import tiny_text, uniform_values

NOTHING = Store(None)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def samples():
    text = tiny_text(2 * 350, vocabulary=90, seed=3)[0]
    return [Sample(part[:300], part[300:], "noise", f"part {index}") for index, part in enumerate(text.split(350))]


def method(loaded, policy="h2o", share=0.5):
    return Method(f"{policy} {share}", share, uniform_values(loaded.model, policy, share=share))


def test_the_full_cache_is_no_distance_from_itself_and_its_likelihood_that_of_a_forward(loaded, samples):
    found = run_fidelity(loaded, samples, [method(loaded, share=1.0)], NOTHING)
    assert [row.method for row in found] == [FULL, "h2o 1.0"] * 2
    for row in found:
        assert row.slots == 1
        for part in ("recall", "look-up", "continuation"):
            assert row.values[f"{part} KL"] == pytest.approx(0, abs=1e-5)
            assert row.values[f"{part} top-1"] == 1
    context, probes = make_probes(loaded, samples[0], 1_000_003)
    for name in ("look-up", "continuation"):
        terms = []
        for probe in probes:
            if probe.name == name:
                tokens = torch.cat([context, probe.tokens])
                with torch.no_grad():
                    logs = loaded.model(tokens[None]).logits[0].log_softmax(-1)
                places = range(len(context), len(tokens))
                if name == "look-up":  # the value's digits, which end the question
                    places = places[-len(probe.targets()) :]
                    assert tokens[places[0] :].tolist() == probe.targets().tolist()
                    assert len(places) == 6  # a blank and five digits
                else:
                    places = places[1:]
                terms += [-float(logs[place - 1, tokens[place]]) for place in places]
        assert found[0].values[f"{name} NLL"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_a_compressed_cache_is_compared_as_in_the_check_of_a_profile(loaded, samples):
    plan = method(loaded, share=0.3)
    found = run_fidelity(loaded, samples[:1], [plan], NOTHING)[1]
    context, probes = make_probes(loaded, samples[0], 1_000_003)
    recall, continuation = (
        next(probe for probe in probes if probe.name == name) for name in ("recall", "continuation")
    )
    trial = Trial(context, recall.tokens, continuation.tokens)
    full = run_merged(loaded.model, KVMerger.from_profile(uniform_values(loaded.model)), trial, [0, 1])[0]
    own, slots, nbytes = run_merged(loaded.model, KVMerger.from_profile(plan.plan), trial, [0, 1])
    assert (found.slots, found.nbytes) == (slots, nbytes)
    assert found.slots == pytest.approx(0.3, abs=1 / 300)
    for name, reference, candidate in zip(("recall", "continuation"), full, own, strict=True):
        expected = distance(reference[:-1], candidate[:-1])
        assert found.values[f"{name} KL"] == pytest.approx(expected.kl, rel=1e-3)
        assert found.values[f"{name} top-1"] == pytest.approx(expected.top1, abs=1e-6)
        assert expected.kl > 0.01


def examples_of(name, loaded, count=1, tokens=500):
    return TASKS[name].examples(Request("", count, tokens, 0, len, cut=lambda text, _: text, head=lambda text, _: text))


def test_a_task_runs_through_every_method(loaded):
    examples = examples_of("needle", loaded)
    found = run_task(loaded, ("needle", TASKS["needle"]), examples, [method(loaded)], NOTHING)
    assert len(found) == 2 * len(examples)
    for row in found:
        assert row.slots == (1 if row.method == FULL else pytest.approx(0.5, abs=2 / row.tokens))
        assert row.values["needle NLL"] > 0
        assert row.values["needle score"] in (0, 100)
        assert row.place is not None
        assert row.text is not None


def test_scores_are_worked_out_anew_and_once_more_without_what_stands_apart(loaded, tmp_path):
    examples = [Example("Text " * 40, " Question?", ("x",), group=group, max_new_tokens=2) for group in ("few", "rest")]
    for points in (0.25, 0.75):
        task = Task("", "", lambda _request: [], lambda _text, _example, points=points: points, apart=("few",))
        found = run_task(loaded, ("toy", task), examples, [], open_store(tmp_path / "rows.jsonl"))
        scores = [{name: value for name, value in row.values.items() if "score" in name} for row in found]
        assert scores == [
            {"toy score": 100 * points},
            {"toy score": 100 * points, "toy score without few": 100 * points},
        ]
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [list(row["values"]) for row in stored] == [["toy NLL"]] * 2


def test_finished_rows_are_used_again_and_only_where_they_are_true(loaded, samples, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    plans = [method(loaded), method(loaded, "snapkv")]
    first = run_fidelity(loaded, samples, plans, open_store(path))
    assert len(path.read_text().splitlines()) == len(first) == 6

    measured = []
    honest = Filled.cache

    def counted(filled, method):
        measured.append(method.name)
        return honest(filled, method)

    monkeypatch.setattr(Filled, "cache", counted)
    assert run_fidelity(loaded, samples, plans, open_store(path)) == first
    assert measured == []
    # The same plan under another name is the same measurement; another plan is not.
    renamed = Method("mine", 0.5, plans[0].plan)
    again = run_fidelity(loaded, samples, [renamed, method(loaded, share=0.4)], open_store(path))
    assert measured == ["h2o 0.4", FULL] * 2
    assert [row.values for row in again if row.method == "mine"] == [
        row.values for row in first if row.method == "h2o 0.5"
    ]
    # Other text, other weights, other code.
    for change in ("seed", "weights", "code"):
        measured.clear()
        with monkeypatch.context() as patch:
            if change == "weights":
                patch.setattr(rows, "weights_digest", lambda _model: "other")
            if change == "code":
                patch.setattr(rows, "code_digest", lambda *_, **__: "other")
            run_fidelity(loaded, samples[:1], plans[:1], open_store(path), seed=int(change == "seed"))
        assert measured == [FULL, "h2o 0.5"]


def test_another_training_has_other_weights(loaded):
    before = rows.identity(loaded)
    weight = next(loaded.model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
    assert rows.identity(loaded) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert rows.identity(loaded) == before


def test_a_line_cut_off_is_dropped_and_other_files_are_refused(loaded, samples, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_fidelity(loaded, samples[:1], [method(loaded)], open_store(path))
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0][:40])
    assert len(open_store(path).found) == 2
    assert path.read_text() == whole
    path.write_text("no row\n" + whole)
    with pytest.raises(KVProfileError, match=r"line 1 of .* is no finished row"):
        open_store(path)
    path.write_text(json.dumps({"key": "only"}) + "\n" + whole)
    with pytest.raises(KVProfileError, match="line 1"):
        open_store(path)


def test_the_full_cache_has_no_plan_to_hash(loaded):
    assert FULL_METHOD.what_runs() is None
    half, mine = method(loaded), Method("mine", 0.9, uniform_values(loaded.model, "h2o", share=0.5))
    assert half.what_runs() == mine.what_runs()
    assert half.what_runs() != method(loaded, share=0.4).what_runs()
    assert half.what_runs() != method(loaded, "snapkv").what_runs()
