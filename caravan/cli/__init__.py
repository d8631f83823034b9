"""The command line: every stage is a command whose flags are its Config; results to stdout, words to stderr.

`caravan --help` reads docstrings from source and imports nothing heavy. Exit codes: 0 done, 1 found wrong or
unexpected, 2 the user can put it right, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caravan.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; never raises for what a user can do wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        if err.hint:
            print(f"hint: {err.hint}", file=sys.stderr)
        if os.environ.get("CARAVAN_DEBUG") and err.__cause__:
            print(f"cause: {err.__cause__!r}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        where = f" {stop.args[0]}" if stop.args else ""
        print(f"\ninterrupted;{where} run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `caravan ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as err:
        if os.environ.get("CARAVAN_DEBUG"):
            raise
        print(f"error: unexpected {type(err).__name__}: {_short(err)}", file=sys.stderr)
        print(f"hint: the traceback is in {_save_trace(argv)}; CARAVAN_DEBUG=1 prints it", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    from caravan.cli import help as pages

    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[0] == "help":
            return _dispatch([argv[1], "--help"])
        print(pages.overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from caravan import __version__

        print(f"caravan {__version__}")
        return 0
    command, words = argv[0], argv[1:]
    if "." in command:
        sys.path.insert(0, os.getcwd())  # a stage of one's own stands in the current folder
    path = pages.file_of(command)  # an unknown command ends here
    if "-h" in words or "--help" in words:
        print(pages.page(command, path))
        return 0
    if command == "inspect":
        from caravan.cli import inspect

        return inspect.main(words)
    if command in pages.SHOWING:
        from caravan.cli import showing

        return showing.main(command, words)
    if command in pages.DIRECT:
        import importlib

        return int(importlib.import_module(f"caravan.cli.{command}").main(words))
    from caravan.cli import running

    return (
        running.program(command, words)
        if command in pages.PROGRAMS
        else running.stage_command(command, words)
    )


def _short(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:200] if lines else ""


def _save_trace(argv: list[str]) -> Path:
    import tempfile
    import time
    import traceback

    text = f"caravan {' '.join(argv)}\n\n{traceback.format_exc()}"
    path = Path(tempfile.gettempdir()) / f"caravan-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path.write_text(text, errors="backslashreplace")
    return path
