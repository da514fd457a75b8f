"""How a verb ends. Owns exit codes and what is said on stderr: one sentence for a BrimError, never a traceback.

Exit codes: 0 done; 1 a BrimError or a bug of ours; 2 wrong usage (typer's own); 130 interrupted; 141 the reader of stdout went.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from brim.errors import BrimError, MemoryBudgetError, OutOfDeviceMemory

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Map whatever leaves `verb` to a sentence and an exit code. `brim --debug VERB` keeps the traceback."""

    @functools.wraps(verb)
    def wrapper(*args: Any, **values: Any) -> None:
        try:
            verb(*args, **values)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Python flushes stdout once more at exit; let that go nowhere instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except Exception as error:
            if sys.argv[1:2] == ["--debug"]:
                raise
            report_error(error)
            raise typer.Exit(EXIT_FAILED) from None

    return wrapper


def report_error(error: Exception) -> None:
    """Say what went wrong on stderr; a memory error brings its ledger as a table."""
    if not isinstance(error, BrimError):
        kind = type(error).__name__
        message = f"internal error, a bug in Brim: {kind}: {error}. `brim --debug ...` shows where."
        print(f"brim: {message}", file=sys.stderr)
        return
    print(f"brim: {error}", file=sys.stderr)
    if isinstance(error, (MemoryBudgetError, OutOfDeviceMemory)) and error.ledger is not None:
        from brim.cli.tables import print_ledger

        print_ledger(error.ledger)
