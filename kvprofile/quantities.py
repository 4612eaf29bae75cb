"""Sizes and counts as people write them: 24GB, 24GiB, 80G; 32k, 128k, 4,096."""

import re

from kvprofile.errors import UsageError

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
COUNTS = {"": 1, "k": 2**10, "m": 2**20}  # of tokens: a 32k context is 32,768


def parse_size(text: str) -> int:
    """Bytes: GB and G are 10^9, GiB is 2^30. Raises UsageError."""
    match = re.fullmatch(r"([\d.,_ ]*\d)\s*([KMGT]I?)?B?", text.strip().upper())
    number = _number(match[1]) if match else None
    if match is None or not number:
        raise UsageError(f"{text!r} is no size; expected for example 24GB, 24GiB or 80G")
    return round(number * SIZES[match[2] or ""])


def parse_count(text: str) -> int:
    """Tokens: 32k is 32,768. Raises UsageError."""
    match = re.fullmatch(r"([\d.,_]*\d)\s*([km])?", text.strip().lower())
    number = _number(match[1]) if match else None
    count = None if match is None or number is None else number * COUNTS[match[2] or ""]
    if not count or count != int(count):
        raise UsageError(f"{text!r} is no number of tokens; expected for example 4096, 32k (32,768) or 128k")
    return int(count)


def _number(digits: str) -> float | None:
    try:
        return float(digits.replace(",", "").replace("_", "").replace(" ", ""))
    except ValueError:  # 1.2.3
        return None
