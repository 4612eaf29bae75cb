"""Whose turn it is in a forward: a layer's keys are stored once, then each of its readers attends to them once."""


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
