"""Why a model could not be loaded, in one line, and what to do."""

import contextlib
from collections.abc import Iterator

from kvprofile.errors import KVProfileError, is_memory
from kvprofile.models.names import Source

FOLDER_INSTEAD = "or give a local folder with the model instead"


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
