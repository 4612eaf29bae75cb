"""The errors a user can cause, each with the exit code the command line ends with, and the look of too little memory.

A message is one line: what went wrong, what was got, what was expected, what to do next.
"""

import errno
import re

LONGEST = 2000  # characters of a message; what a file says about itself may be as long as the file


class KVProfileError(Exception):
    """Something the user can mend; the command line prints the message and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Control characters too: a name in a file must not speak to the terminal.
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}")


class UsageError(KVProfileError):
    """A flag or an argument that cannot be used (exit code 2, like click's own)."""

    exit_code = 2


class MismatchError(KVProfileError):
    """The profile does not fit the model, or the budget cannot be met (exit code 3)."""

    exit_code = 3


# Only devices have an error of their own in torch; a CPU that refuses memory, and libraries on a device, raise RuntimeError.
# A library that no longer fits while it is imported is an ImportError, a file that cannot be mapped an error of its reader.
_MEMORY = (
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "bad_alloc",
    "alloc_failed",
)


def is_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, means that memory was asked for and not given. Imports nothing."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if isinstance(link, MemoryError) or getattr(link, "errno", None) == errno.ENOMEM:
            return True
        if any(sign in str(link).lower() for sign in _MEMORY):
            return True
        seen.append(link)
        link = link.__cause__ or link.__context__
    return False
