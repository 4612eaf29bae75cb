"""The bond between an attached model and the caches made for it."""

from typing import Any

import torch

from kvprofile.errors import KVProfileError


class Attachment:
    """What ties caches and their copies to an attached model.

    readers: for every layer of the model the modules that attend to its keys, in turn; more than one where layers share
    their keys. active: False once the merger is detached.
    """

    def __init__(self, readers: dict[int, list[torch.nn.Module]]) -> None:
        self.readers = readers
        self.active = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise KVProfileError(
            "a merged cache cannot be pickled or saved, because it belongs to the model it was made for; copy it with "
            "copy.deepcopy, or read the prompt again"
        )
