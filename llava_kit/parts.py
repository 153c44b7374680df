"""A LLaVA taken apart: what every checkpoint layout is read into and written from.

Each part is as ``to_hf`` of :class:`llava_kit.contracts.Exportable` gives it: config and tensors in the hub's layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_kit.errors import ModelError, Problem
from llava_kit.weights import Stored

KINDS = {"vision_encoder": "vision_encoders", "connector": "connectors", "language_model": "language_models"}
"""Components of a model, and the kind of plugin that makes each."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(kw_only=True)
class Part:
    """One component: its config, and its tensors under the hub's names."""

    config: dict[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read: nothing of it is copied yet."""

    layout: str
    """What it was recognised as."""
    folder: Path
    parts: Mapping[str, Part]
    tokenizer: Path
    """The folder that has the tokenizer's files."""


def full_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A part's config with transformers' defaults for what it leaves out.

    Raises:
        ModelError: transformers does not know the model type, or refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = dict(config)
    try:
        known = AutoConfig.for_model(given.pop("model_type"), **given)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            Problem(where, f"is no config of a known model: {' '.join(str(error).split())[:200]}")
        ) from error
    plain: dict[str, Any] = known.to_dict()
    return plain


def refuse(problems: Sequence[Problem]) -> None:
    """Stop if there is a problem.

    Raises:
        ModelError: there is.
    """
    if problems:
        raise ModelError(list(problems))
