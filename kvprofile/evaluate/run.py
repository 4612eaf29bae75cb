"""One evaluation from its choices: documents and examples are made, every method is run, the circumstances are recorded."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprofile.calibration.tracking import Track, untracked
from kvprofile.errors import UsageError
from kvprofile.evaluate.bench import FIDELITY, run_fidelity, run_task
from kvprofile.evaluate.methods import Method, profile_methods, uniform_methods
from kvprofile.evaluate.prompts import encode, uses_template
from kvprofile.evaluate.rows import Row, Store, identity
from kvprofile.evaluate.tasks import TASKS, Request, named_task
from kvprofile.models.context_length import beyond_context, longest_text
from kvprofile.models.load import LoadedModel
from kvprofile.profile.fingerprint import model_facts
from kvprofile.profile.measured_arrays import centring
from kvprofile.profile.profile import Profile
from kvprofile.profile.storage import load_arrays, load_profile
from kvprofile.samples import Sample, load_documents, make_samples
from kvprofile.samples.builtin import SHARES
from kvprofile.samples.load import named_text

CONTINUATION = 256
SEED_OFFSET = 1000
"""Added to the seed of built-in text, so that its entries are not those of a calibration with the same seed."""


@dataclass(frozen=True)
class Choices:
    """What an evaluation is asked for; the flags of `kvprofile evaluate`.

    Attributes:
        profiles: files; the first is the one that is judged, the others are compared with it.
        budgets: fractions of slots to keep; empty for the first profile's own.
        policies: names of `POLICIES`, run with uniform shares.
        texts: what documents are read for fidelity, as `--data` takes it, each with KIND= in front if it is to have a name.
        documents: of each text; 0 leaves fidelity out.
        tasks: NAME or NAME:SOURCE of `TASKS`.
        examples: of each part of a task; 0 leaves the tasks out.
        tokens: of every context, at most.
        question: "after" or "before" the compression.
        seed: of everything drawn.
    """

    profiles: tuple[Path, ...]
    budgets: tuple[float, ...] = ()
    policies: tuple[str, ...] = ()
    texts: tuple[str, ...] = ("builtin",)
    documents: int = 4
    tasks: tuple[str, ...] = ("encyclopedia",)
    examples: int = 2
    tokens: int = 2048
    question: str = "after"
    seed: int = 0


def evaluate(
    loaded: LoadedModel,
    choices: Choices,
    store: Store,
    *,
    track: Track = untracked,
    log: Callable[[str], None] = lambda _message: None,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2),
) -> tuple[list[Row], dict[str, Any]]:
    """Run every method on everything that was asked for; returns the rows and the circumstances.

    `warn` is told, before anything is read, if contexts and what follows them are longer than the model was made for.
    Raises UsageError for a task or a text that does not exist, MismatchError where a profile does not fit the model or a
    budget is out of reach.
    """
    tasks = [named_task(spec) for spec in choices.tasks if choices.examples]
    if not tasks and not choices.documents:
        raise UsageError("nothing to evaluate: --documents is 0, and there is no task or --examples is 0")
    profiles = {name: (load_profile(path), path) for name, path in _names(choices.profiles).items()}
    for profile, _ in profiles.values():
        profile.check_model(model_facts(loaded.model.config))
    methods = make_methods(profiles, choices.budgets, choices.policies)
    log(f"{len(methods)} methods and the full cache, on {loaded.name}")
    longest = longest_text(loaded.model.config)
    if message := beyond_context(
        longest, choices.tokens + CONTINUATION, "contexts and what is read after them take up to"
    ):
        warn(message)
    # All text is made before anything is run: a file that is missing is told at once.
    documents = make_documents(loaded, choices) if choices.documents else []
    asked = [(name, source, TASKS[name].examples(_request(loaded, source, choices))) for name, source in tasks]
    rows = run_fidelity(loaded, documents, methods, store, seed=choices.seed, track=track) if documents else []
    task_facts: dict[str, Any] = {}
    for name, source, examples in asked:
        task = TASKS[name]
        rows += run_task(loaded, (name, task), examples, methods, store, question=choices.question, track=track)
        task_facts[name] = {
            "source": _public(source),
            "examples": len(examples),
            "metric": task.metric,
            "chat_template": any(uses_template(example, loaded.tokenizer) for example in examples),
            "prefix": examples[0].prefix,
            "answer_tokens": max(example.max_new_tokens for example in examples),
        }
    taken = sum(row.key in store.found for row in rows)
    if taken:
        log(f"{taken} of {len(rows)} rows were finished already, in {store.path}")
    return rows, facts_of(loaded, choices, {name: profile for name, (profile, _) in profiles.items()}, task_facts)


def make_methods(
    profiles: dict[str, tuple[Profile, Path]], budgets: Sequence[float], policies: Sequence[str]
) -> list[Method]:
    """The profiles' plans and the policies with uniform shares, at every budget; without budgets at the first profile's."""
    first = next(iter(profiles.values()))[0]
    budgets = tuple(dict.fromkeys(budgets)) or (first.plan.budget,)
    methods: list[Method] = []
    for name, (profile, path) in profiles.items():
        solved = any(budget != profile.plan.budget for budget in budgets) and profile.statistics.arrays is not None
        arrays = load_arrays(profile, path) if solved or centring(profile) else {}
        methods += profile_methods(name, profile, arrays, budgets)
    return methods + uniform_methods(first, policies, budgets)


def make_documents(loaded: LoadedModel, choices: Choices) -> list[Sample]:
    """`documents` samples of every text, each of `tokens` and a continuation."""
    found: list[Sample] = []
    for text in choices.texts:
        kind, spec = named_text(text)
        blocks = make_samples(
            load_documents(spec, seed=choices.seed + SEED_OFFSET),
            loaded.tokenizer,
            samples=choices.documents,
            tokens=choices.tokens,
            held_out=0,
            continuation=CONTINUATION,
            seed=choices.seed + SEED_OFFSET,
        )
        found += [
            Sample(sample.context, sample.continuation, kind or sample.kind, sample.name)
            for sample in blocks.calibration
        ]
    return found


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """The files' stems, or their whole paths where two share a stem."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def _request(loaded: LoadedModel, source: str, choices: Choices) -> Request:
    def length(text: str) -> int:
        return len(encode(loaded.tokenizer, text))

    def cut(text: str, tokens: int) -> str:
        ids = encode(loaded.tokenizer, text)
        if len(ids) <= tokens:
            return text
        half = tokens // 2
        return loaded.tokenizer.decode(ids[:half]) + loaded.tokenizer.decode(ids[len(ids) - (tokens - half) :])

    def head(text: str, tokens: int) -> str:
        return str(loaded.tokenizer.decode(encode(loaded.tokenizer, text)[:tokens]))

    return Request(source, choices.examples, choices.tokens, choices.seed, length, cut, head)


