"""Where files are kept, and how one is written so that nobody ever reads half of it."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvprofile.errors import KVProfileError


def cache_dir() -> Path:
    """The folder for converted models: `$KVPROFILE_CACHE`, otherwise the user's cache folder of the platform.

    It is only named here, not made: asking where something would be must not touch the disk.
    """
    import platformdirs

    chosen = os.environ.get("KVPROFILE_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("kvprofile")


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` completely or not at all, replacing what was there.

    The bytes go to a temporary file in the same folder, are flushed to the disk and then take the name in one step, so
    neither a reader nor a power cut sees a half-written file. The temporary file is removed on any failure.

    Raises:
        KVProfileError: the folder is missing, may not be written, or the disk is full.
    """
    path = Path(path)
    with _explained(path), _partial(path) as partial:
        # Opened by name, not through `tempfile`, so that the file gets the user's own umask instead of mode 600.
        with partial.open("xb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else uses; its file is removed on any failure."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of what goes wrong that `path` cannot be written, and what to do."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KVProfileError(f"cannot write {path}: {path.parent} is not a folder; make it first") from error
    except PermissionError as error:
        raise KVProfileError(f"cannot write {path}: no permission in {path.parent}; choose another folder") from error
    except OSError as error:
        raise KVProfileError(f"cannot write {path}: {error.strerror or error}; choose another path") from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        KVProfileError: the file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise KVProfileError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def check_writable(path: str | Path) -> None:
    """Raise KVProfileError now if `path` could not be written later: its folder is missing or takes no new file."""
    path = Path(path)
    with _explained(path), _partial(path) as probe:
        with probe.open("xb"):
            pass
        probe.unlink()
