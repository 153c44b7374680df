"""Samples to batches: images, tokens and the splice plan; and the record of every sample that could not be used."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from llava_kit.contracts import (
    IGNORE,
    Batch,
    Connector,
    ImageBatch,
    ImageSlot,
    LanguageModel,
    Layout,
    Sample,
    SplicePlan,
    Template,
    Turn,
    Views,
    VisionEncoder,
)
from llava_kit.errors import DataError, Problem, RecipeError, SampleError, nearest
from llava_kit.images import load_image
from llava_kit.order import Position
from llava_kit.plan import PlacedImage, PlanSequence, build_plan
from llava_kit.tokens import Encoder, Tokens, check_template, fit

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_kit.recipe import Limits, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A sample that cannot be used, and why."""

    id: str
    position: Position
    error: SampleError

    @property
    def reason(self) -> str:
        """The kind of mistake: its message up to the details."""
        return self.error.problems[0].what.split(": ")[0]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What goes through the model at once, and which of its samples could not be used; no batch if none could."""

    batch: Batch | None
    rejected: tuple[Rejected, ...] = ()
    truncated: int = 0
    """Samples of the batch whose tail was cut off."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as it will be learned from."""

    sample: Sample
    sequence: PlanSequence
    full_length: int
    """Rows before the tail was cut off."""

    @property
    def tokens(self) -> Tokens:
        return self.sequence.tokens

    @property
    def truncated(self) -> bool:
        return self.sequence.length < self.full_length


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns samples into batches.  Picklable if its parts are: it works in data loader processes."""

    preprocess: Callable[[Image], Views]
    """The vision encoder's."""
    num_tokens: Callable[[Layout], int]
    """The connector's."""
    per_token: bool = False
    """The connector treats every row alone, so it also gets prefix rows, and the plan drops them."""
    tokenize: Callable[[str], Any] | None = None
    """The connector's, if it reads the human turn that holds an image."""
    template: Template
    encoder: Encoder
    limits: Limits
    max_length: int
    drops: Callable[[Sequence[Turn]], bool] | None = None
    """The template's ``original_drops``, if the recipe is to have it: these samples stay but have no labels."""

    def __call__(self, items: Iterable[tuple[Position, Sample | SampleError]]) -> MicroBatch:
        """A right-padded batch to train on."""
        encoded, rejected = self._encode_all(items, reply=False)
        return self._assemble(encoded, rejected, "right")

    def prompts(self, samples: Sequence[Sample]) -> MicroBatch:
        """A left-padded batch of conversations whose last turn is the human's, ready to be answered."""
        items = [(Position("prompts", index), sample) for index, sample in enumerate(samples)]
        encoded, rejected = self._encode_all(items, reply=True)
        return self._assemble(encoded, rejected, "left")

    def encode(self, sample: Sample, reply: bool = False) -> Encoded:
        """One sample as it will be learned from, or with ``reply`` as it will be asked.

        Raises:
            SampleError: it cannot be used; the message says why.
        """
        where = f"sample '{sample.id}'"
        self._check_slots(sample, where)
        try:
            segments = self.template.render(sample.turns, reply)
        except ValueError as error:
            raise SampleError(Problem(where, f"the template cannot write it: {error}")) from error
        images = self._images(sample)
        try:
            tokens = self.encoder(segments)
            if reply:
                return self._encoded_prompt(sample, tokens, images)
            fitted = fit(tokens, [image.rows for image in images], self.max_length)
        except SampleError as error:
            raise SampleError([replace(problem, where=where) for problem in error.problems]) from error
        learned = fitted.tokens
        if self.drops is not None and len(tokens.ids) < self.max_length and self.drops(sample.turns):
            learned = replace(learned, labels=[IGNORE] * len(learned.labels))
        sequence = PlanSequence(id=sample.id, tokens=learned, images=images[: fitted.images])
        return Encoded(sample=sample, sequence=sequence, full_length=fitted.full_length)

    def _encoded_prompt(self, sample: Sample, tokens: Tokens, images: tuple[PlacedImage, ...]) -> Encoded:
        sequence = PlanSequence(id=sample.id, tokens=tokens, images=images)
        if sequence.length >= self.max_length:
            what = f"the conversation is too long: {sequence.length} rows, where {self.max_length} hold the answer too"
            raise SampleError(Problem("", what, "start a new one or raise max_length"))
        return Encoded(sample=sample, sequence=sequence, full_length=sequence.length)

    def _images(self, sample: Sample) -> tuple[PlacedImage, ...]:
        placed = []
        for index, path in enumerate(sample.images):
            views = self.preprocess(load_image(path, self.limits))
            text = None
            if self.tokenize is not None:
                turn = next(turn for turn in sample.turns if ImageSlot(index) in turn.parts)
                text = self.tokenize(turn.text)
            placed.append(PlacedImage(views=views, rows=self.num_tokens(views.layout), text=text))
        return tuple(placed)

    @staticmethod
    def _check_slots(sample: Sample, where: str) -> None:
        slots = [part.index for turn in sample.turns for part in turn.parts if isinstance(part, ImageSlot)]
        if slots != list(range(len(sample.images))):
            what = f"placeholder mismatch: the turns show images {slots}, the sample has {len(sample.images)}"
            raise SampleError(Problem(where, what, "each image must have one place, in order"))

    def _encode_all(
        self, items: Iterable[tuple[Position, Sample | SampleError]], reply: bool
    ) -> tuple[list[Encoded], list[Rejected]]:
        encoded, rejected = [], []
        for position, item in items:
            if isinstance(item, SampleError):
                rejected.append(Rejected(id=f"{position.source}[{position.index}]", position=position, error=item))
                continue
            try:
                encoded.append(self.encode(item, reply))
            except SampleError as error:
                rejected.append(Rejected(id=item.id, position=position, error=error))
        return encoded, rejected

    def _assemble(self, encoded: Sequence[Encoded], rejected: Sequence[Rejected], pad: Any) -> MicroBatch:
        if not encoded:
            return MicroBatch(batch=None, rejected=tuple(rejected))
        images, plan = build_plan([one.sequence for one in encoded], per_token=self.per_token, pad=pad)
        batch = Batch(images=images, plan=plan, ids=tuple(one.sample.id for one in encoded))
        truncated = sum(one.truncated for one in encoded)
        return MicroBatch(batch=batch, rejected=tuple(rejected), truncated=truncated)


