"""Profiles on the hub: `hub:ORG/NAME` is fetched wherever a profile is taken, `kvprofile push` puts one there.

A repository holds `profile.json`, the arrays under the name the profile has for them, and a model card with its pictures.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.files import read_bytes
from kvprofile.models.failures import explained
from kvprofile.models.load import resolved_revision
from kvprofile.models.names import HUB_ID, Source
from kvprofile.profile.places import PREFIX, locate

if TYPE_CHECKING:
    from kvprofile.profile.profile import Profile

FILE = "profile.json"
INSTEAD = "or give the file of a profile instead"


def repository(name: str) -> Source:
    """Where `hub:ORG/NAME` or `hub:ORG/NAME@REVISION` leads. Raises UsageError for anything else."""
    place, _, revision = name.removeprefix(PREFIX).partition("@")
    if not HUB_ID.fullmatch(place):
        raise UsageError(f"{name} names no repository; expected {PREFIX}ORG/NAME, or {PREFIX}ORG/NAME@REVISION")
    return Source(name, "hub", place, revision or None)


@cache  # what a process reads of one name is of one commit
def fetched(name: str) -> Path:
    """The path of the profile in the hub's cache, its arrays beside it; the hub is asked where it can be reached.

    Raises UsageError for a name that leads nowhere, KVProfileError in one line for what goes wrong.
    """
    from huggingface_hub import errors, hf_hub_download

    from kvprofile.profile.storage import load_profile

    source = repository(name)

    def bring(file: str) -> Path:
        try:
            return Path(hf_hub_download(source.location, file, revision=revision))
        except errors.RemoteEntryNotFoundError:
            raise KVProfileError(
                f"{source.location} on the hub has no {file}; `kvprofile push PROFILE {source.location}` puts a profile there"
            ) from None

    with explained(source, INSTEAD):
        revision: Any = resolved_revision(source)
        path = bring(FILE)
        arrays = load_profile(path).statistics.arrays
        if arrays is not None:
            bring(arrays.file)
    return path


def push(
    profile: "Profile",
    path: Path,
    name: str,
    *,
    beside: Mapping[str, bytes],
    private: bool = False,
    force: bool = False,
) -> str:
    """Put the profile saved at `path`, its arrays and the files `beside` it into a repository of the hub, made if need be.

    Returns the address. Raises KVProfileError where a profile lies there and `force` is off, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from kvprofile.profile.storage import MAX_ARRAYS

    source = repository(name)
    files = {**beside, FILE: profile.to_json().encode()}
    if (arrays := profile.statistics.arrays) is not None:
        files[arrays.file] = read_bytes(locate(path).parent / arrays.file, limit=MAX_ARRAYS)
    hub = HfApi()
    with explained(source, INSTEAD):
        hub.create_repo(source.location, private=private, exist_ok=True)
        if not force and hub.file_exists(source.location, FILE):
            raise KVProfileError(f"{source.location} has a {FILE} already; give --force to replace it")
        hub.create_commit(
            source.location,
            [CommitOperationAdd(file, content) for file, content in files.items()],
            commit_message=f"Profile of {profile.model.name} by kvprofile",
        )
    return f"{hub.endpoint}/{source.location}"
