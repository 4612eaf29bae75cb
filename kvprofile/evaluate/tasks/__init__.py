"""The tasks of `kvprofile evaluate`, by name. To add one, write a file beside these and enter its task here."""

from kvprofile.errors import UsageError
from kvprofile.evaluate.tasks.encyclopedia import ENCYCLOPEDIA
from kvprofile.evaluate.tasks.longbench import LONGBENCH
from kvprofile.evaluate.tasks.needle import NEEDLE
from kvprofile.evaluate.tasks.pairs import PAIRS
from kvprofile.evaluate.tasks.ruler import RULER
from kvprofile.evaluate.tasks.synthwiki import SYNTHWIKI
from kvprofile.evaluate.tasks.task import Example, Request, Task
from kvprofile.evaluate.tasks.zeroscrolls import ZEROSCROLLS

__all__ = ["TASKS", "Example", "Request", "Task", "named_task"]

TASKS: dict[str, Task] = {
    "encyclopedia": ENCYCLOPEDIA,
    "needle": NEEDLE,
    "ruler": RULER,
    "key-value": PAIRS,
    "synthwiki": SYNTHWIKI,
    "longbench": LONGBENCH,
    "zeroscrolls": ZEROSCROLLS,
}


def named_task(spec: str) -> tuple[str, str]:
    """The task and the source that `NAME:SOURCE` names; raises UsageError where there is no such task."""
    name, _, source = spec.partition(":")
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return name, source
