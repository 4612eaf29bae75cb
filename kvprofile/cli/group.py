"""The group of commands: turns our errors into one line and an exit code, and Ctrl-C into a quiet end."""

import logging
from typing import Any

import click

from kvprofile.errors import KVProfileError, is_memory

# Where torchao is installed, transformers imports it, and it warns of every CUDA library that this machine cannot load.
IMPORT_NOISE = ("torchao", "torch.utils._pytree")
SPARE = 4 * 2**20  # bytes held back, to have a little to work with where memory has run out


class Group(click.Group):
    """Ends with the error's exit code (1 failed, 2 usage, 3 does not fit) or 130 on Ctrl-C; no traceback for either."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they are registered, which is that of the work, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        for name in IMPORT_NOISE:
            logging.getLogger(name).setLevel(logging.ERROR)
        spare = bytearray(SPARE)
        try:
            return super().invoke(ctx)
        except KVProfileError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            del spare
            if not is_memory(error):
                raise
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "Interrupted. Nothing was written.", err=True)
            ctx.exit(130)
        # Here the error and the frames it came through are gone, and with them what they held. Where a model is read or run,
        # the message is better: this is for loading it, and for all that needs none.
        click.echo("Error: out of memory; close other programs, or take a smaller model or --dtype", err=True)
        ctx.exit(1)
