"""A plugin framework for visual instruction tuning: LLaVA with every part replaceable.

The names below are loaded when first used, so that importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llava_kit.hookspecs import hookimpl

if TYPE_CHECKING:
    from llava_kit.interop import load_model
    from llava_kit.model import build_model
    from llava_kit.recipe import load_recipe
    from llava_kit.run import train

__all__ = ["build_model", "hookimpl", "load_model", "load_recipe", "train"]

_HOMES = {
    "build_model": "llava_kit.model",
    "load_model": "llava_kit.interop",
    "load_recipe": "llava_kit.recipe",
    "train": "llava_kit.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llava_kit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
