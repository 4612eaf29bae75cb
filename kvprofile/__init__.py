"""kvprofile: measure once where a model's KV cache can be merged, then merge it inside `generate`."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvprofile.calibration.calibrate import calibrate
    from kvprofile.generation import generate
    from kvprofile.models.load import load_model
    from kvprofile.planning.plans import replan
    from kvprofile.profile.profile import Profile
    from kvprofile.profile.storage import load_arrays, load_profile, save_profile
    from kvprofile.runtime.merger import KVMerger
    from kvprofile.samples import load_documents, make_samples

# Names are imported when first used: `import kvprofile` and `kvprofile --help` load no torch.
_HOMES = {
    "KVMerger": "kvprofile.runtime.merger",
    "Profile": "kvprofile.profile.profile",
    "calibrate": "kvprofile.calibration.calibrate",
    "generate": "kvprofile.generation",
    "load_arrays": "kvprofile.profile.storage",
    "load_documents": "kvprofile.samples",
    "load_model": "kvprofile.models.load",
    "load_profile": "kvprofile.profile.storage",
    "make_samples": "kvprofile.samples",
    "replan": "kvprofile.planning.plans",
    "save_profile": "kvprofile.profile.storage",
}

__all__ = [
    "KVMerger",
    "Profile",
    "calibrate",
    "generate",
    "load_arrays",
    "load_documents",
    "load_model",
    "load_profile",
    "make_samples",
    "replan",
    "save_profile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvprofile' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
