"""The tasks of `kvprofile evaluate`, by name. To add one, write a file beside these and enter its task here."""

from kvprofile.evaluate.tasks.encyclopedia import ENCYCLOPEDIA
from kvprofile.evaluate.tasks.longbench import LONGBENCH
from kvprofile.evaluate.tasks.needle import NEEDLE
from kvprofile.evaluate.tasks.pairs import PAIRS
from kvprofile.evaluate.tasks.ruler import RULER
from kvprofile.evaluate.tasks.synthwiki import SYNTHWIKI
from kvprofile.evaluate.tasks.task import Example, Request, Task
from kvprofile.evaluate.tasks.zeroscrolls import ZEROSCROLLS

__all__ = ["TASKS", "Example", "Request", "Task"]

TASKS: dict[str, Task] = {
    "encyclopedia": ENCYCLOPEDIA,
    "needle": NEEDLE,
    "ruler": RULER,
    "key-value": PAIRS,
    "synthwiki": SYNTHWIKI,
    "longbench": LONGBENCH,
    "zeroscrolls": ZEROSCROLLS,
}
