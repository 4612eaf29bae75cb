"""Whether a number measured before is still true: digests of the code that made it and of the model's weights."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvprofile
from kvprofile.models.offloading import offloaded_weight

if TYPE_CHECKING:
    import torch

WEIGHTS_READ = 1024  # elements of each weight that are hashed as they are
_ROOT = Path(kvprofile.__file__).parent


@cache
def code_digest(*modules: str, but: tuple[str, ...] = ()) -> str:
    """SHA-256 of the sources of these modules of the package and of all they import when loaded; without any, of all.

    `but` names modules and packages that do not count, nor what only they import.
    """
    files = source_files(modules, but) if modules else sorted(_ROOT.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def source_files(modules: Iterable[str], but: tuple[str, ...] = ()) -> list[Path]:
    """The files of the package that `modules` (`kvprofile.a.b`) and what they import are loaded from, sorted.

    Nothing is followed into the modules and packages of `but`. Imports inside functions do not count: they are there to be
    optional or late, in reports and commands.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if name in found or path is None or f"{name}.".startswith(tuple(f"{other}." for other in but)):
            continue
        found[name] = path
        for statement in ast.parse(path.read_bytes()).body:
            if isinstance(statement, ast.Import):
                waiting += [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                waiting.append(statement.module)
                waiting += [f"{statement.module}.{alias.name}" for alias in statement.names]
    return sorted(found.values())


def _file_of(module: str) -> Path | None:
    package, *names = module.split(".")
    if package != _ROOT.name:
        return None
    place = _ROOT.joinpath(*names)
    return next((path for path in (place / "__init__.py", place.with_name(f"{place.name}.py")) if path.is_file()), None)


def weights_digest(model: Any) -> str:
    """A digest of every weight: the sum of all its bits as integers, and a spread of its elements.

    It notices other weights in a folder of the same name in a fraction of the time that hashing gigabytes takes.
    """
    import torch

    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in _weights(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            bits = tensor.detach().contiguous().flatten().view(as_integers[tensor.element_size()])
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
            digest.update(bits[:: max(1, len(bits) // WEIGHTS_READ)].cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(model: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of a model by name: also what is offloaded, and what quantised tensors are made of."""
    import torch

    for name, weight in model.state_dict().items():
        if isinstance(weight, torch.Tensor):  # modules may keep an extra state of any kind
            away = offloaded_weight(model, name) if weight.device.type == "meta" else None
            yield from _parts(name, weight if away is None else away)


def _parts(name: str, weight: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for inner in weight.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{inner}", getattr(weight, inner))
