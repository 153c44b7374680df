"""How a command ends: exceptions become one line each on stderr and an exit status, with no traceback unless asked."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from llava_kit.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_UNEXPECTED,
    KitError,
    Problem,
    RecipeError,
    ResourceError,
)
from llava_kit.printing import one_line

EXIT_BROKEN_PIPE = 141
_MEMORY_HINT = "use a smaller model, batch or length"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came.  Like an interrupt, it passes through everything that collects other people's errors."""


def run_guarded(command: Callable[[], Any], *, as_json: bool, debug: bool) -> int:
    """Run a command to its end and say on stderr what went wrong; the exit status."""
    try:
        command()
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:  # the reader has had enough; nothing may be written at shutdown either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except TerminatedError as caught:
        error: BaseException = caught
        code, problems = EXIT_TERMINATED, [Problem("", "terminated")]
    except KeyboardInterrupt as caught:
        error = caught
        code, problems = EXIT_INTERRUPTED, [Problem("", "interrupted")]
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except Exception as caught:  # noqa: BLE001 - the one place where nothing may pass
        error = caught
        code, problems = explain(caught)
    if debug:
        traceback.print_exception(error)
    for problem in problems:
        print(_line(code, problem, as_json), file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[int, list[Problem]]:
    """The exit status and the problems of an exception."""
    if isinstance(error, KitError):
        return error.code, list(error.problems)
    if usage := getattr(error, "format_message", None):  # typer's mistakes in the command line itself
        context = getattr(error, "ctx", None)
        hint = f"see `{context.command_path} --help`" if context else ""
        return RecipeError.code, [Problem("usage", usage().rstrip("."), hint)]
    if _is_out_of_memory(error):
        return ResourceError.code, [Problem("memory", f"out of memory: {_first_line(error)}", _MEMORY_HINT)]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError.code, [
            Problem(str(error.filename or "disk"), "the disk is full", "make room and try again")
        ]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return ResourceError.code, [Problem(str(error.filename), error.strerror, "check the path and its permissions")]
    what = f"unexpected {type(error).__name__}: {_first_line(error)}"
    return EXIT_UNEXPECTED, [Problem(_place(error), what, "run again with --debug for the traceback")]


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for the question
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or "no message"


def _place(error: Exception) -> str:
    """Module and line where an unexpected error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""  # noqa: PTH119


def _line(code: int, problem: Problem, as_json: bool) -> str:
    if as_json:
        return json.dumps({"code": code, "where": problem.where, "message": problem.what, "hint": problem.hint})
    return f"error[{code}] {one_line(str(problem))}"
