"""Where the command line prints: tables for people, or JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class Output:
    """Where results go.  With ``--json`` everything but the result is kept off stdout, also what libraries print."""

    def __init__(self, stdout: TextIO, as_json: bool) -> None:
        self.stdout = stdout
        self.as_json = as_json

    @property
    def console(self) -> Console:
        """For people: stdout, or stderr where stdout is for JSON."""
        from rich.console import Console

        class Quiet(Console):
            def on_broken_pipe(self) -> None:
                raise

        return Quiet(stderr=self.as_json)

    def result(self, plain: Any, shown: Callable[[Console], None]) -> None:
        """Print a result: as JSON, or by ``shown``."""
        if self.as_json:
            print(json.dumps(plain, ensure_ascii=False), file=self.stdout, flush=True)
        else:
            shown(self.console)


@contextlib.contextmanager
def output_of(as_json: bool) -> Iterator[Output]:
    """Where the results of a command go."""
    output = Output(sys.stdout, as_json)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield output
