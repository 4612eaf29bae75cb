"""What a codec is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """One way to store vectors `(..., dim)`, each on its own: nothing is shared between them but an offline mean.

    What is stored are *parts*, tensors `(..., width)` that differ from the vectors in the last dimension alone: they are
    appended, indexed and selected as the vectors would be. Parts of nothing but zeros decode to finite numbers, so that room
    that was never written to harms nobody.

    A mean, broadcast against the vectors, is taken off before they are stored and put back when they are read. The host never
    waits for the device. A vector with a number that is not finite is not finite either when it is read, so that an output
    shows it; the other vectors are untouched.

    Attributes:
        name: its key in `table.CODECS`.
        rotated: vectors are stored turned (`rotation.turn`). Ask turned keys with turned queries; turn back what turned
            values add up to.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def rotated(self) -> bool: ...  # noqa: D102

    def nbytes(self, dim: int) -> int:
        """Bytes of one stored vector of `dim` elements, scale and offset in; the mean is not counted, it is kept once."""
        ...

    def encode(self, vectors: Tensor, mean: Tensor | None = None) -> tuple[Tensor, ...]:
        """The parts of vectors `(..., dim)` of any floating dtype."""
        ...

    def decode(self, parts: Sequence[Tensor], dim: int, mean: Tensor | None = None) -> Tensor:
        """The vectors `(..., dim)` in float32, turned where `rotated` is true."""
        ...
