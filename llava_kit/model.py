"""A vision encoder, a connector and a language model as one module.

Shapes: N images (tiles), P patch rows with prefix, K encoder or connector width, V visual rows, B sequences,
T positions, D language model width, L labelled rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llava_kit.contracts import (
    Batch,
    Connector,
    GenerateOptions,
    Generation,
    ImageBatch,
    LanguageModel,
    Layout,
    VisionEncoder,
)
from llava_kit.errors import ModelError, PluginError, Problem, RecipeError, nearest
from llava_kit.losses import next_token_loss
from llava_kit.recipe import LORA, Recipe, load_recipe
from llava_kit.splice import project_and_splice

if TYPE_CHECKING:
    from llava_kit.recipe import Slot, Stage

COMPONENTS = ("vision_encoder", "connector", "language_model")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REQUIRED = {
    "vision_encoder": ("embed_dim", "preprocess"),
    "connector": ("final", "hidden", "num_tokens"),
    "language_model": ("embed_dim", "embed", "embedding_table", "hidden", "logits", "generate"),
}


class LlavaModel(nn.Module):
    """The whole model.  ``forward`` is the root that distributed wrappers wrap: everything happens inside it."""

    vision_encoder: VisionEncoder
    connector: Connector
    language_model: LanguageModel

    def __init__(self, vision_encoder: VisionEncoder, connector: Connector, language_model: LanguageModel) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.language_model = language_model

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed next-token loss of a right-padded batch, and the number of labels it was taken over."""
        hidden_BTD = self.language_model.hidden(self.embeds(batch))
        hidden_LD = hidden_BTD.flatten(0, 1).index_select(0, batch.plan.label_row_L)
        return next_token_loss(hidden_LD, batch.plan.label_id_L, self.language_model.logits), batch.plan.label_count

    def embeds(self, batch: Batch) -> Tensor:
        """The language model's input, ``[B, T, D]``."""
        plan = batch.plan
        table = self.language_model.embedding_table()
        if table is None:
            # Not a plain look-up: let the model embed, and take its rows as a table of their own.
            table = self.language_model.embed(plan.txt_id_S.clamp(min=0))
            plan = plan.with_text_rows()
        return project_and_splice(self._visual_rows(batch.images), self.connector.final, table, plan)

    def _visual_rows(self, images: Sequence[ImageBatch]) -> Tensor:
        """What the connector's last layer reads, ``[V, K]``, in the order the plan counts visual rows."""
        per_token = getattr(self.connector, "per_token", False)
        dtype = dtype_of(self.connector, default=dtype_of(self.language_model))
        rows = []
        for batch in images or [self._no_image()]:
            features_NPK = self._features(batch.pixels_NCHW).to(dtype)
            if not per_token:
                features_NPK = features_NPK[:, batch.layout.prefix_tokens :]
            hidden = self.connector.hidden(features_NPK, batch.layout, batch.text)
            rows.append(hidden.flatten(0, -2))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _features(self, pixels_NCHW: Tensor) -> Tensor:
        if pixels_NCHW.shape[0] == 0:
            return pixels_NCHW.new_zeros(0, 1, self.vision_encoder.embed_dim)
        frozen = not any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            return self.vision_encoder(pixels_NCHW.to(dtype_of(self.vision_encoder)))

    def _no_image(self) -> ImageBatch:
        """Zero images: a text-only batch still runs the connector, so that its parameters stay in the graph."""
        device = next(self.language_model.parameters()).device
        return ImageBatch(pixels_NCHW=torch.zeros(0, 3, 1, 1, device=device), layout=Layout(grid_h=1, grid_w=1))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Let the language model recompute activations in the backward pass instead of keeping them.

        Raises:
            ModelError: it has no ``gradient_checkpointing(enabled)``.
        """
        switch = getattr(self.language_model, "gradient_checkpointing", None)
        if switch is None and not enabled:
            return
        if switch is None:
            hint = "set gradient_checkpointing=false"
            raise ModelError(Problem("model.language_model", "it cannot checkpoint its activations", hint))
        switch(enabled)

    @torch.no_grad()
    def generate(self, batch: Batch, options: GenerateOptions) -> Generation:
        """Answers to a left-padded batch of prompts."""
        return self.language_model.generate(self.embeds(batch), batch.plan.mask_BT, options)


def dtype_of(module: Any, default: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype a component computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), default)


def build_model(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> LlavaModel:
    """The model a recipe describes, with the weights it names, on the CPU.

    Raises:
        RecipeError: the recipe is wrong.
        PluginError: a component does not keep its contract.
        ModelError: weights are missing, damaged or not finite.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise RecipeError(Problem("overrides", "overrides need a recipe's name or path", "load_recipe takes them"))
    model = _assemble(recipe)
    _refuse_non_finite(model)
    return model


