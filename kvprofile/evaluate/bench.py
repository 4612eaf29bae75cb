"""The bench: every method on the same documents and questions, each through a cache that was filled, compressed, then read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvprofile.calibration.planting import plant
from kvprofile.calibration.tracking import Track, untracked
from kvprofile.errors import UsageError
from kvprofile.evaluate.answers import answer
from kvprofile.evaluate.fidelity import distance, make_trial, negative_log_likelihood, read_parts
from kvprofile.evaluate.filled import Filled
from kvprofile.evaluate.methods import FULL, Method
from kvprofile.evaluate.prompts import PromptTokens, make_reading
from kvprofile.evaluate.rows import Row, Store, digest, identity
from kvprofile.evaluate.tasks.task import Example, Task
from kvprofile.models.device_memory import explaining_memory
from kvprofile.models.load import LoadedModel
from kvprofile.profile.fingerprint import model_facts
from kvprofile.runtime.cache import MergedCache, allocated_bytes
from kvprofile.samples import Sample

FIDELITY = "fidelity"
RECALL, LOOKUP, CONTINUATION = PARTS = ("recall", "look-up", "continuation")
LOOKUPS = 4  # key-value lines planted in every context
FULL_METHOD = Method(FULL, 1.0, None)


@dataclass(frozen=True)
class Measured:
    """One method on one document or question: its measures, slots over tokens and bytes after the context, its answer."""

    values: dict[str, float]
    slots: float
    nbytes: int
    text: str | None = None


Measure = Callable[[Method], Measured]


@dataclass(frozen=True)
class Passage:
    """What is read after a context: `tokens` `(tokens,)`, and `scored`, the rows of its predictions that count."""

    name: str
    tokens: Tensor
    scored: slice

    def targets(self) -> Tensor:
        """The tokens that the scored rows predict: each row the one after its own."""
        return self.tokens.roll(-1)[self.scored]


def run_fidelity(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    store: Store,
    *,
    seed: int = 0,
    track: Track = untracked,
) -> list[Row]:
    """KL, top-1 agreement and NLL of recall, key-value look-up and continuation, for the full cache and every method.

    Raises UsageError for a sample without a continuation.
    """
    known = identity(loaded)
    rows: list[Row] = []
    for index, sample in enumerate(track(samples, FIDELITY)):
        if len(sample.continuation) < 2:
            raise UsageError("the fidelity bench needs samples with a continuation of two tokens or more")
        places = (seed + 1) * 1_000_003 + index  # not the places of a calibration with the same seed
        context, probes = make_probes(loaded, sample, places)
        rows += _rows(
            methods,
            store,
            _fidelity_measure(loaded, context, probes),
            loaded=loaded,
            key=(known, digest(context, [(probe.name, probe.tokens, str(probe.scored)) for probe in probes])),
            bench=FIDELITY,
            unit=f"{index}: {sample.name}",
            group=sample.kind,
            tokens=len(context),
        )
    return rows


def make_probes(loaded: LoadedModel, sample: Sample, seed: int) -> tuple[Tensor, list[Passage]]:
    """A sample's context `(tokens,)` with facts planted in it, and what is read after it."""
    context, questions = plant(sample.context, loaded.tokenizer, facts=0, lookups=LOOKUPS, seed=seed)
    trial = make_trial(context, sample.continuation, seed)
    probes = [
        # Of the look-up only the values count: the rows before each of their tokens.
        *(Passage(LOOKUP, asked.tokens, slice(-asked.answer - 1, -1)) for asked in questions),
        Passage(RECALL, trial.recall, slice(0, -1)),
        Passage(CONTINUATION, trial.continuation, slice(0, -1)),
    ]
    return context, probes


