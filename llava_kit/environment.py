"""What a run ran on, for ``environment.json`` and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

PACKAGES = (
    "llava-kit", "torch", "torchvision", "transformers", "open_clip_torch", "timm", "accelerate", "safetensors",
    "tokenizers", "pluggy", "omegaconf", "pillow", "numpy", "triton",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions, machine and devices.  No host or user names, no paths, no environment variables but thread counts."""
    import torch

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
