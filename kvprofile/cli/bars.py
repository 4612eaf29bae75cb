"""Progress bars on stderr."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from kvprofile.calibration.tracking import Pace, Track

T = TypeVar("T")

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.3g}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class Bars(Track):
    """A bar that moves with the parts of a sample; the time left follows from what has been measured so far.

    No bar with `quiet`, or where stderr is not a terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.finished = 0
        self.pace = Pace()

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]:
        """The same items, under a bar."""
        # disable=None: no bar where stderr is not a terminal. smoothing=0: the rate is that of all that was done.
        with tqdm(
            total=len(items),
            desc=label,
            unit="sample",
            disable=True if self.quiet else None,
            smoothing=0,
            bar_format=FORMAT,
        ) as self.bar:
            self.pace = Pace()
            for self.finished, item in enumerate(items):
                self.pace.begin()
                yield item
                self.pace.end()
                self._move(1.0)
        self.bar = None

    def part(self, done: int, of: int) -> None:
        """Move the bar within a sample."""
        if self.bar is not None:
            self._move(self.pace.at(done, of))

    def _move(self, share: float) -> None:
        self.bar.update(max(0.0, self.finished + share - self.bar.n))
