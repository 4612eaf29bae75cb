"""Finished measurements, one JSON line each, taken up again only where nothing that decides them has changed."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers

import kvprofile
from kvprofile.digests import code_digest, weights_digest
from kvprofile.errors import KVProfileError
from kvprofile.models.load import LoadedModel
from kvprofile.models.offloading import input_device
from kvprofile.profile.fingerprint import model_facts

# Where the code that decides a measurement begins; kernels are imported late, where they can serve.
READERS = (
    "kvprofile.evaluate.bench",
    "kvprofile.runtime.backends.compiled.kernel",
    "kvprofile.runtime.backends.triton_kernels",
)
# Code that decides no measurement: what it makes (models, texts, plans, tasks' examples) is hashed itself.
MAKERS = tuple(
    f"kvprofile.{name}"
    for name in (
        *("models.gguf", "models.names", "models.load", "samples", "calibration.planting", "evaluate.tasks"),
        *("planning", "profile.profile", "profile.schema"),
        *("errors", "evaluate.rows", "files", "calibration.tracking"),
    )
)


@dataclass(frozen=True)
class Row:
    """One method on one document or question.

    Attributes:
        key: hash of the model, its weights, the text, the plan, the settings and the code.
        bench: "fidelity", or the task.
        unit: which document or question.
        group: the kind of text, or the part of the task.
        method, budget: whose numbers these are, as in `Method`.
        tokens: of the context.
        slots: stored after the context, over tokens, mean over the full-attention layers' heads.
        nbytes: allocated then.
        values: the measures, by name; scores are not kept in the file.
        place: as in `Example`.
        text: the answer given, for tasks.
    """

    key: str
    bench: str
    unit: str
    group: str
    method: str
    budget: float
    tokens: int
    slots: float
    nbytes: int
    values: dict[str, float]
    place: tuple[int, float] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Store:
    """The file of finished rows and what was read from it: values by key. Without a path nothing is kept."""

    path: Path | None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, row: dict[str, Any]) -> Row | None:
        """The finished row of `row["key"]`, under the names that `row` gives it now."""
        finished = self.found.get(row["key"])
        return None if finished is None else Row(**{**finished, **row})

    def add(self, row: Row) -> None:
        """Write a row at the end of the file, at once: an interrupted run loses none."""
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        except OSError as error:
            raise KVProfileError(f"cannot write {self.path}: {error.strerror}; choose another -o") from error


def open_store(path: Path | None) -> Store:
    """Read the finished rows, if there are any. The last line may be cut off; it is dropped.

    Raises KVProfileError where the file is something else.
    """
    if path is None or not path.exists():
        return Store(path)
    found: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            row = Row(**values)
        except (ValueError, TypeError):
            if number == len(lines):
                # Cut off in the middle of a write: what follows must begin on a line of its own.
                path.write_text("".join(f"{whole}\n" for whole in lines[:-1]), encoding="utf-8")
                break
            raise KVProfileError(
                f"line {number} of {path} is no finished row; remove the file, or choose another -o"
            ) from None
        place = None if row.place is None else tuple(row.place)
        found[row.key] = {**{name.name: values[name.name] for name in fields(Row)}, "place": place}
    return Store(path, found)


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values; tensors count with their numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        raise TypeError(f"cannot hash {type(value).__name__}")

    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """What has to be the same for a finished row to be true still, besides text, plan and settings."""
    model = loaded.model
    return {
        "model": model_facts(model.config)["config_hash"],
        "weights": weights_digest(model),
        "tokenizer": digest(loaded.tokenizer.chat_template, len(loaded.tokenizer)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": input_device(model).type,
        "code": code_digest(*READERS, but=MAKERS),
        "kvprofile": kvprofile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
