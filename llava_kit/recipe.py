"""Recipes: what a run is made of, as checked frozen dataclasses, and how they are loaded from YAML.

A recipe names its parts (plugins) and its stages.  :func:`load_recipe` reads it with everything it extends, applies
overrides, binds every plugin's keys to the plugin's own dataclass, and reports all mistakes at once, before anything
is built or downloaded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from llava_kit.errors import Problem, RecipeError, nearest
from llava_kit.recipe_bind import Binder, Slot, UnreadableError, complaints, nearest_place
from llava_kit.recipe_spelling import LORA, spell_compatibility, spell_share, spell_trainable
from llava_kit.recipe_yaml import Node, Resolver, apply_override, at, read_tree, shipped_recipes
from llava_kit.registry import Registry, default_registry

__all__ = [
    "Recipe", "Stage", "Source", "Slot", "ModelParts", "Optimizer", "Schedule", "Validation", "Limits", "Saving",
    "Lora", "Splice", "Provenance", "load_recipe", "shipped_recipes", "COMPONENTS", "LORA",
]  # fmt: skip

COMPONENTS = ("vision_encoder", "connector", "language_model")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _rule(wanted: str, holds: Callable[[Any], bool]) -> Callable[[str, Any], Iterable[str]]:
    """A check of a field by itself, as the binder runs it on every value it can read."""
    return lambda name, value: [] if holds(value) else [f"{name} must be {wanted}, got {value!r}"]


_POSITIVE = _rule("positive", lambda number: number > 0)
_NOT_NEGATIVE = _rule("0 or more", lambda number: number >= 0)
_AT_LEAST_1 = _rule("at least 1", lambda number: number >= 1)
_FRACTION = _rule("from 0 to below 1", lambda number: 0 <= number < 1)


def _names(name: str, entries: Iterable[str]) -> Iterable[str]:
    """Chosen names become file names and parts of dotted keys."""
    rule = "a name may hold letters, digits, '_' and '-' only"
    return [f"{name}.{entry}: {rule}" for entry in entries if not _NAME.fullmatch(entry)]


class _Checked:
    """Refuses values that break their field's ``check``, and what :meth:`_relations` says, all at once."""

    def __post_init__(self) -> None:
        alone = [text for one in dataclasses.fields(self) for text in complaints(one, getattr(self, one.name))]  # type: ignore[arg-type]
        messages = alone or [message for wrong, message in self._relations() if wrong]
        if messages:
            raise ValueError(*messages)

    def _relations(self) -> Iterable[tuple[bool, str]]:
        """Conditions between values that are wrong when they hold; a message begins with the key it is about."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The three parts of the model."""

    vision_encoder: Slot = field(metadata={"kind": "vision_encoders"})
    connector: Slot = field(metadata={"kind": "connectors"})
    language_model: Slot = field(metadata={"kind": "language_models"})


@dataclass(frozen=True, kw_only=True)
class Source(_Checked):
    """Samples of one kind, and how many of them an epoch takes."""

    format: Slot = field(metadata={"kind": "data_formats", "inline": True})
    share: float | None = field(default=None, metadata={"spell": spell_share, "check": _POSITIVE})
    """``None`` (in YAML ``all``): every sample once an epoch.  A number: drawn in proportion to the other shares."""
    samples: int | None = field(default=None, metadata={"check": _AT_LEAST_1})
    """How many there should be; checked against the data when it is there."""


@dataclass(frozen=True, kw_only=True)
class Lora(_Checked):
    """Low-rank adapters: ``y = W x + alpha / r · B A x``, ``A`` having ``r`` rows, with dropout in front of it."""

    r: int = field(default=64, metadata={"check": _AT_LEAST_1})
    alpha: float = field(default=16.0, metadata={"check": _POSITIVE})
    dropout: float = field(default=0.05, metadata={"check": _FRACTION})
    targets: tuple[str, ...] = ()
    """Names of the layers that get one, or how they end; by default every linear layer but the head."""


