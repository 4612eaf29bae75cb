"""An interrupted calibration goes on where it was: the statistics lie in a file that is renewed after every sample.

The file holds the accumulators' arrays and, as its metadata, which run they belong to. Every sample's randomness comes from
its index, so a run that is taken up again ends with the very numbers of one that was never interrupted.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvprofile
from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write
from kvprofile.fingerprint import model_facts

if TYPE_CHECKING:
    from kvprofile.measure.statistics import Statistics
    from kvprofile.models import LoadedModel
    from kvprofile.samples import SampleSet

_ANEW = "give the same command as before, or leave --resume out and give --force to begin anew"


def checkpoint_path(profile: Path) -> Path:
    """Where the statistics of the calibration that will write `profile` are kept."""
    return profile.with_suffix(".partial.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Statistics on disk: `path`, and what the run that wrote them has to share with the one that reads them."""

    path: Path
    run: Mapping[str, str]

    def load(self, statistics: "Statistics") -> int:
        """Fill `statistics` with what the file holds; returns how many samples they have seen, 0 if there is no file.

        Raises KVProfileError if the file is damaged or of another run; the message names what differs.
        """
        from safetensors.numpy import load_file

        if not self.path.exists():
            return 0
        facts = _facts(self.path)
        for name, here in self.run.items():
            if (there := facts["run"].get(name)) != here:
                raise KVProfileError(
                    f"{self.path} belongs to another calibration: its {name} is {there}, this one's is {here}; {_ANEW}"
                )
        for kind in facts["kinds"]:
            statistics.ratios.of_kind(kind)
        saved, targets = load_file(self.path), statistics.state()
        if {name: array.shape for name, array in saved.items()} != {name: a.shape for name, a in targets.items()}:
            raise KVProfileError(f"{self.path} does not hold what this calibration measures; {_ANEW}")
        for name, target in targets.items():
            target[...] = saved[name]
        return int(facts["samples"])

    def save(self, statistics: "Statistics", samples: int) -> None:
        """Write what `statistics` know after so many samples, completely or not at all."""
        from safetensors.numpy import save

        facts = {"run": dict(self.run), "samples": samples, "kinds": sorted(statistics.ratios.kinds)}
        arrays = {name: np.ascontiguousarray(array) for name, array in statistics.state().items()}
        atomic_write(self.path, save(arrays, metadata={"kvprofile": json.dumps(facts)}))


def samples_done(path: Path) -> int:
    """How many samples the statistics at `path` have seen; 0 if there is no such file."""
    return int(_facts(path)["samples"]) if path.exists() else 0


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


def _facts(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["kvprofile"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KVProfileError(f"{path} is damaged or no checkpoint of kvprofile ({error}); {_ANEW}") from error


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
