"""What a backend of the splice is, and those that need nothing but PyTorch.

A backend computes the whole operation, forward and backward.  All of them mean the same.

Shapes: V visual rows, S text rows, K connector width, D language model width, R rows of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_kit.errors import Problem, ResourceError


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The tensors and counts of a :class:`llava_kit.contracts.SplicePlan` that backends read."""

    vis_dst_V: Tensor
    txt_id_S: Tensor
    txt_dst_S: Tensor
    seg_order_S: Tensor
    seg_start: Tensor
    seg_uid: Tensor
    shape: Sequence[int]
    """B and T."""
    uniform: Sequence[int]
    """First row, dropped rows and rows of each sequence's only image block, or empty."""

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Visual:
    """Visual rows and the layer that projects them; without ``weight_DK`` they are projected already."""

    hidden_VK: Tensor
    weight_DK: Tensor | None
    bias_D: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which gradients are needed, and what the table's looks like."""

    hidden: bool
    weight: bool
    bias: bool
    table: bool
    table_rows: int
    table_dtype: torch.dtype


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of ``hidden_VK``, ``weight_DK``, ``bias_D`` and ``table``; ``None`` where not wanted."""


class Backend(Protocol):
    """One way to compute the splice; results are new tensors."""

    def forward(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
        """``[R, D]`` in ``dtype``."""
        ...

    def backward(self, grad_RD: Tensor, visual: Visual, maps: Maps, wanted: Wanted) -> Gradients: ...


def unavailable(name: str, reason: str) -> ResourceError:
    """The error of choosing a backend that cannot do what is asked."""
    hint = "set splice.backend=auto"
    return ResourceError(Problem("splice.backend", f"'{name}' is not available: {reason}", hint))


# --- plain PyTorch ---------------------------------------------------------------------------------------------------


class Reference:
    """The meaning of the operation, in plain PyTorch on any device."""

    def forward(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
        # One row more than the output has: dropped rows land there, so that nothing depends on their number.
        out_RD = table.new_empty(maps.rows + 1, table.shape[1], dtype=dtype)
        out_RD.index_copy_(0, keep(maps.vis_dst_V, maps.rows), project(visual).to(dtype))
        _write_text(out_RD, table, maps)
        return out_RD[: maps.rows]

    def backward(self, grad_RD: Tensor, visual: Visual, maps: Maps, wanted: Wanted) -> Gradients:
        grad_VD = gather(grad_RD, maps.vis_dst_V, visual.hidden_VK.dtype) if wants_visual(wanted) else None
        return (*visual_gradients(grad_VD, visual, wanted), table_gradient(grad_RD, maps, wanted))


class Strided:
    """The projection written by one batched product straight into its place: for sequences laid out alike."""

    def forward(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
        reason = strided_refusal(visual, maps, dtype)
        if reason or visual.weight_DK is None:
            raise unavailable("strided", reason)
        first, dropped, count = maps.uniform
        out_RD = table.new_empty(maps.rows + 1, table.shape[1], dtype=dtype)
        out_BTD = out_RD[: maps.rows].view(*maps.shape, -1)
        hidden_BPK = visual.hidden_VK.reshape(maps.shape[0], dropped + count, -1)[:, dropped:]
        weight_BKD = visual.weight_DK.t().expand(maps.shape[0], -1, -1)
        place_BPD = out_BTD[:, first : first + count]
        if visual.bias_D is None:
            torch.bmm(hidden_BPK, weight_BKD, out=place_BPD)
        else:
            torch.baddbmm(visual.bias_D.expand_as(place_BPD), hidden_BPK, weight_BKD, out=place_BPD)
        _write_text(out_RD, table, maps)
        return out_RD[: maps.rows]

    backward = Reference.backward


def strided_refusal(visual: Visual, maps: Maps, dtype: torch.dtype) -> str:
    """Why ``strided`` cannot compute this; empty when it can."""
    if visual.weight_DK is None:
        return "there is no plain linear layer to fuse"
    if not maps.uniform:
        return "the sequences of this batch are not laid out alike"
    return "" if visual.hidden_VK.dtype == dtype else f"it cannot project {visual.hidden_VK.dtype} into {dtype}"


def keep(rows: Tensor, instead: int) -> Tensor:
    """Row numbers as torch wants them, dropped ones replaced."""
    return rows.where(rows >= 0, instead).long()


def project(visual: Visual) -> Tensor:
    """Rows of the language model's width."""
    if visual.weight_DK is None:
        return visual.hidden_VK
    return F.linear(visual.hidden_VK, visual.weight_DK, visual.bias_D)


def _write_text(out_RD: Tensor, table: Tensor, maps: Maps) -> None:
    """Text rows and padding; the row after the last one takes what must not be seen."""
    found_SD = table.index_select(0, maps.txt_id_S.clamp(min=0)).to(out_RD.dtype)
    out_RD.index_copy_(0, maps.txt_dst_S.long(), found_SD)
    out_RD.index_fill_(0, chosen_rows(maps.txt_dst_S, maps.txt_id_S < 0, maps.rows), 0)


def gather(grad_RD: Tensor, dst_V: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of each visual row, zeros for dropped ones."""
    count = dst_V.shape[0]
    grad_VD = grad_RD.new_empty(count + 1, grad_RD.shape[1])
    torch.index_select(grad_RD, 0, dst_V.clamp(min=0), out=grad_VD[:count])
    own_V = torch.arange(count, device=dst_V.device)
    grad_VD.index_fill_(0, chosen_rows(own_V, dst_V < 0, count), 0)
    return grad_VD[:count].to(dtype)


def chosen_rows(rows: Tensor, chosen: Tensor, spare: int) -> Tensor:
    """The chosen ones of ``rows``; a GPU is not asked how many these are, the others become the ``spare`` row there."""
    return rows[chosen].long() if rows.device.type == "cpu" else rows.where(chosen, spare).long()


def wants_visual(wanted: Wanted) -> bool:
    """Whether the gradient of visual rows is needed for anything."""
    return wanted.hidden or wanted.weight or wanted.bias


def visual_gradients(
    grad_VD: Tensor | None, visual: Visual, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden rows, weight and bias from that of the projected rows."""
    if grad_VD is None:
        return None, None, None
    d_hidden = None
    if wanted.hidden:
        d_hidden = grad_VD if visual.weight_DK is None else grad_VD @ visual.weight_DK
    d_weight = grad_VD.t() @ visual.hidden_VK if wanted.weight else None
    return d_hidden, d_weight, grad_VD.sum(0) if wanted.bias else None


def table_gradient(grad_RD: Tensor, maps: Maps, wanted: Wanted) -> Tensor | None:
    """The table's gradient with torch's own (deterministic) kernel; rows of id −1 are its padding."""
    if not wanted.table:
        return None
    grad_SD = grad_RD.index_select(0, maps.txt_dst_S).to(wanted.table_dtype)
    padding = wanted.table_rows  # a row too many, cut off below: every kernel agrees on what an ordinary id means
    id_S = keep(maps.txt_id_S, padding)
    summed = torch.ops.aten.embedding_dense_backward(grad_SD, id_S, wanted.table_rows + 1, padding, False)
    return summed[: wanted.table_rows]  # type: ignore[no-any-return]