def _component_rates(name: str, rates: Mapping[str, float]) -> Iterable[str]:
    return [text for component, lr in rates.items() for text in _POSITIVE(f"{name}.{component}", lr)]


@dataclass(frozen=True, kw_only=True)
class Optimizer(_Checked):
    """AdamW."""

    lr: float = field(metadata={"check": _POSITIVE})
    component_lr: dict[str, float] = field(default_factory=dict, metadata={"check": _component_rates})
    """Learning rates of components that differ from ``lr``."""
    weight_decay: float = field(default=0.0, metadata={"check": _NOT_NEGATIVE})
    betas: tuple[float, float] = field(
        default=(0.9, 0.999),
        metadata={"check": _rule("from 0 to below 1", lambda betas: all(0 <= beta < 1 for beta in betas))},
    )
    eps: float = field(default=1e-8, metadata={"check": _POSITIVE})
    max_grad_norm: float | None = field(default=1.0, metadata={"check": _POSITIVE})
    """Longer gradients are shortened to this; ``None`` leaves them."""


@dataclass(frozen=True, kw_only=True)
class Schedule(_Checked):
    """How the learning rate rises to its peak and falls to 0 (``constant``: stays)."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = field(default=0.03, metadata={"check": _FRACTION})
    """Part of all steps; counts where ``warmup_steps`` is not given."""
    warmup_steps: int | None = field(default=None, metadata={"check": _NOT_NEGATIVE})

    def warmup(self, total_steps: int) -> int:
        """Steps in which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(round(self.warmup_ratio * total_steps, 6))  # 0.07 * 100 is 7.000000000000001


@dataclass(frozen=True, kw_only=True)
class Validation(_Checked):
    """What is looked at while a stage trains."""

    every: int = field(default=0, metadata={"check": _NOT_NEGATIVE})
    """Steps between two looks; 0 is never."""
    samples: int = field(default=0, metadata={"check": _NOT_NEGATIVE})
    """Samples held out for a validation loss, chosen at random from all sources in proportion to their lengths."""
    pictures: int = field(default=0, metadata={"check": _NOT_NEGATIVE})
    """Held-out pictures that are answered each time."""


