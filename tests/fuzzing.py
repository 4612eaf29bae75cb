"""Mutations of JSON values and of bytes, for the fuzzers; and what a fuzzed reader may do: work, or refuse in one line."""

import copy
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kvprofile.errors import LONGEST, KVProfileError

# How many examples: a few in the suite, thousands by hand (KVPROFILE_FUZZ=10000 python -m pytest tests/unit/test_fuzz_*.py -s).
EXAMPLES = int(os.environ.get("KVPROFILE_FUZZ", "0"))
outcomes: Counter[str] = Counter()


def fuzzing(few: int) -> settings:
    """Seeded runs: `few` examples in the suite, as many as the environment asks for by hand."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal(action: Callable[[], Any]) -> str | None:
    """Why `action` refused, None where it worked; anything but one short line of KVProfileError goes through."""
    try:
        action()
    except KVProfileError as error:
        message = str(error)
        assert message, "a refusal without a word"
        assert len(message.splitlines()) == 1, message
        assert len(message) <= LONGEST + 10
        return message
    return None


ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        31,
        0.5,
        -0.0,
        1.001,
        1e-320,
        1e308,
        -1e308,
        2**31,
        2**63,
        -(2**63),
        10**30,
        10**400,
    ),
    *(
        "",
        "x",
        "x" * 5000,
        "naïve \u2028 \U0001f600",
        "\ud800",
        "nul\0",
        "../x",
        "x-foreign",
        "1",
        "NaN",
        "int8",
        "int4",
    ),
    *([], {}, [None], [[]], {"": None}, ["full_attention"] * 3, [0.5], float("nan"), float("inf"), -float("inf")),
]


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON values; of long lists of numbers the first, second and last only."""
    found = [path] if path else []
    if isinstance(values, dict):
        for key, value in values.items():
            found += places(value, (*path, key))
    elif isinstance(values, list):
        for index in sorted({0, 1, len(values) - 1} & set(range(len(values)))):
            found += places(values[index], (*path, index))
    return found


def get(values: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        values = values[step]
    return values


@st.composite
def mutations(draw: Any, values: Any) -> list[tuple[tuple[Any, ...], str, Any]]:
    """One to three changes: where, what is done there, and with what."""
    where = places(values)
    steps = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(where))
        what = draw(st.sampled_from(["set", "set", "set", "delete", "repeat", "swap", "deepen", "nudge", "rename"]))
        other = draw(st.sampled_from(where)) if what == "swap" else None
        steps.append((path, what, get(values, other) if other else draw(st.sampled_from(ODD))))
    return steps


def mutate(values: Any, steps: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    """Change JSON values in place; a place that an earlier change took away is left."""
    for path, what, value in steps:
        try:
            part, key = get(values, path[:-1]), path[-1]
            old = part[key]
            if what in ("set", "swap"):
                part[key] = copy.deepcopy(value)
            elif what == "delete":
                del part[key]
            elif what == "repeat" and isinstance(part, list):
                part.insert(key, old)
            elif what == "deepen":
                for _ in range(40):
                    old = [old]
                part[key] = old
            elif what == "nudge" and isinstance(old, (int, float)):
                part[key] = old * 1.5 + 1 if isinstance(old, float) else old + 1
            elif what == "rename" and isinstance(part, dict):
                part[str(value)[:20]] = part.pop(key)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
            continue


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes cut off, overwritten, doubled or replaced."""
    what = draw(st.sampled_from(["cut", "flip", "flip", "insert", "remove", "replace"]))
    at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(256, max(0, len(data) - 1))))
    piece = draw(st.binary(min_size=1, max_size=12))
    if what == "cut":
        return data[:at]
    if what == "flip":
        return data[:at] + piece + data[at + len(piece) :]
    if what == "insert":
        return data[:at] + piece + data[at:]
    if what == "remove":
        return data[:at] + data[at + len(piece) :]
    return draw(st.binary(max_size=64))
