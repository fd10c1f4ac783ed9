"""What all commands share: one line per error and per warning."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ovit_engine.distributed.launch import launched

EXPECTED = (ValueError, OSError, MemoryError)  # what we raise on purpose, RecipeError and ExportError among them
_LONGEST = 300  # characters of a file's name in a message
MOST_FINDINGS = 20  # lines about one file


class OvitGroup(click.Group):
    """A group that prints an error as one line on stderr and exits with 1; `--debug` shows the traceback.

    A file that violates its certificate in several ways gets one more line for each.
    """

    def __init__(self, *, name: str, commands: Sequence[click.Command], help: str) -> None:
        debug = click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")
        version = click.version_option(package_name="ovit-engine", prog_name="ovit")
        super().__init__(
            name, commands={command.name or "": command for command in commands}, help=help, params=[debug]
        )
        version(self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of a user's work, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print errors that click does not know as one line."""
        debug = ctx.params.pop("debug")
        with _warnings_on_stderr():
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                where = error.ctx.command_path if error.ctx else "ovit"
                _print_error(f"{' '.join(error.format_message().split())} (see {where} --help)")
                ctx.exit(error.exit_code)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if debug:
                    raise
                _print_error(describe(error), _findings(error))
                ctx.exit(1)


def describe(error: Exception) -> str:
    """Return an error in one line, without the findings, which follow in lines of their own."""
    findings = _findings(error)
    if findings:
        return f"{getattr(error, 'summary', error)}: {len(findings)} findings"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = str(error.filename)
        return f"{name if len(name) < _LONGEST else name[:_LONGEST] + '...'!r}: {error.strerror}"
    if isinstance(error, EXPECTED) and text:
        return text
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ovit_engine"):
        return f"this command needs {error.name}, which is not installed"
    return f"{type(error).__name__}: {text} (ovit --debug shows the traceback)"


def _print_error(message: str, findings: Sequence[str] = ()) -> None:
    """Print one line on stderr and one per finding; under torchrun only in the first process that fails."""
    if launched().count > 1:
        from ovit_engine.distributed.torchrun import first_to_fail

        if not first_to_fail():
            return
    click.echo(f"ovit: error: {message}", err=True)
    for finding in findings[:MOST_FINDINGS]:
        click.echo(f"  - {' '.join(finding.split())}", err=True)
    if len(findings) > MOST_FINDINGS:
        click.echo(f"  ... and {len(findings) - MOST_FINDINGS} more", err=True)


def _findings(error: Exception) -> Sequence[str]:
    """Return the findings of a CertificateError if there are several; a single one is part of the error's line."""
    found: Sequence[str] = getattr(error, "violations", ())
    return found if len(found) > 1 else ()


class _OneLine(logging.Handler):
    """Print our warnings: those of the first process, and of each process which images are broken."""

    def emit(self, record: logging.LogRecord) -> None:
        if launched().is_main or record.name == "ovit_engine.training.images":
            _warn(record.getMessage())


def _warn(message: str) -> None:
    click.echo(f"ovit: warning: {' '.join(message.split())}", err=True)


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print Python warnings and our log's warnings as one line each."""
    show, handler, log = warnings.showwarning, _OneLine(logging.WARNING), logging.getLogger("ovit_engine")

    def one_line(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if launched().is_main:
            _warn(str(message))

    warnings.showwarning = one_line
    log.addHandler(handler)
    try:
        yield
    finally:
        warnings.showwarning = show
        log.removeHandler(handler)
