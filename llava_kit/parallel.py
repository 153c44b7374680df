"""Devices and threads: accelerate set up from a stage's values."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llava_kit.errors import Problem, ResourceError

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def set_threads() -> int:
    """One thread per core this process may use, unless ``OMP_NUM_THREADS`` says otherwise; the number chosen.

    More threads than cores make small models slower by an order of magnitude.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(len(os.sched_getaffinity(0)), 8)))
    return torch.get_num_threads()


def make_accelerator(precision: str, trackers: tuple[str, ...] = (), folder: str | None = None) -> Accelerator:
    """accelerate for one stage.

    Raises:
        ResourceError: fp16 without a GPU, or a tracker that is not installed.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # else the first stage's precision would hold for all
    if precision == "fp16" and not torch.cuda.is_available():
        raise ResourceError(Problem("precision", "fp16 training needs a GPU", "use bf16 or fp32"))
    try:
        accelerator = Accelerator(
            mixed_precision=PRECISIONS[precision], log_with=list(trackers) or None, project_dir=folder
        )
    except (ImportError, ValueError) as error:
        raise ResourceError(Problem("trackers", str(error), "pip install 'llava-kit[track]'")) from error
    if accelerator.num_processes > 1:
        what = f"{accelerator.num_processes} processes were started, this version trains in one"
        raise ResourceError(Problem("launch", what, "start it without a launcher"))
    return accelerator


def pick_device() -> str:
    """Where to run a model that is not trained: a GPU when there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
