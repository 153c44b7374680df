"""How much memory and arithmetic a stage needs, from the shapes of a model without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_kit.losses import ROWS_AT_ONCE
from llava_kit.model import COMPONENTS, LlavaModel

if TYPE_CHECKING:
    from llava_kit.contracts import Views
    from llava_kit.recipe import Stage

_BLANK = (512, 512)
"""Size of the blank picture that shows how an encoder arranges its rows."""


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """What becomes of one square picture."""

    pixels: tuple[int, ...]
    tiles: int
    grid: tuple[int, int]
    prefix: int
    """Class and register rows, which do not reach the language model."""
    tokens: int
    """Rows of the language model's input."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a stage needs on one device, at most: micro-batches of full length, plain data parallelism."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def image_rows(model: LlavaModel) -> ImageRows:
    """How a blank square picture is arranged, from its pixels to the language model's input."""
    views = blank_views(model)
    layout = views.layout
    return ImageRows(
        pixels=tuple(views.pixels_NCHW.shape),
        tiles=layout.tiles,
        grid=(layout.grid_h, layout.grid_w),
        prefix=layout.prefix_tokens,
        tokens=model.connector.num_tokens(layout),
    )


def blank_views(model: LlavaModel) -> Views:
    """A blank square picture as the encoder sees it."""
    from PIL import Image

    return model.vision_encoder.preprocess(Image.new("RGB", _BLANK))


@dataclass(frozen=True)
class Stack:
    """The layers of a transformer, found by their shape: its longest list of modules."""

    layers: int
    parameters: int
    """Of one layer."""
    width: int

    @classmethod
    def of(cls, module: Any, width: int) -> Stack:
        stacks = [inner for inner in module.modules() if isinstance(inner, (nn.ModuleList, nn.Sequential))]
        longest = max(map(list, stacks), key=len, default=[])
        sizes = [count(layer.parameters()) for layer in longest]
        return cls(len(sizes), max(sizes, default=0), width)

    def bytes_per_token(self, size: int, *, trained: bool, checkpointing: bool) -> int:
        """Activations kept for the backward pass.

        A layer keeps what its products read and what its gates multiply: about ``parameters / width`` values a token,
        and the inputs of its norms and projections, four widths, when its weights train.  With checkpointing every
        layer keeps its input alone, and one at a time all of it.
        """
        layer = self.parameters // self.width + (4 * self.width if trained else 0)
        return size * (self.layers * self.width + layer if checkpointing else self.layers * layer)


def memory(model: LlavaModel, image: ImageRows, stage: Stage, trainable: dict[str, int]) -> Memory:
    size = 4 if stage.precision == "fp32" else 2
    weights = 0
    for name in COMPONENTS:
        trained = trainable[name]
        # Components with anything to train are kept in fp32, and autocast makes a copy of what trains.
        copy = trained * size if stage.precision != "fp32" else 0
        whole = count(getattr(model, name).parameters())
        in_fp32 = trained if _is_adapted(name, stage) else whole if trained else 0
        weights += in_fp32 * 4 + (whole - in_fp32) * size + copy
    language = Stack.of(model.language_model, model.language_model.embed_dim)
    rows = stage.micro_batch_size * stage.max_length
    activations = rows * language.bytes_per_token(
        size,
        trained=trainable["language_model"] > 0 and not stage.trains_adapters,
        checkpointing=stage.gradient_checkpointing,
    )
    if trainable["vision_encoder"]:
        vision = Stack.of(model.vision_encoder, model.vision_encoder.embed_dim)
        activations += (
            stage.micro_batch_size
            * _encoder_rows(image)
            * vision.bytes_per_token(size, trained=True, checkpointing=False)
        )
    labelled = min(ROWS_AT_ONCE, stage.micro_batch_size * max(1, stage.max_length - image.tokens))
    total = sum(trainable.values())
    return Memory(
        weights=weights,
        gradients=4 * total,
        optimizer=8 * total,
        activations=activations,
        logits=labelled * _vocabulary(model) * (8 + size),
    )


def _is_adapted(component: str, stage: Stage) -> bool:
    """Whether only adapters of the component are kept in fp32."""
    return component == "language_model" and stage.trains_adapters


def flops(model: LlavaModel, image: ImageRows, stage: Stage, trainable: dict[str, int]) -> int:
    """Two operations per weight and row forward, as many again for the inputs' gradients and for the weights' own."""
    language = Stack.of(model.language_model, model.language_model.embed_dim)
    passes = 2 + (trainable["language_model"] > 0 and not stage.trains_adapters) + stage.gradient_checkpointing
    total = 2 * passes * language.layers * language.parameters * stage.max_length
    seen = _encoder_rows(image)
    total += 2 * (3 if trainable["vision_encoder"] else 1) * count(model.vision_encoder.parameters()) * seen
    return total + 2 * 3 * count(model.connector.parameters()) * image.tokens


def _encoder_rows(image: ImageRows) -> int:
    return image.tiles * (image.prefix + image.grid[0] * image.grid[1])


def _vocabulary(model: LlavaModel) -> int:
    return model.language_model.logits(torch.empty(1, model.language_model.embed_dim, device="meta")).shape[-1]


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
