"""Where files are kept, and how one is written so that nobody ever reads half of it."""

import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
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
    except PermissionError as error:
        raise KVProfileError(f"cannot write {path}: no permission in {path.parent}; choose another folder") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not path.parent.is_dir():
            raise KVProfileError(f"cannot write {path}: {path.parent} is not a folder; make it first") from error
        # A folder such as /proc is there and takes no files: its own reason would say that the file is missing.
        reason = f"{path.parent} takes no files" if isinstance(error, FileNotFoundError) else _reason(error)
        raise KVProfileError(f"cannot write {path}: {reason}; choose another path") from error


def lies_at(path: str | Path) -> bool:
    """True if something lies at `path`, be it a broken link; a name that no file can have leads nowhere."""
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """A regular file's bytes, once: what is checked is what is used.

    Raises:
        KVProfileError: as `open_file`, or it has more than `limit` bytes.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise KVProfileError(f"cannot read {path}: it has {size:,} bytes, more than {limit:,}; check the path")
        try:
            return stream.read(size)  # memory is taken for as much as is asked for
        except (OSError, MemoryError) as error:
            raise KVProfileError(f"cannot read {path}: {_reason(error)}; check the path") from error


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; nothing else is waited for.

    Raises:
        KVProfileError: it is missing, a folder, a pipe or a device, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise KVProfileError(f"cannot read {path}: {_reason(error)}; check the path") from error
    kind = os.fstat(number).st_mode
    if not stat.S_ISREG(kind):
        os.close(number)
        what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a device or a socket"
        raise KVProfileError(f"cannot read {path}: it is {what}; give a file")
    return os.fdopen(number, "rb")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        KVProfileError: as `open_file`.
    """
    with open_file(path) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise KVProfileError(f"cannot read {path}: {_reason(error)}; check the path") from error


def check_writable(path: str | Path) -> None:
    """Raise KVProfileError now if `path` could not be written later: its folder is missing or takes no new file."""
    path = Path(path)
    with _explained(path), _partial(path) as probe:
        with probe.open("xb"):
            pass
        probe.unlink()


def _reason(error: Exception) -> str:
    told = "out of memory" if isinstance(error, MemoryError) else str(error)
    return getattr(error, "strerror", None) or told or type(error).__name__
