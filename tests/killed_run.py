"""Trains in child processes that are killed at given steps, then resumes; prints how each child ended.

killed_run.py RECIPE RUN STAGE:STEP …     kill -9 at each of these, then run to the end
killed_run.py RECIPE RUN --stop STAGE:STEP   only the first part
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rich.console import Console

import llava_kit.run
from llava_kit import trainer


def child(recipe: str, run: str, kill: str) -> None:
    step = trainer.Trainer._step

    def deadly(self, number, micro_batches):  # type: ignore[no-untyped-def]
        row = step(self, number, micro_batches)
        if f"{self.stage_name}:{number + 1}" == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    trainer.Trainer._step = deadly  # type: ignore[method-assign]
    resume = (Path(run) / "recipe.yaml").exists()
    llava_kit.run.train(recipe, run_folder=run, resume=resume, console=Console(quiet=True))


def main() -> None:
    recipe, run, *kills = sys.argv[1:]
    plan = kills[1:] if kills[0] == "--stop" else [*kills, ""]
    for kill in plan:
        pid = os.fork()  # after the imports, which cost more than the training
        if pid == 0:
            try:
                child(recipe, run, kill)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


main()
