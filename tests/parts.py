"""Small parts that several test files build on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from llava_kit.contracts import ImageSlot, Sample, Turn
from llava_kit.data import Collator
from llava_kit.model import LlavaModel
from llava_kit.order import Position
from llava_kit.tokens import Encoder
from llava_kit_plugins.causal_lm import CausalLmConfig, build_causal_lm
from llava_kit_plugins.clip import ClipConfig, build_clip
from llava_kit_plugins.connectors import LinearConfig, MlpConfig, build_linear, build_mlp
from llava_kit_plugins.templates import Vicuna, VicunaConfig

LIMITS = SimpleNamespace(max_pixels=1_000_000, max_aspect=200.0, max_bad_samples=100, max_bad_fraction=1.0)


def tiny_model(folder: Path, *, model_type: str = "llama", connector: str = "linear") -> LlavaModel:
    """A CLIP tower of 16 patches and width 32, a connector, and a two-layer decoder of width 64."""
    vision_encoder = build_clip(ClipConfig().tiny(folder))
    config = CausalLmConfig(model="a/b", architecture={"model_type": model_type}).tiny(folder)
    language_model = build_causal_lm(config)
    torch.manual_seed(0)
    widths = {"in_dim": vision_encoder.embed_dim, "out_dim": language_model.embed_dim}
    built = build_linear(LinearConfig(), **widths) if connector == "linear" else build_mlp(MlpConfig(), **widths)
    with torch.no_grad():
        # Random weights as they come make a decoder that hardly looks at its input.
        for parameter in [*built.parameters(), *(p for p in language_model.parameters() if p.ndim > 1)]:
            parameter.mul_(5.0)
    return LlavaModel(vision_encoder, built, language_model)


def tiny_collator(model: LlavaModel, max_length: int = 512) -> Collator:
    """The collator of a stage with the template ``vicuna_v1``."""
    return Collator(
        preprocess=model.vision_encoder.preprocess,
        num_tokens=model.connector.num_tokens,
        per_token=True,
        template=Vicuna(VicunaConfig()),
        encoder=Encoder(model.language_model.tokenizer),
        limits=LIMITS,  # type: ignore[arg-type]
        max_length=max_length,
    )


def picture(path: Path, seed: int) -> Path:
    """A small image of nine coloured fields."""
    fields = torch.randint(0, 256, (3, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pixels = fields.repeat_interleave(24, 0).repeat_interleave(20, 1)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def sample(id_: str, images: Sequence[Path], *exchange: str) -> Sample:
    """A conversation; all images stand in front of its first question."""
    slots: list[str | ImageSlot] = [part for index in range(len(images)) for part in (ImageSlot(index), "\n")]
    turns = [Turn("human", (*slots, exchange[0]))]
    for number, text in enumerate(exchange[1:], 1):
        turns.append(Turn("assistant" if number % 2 else "human", (text,)))
    return Sample(id=id_, turns=tuple(turns), images=tuple(images))


def numbered(*samples: Sample) -> list[tuple[Position, Sample]]:
    """Samples as a collator takes them."""
    return [(Position("data", index), one) for index, one in enumerate(samples)]
