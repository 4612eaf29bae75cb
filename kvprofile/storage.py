"""Profiles on disk: the JSON and, beside it, the arrays as `.safetensors`. No pickle anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.files import atomic_write, sha256_of
from kvprofile.profile import SCHEMA_VERSION, Arrays, Profile

if TYPE_CHECKING:
    import numpy as np


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises KVProfileError with one line where the file cannot be read, MismatchError where it is no valid profile or was
    written by a newer major version.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KVProfileError(f"no profile at {path}; make one with `kvprofile calibrate MODEL -o {path}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KVProfileError(
            f"cannot read the profile {path}: {error}; give the .json file that calibrate wrote"
        ) from error
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MismatchError(f"{path} is not a complete JSON file ({error}); copy it again or calibrate anew") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version is None:
        raise MismatchError(
            f"{path} is not a kvprofile profile: it has no schema_version; give the .json file that calibrate wrote"
        )
    if version != SCHEMA_VERSION:
        raise MismatchError(
            f"{path} has schema version {version!r}, this kvprofile reads version {SCHEMA_VERSION}; update kvprofile or "
            "calibrate anew"
        )
    try:
        return Profile.model_validate_json(text).at(path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise MismatchError(
            f"{path} is not a valid profile: {where}: {first['msg']}{more}; it was edited or damaged, calibrate anew"
        ) from error


def save_profile(
    profile: Profile, arrays: dict[str, "np.ndarray"], path: str | Path, *, force: bool = False
) -> tuple[Profile, list[Path]]:
    """Write a profile and, beside it, its arrays as `.safetensors`; returns the profile as saved and the paths.

    The arrays go first: a JSON file never names a file that is not there. Raises KVProfileError if a file exists and
    `force` is off, or cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save

    path = Path(path)
    beside = path.with_suffix(".safetensors")
    if beside == path:
        raise KVProfileError(f"{path} is the name the arrays would get; give the profile a name that ends in .json")
    for file in (path, beside):
        if file.exists() and not force:
            raise KVProfileError(f"{file} exists; give --force to replace it, or another -o")
    # safetensors writes a strided array's memory as it lies, not the array.
    atomic_write(beside, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    facts = Arrays(file=beside.name, sha256=sha256_of(beside))
    profile = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"arrays": facts})})
    return profile.at(path), [profile.save(path, force=force), beside]


def load_arrays(profile: Profile, path: str | Path) -> dict[str, "np.ndarray"]:
    """Read the arrays that lie beside the profile saved at `path`.

    Raises KVProfileError where the file is missing or is not the one the profile was saved with.
    """
    from safetensors.numpy import load_file

    arrays = profile.statistics.arrays
    if arrays is None:
        raise KVProfileError(f"{path} names no arrays file; calibrate anew to get one")
    file = Path(path).parent / arrays.file
    if not file.exists():
        raise KVProfileError(f"{file} is missing; it belongs beside {path}: copy it there or calibrate anew")
    if sha256_of(file) != arrays.sha256:
        raise KVProfileError(f"{file} is not the file {path} was saved with (SHA-256 differs); calibrate anew")
    return load_file(file)


def carry_arrays(profile: Profile, source: Path, target: Path) -> None:
    """Copy the arrays that lie beside the profile at `source` beside `target`, where the two folders differ.

    Raises KVProfileError if the arrays are missing or cannot be written.
    """
    from safetensors.numpy import save

    if profile.statistics.arrays is not None and source.parent.resolve() != target.parent.resolve():
        atomic_write(target.parent / profile.statistics.arrays.file, save(load_arrays(profile, source)))


def _no_constant(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is not allowed in a profile")
