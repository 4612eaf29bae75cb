"""Finished measurements, one JSON line each, taken up again only where nothing that decides them has changed."""

import hashlib
import json
import math
import platform
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import kvprofile
from kvprofile.errors import KVProfileError
from kvprofile.fingerprint import model_facts
from kvprofile.models import LoadedModel

# The code that decides a measurement. Texts and examples are hashed themselves, and answers are scored anew.
DECIDING = ("merging", "runtime", *(f"evaluate/{name}.py" for name in ("answers", "bench", "fidelity", "methods")))
WEIGHTS_READ = 64  # of each parameter


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
        "weights": _weights(model),
        "tokenizer": digest(loaded.tokenizer.chat_template, len(loaded.tokenizer)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "code": code_digest(),
        "kvprofile": kvprofile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


@cache
def code_digest() -> str:
    """SHA-256 of the source files that decide a measurement."""
    root = Path(kvprofile.__file__).parent
    places = [root / name for name in DECIDING]
    files = sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place]))
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(path.relative_to(root).as_posix().encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _weights(model: PreTrainedModel) -> str:
    """A digest of some numbers of every parameter: another training changes nearly all of them."""
    hashed = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        step = max(1, math.ceil(len(flat) / WEIGHTS_READ))
        hashed.update(name.encode())
        hashed.update(flat[::step].float().cpu().numpy().tobytes())
    return hashed.hexdigest()
