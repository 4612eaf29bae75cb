"""How long loops tell how far they are, so that no measuring code knows about terminals."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Track:
    """Wraps the items of a loop, and hears of the parts of the item at work. This one shows nothing; subclasses do."""

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]:
        """Return the same items, in order; `label` says what the loop does."""
        return items

    def part(self, done: int, of: int) -> None:
        """Hear that so many of the current item's parts are done."""


untracked = Track()


class Parts:
    """Counts the parts of one item: there are `of` in all."""

    def __init__(self, track: Track, of: int) -> None:
        self.track, self.of, self.done = track, of, 0

    def tick(self) -> None:
        """One more part is done."""
        self.done += 1
        self.track.part(self.done, self.of)


class Pace:
    """Which share of an item's time has passed after so many of its parts, as it was in the item before.

    Parts take different times: a layer's forward is short, its damage long. In the first item all count alike.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.places: list[float] = [0.0, 1.0]
        self.shares: list[float] = [0.0, 1.0]
        self.begin()

    def begin(self) -> None:
        """An item begins."""
        self.started = self.clock()
        self.seen: list[tuple[float, float]] = []

    def at(self, done: int, of: int) -> float:
        """The share of the item's time that has passed, from 0 to 1, now that `done` of its parts are done."""
        place = done / of
        self.seen.append((place, self.clock() - self.started))
        return float(np.interp(place, self.places, self.shares))

    def end(self) -> None:
        """The item is done: the next is taken to go as it did."""
        whole = self.clock() - self.started
        if self.seen and whole > 0:
            self.places = [0.0, *(place for place, _ in self.seen), 1.0]
            self.shares = [0.0, *(passed / whole for _, passed in self.seen), 1.0]