def _trainable(name: str, trainable: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    if not trainable:
        yield f"{name} must name a component; there is {', '.join(COMPONENTS)}"
    for component, patterns in trainable.items():
        if component not in COMPONENTS:
            yield f"{name}.{component}: no component '{component}'; {nearest(component, COMPONENTS)}"
        if not patterns or "" in patterns:
            yield f"{name}.{component} must be 'all', 'lora' or a list of patterns for names of parameters"


def _sources(name: str, sources: Mapping[str, Source]) -> Iterable[str]:
    if not sources:
        yield f"{name} must have at least one source"
    if len({source.share is None for source in sources.values()}) > 1:
        yield f"{name} mixes shares; give every source a number, or all of them 'all'"
    yield from _names(name, sources)


@dataclass(frozen=True, kw_only=True)
class Stage(_Checked):
    """One training stage: what trains, on what, and how."""

    trainable: dict[str, tuple[str, ...]] = field(metadata={"spell": spell_trainable, "check": _trainable})
    """Component -> patterns over the names of its parameters; ``all`` and a list of components mean ``("*",)``."""
    data: dict[str, Source] = field(metadata={"check": _sources})
    template: Slot = field(metadata={"kind": "templates"})
    optimizer: Optimizer
    batch_size: int = field(metadata={"check": _AT_LEAST_1})
    """Samples in one step, over all devices."""
    micro_batch_size: int = field(metadata={"check": _AT_LEAST_1})
    """Samples that go through the model at once, on one device."""
    max_length: int = field(metadata={"check": _AT_LEAST_1})
    """Longest sequence, image rows included."""
    epochs: int | None = field(default=None, metadata={"check": _AT_LEAST_1})
    steps: int | None = field(default=None, metadata={"check": _AT_LEAST_1})
    samples: int | None = field(default=None, metadata={"check": _AT_LEAST_1})
    """How many all sources together should hold, which is an epoch; checked against the data when it is there."""
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    order: Literal["shuffled", "modality_length"] = "shuffled"
    """How an epoch is ordered; ``modality_length``: batches of samples with images or without, of similar length."""
    image_aspect: str | None = None
    """What becomes of images that are not square, in the vision encoder's words; by default as the model says."""
    lora: Lora | None = None
    """Adapters of the language model, for ``trainable: {language_model: lora}``; they stay for later stages."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False

    def _relations(self) -> Iterable[tuple[bool, str]]:
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % micro:
            sizes = [size for size in range(1, min(batch, 10_000) + 1) if batch % size == 0]
            fitting = " or ".join(map(str, sorted(sorted(sizes, key=lambda size: abs(size - micro))[:2])))
            yield True, f"batch_size {batch} is no multiple of micro_batch_size {micro}; {fitting} would fit"
        yield self.epochs is None and self.steps is None, "epochs or steps is missing"
        yield self.epochs is not None and self.steps is not None, "epochs and steps are both given; leave one out"
        warmup = self.schedule.warmup_steps
        if self.steps is not None and warmup is not None:
            yield warmup >= self.steps, f"schedule.warmup_steps must be below steps ({self.steps}), got {warmup}"
        if self.lora is None:
            yield self.trains_adapters, "trainable.language_model is 'lora'; add a section 'lora', such as {r: 128}"
        else:
            yield not self.trains_adapters, "lora is given, but trainable.language_model is not 'lora'"
        for name in self.optimizer.component_lr:
            hint = nearest(name, list(self.trainable))
            yield name not in self.trainable, f"optimizer.component_lr.{name}: '{name}' is not trained here; {hint}"

    @property
    def trains_adapters(self) -> bool:
        """Whether the language model's adapters train."""
        return LORA in self.trainable.get("language_model", ())

    def epoch_samples(self, lengths: Mapping[str, int] | None = None) -> int:
        """Samples of an epoch: declared for the stage, or summed over the sources.

        Args:
            lengths: what the sources that declare no ``samples`` really hold, by source name.

        Raises:
            RecipeError: a source's size is neither declared nor given.
        """
        if self.samples is not None:
            return self.samples
        total = 0
        for name, source in self.data.items():
            size = source.samples if source.samples is not None else (lengths or {}).get(name)
            if size is None:
                hint = "declare 'samples' there or for the stage, or prepare the data first"
                raise RecipeError(Problem(f"data.{name}", "how many samples there are is not known", hint))
            total += size
        return total

    def total_steps(self, epoch_samples: int) -> int:
        """Optimiser steps of the stage; the last batch of an epoch may be short."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * -(-epoch_samples // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Limits(_Checked):
    """What is tolerated in the data before a run stops (exit 3)."""

    max_bad_samples: int = field(default=100, metadata={"check": _NOT_NEGATIVE})
    max_bad_fraction: float = field(default=0.01, metadata={"check": _rule("from 0 to 1", lambda part: 0 <= part <= 1)})
    max_pixels: int = field(default=50_000_000, metadata={"check": _AT_LEAST_1})
    """Pixels of one image."""
    max_aspect: float = field(default=200.0, metadata={"check": _AT_LEAST_1})
    """Longer side over shorter side of one image."""


@dataclass(frozen=True, kw_only=True)
class Saving(_Checked):
    """When checkpoints are written."""

    every: int = field(default=1000, metadata={"check": _NOT_NEGATIVE})
    """Steps between two checkpoints; 0 writes none, only the weights when a stage ends."""
    keep: int = field(default=2, metadata={"check": _AT_LEAST_1})
    """How many of the newest are kept."""


@dataclass(frozen=True, kw_only=True)
class Splice(_Checked):
    """What computes the projection of visual rows and their place among the text rows."""

    backend: Literal["auto", "reference", "triton", "cublas_scatter", "strided"] = "auto"
    """``auto`` times what a GPU offers once per size, and takes ``reference`` without one."""


@dataclass(frozen=True)
class Provenance:
    """Which file a recipe came from, and the line or override of each of its values."""

    label: str = ""
    root: Node = field(default_factory=lambda: Node({}, ""), repr=False)

    def where(self, *keys: str) -> str:
        """``file:line: full.key.path`` of a value, for messages; of the nearest mapping where it has its default."""
        return at(nearest_place(self.root, keys), keys, "").where.removeprefix(": ")


def _stages(name: str, stages: Iterable[str]) -> Iterable[str]:
    if not stages:
        yield f"{name} must have at least one stage"
    if "evaluation" in stages:
        yield f"{name}.evaluation: the run folder has a folder of that name already"
    yield from _names(name, stages)


_IS_NAME = _rule("letters, digits, '_' and '-' only", lambda name: _NAME.fullmatch(name) is not None)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Checked):
    """Everything a run needs to know."""

    name: str = field(metadata={"check": _IS_NAME})
    seed: int = field(default=0, metadata={"check": _rule("from 0 to 4294967295", lambda seed: 0 <= seed < 2**32)})
    data_root: str = field(default="data", metadata={"check": _rule("a folder", bool)})
    """Where prepared data lives; recipes write ``${data_root}/…``.

    Made absolute when the recipe is loaded, so that a run can be used from any folder.
    """
    prepare: dict[str, Slot] = field(default_factory=dict, metadata={"kind": "preparations", "check": _names})
    model: ModelParts
    stages: dict[str, Stage] = field(metadata={"check": _stages})
    evaluate: dict[str, Slot] = field(default_factory=dict, metadata={"kind": "benchmarks", "check": _names})
    limits: Limits = Limits()
    saving: Saving = Saving()
    compatibility: tuple[Literal["no_clipping", "micro_batch_mean", "mismatch"], ...] = field(
        default=(), metadata={"spell": spell_compatibility}
    )
    """What is to be as in the original's code, where that is not what is meant; ``original``: all of it.  Gradients
    are not clipped; losses are means over micro-batches; samples whose length the original miscounts teach nothing."""
    splice: Splice = Splice()
    workers: int = field(default=0, metadata={"check": _NOT_NEGATIVE})
    """Data loader processes."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate that get the metrics too, such as ``tensorboard``."""
    source: Provenance = field(default=Provenance(), compare=False, repr=False, metadata={"internal": True})

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain mappings, lists and scalars; loading them gives an equal recipe."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.to_dict())), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Slot):
        return {"name": value.name, **_plain(value.config)}
    if isinstance(value, Source):
        slot = _plain(value.format)
        share = "all" if value.share is None else value.share
        return {"format": slot.pop("name"), **slot, "share": share, "samples": value.samples}
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.init and not f.metadata.get("internal")]
        return {f.name: _plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_recipe(target: str | Path, overrides: Sequence[str] = (), registry: Registry | None = None) -> Recipe:
    """Load a recipe with everything it extends, apply overrides, and check it all.

    Args:
        target: a path, or the name of a shipped recipe.
        overrides: ``dotted.key=value``, later ones over earlier ones.
        registry: where plugins are looked up; by default every installed plugin.

    Raises:
        RecipeError: with every mistake that was found, each with file and line, full key path and a way out.
    """
    problems: list[Problem] = []
    root, label = read_tree(target, problems)
    for override in overrides:
        root = apply_override(root, override, problems)
    for one in dataclasses.fields(Recipe):  # so that references reach the defaults too
        if isinstance(one.default, (str, int)) and one.name not in root.value:
            root.value[one.name] = Node(one.default, root.where, text=str(one.default))
    data_root = root.value["data_root"]
    if isinstance(data_root.value, str) and "${" not in data_root.value and data_root.value:
        absolute = str(Path(data_root.value).expanduser().absolute())
        root.value["data_root"] = dataclasses.replace(data_root, value=absolute, text=absolute)
    Resolver(root, problems).run()
    binder = Binder(registry or default_registry(), problems)
    try:
        recipe: Recipe = binder.dataclass(Recipe, root, ())
    except UnreadableError:
        raise RecipeError(problems) from None
    if problems:
        raise RecipeError(problems)
    return dataclasses.replace(recipe, source=Provenance(label, root))