class Parts(Protocol):
    """The parts of a model."""

    vision_encoder: VisionEncoder
    connector: Connector
    language_model: LanguageModel


def make_collator(recipe: Recipe, model: Parts, stage: Stage) -> Collator:
    """The collator of a stage.

    Raises:
        RecipeError: the stage's template and the model's tokenizer do not fit, or the encoder lacks ``image_aspect``.
    """
    template: Template = stage.template.build()
    connector: Any = model.connector
    return Collator(
        preprocess=choose_preprocess(model.vision_encoder, stage.image_aspect),
        num_tokens=connector.num_tokens,
        per_token=getattr(connector, "per_token", False),
        tokenize=connector.tokenize if getattr(connector, "needs_text", False) else None,
        template=template,
        encoder=check_template(template, model.language_model.tokenizer),
        limits=recipe.limits,
        max_length=stage.max_length,
        drops=getattr(template, "original_drops", None) if "mismatch" in recipe.compatibility else None,
    )


def choose_preprocess(encoder: Any, aspect: str | None) -> Callable[[Image], Views]:
    """The encoder's preprocessing, treating images that are not square as a stage says.

    Raises:
        RecipeError: the encoder knows no such way.
    """
    if aspect is None:
        return cast("Callable[[Image], Views]", encoder.preprocess)
    known = getattr(encoder, "aspects", ())
    if aspect not in known:
        what = f"the vision encoder knows no '{aspect}'"
        raise RecipeError(Problem("image_aspect", what, nearest(aspect, known) if known else "leave it out"))
    return partial(encoder.preprocess, aspect=aspect)


