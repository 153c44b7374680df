"""The hooks: one per kind of component, all of one shape.

Inside a hook a plugin calls ``register(name, build, config)``: ``name`` is what a recipe writes, ``config`` a frozen,
keyword-only dataclass whose fields are the recipe's other keys, ``build`` turns a config into the component.  What
``build`` must return is described in :mod:`llava_kit.contracts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pluggy

PROJECT = "llava_kit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """What a hook receives: names one component, its builder and its config dataclass."""

    def __call__(self, name: str, build: Callable[..., Any], config: type[Any]) -> None: ...


@hookspec
def register_vision_encoders(register: Register) -> None:
    """``build(config) -> VisionEncoder``"""


@hookspec
def register_connectors(register: Register) -> None:
    """``build(config, *, in_dim, out_dim) -> Connector``"""


@hookspec
def register_language_models(register: Register) -> None:
    """``build(config) -> LanguageModel``"""


@hookspec
def register_data_formats(register: Register) -> None:
    """``build(config) -> Sequence[Sample]``"""


@hookspec
def register_templates(register: Register) -> None:
    """``build(config) -> Template``"""


@hookspec
def register_benchmarks(register: Register) -> None:
    """``build(config) -> Benchmark``"""


@hookspec
def register_preparations(register: Register) -> None:
    """``build(config) -> Preparation``"""
