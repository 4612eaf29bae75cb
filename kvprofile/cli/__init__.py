"""The command line: flags, then one call each. Heavy imports stay inside command bodies, so that --help is instant.

One file a command: `kvprofile/cli/NAME.py` holds the click command `NAME`; its name in `COMMANDS` registers it.
"""

from importlib import import_module

import click

from kvprofile import __version__
from kvprofile.cli.group import Group

COMMANDS = (
    "calibrate",
    "merge",
    "plan",
    "fit",
    "show",
    "report",
    "validate",
    "export",
    "push",
    "generate",
    "evaluate",
    "models",
    "policies",
    "tasks",
    "doctor",
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kvprofile")
def main() -> None:
    """Measure where a model's KV cache can be merged, and merge it there.

    A calibration runs once per model and writes a profile; the profile is applied inside generate.

    \b
    Examples:
      kvprofile calibrate smollm2-135m --budget 0.5 -o profile.json --report
      kvprofile plan profile.json --budget 0.25 -o quarter.json
      kvprofile generate smollm2-135m --profile profile.json --prompt-file long.txt

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the profile does not fit the model or the budget is
    out of reach, 130 interrupted. COMMAND --help says more; shell completion: docs/command-line.md.
    """


for _name in COMMANDS:
    main.add_command(getattr(import_module(f"kvprofile.cli.{_name}"), _name))
