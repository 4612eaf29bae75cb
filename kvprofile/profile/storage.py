"""Profiles on disk: the JSON and, beside it, the arrays as `.safetensors`. No pickle anywhere."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.files import atomic_write, lies_at, read_bytes
from kvprofile.profile.measured_arrays import check_arrays
from kvprofile.profile.places import locate, shipped
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import SCHEMA_VERSION, Arrays

if TYPE_CHECKING:
    import numpy as np


READ = (1, SCHEMA_VERSION)
MAX_PROFILE = 2**28  # bytes; the profile of a model of 128 layers with 128 KV heads has a sixth of it
MAX_ARRAYS = 2**33


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile: a file, or by its name one that comes with kvprofile, such as `smollm2-135m`.

    Raises KVProfileError with one line where the file cannot be read, MismatchError where it is no valid profile or was
    written by a newer major version.
    """
    path = locate(path)
    if not lies_at(path):
        raise KVProfileError(
            f"no profile at {path}; make one with `kvprofile calibrate MODEL -o {path}`, or name one of those that come with "
            f"kvprofile: {', '.join(shipped())}"
        )
    try:
        text = read_bytes(path, limit=MAX_PROFILE).decode()
    except (KVProfileError, UnicodeDecodeError) as error:
        raise KVProfileError(
            f"cannot read the profile {path}: {error}; give the .json file that calibrate wrote"
        ) from error
    try:
        values = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise MismatchError(f"{path} is not a complete JSON file ({error}); copy it again or calibrate anew") from error
    return _checked(values, text, str(path)).at(path)


def profile_of(values: Any) -> Profile:
    """Check a profile's JSON values, as `load_profile` checks a file.

    Raises MismatchError where they are no valid profile or of another major version.
    """
    name = "the profile"
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MismatchError(f"{name} is no JSON ({error}); give the values of a file that calibrate wrote") from error
    return _checked(values, text, name)


def _checked(values: Any, text: str, name: str) -> Profile:
    """The profile with these JSON values, of which `text` is the JSON; `name` says whose they are."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version is None:
        raise MismatchError(
            f"{name} is not a kvprofile profile: it has no schema_version; give the .json file that calibrate wrote"
        )
    if version not in READ or not isinstance(version, int) or isinstance(version, bool):
        raise MismatchError(
            f"{name} has schema version {version!r}, this kvprofile reads version {' and '.join(map(str, READ))}; update "
            "kvprofile or calibrate anew"
        )
    if version != SCHEMA_VERSION:
        # What version 2 adds says of an older profile, left out, what is true of it: slots in the model's own dtype.
        text = json.dumps({**values, "schema_version": SCHEMA_VERSION})
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise MismatchError(
            f"{name} is not a valid profile: {where}: {first['msg']}{more}; it was edited or damaged, calibrate anew"
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
        if lies_at(file) and not force:
            raise KVProfileError(f"{file} exists; give --force to replace it, or another -o")
    # safetensors writes a strided array's memory as it lies, not the array.
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    facts = Arrays(file=beside.name, sha256=hashlib.sha256(data).hexdigest())
    atomic_write(beside, data)
    profile = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"arrays": facts})})
    return profile.at(path), [profile.save(path, force=force), beside]


def load_arrays(profile: Profile, path: str | Path) -> dict[str, "np.ndarray"]:
    """Read the arrays that lie beside the profile saved at `path`.

    Raises KVProfileError where the file is missing, is not the one the profile was saved with, or does not hold what the
    profile says was measured.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    beside = profile.statistics.arrays
    if beside is None:
        raise KVProfileError(f"{path} names no arrays file; calibrate anew to get one")
    file = locate(path).parent / beside.file
    if not lies_at(file):
        raise KVProfileError(f"{file} is missing; it belongs beside {path}: copy it there or calibrate anew")
    data = read_bytes(file, limit=MAX_ARRAYS)
    if hashlib.sha256(data).hexdigest() != beside.sha256:
        raise KVProfileError(f"{file} is not the file {path} was saved with (SHA-256 differs); calibrate anew")
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise KVProfileError(f"{file} is no complete .safetensors file ({error}); calibrate anew") from error
    check_arrays(profile, arrays, file)
    return arrays


def save_planned(profile: Profile, source: Path, path: Path, *, force: bool = False) -> tuple[Profile, list[Path]]:
    """Write a profile that was planned anew, and beside it a copy of the arrays beside `source`, the profile it comes from.

    Returns the profile as saved and the paths. Raises KVProfileError as `save_profile` does, or if the arrays are not at hand.
    """
    if profile.statistics.arrays is None:
        return profile.at(path), [profile.save(path, force=force)]
    if path.resolve() == source.resolve():
        return profile.at(path), [profile.save(path, force=force)]  # its arrays lie there already
    return save_profile(profile, load_arrays(profile, source), path, force=force)


def _no_constant(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is not allowed in a profile")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large a number")
    return number


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's values; a name that comes twice would be read one way here and another way elsewhere."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in seen if seen.count(name) > 1)!r} comes twice")
    return values
