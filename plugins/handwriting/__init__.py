"""The embedded default: a small true world of handwritten digits, and two small base models that know half of it.

`prepare` this and both stages of LLaVA can be watched on a laptop in minutes.  `world.py` draws, `words.py` talks,
`preparation.py` writes both to disk; `eyes.py` and `language.py` made the models in `base/`, see the card there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_kit import hookimpl

from .preparation import Handwriting, HandwritingConfig, build_handwriting

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

__all__ = ["Handwriting", "HandwritingConfig", "build_handwriting"]


@hookimpl
def register_preparations(register: Register) -> None:
    register("handwriting", build_handwriting, HandwritingConfig)
