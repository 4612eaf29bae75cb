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
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            click.echo(f"Error: {_LACK_OF_MEMORY}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "Interrupted. Nothing was written.", err=True)
            ctx.exit(130)


_LACK_OF_MEMORY = (
    "not enough memory; ask for fewer --tokens or a smaller --dtype, spread the model with --device-map auto, or close other "
    "programs (calibrate --dry-run says what a run needs)"
)


def _is_lack_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Torch has a class of its own for this on GPUs, and on a CPU only a sentence."""
    told = str(error)
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in told
    )
