"""Whose turn it is in a forward: a layer's keys are stored once, then each of its readers attends to them once."""

from collections.abc import Sequence

import torch

from kvprofile.errors import KVProfileError


class Turns:
    """Counts the modules that have yet to attend to what was stored last."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.waiting = 0

    def begin(self) -> None:
        """Keys were stored: every reader is to come."""
        self.waiting = self.readers

    def done(self) -> bool:
        """A reader has attended; True if it was the last."""
        self.waiting -= 1
        return not self.waiting

    @property
    def unattended(self) -> bool:
        """True if keys were stored and nobody has attended to them since."""
        return self.waiting == self.readers

    def check(self, module: torch.nn.Module | None, readers: Sequence[torch.nn.Module], layer: int) -> None:
        """Raise KVProfileError unless it is the turn of `module`, one of the `readers` of the layer."""
        if module not in readers:
            raise KVProfileError(
                "this cache was made for another model; use the cache() of the merger that is attached to this one"
            )
        if not self.waiting:
            raise KVProfileError(
                f"layer {layer} was attended to more often in a forward than when the model was attached; a merged cache "
                "cannot follow that, use the stock cache"
            )
