"""What a run's numbers depend on, in words: samples are joined only where all of it is the same."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvprofile
from kvprofile.fingerprint import model_facts

if TYPE_CHECKING:
    from kvprofile.models import LoadedModel
    from kvprofile.samples import SampleSet


def run_facts(loaded: "LoadedModel", samples: "SampleSet", **settings: object) -> dict[str, str]:
    """All that the statistics depend on, in words: two runs with the same facts measure the same numbers.

    `settings` are those of the measuring. How a budget is spent (`--budget`, `--objective` and the like) is not among
    them: it is decided afterwards.
    """
    import torch
    import transformers

    kinds = "/".join(sample.kind for sample in samples.calibration)
    return {
        "model": " ".join(part for part in (loaded.source, loaded.revision) if part),
        "configuration": _short(model_facts(loaded.model.config)["config_hash"]),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "text": f"{samples.description} ({_short(samples.digest + kinds)})",
        **{name: str(value) for name, value in settings.items()},
        "weights": _weights_digest(loaded.model),
        "code": f"kvprofile {kvprofile.__version__} ({_code_digest()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _weights_digest(model: Any) -> str:
    """A digest of every weight: the sum of all its bits as integers, and a spread of its elements.

    It notices other weights in a folder of the same name in a fraction of the time that hashing gigabytes takes.
    """
    import torch

    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():  # accelerate keeps offloaded weights elsewhere
            bits = tensor.detach().contiguous().flatten().view(as_integers[tensor.element_size()])
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
            digest.update(bits[:: max(1, len(bits) // 1024)].cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _code_digest() -> str:
    """Of the package's own sources: the version does not change with every edit."""
    folder = Path(kvprofile.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
