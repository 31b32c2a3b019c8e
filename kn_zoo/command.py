"""Run typer apps, and report errors as one line."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from kn_zoo.checkpoints.files import DISK_FULL, WeightsError, WriteError
from kn_zoo.checkpoints.manifest import ManifestError

# click's error for bad usage, wherever this version of typer keeps its click.
UsageError: Any = typer.BadParameter.__base__


def run(command: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a typer app and return its exit status; an error is one line on stderr and status 2."""
    program = Path(sys.argv[0]).name
    try:
        status = typer.main.get_command(command).main(
            args=None if argv is None else list(argv), prog_name=program, standalone_mode=False
        )
        sys.stdout.flush()
    except UsageError as error:
        print(f"{program}: {one_line(error.format_message())}", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename or error.errno not in DISK_FULL:  # files are reported with their paths
            raise
        with contextlib.suppress(OSError):  # otherwise the interpreter flushes it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{program}: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return status or 0


def one_line(text: object) -> str:
    """Return text, or a file name of any bytes, as one line that every terminal can show."""
    line = " ".join(str(text).split())
    return line.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turn errors of files and checkpoints into a `UsageError`; print warnings as lines."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(one_line(message), file=sys.stderr)
            yield
    except OSError as error:
        raise UsageError(describe(error)) from None
    except (WeightsError, ManifestError, ValueError) as error:
        raise UsageError(str(error)) from None


def describe(error: OSError) -> str:
    """Describe an error of the operating system by the path and the reason, without its number."""
    if isinstance(error, WriteError):
        return str(error.strerror)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
