"""The documents of the benches that read a context and then look back: held-out text of several kinds."""

from collections.abc import Sequence

import kvprofile
from kvprofile.evaluate.fidelity import Trial, make_trial
from kvprofile.models.load import LoadedModel

CONTINUATION = 256


def make_trials(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    documents: int,
    tokens: int,
    seed: int,
    column: str | None = None,
) -> list[tuple[str, Trial]]:
    """`documents` of every text (KIND=SPEC), each with its kind; without a text, of the built-in one."""
    trials = []
    for text in texts or ["builtin=builtin"]:
        kind, spec = text.split("=", 1)
        blocks = kvprofile.make_samples(
            kvprofile.load_documents(spec, column=column, seed=seed + 1000),
            loaded.tokenizer,
            samples=documents,
            tokens=tokens,
            held_out=0,
            continuation=CONTINUATION,
            seed=seed,
        )
        for index, sample in enumerate(blocks.calibration):
            trials.append((kind, make_trial(sample.context, sample.continuation, seed * 1000 + index)))
    return trials
