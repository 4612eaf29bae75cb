"""What a run's numbers depend on, in words: samples are joined only where all of it is the same."""

import hashlib
from typing import TYPE_CHECKING

import kvprofile
from kvprofile.digests import code_digest, weights_digest
from kvprofile.models.offloading import input_device
from kvprofile.profile.fingerprint import model_facts

if TYPE_CHECKING:
    from kvprofile.models.load import LoadedModel
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
        "device": input_device(loaded.model).type,
        "text": f"{samples.description} ({_short(samples.digest + kinds)})",
        **{name: str(value) for name, value in settings.items()},
        "weights": weights_digest(loaded.model)[:12],
        "code": f"kvprofile {kvprofile.__version__} ({code_digest()[:12]})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
