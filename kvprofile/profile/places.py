"""Where a profile named by a user lies: a path, the name of one that comes with kvprofile, or a place on the hub."""

from importlib import resources
from pathlib import Path

from kvprofile.files import lies_at

PREFIX = "hub:"


def locate(name: str | Path) -> Path:
    """The path of a profile: `name` itself if something lies there, else of what it names.

    `hub:ORG/NAME` is fetched; raises as `hub.fetched` does.
    """
    if lies_at(name):
        return Path(name)
    if str(name).startswith(PREFIX):
        from kvprofile.profile.hub import fetched

        return fetched(str(name))
    return shipped().get(str(name), Path(name))


def shipped() -> dict[str, Path]:
    """The profiles that come with kvprofile, by the alias of their model."""
    # Part of the package in a wheel; in a checkout a link to the folder of profiles.
    folder = Path(str(resources.files("kvprofile"))) / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}
