"""How long loops show their progress: a function that wraps the items, so that no measuring code knows about terminals."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps the items of a loop and says what the loop does."""

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]:
        """Return the same items, in order."""


def untracked(items: Sequence[T], label: str) -> Iterable[T]:
    """Show nothing."""
    return items