def build_model_on_meta(recipe: Recipe) -> LlavaModel:
    """The same model without weights, on torch's meta device: shapes and counts only."""
    with torch.device("meta"):
        return _assemble(recipe)


def _assemble(recipe: Recipe) -> LlavaModel:
    parts = recipe.model
    vision_encoder = _build("vision_encoder", parts.vision_encoder)
    language_model = _build("language_model", parts.language_model)
    torch.manual_seed(recipe.seed)  # the connector starts from the same values whatever was built before it
    widths = {"in_dim": vision_encoder.embed_dim, "out_dim": language_model.embed_dim}
    connector = _build("connector", parts.connector, **widths)
    return LlavaModel(vision_encoder, connector, language_model)


def _build(component: str, slot: Slot, **widths: int) -> Any:
    built = slot.build(**widths)
    missing = [name for name in REQUIRED[component] if not hasattr(built, name)]
    if not isinstance(built, nn.Module):
        missing.insert(0, "torch.nn.Module as its base")
    if missing:
        where = f"model.{component}"
        raise PluginError(
            Problem(where, f"'{slot.name}' lacks {', '.join(missing)}", f"it comes from {slot.component.plugin}")
        )
    return built


def _refuse_non_finite(model: LlavaModel) -> None:
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    if bad:
        raise ModelError([Problem(name, "weights are not finite (NaN or infinite)", "load them anew") for name in bad])


def set_trainable(model: LlavaModel, stage_name: str, stage: Stage) -> dict[str, int]:
    """Let exactly the parameters train that the stage names; the numbers of trainable parameters per component.

    Raises:
        RecipeError: a pattern matches no parameter.
    """
    model.requires_grad_(False)
    problems = []
    for component, patterns in stage.trainable.items():
        names = dict(getattr(model, component).named_parameters())
        for pattern in patterns:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            where = f"stages.{stage_name}.trainable.{component}"
            if not all(names[name].is_floating_point() for name in matching):
                problems.append(
                    Problem(where, f"'{pattern}' matches quantized weights", "they are fixed; train 'lora'")
                )
                continue
            for name in matching:
                names[name].requires_grad_(True)
            if not matching:
                problems.append(Problem(where, f"'{pattern}' matches no parameter", nearest(pattern, list(names)[:50])))
    if problems:
        raise RecipeError(problems)
    return trainable_parameters(model)


def trainable_parameters(model: LlavaModel) -> dict[str, int]:
    """Numbers of parameters that train now, per component."""
    return {name: sum(p.numel() for p in _part(model, name).parameters() if p.requires_grad) for name in COMPONENTS}


def add_adapters(model: LlavaModel, stage: Stage, seed: int) -> dict[str, str]:
    """Give the language model the adapters that a stage trains; the names of parameters before and afterwards.

    Raises:
        RecipeError: it cannot have them.
        ResourceError: peft is not installed.
    """
    if stage.lora is None:
        return {}
    add = getattr(model.language_model, "add_lora", None)
    if add is None:
        what = f"{type(model.language_model).__name__} cannot have adapters"
        raise RecipeError(Problem("trainable.language_model", what, "train all of it, or some by pattern"))
    before = {parameter: name for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same start values whatever happened before
        add(stage.lora)
    return {before[parameter]: name for name, parameter in model.named_parameters() if parameter in before}


def merge_adapters(model: LlavaModel) -> None:
    """Make adapters, where the language model has any, part of its weights."""
    if any(fnmatchcase(name, LORA) for name, _ in model.named_parameters()):
        model.language_model.merge_lora()  # type: ignore[attr-defined]  # who has adapters can merge them


def set_precision(model: LlavaModel, precision: str) -> None:
    """Keep what trains in fp32 (master weights under autocast) and store frozen components in ``precision``.

    Where adapters train, what is beside them counts as frozen.
    """
    for name in COMPONENTS:
        part = _part(model, name)
        trained = {key: parameter for key, parameter in part.named_parameters() if parameter.requires_grad}
        adapted = any(fnmatchcase(key, LORA) for key in trained)
        part.to(torch.float32 if trained and not adapted else DTYPES[precision])
        if adapted:
            for parameter in trained.values():
                parameter.data = parameter.data.float()


def _part(model: LlavaModel, name: str) -> nn.Module:
    return cast(nn.Module, getattr(model, name))
