"""What several commands do: load a model, speak on stderr, show progress, check the output's place."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.errors import KVProfileError, UsageError

if TYPE_CHECKING:
    from kvprofile.calibration.tracking import Track
    from kvprofile.models.load import LoadedModel


def say(message: str) -> None:
    """Print a message for people: on stderr, so that stdout stays clean for results."""
    click.echo(message, err=True)


def warn(message: str) -> None:
    """Print a warning for people, one line on stderr."""
    say(f"Warning: {message}")


def log_of(quiet: bool) -> Callable[[str], None]:
    """`say`, or with --quiet nothing."""
    return (lambda _message: None) if quiet else say


def check_verbosity(quiet: bool, verbose: bool) -> None:
    """Refuse --quiet and --verbose together."""
    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other; give one of them")


def check_model(model: str, options: dict[str, Any]) -> None:
    """Refuse a model's name, device or dtype that cannot be meant, before torch is loaded, which takes seconds.

    Raises UsageError.
    """
    from kvprofile.models.device_and_dtype import check_placement
    from kvprofile.models.names import resolve

    resolve(model, options["revision"])
    check_placement(options["device"], options["dtype"], options["device_map"])


def load(model: str, options: dict[str, Any], log: Callable[[str], None], *, verbose: bool = False) -> "LoadedModel":
    """Load a model as the `model_options` say; transformers' warnings are shown if `verbose`."""
    import transformers

    from kvprofile.models.context_length import ContextLengthWarning
    from kvprofile.models.load import load_model

    (transformers.logging.set_verbosity_warning if verbose else transformers.logging.set_verbosity_error)()
    # A command that reads text says so itself, before it reads.
    warnings.simplefilter("ignore", ContextLengthWarning)
    return load_model(model, **options, log=log)


def peak_memory(loaded: "LoadedModel") -> str:
    """The most memory held of each CUDA device the model lies on, or without one by this process, for people."""
    from kvprofile.models.device_memory import device_peaks

    if found := device_peaks(loaded.model):
        return ", ".join(f"{size / 2**30:.1f} GiB on {device}" for device, size in found.items())
    try:
        import resource
    except ImportError:  # there is none on Windows
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.1f} GiB"


def check_writable(path: Path, force: bool) -> None:
    """Find out before the work, not after it, that the result cannot be written."""
    from kvprofile import files

    if path.exists() and not force:
        raise KVProfileError(f"{path} exists; give --force to replace it, or another -o")
    if path.is_dir():
        raise KVProfileError(f"{path} is a folder; give -o a file name")
    files.check_writable(path)


def track_of(quiet: bool) -> "Track":
    """Progress bars for loops; none with --quiet or where stderr is not a terminal."""
    from kvprofile.cli.bars import Bars

    return Bars(quiet)
