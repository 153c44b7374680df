"""Builds and checks splice plans on the CPU, where a wrong count can still name the sample it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llava_kit.contracts import IGNORE, IMAGE_TOKEN, ImageBatch, Layout, SplicePlan, Views
from llava_kit.errors import ModelError, Problem
from llava_kit.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class PlacedImage:
    """An image of a sequence: its pixels, the rows it takes in the sequence, and the text its connector reads."""

    views: Views
    rows: int
    text: Any = None


@dataclass(frozen=True, kw_only=True)
class PlanSequence:
    """A sequence to be planned: a sample's tokens and the images its ids hold, in order."""

    id: str
    tokens: Tokens
    images: tuple[PlacedImage, ...] = ()

    @property
    def length(self) -> int:
        """Rows of the sequence, images with all of theirs."""
        return len(self.tokens.ids) - len(self.images) + sum(image.rows for image in self.images)


def build_plan(
    sequences: Sequence[PlanSequence], *, per_token: bool, pad: Literal["left", "right"]
) -> tuple[tuple[ImageBatch, ...], SplicePlan]:
    """Images grouped by layout, and the plan that puts their rows and the text's where they belong.

    Args:
        per_token: the connector gives a row for each of the encoder's rows, so the plan drops the prefix rows.

    Raises:
        ModelError: an encoder's or connector's rows do not come out even; the message names the sample.
    """
    lengths = [sequence.length for sequence in sequences]
    width = max(lengths)
    text: list[tuple[int, int]] = []  # output row, token id
    labels: list[tuple[int, int]] = []  # output row, id of the token after it
    label_counts = []
    image_starts: list[tuple[int, PlacedImage, str]] = []
    mask_BT = torch.zeros(len(sequences), width, dtype=torch.bool)
    for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        first = number * width + (width - length if pad == "left" else 0)
        labels_before = len(labels)
        row = first
        images = iter(sequence.images)
        for index, label in zip(sequence.tokens.ids, sequence.tokens.labels, strict=True):
            if label != IGNORE and row > first:
                labels.append((row - 1, label))
            if index == IMAGE_TOKEN:
                image = next(images)
                image_starts.append((row, image, sequence.id))
                row += image.rows
            else:
                text.append((row, index))
                row += 1
        label_counts.append(len(labels) - labels_before)
        padding = range(number * width, first) if pad == "left" else range(row, (number + 1) * width)
        text += [(place, -1) for place in padding]
        column = first - number * width
        mask_BT[number, column : column + length] = True
    batches, vis_dst = _group_images(image_starts, per_token)
    txt_id_S = torch.tensor([index for _, index in text], dtype=torch.int32)
    order_S, start, uid = text_segments(txt_id_S)
    plan = SplicePlan(
        vis_dst_V=torch.tensor(vis_dst, dtype=torch.int32),
        txt_id_S=txt_id_S,
        txt_dst_S=torch.tensor([row for row, _ in text], dtype=torch.int32),
        seg_order_S=order_S,
        seg_start=start,
        seg_uid=uid,
        label_row_L=torch.tensor([row for row, _ in labels], dtype=torch.int32),
        label_id_L=torch.tensor([label for _, label in labels], dtype=torch.int64),
        mask_BT=mask_BT,
        lengths=tuple(lengths),
        label_counts=tuple(label_counts),
        uniform=uniform_block(vis_dst, len(sequences), width),
    )
    check_plan(plan, [sequence.id for sequence in sequences])
    return batches, plan


def text_segments(txt_id_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order, starts and ids of :class:`~llava_kit.contracts.SplicePlan`'s segments."""
    order_S = torch.argsort(txt_id_S, stable=True)
    ids, counts = torch.unique_consecutive(txt_id_S[order_S], return_counts=True)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    padding = int(len(ids) > 0 and int(ids[0]) < 0)
    return order_S.int(), ends[padding:].int(), ids[padding:].int()


def uniform_block(vis_dst: Sequence[int], sequences: int, width: int) -> tuple[int, ...]:
    """``uniform`` of a plan for visual rows that go to these rows of sequences of ``width`` rows."""
    own, rest = divmod(len(vis_dst), sequences)
    dropped = next((index for index, row in enumerate(vis_dst) if row >= 0), own)
    if rest or dropped >= own:
        return ()
    first, count = vis_dst[dropped], own - dropped
    if first + count > width:
        return ()
    alike = [
        row for start in range(0, sequences * width, width)
        for row in (*[-1] * dropped, *range(start + first, start + first + count))
    ]  # fmt: skip
    return (first, dropped, count) if alike == list(vis_dst) else ()


def _group_images(
    placed: Sequence[tuple[int, PlacedImage, str]], per_token: bool
) -> tuple[tuple[ImageBatch, ...], list[int]]:
    """Images of one layout and size together, in the order they first appear, and where their rows go."""
    groups: dict[Any, list[tuple[int, PlacedImage]]] = {}
    for row, image, id_ in placed:
        layout, pixels_NCHW = image.views.layout, image.views.pixels_NCHW
        if pixels_NCHW.dim() != 4 or pixels_NCHW.shape[0] != layout.tiles:
            what = f"preprocess gave pixels of shape {tuple(pixels_NCHW.shape)} for a layout of {layout.tiles} tiles"
            raise ModelError(Problem(f"sample '{id_}'", what, "it must be [tiles, channels, height, width]"))
        patches = layout.tiles * layout.grid_h * layout.grid_w
        if per_token and image.rows != patches:
            what = f"the connector claims {image.rows} rows for an image of {patches} patches"
            raise ModelError(
                Problem(f"sample '{id_}'", what, "num_tokens must count every patch where per_token is set")
            )
        groups.setdefault((layout.shape, pixels_NCHW.shape[1:]), []).append((row, image))
    batches = []
    vis_dst: list[int] = []
    for members in groups.values():
        layout = members[0][1].views.layout
        texts = tuple(image.text for _, image in members)
        batches.append(
            ImageBatch(
                pixels_NCHW=torch.cat([image.views.pixels_NCHW for _, image in members]),
                layout=layout if len(members) == 1 else replace(layout, crop=None),
                text=None if texts[0] is None else texts,
            )
        )
        for row, image in members:
            vis_dst += _image_rows(row, layout) if per_token else range(row, row + image.rows)
    return tuple(batches), vis_dst


def _image_rows(row: int, layout: Layout) -> list[int]:
    """Output rows of an image's encoder rows, tile by tile; prefix rows go nowhere."""
    grid = layout.grid_h * layout.grid_w
    rows: list[int] = []
    for tile in range(layout.tiles):
        rows += [-1] * layout.prefix_tokens
        rows += range(row + tile * grid, row + (tile + 1) * grid)
    return rows


def check_plan(plan: SplicePlan, ids: Sequence[str]) -> None:
    """Make sure that every output row is written exactly once.

    Raises:
        ModelError: one is not; the message names the sample.
    """
    destinations: Tensor = torch.cat([plan.vis_dst_V[plan.vis_dst_V >= 0], plan.txt_dst_S]).long()
    width = plan.mask_BT.shape[1]
    if len(destinations) and not 0 <= int(destinations.min()) <= int(destinations.max()) < plan.rows:
        raise ModelError(Problem("splice plan", f"it writes outside its {plan.rows} rows"))
    written = torch.bincount(destinations, minlength=plan.rows)
    wrong = (written != 1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        what = f"row {row % width} of its sequence is written {int(written[row])} times in the splice plan"
        raise ModelError(Problem(f"sample '{ids[row // width]}'", what, "it must be written once"))
