"""How much attention changes the hidden state: what SqueezeAttention goes by (arXiv 2404.04793)."""

from typing import Self

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments


class AttentionChange:
    """Cosine between every token's hidden state before a layer's attention and after it; mean over tokens and samples."""

    def __init__(self, layers: int) -> None:
        self.moments = Moments(layers, ())

    def update(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Add one sample's layer: `before` and `after`, each `(tokens, hidden)`."""
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.moments.update(layer, np.array(float(cosine.mean())))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return self.moments.state()

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`attention_cosine` `(layers,)`, NaN for a layer that did not show it; nothing if none did."""
        seen = self.moments.count > 0
        return {"attention_cosine": np.where(seen, self.moments.mean, np.nan).astype(np.float32)} if seen.any() else {}
