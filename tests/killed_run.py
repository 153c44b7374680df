"""Trains in child processes that are killed at given steps, then resumes; prints how each child ended.

killed_run.py RECIPE RUN STAGE:STEP …     kill -9 after each of these steps, then run to the end
    STAGE:STEP:saved      after the checkpoint of that step was written
    STAGE:STEP:pictures   after the fixed pictures were answered, before the look is complete
killed_run.py RECIPE RUN --stop STAGE:STEP   only the first part
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import llava_kit.run
from llava_kit import trainer, watch


def deadly(method: Callable[..., Any], kill: str, suffix: str, offset: int = 0) -> Callable[..., Any]:
    """The method, which is the last thing the process does when its step (its first argument) is the one to die at."""

    def called(self: Any, step: int, *rest: Any) -> Any:
        result = method(self, step, *rest)
        if f"{self.stage_name}:{step + offset}{suffix}" == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return called


def child(recipe: str, run: str, kill: str) -> None:
    trainer.Trainer._step = deadly(trainer.Trainer._step, kill, "", offset=1)  # type: ignore[method-assign]
    trainer.Trainer._save = deadly(trainer.Trainer._save, kill, ":saved")  # type: ignore[method-assign]
    watcher = watch.StageObserver
    watcher._answer_pictures = deadly(watcher._answer_pictures, kill, ":pictures")  # type: ignore[method-assign]
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
