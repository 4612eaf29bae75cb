"""Where a profile named by a user lies: a path, or the name of one that comes with kvprofile."""

from importlib import resources
from pathlib import Path

from kvprofile.files import lies_at


def locate(name: str | Path) -> Path:
    """The path of a profile: `name` itself if something lies there, else that of a shipped profile of this name."""
    return Path(name) if lies_at(name) else shipped().get(str(name), Path(name))


def shipped() -> dict[str, Path]:
    """The profiles that come with kvprofile, by the alias of their model."""
    # Part of the package in a wheel; in a checkout a link to the folder of profiles.
    folder = Path(str(resources.files("kvprofile"))) / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}
