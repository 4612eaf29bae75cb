"""The group of commands: turns our errors into one line and an exit code, and Ctrl-C into a quiet end."""

import logging
from typing import Any

import click

from kvprofile.errors import KVProfileError

# Where torchao is installed, transformers imports it, and it warns of every CUDA library that this machine cannot load.
IMPORT_NOISE = ("torchao", "torch.utils._pytree")


class Group(click.Group):
    """Ends with the error's exit code (1 failed, 2 usage, 3 does not fit) or 130 on Ctrl-C; no traceback for either."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they are registered, which is that of the work, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        for name in IMPORT_NOISE:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except KVProfileError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "Interrupted. Nothing was written.", err=True)
            ctx.exit(130)
