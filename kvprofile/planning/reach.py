"""What can be asked for: a fraction, and one within reach. Said here, in one place, for every rule and unit."""

import math

from kvprofile.errors import MismatchError, UsageError

TOLERANCE = 1e-9


def check_budget(budget: float) -> float:
    """Return the budget, or raise UsageError if it is not a fraction of slots to keep."""
    return _fraction("budget", budget, "slots to keep", 0.5)


def check_bytes(size: float) -> float:
    """Return the bytes asked for, or raise UsageError if they are not a fraction of the stock cache's."""
    return _fraction("bytes", size, "the stock cache's bytes", 0.25)


def asked_for(budget: float | None, size: float | None) -> tuple[float, bool]:
    """What was asked for, and whether in bytes; half of the slots where nothing was.

    Raises UsageError for both, and for what is no fraction.
    """
    if budget is not None and size is not None:
        raise UsageError("both budget and bytes were given; give one: the fraction of the slots, or that of the bytes")
    return (check_bytes(size), True) if size is not None else (check_budget(0.5 if budget is None else budget), False)


def _fraction(what: str, value: float, of: str, example: float) -> float:
    if not 0.0 < value <= 1.0:
        raise UsageError(
            f"{what} {value:g} is not a fraction of {of}; expected above 0 and at most 1, for example {example:g}"
        )
    return value


def check_reach(
    asked: float,
    lowest: float,
    highest: float = 1.0,
    *,
    what: str = "budget",
    because: str = "protected tokens keep at least {lowest} of the slots of every head",
    instead: str = "",
) -> None:
    """Raise MismatchError with the range that works unless `asked` lies within `lowest` and `highest`.

    `what` is asked for; `because` says in a clause what takes the `lowest`, or leaves the `highest`; `instead` what else
    would help.
    """
    if lowest - TOLERANCE <= asked <= highest + TOLERANCE:
        return
    told = because.format(lowest=f"{lowest:.3f}", highest=f"{highest:.3f}")
    low, high = math.ceil(lowest * 1000) / 1000, "1" if highest == 1 else f"{highest:.3f}"
    raise MismatchError(
        f"{what} {asked:g} is out of reach: {told}; ask for {_a(what)} from {low:.3f} to {high}{instead}"
    )


def _a(what: str) -> str:
    return what if what.endswith("s") else f"a {what}"