def batch_to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on ``device``."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

    def move_fields(record: Any) -> Any:
        return replace(record, **{f.name: move(getattr(record, f.name)) for f in fields(record)})

    images: tuple[ImageBatch, ...] = tuple(move_fields(image) for image in batch.images)
    plan: SplicePlan = move_fields(batch.plan)
    return replace(batch, images=images, plan=plan)


# --- samples that cannot be used -------------------------------------------------------------------------------------

SHOWN = 5
"""Samples an error message lists."""


@dataclass
class Quarantine:
    """Counts and lists what could not be used, and stops when it is more than the recipe tolerates.

    Every sample is accounted for: ``seen = used + the counts of all reasons``.

    Args:
        total: samples the stage has, which the tolerated fraction is of.
    """

    limits: Limits
    total: int
    seen: int = 0
    used: int = 0
    truncated: int = 0
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """Held-out samples that cannot be used."""

    def add(self, micro: MicroBatch) -> None:
        """Take a micro-batch to the account.

        Raises:
            DataError: more samples than tolerated cannot be used.
        """
        used = len(micro.batch.ids) if micro.batch is not None else 0
        self.used += used
        self.seen += used + len(micro.rejected)
        self.truncated += micro.truncated
        for rejected in micro.rejected:
            self._list(rejected)
        if micro.rejected and len(self.samples) > self.tolerated:
            raise DataError(self._too_many())

    def note(self, rejected: Iterable[Rejected]) -> None:
        """List samples that are only looked at (held out); they are not part of what was seen."""
        for one in rejected:
            known = [sample["position"] for sample in self.held_out]
            if [one.position.source, one.position.index] not in known:
                problem = one.error.problems[0]
                row = {
                    "id": one.id,
                    "position": [one.position.source, one.position.index],
                    "where": problem.where,
                    "what": problem.what,
                }
                self.held_out.append(row)

    def _list(self, rejected: Rejected) -> None:
        """Count a sample each time it comes, but list it once."""
        entry = self.reasons.setdefault(rejected.reason, {"count": 0, "ids": [], "first_path": "", "samples": []})
        entry["count"] += 1
        position = [rejected.position.source, rejected.position.index]
        if any(sample["position"] == position for sample in entry["samples"]):
            return
        problem = rejected.error.problems[0]
        entry["ids"].append(rejected.id)
        entry["first_path"] = entry["first_path"] or problem.where
        entry["samples"].append(
            {
                "id": rejected.id,
                "position": position,
                "where": problem.where,
                "what": problem.what,
                "hint": problem.hint,
            }
        )

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Every sample that could not be used, once."""
        return [sample for entry in self.reasons.values() for sample in entry["samples"]]

    @property
    def tolerated(self) -> int:
        """How many different samples may be unusable; never all of them."""
        part = math.ceil(round(self.limits.max_bad_fraction * self.total, 6))
        return max(0, min(self.limits.max_bad_samples, part, self.total - 1))

    def _too_many(self) -> list[Problem]:
        samples = self.samples
        what = f"{len(samples)} of {self.total:,} samples cannot be used, more than the {self.tolerated} tolerated"
        hint = "mend the data, or raise limits.max_bad_samples and limits.max_bad_fraction"
        listed = [Problem(f"{one['id']}: {one['where']}", one["what"], one["hint"]) for one in samples[:SHOWN]]
        return [Problem("data", what, hint), *listed]

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON, for checkpoints and the data report."""
        names = ("total", "seen", "used", "truncated", "reasons", "held_out")
        plain: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}))
        return plain

    def load_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an account that :meth:`to_dict` gave."""
        self.seen, self.used, self.truncated = state["seen"], state["used"], state["truncated"]
        self.reasons = json.loads(json.dumps(state["reasons"]))
        self.held_out = json.loads(json.dumps(state["held_out"]))


def write_data_report(path: Path, stage: str, quarantine: Quarantine) -> None:
    """Put a stage's account into ``data_report.json``, beside those of other stages."""
    report: dict[str, Any] = {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # a damaged report must not cost a trained stage
            report = json.loads(path.read_text("utf-8"))
    report[stage] = quarantine.to_dict()
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)