def _asked(profile: Profile) -> str:
    """What the profile was planned for."""
    plan = profile.plan
    return f"{plan.budget:g} of the slots" if plan.bytes is None else f"{100 * plan.bytes:g}% of the bytes"


def facts_of(
    loaded: LoadedModel, choices: Choices, profiles: dict[str, Profile], tasks: dict[str, Any]
) -> dict[str, Any]:
    """The circumstances of an evaluation, as JSON values: nothing in them tells where the files lay."""
    known = identity(loaded)
    notes = []
    if (
        choices.documents
        and "builtin" in choices.texts
        and any(set(profile.calibration.measured.kinds) <= set(SHARES) for profile in profiles.values())
    ):
        notes.append(
            "The built-in prose and code are other cuts of the documents the profile was calibrated on, not unseen text; give "
            "--data for that."
        )
    return {
        "model": loaded.name,
        "source": loaded.source,
        "revision": loaded.revision,
        **{name: known[name] for name in ("dtype", "device", "weights", "code", "kvprofile", "torch", "transformers")},
        "profiles": {
            name: f"planned for {_asked(profile)}, policy {profile.plan.policy}, spent by "
            f"{profile.plan.rule} for every {profile.plan.granularity}, {profile.plan.mode} mode"
            for name, profile in profiles.items()
        },
        "seed": choices.seed,
        "tokens": choices.tokens,
        "question": choices.question,
        FIDELITY: f"{choices.documents} documents of {choices.tokens:,} tokens of each of: "
        + ", ".join(_public(text) for text in choices.texts)
        if choices.documents
        else None,
        "tasks": tasks,
        "notes": notes,
    }


def _public(text: str) -> str:
    """A text's spec without the folders it lies in: results are passed on."""
    parts = re.split("([=:])", text)
    return "".join(Path(part).name if part.startswith(("/", "~")) else part for part in parts)