def _fidelity_measure(loaded: LoadedModel, context: Tensor, probes: Sequence[Passage]) -> Measure:
    """Measures a method against the full cache, whose distributions are computed once and only if they are needed."""
    filled = Filled(loaded.model, context)

    def read(method: Method) -> tuple[list[Tensor], Measured]:
        with filled.cache(method) as own:
            size = _size(loaded, own, len(context))
            rows = read_parts(loaded.model, own, [probe.tokens for probe in probes])
        # The scored rows of every probe, `(rows, vocabulary)`.
        return [row[probe.scored] for row, probe in zip(rows, probes, strict=True)], size

    @cache
    def reference() -> tuple[list[Tensor], Measured]:
        return read(FULL_METHOD)

    def measure(method: Method) -> Measured:
        rows, size = reference() if method.plan is None else read(method)
        values: dict[str, float] = {}
        for name in PARTS:
            chosen = [place for place, probe in enumerate(probes) if probe.name == name]
            full, own = (torch.cat([source[place] for place in chosen]) for source in (reference()[0], rows))
            following = torch.cat([probes[place].targets() for place in chosen])
            gap = distance(full, own)
            nll = negative_log_likelihood(own, following)
            values |= {f"{name} KL": gap.kl, f"{name} top-1": gap.top1, f"{name} NLL": nll}
        return replace(size, values=values)

    return measure


def run_task(
    loaded: LoadedModel,
    task: tuple[str, Task],
    examples: Sequence[Example],
    methods: Sequence[Method],
    store: Store,
    *,
    question: str = "after",
    track: Track = untracked,
) -> list[Row]:
    """A task's score in percent and the NLL of the right answer, for the full cache and every method.

    `task` is its name and itself; `question` says whether it is read "after" the compression or known "before" it.
    """
    name = task[0]
    known = identity(loaded)
    rows: list[Row] = []
    for index, example in enumerate(track(examples, name)):
        reading = make_reading(example, loaded.tokenizer, question)
        answered = _rows(
            methods,
            store,
            _task_measure(loaded, name, example, reading),
            loaded=loaded,
            key=(
                known,
                digest(reading.context, reading.question, reading.answer),
                example.max_new_tokens,
                example.stop,
            ),
            bench=name,
            unit=f"{index}",
            group=example.group,
            tokens=len(reading.context),
            place=example.place,
        )
        # Scored anew every time: a row keeps the answer, not what a metric made of it.
        rows += [replace(row, values={**_scores(task, example, row.text or ""), **row.values}) for row in answered]
    return rows


def _task_measure(loaded: LoadedModel, name: str, example: Example, reading: PromptTokens) -> Measure:
    filled = Filled(loaded.model, reading.context)

    def measure(method: Method) -> Measured:
        with filled.cache(method) as own:
            size = _size(loaded, own, len(reading.context))
            found = answer(
                loaded.model,
                loaded.tokenizer,
                own,
                reading,
                max_new_tokens=example.max_new_tokens,
                stop=example.stop,
            )
        return replace(size, values={f"{name} NLL": found.nll}, text=found.text)

    return measure


def _scores(named: tuple[str, Task], example: Example, text: str) -> dict[str, float]:
    name, task = named
    score = 100 * task.score(text, example)
    scores = {f"{name} score": score}
    if task.apart and example.group not in task.apart:
        scores[f"{name} score without {', '.join(task.apart)}"] = score
    return scores


def _size(loaded: LoadedModel, filled: Cache, tokens: int) -> Measured:
    if not isinstance(filled, MergedCache):
        return Measured({}, 1.0, allocated_bytes(filled))
    kinds = model_facts(loaded.model.config)["attention"]
    slots = [slots for slots, kind in zip(filled.slots(), kinds, strict=True) if kind == "full_attention"]
    return Measured({}, float(np.mean(slots)) / tokens, filled.nbytes())


def _rows(
    methods: Sequence[Method], store: Store, measure: Measure, *, loaded: LoadedModel, key: Any, **about: Any
) -> list[Row]:
    """A row for the full cache and for every method: finished ones from the store, the others measured and stored."""
    rows = []
    for method in (FULL_METHOD, *methods):
        names = {"key": digest(key, method.what_runs()), "method": method.name, "budget": method.budget, **about}
        row = store.take(names)
        if row is None:
            doing = f"reading {about['tokens']:,} tokens with {method.name}"
            with explaining_memory(loaded.model, doing, "lower --tokens", "; finished rows are kept"):
                found = measure(method)
            row = Row(**names, slots=found.slots, nbytes=found.nbytes, values=found.values, text=found.text)
            store.add(row)
        rows.append(row)
    return rows
