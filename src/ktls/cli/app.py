"""The command group, and how failures end: one line on stderr, a status, no traceback."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import signal
import sys
from typing import TYPE_CHECKING, Final, final

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("run",)

#: Command -> module with a ``click.Command`` named ``command``.
_COMMANDS: Final = ("doctor", "serve", "get")


@final
class _Commands(click.Group):
    """Imports a command's module only when the command is used (or listed in the help)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command


def _version() -> str:
    try:
        return importlib.metadata.version("ktls")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(_version(), prog_name="ktls")
@click.pass_context
def _ktls(context: click.Context) -> None:
    """TLS whose records are protected by the Linux kernel."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a wrong command line, 1 for what failed, 130 for ^C."""
    try:
        status = _ktls.main(
            None if arguments is None else list(arguments), prog_name="ktls", standalone_mode=False
        )
    except click.ClickException as error:  # usage errors too: their three lines say no more
        return _one_line(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _one_line("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has gone: nobody left to tell
            sys.stdout = None
            return 1
        return _one_line(str(error))
    except Exception as error:  # a bug of ours; still one line
        return _one_line(f"{type(error).__name__}: {error}")
    return status if isinstance(status, int) else 0


def _one_line(message: str, status: int = 1) -> int:
    click.echo(f"ktls: {' '.join(message.split())}", err=True)
    return status
