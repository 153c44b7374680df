"""Layouts and operands to try the splice's backends on, and their exact results in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llava_kit.plan import text_segments, uniform_block
from llava_kit.splice_backends import Backend, Maps, Reference, Visual, Wanted


@dataclass(frozen=True)
class Case:
    """Rows of a batch: per sequence its pieces in order, a number for text rows, ``i`` for an image of ``patches``."""

    sequences: tuple[tuple[int | str, ...], ...]
    patches: int = 5
    dropped: int = 0
    padded: bool = True


CASES = {
    "padded": Case(((3, "i", 4), (2, "i", 1))),
    "packed": Case(((3, "i", 4), (2, "i", 1)), padded=False),
    "class rows": Case(((3, "i", 4), (1, "i", 2)), dropped=1),
    "two images, first and last": Case((("i", 6, "i"), (7,), (2, "i", "i")), dropped=1),
    "text only": Case(((7,), (3,))),
    "images only": Case((("i",), ("i",))),
    "several tiles": Case(((20, "i", 21), (1, "i", "i", 9)), patches=47, dropped=2),
    "many of one id": Case(((70, "i", 30),)),
}


def make_maps(case: Case, vocabulary: int) -> Maps:
    """Maps with ids drawn from few, so that several rows share one."""
    generator = torch.Generator().manual_seed(1)
    lengths = [sum(case.patches if piece == "i" else int(piece) for piece in one) for one in case.sequences]
    width = max(lengths) if case.padded else sum(lengths)
    vis, ids, rows = [], [], []
    row = 0
    for number, (pieces, length) in enumerate(zip(case.sequences, lengths, strict=True)):
        row = number * width if case.padded else row
        for piece in pieces:
            count = case.patches if piece == "i" else int(piece)
            places = list(range(row, row + count))
            if piece == "i":
                vis += [-1] * case.dropped + places
            else:
                ids += torch.randint(0, vocabulary // 2, (count,), generator=generator).tolist()
                rows += places
            row += count
        if case.padded:
            padding = list(range(row, number * width + width))
            ids += [-1] * len(padding)
            rows += padding
            assert length + len(padding) == width
    shape = (len(case.sequences), width) if case.padded else (1, width)
    txt_id_S = torch.tensor(ids, dtype=torch.int32)
    order_S, start, uid = text_segments(txt_id_S)
    return Maps(
        vis_dst_V=torch.tensor(vis, dtype=torch.int32),
        txt_id_S=txt_id_S,
        txt_dst_S=torch.tensor(rows, dtype=torch.int32),
        seg_order_S=order_S,
        seg_start=start,
        seg_uid=uid,
        shape=shape,
        uniform=uniform_block(vis, *shape),
    )


@dataclass(frozen=True)
class Numbers:
    """Operands of one run."""

    visual: Visual
    table: Tensor
    grad_RD: Tensor


def make_numbers(maps: Maps, dtype: torch.dtype, k: int = 24, d: int = 40, *, layer: bool = True) -> Numbers:
    """Random operands on the maps' device."""
    torch.manual_seed(0)
    v, device = maps.vis_dst_V.shape[0], maps.vis_dst_V.device

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    visual = Visual(
        hidden_VK=random(v, k if layer else d),
        weight_DK=random(d, k) if layer else None,
        bias_D=random(d) if layer else None,
    )
    return Numbers(visual, random(17, d), random(maps.rows, d))


def everything(table: Tensor, *, layer: bool = True) -> Wanted:
    return Wanted(hidden=True, weight=layer, bias=layer, table=True, table_rows=table.shape[0], table_dtype=table.dtype)


def exact(numbers: Numbers, maps: Maps) -> tuple[Tensor | None, ...]:
    """Output and gradients in float64, by the reference."""
    visual = numbers.visual
    double = Visual(
        hidden_VK=visual.hidden_VK.double(),
        weight_DK=None if visual.weight_DK is None else visual.weight_DK.double(),
        bias_D=None if visual.bias_D is None else visual.bias_D.double(),
    )
    table = numbers.table.double()
    wanted = everything(table, layer=visual.weight_DK is not None)
    out_RD = Reference().forward(double, table, maps, torch.float64)
    return out_RD, *Reference().backward(numbers.grad_RD.double(), double, maps, wanted)


def computed(backend: Backend, numbers: Numbers, maps: Maps) -> tuple[Tensor | None, ...]:
    visual, table = numbers.visual, numbers.table
    out_RD = backend.forward(visual, table, maps, table.dtype)
    wanted = everything(table, layer=visual.weight_DK is not None)
    return out_RD, *backend.backward(numbers.grad_RD, visual, maps, wanted)


def errors(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> list[float]:
    """Largest differences of output and gradients, as parts of the largest value."""
    parts = []
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None and other.numel():
            assert one.shape == other.shape
            difference = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)
            parts.append(float(difference.nan_to_num(nan=float("inf"))))
    return parts


def to_device(maps: Maps, device: str) -> Maps:
    """The same maps on another device."""
    tensors = {f.name: getattr(maps, f.name) for f in fields(maps) if isinstance(getattr(maps, f.name), Tensor)}
    return replace(maps, **{name: tensor.to(device) for name, tensor in tensors.items()})


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an element nobody writes shows."""
    fresh = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = fresh(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    Tensor.new_empty = poisoned  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.new_empty = fresh  # type: ignore[method-assign]
