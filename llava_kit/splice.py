"""The one operation between vision and language: project visual rows and put them among the text rows.

It is one operator to autograd, ``torch.compile`` and the profiler.  What computes it is chosen in
:mod:`llava_kit.splice_dispatch`; nothing here or there asks the device for a value.

Shapes: V visual rows, S text rows, K connector width, D language model width, R rows of the output (B·T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_kit.contracts import SplicePlan
from llava_kit.splice_backends import Maps, Visual, Wanted
from llava_kit.splice_dispatch import DISPATCHER


def project_and_splice(
    hidden_VK: Tensor, final: nn.Module | None, table: Tensor, plan: SplicePlan, dtype: torch.dtype | None = None
) -> Tensor:
    """The language model's input, ``[B, T, D]``: text rows looked up in ``table``, visual rows projected by ``final``.

    Args:
        hidden_VK: what the connector gives before its last layer, all images of the batch.
        final: the connector's last layer; ``None`` where ``hidden_VK`` is projected already.
        table: ``[vocabulary, D]``; where ``dtype`` is its own, rows keep its values bit for bit.
        plan: where every row goes.
        dtype: of the result; by default the table's.  The table itself is never cast, only the rows that are taken.
    """
    weight_DK: Tensor | None = None
    bias_D: Tensor | None = None
    if isinstance(final, nn.Linear) and is_plain_linear(final):
        weight_DK, bias_D = final.weight, final.bias
        device = hidden_VK.device.type
        if torch.is_autocast_enabled(device) and hidden_VK.dtype != torch.float64:
            low = torch.get_autocast_dtype(device)
            hidden_VK, weight_DK = hidden_VK.to(low), weight_DK.to(low)
            bias_D = None if bias_D is None else bias_D.to(low)
    elif final is not None:
        hidden_VK = final(hidden_VK)
    out_BTD: Tensor = _project_and_splice(
        hidden_VK, weight_DK, bias_D, table, plan.vis_dst_V, plan.txt_id_S, plan.txt_dst_S, plan.seg_order_S,
        plan.seg_start, plan.seg_uid, plan.mask_BT.shape, plan.uniform, dtype or table.dtype,
    )  # fmt: skip
    return out_BTD


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether using ``layer.weight`` and ``layer.bias`` directly means the same as calling ``layer``.

    An adapter's wrapper also has a ``weight``, that of the base layer; reading it would lose the adapter in silence.
    """
    return type(layer) is nn.Linear and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("llava_kit::project_and_splice", mutates_args=())
def _project_and_splice(
    hidden_VK: Tensor,
    weight_DK: Tensor | None,
    bias_D: Tensor | None,
    table: Tensor,
    vis_dst_V: Tensor,
    txt_id_S: Tensor,
    txt_dst_S: Tensor,
    seg_order_S: Tensor,
    seg_start: Tensor,
    seg_uid: Tensor,
    shape: Sequence[int],
    uniform: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    visual = Visual(hidden_VK=hidden_VK, weight_DK=weight_DK, bias_D=bias_D)
    maps = Maps(
        vis_dst_V=vis_dst_V,
        txt_id_S=txt_id_S,
        txt_dst_S=txt_dst_S,
        seg_order_S=seg_order_S,
        seg_start=seg_start,
        seg_uid=seg_uid,
        shape=shape,
        uniform=uniform,
    )
    with torch.autocast(hidden_VK.device.type, enabled=False):  # operands have the dtypes they are meant to have
        backend = DISPATCHER.backend(DISPATCHER.pick(visual, table, maps, dtype), table.device)
        return backend.forward(visual, table, maps, dtype).view(*shape, table.shape[1])


@_project_and_splice.register_fake
def _(
    hidden_VK: Tensor,
    weight_DK: Tensor | None,
    bias_D: Tensor | None,
    table: Tensor,
    *maps: Any,
) -> Tensor:
    shape, _, dtype = maps[-3:]
    return table.new_empty(*shape, table.shape[1], dtype=dtype)


@torch.library.custom_op("llava_kit::project_and_splice_backward", mutates_args=())
def _project_and_splice_backward(
    grad_BTD: Tensor,
    hidden_VK: Tensor,
    weight_DK: Tensor | None,
    bias_D: Tensor | None,
    vis_dst_V: Tensor,
    txt_id_S: Tensor,
    txt_dst_S: Tensor,
    seg_order_S: Tensor,
    seg_start: Tensor,
    seg_uid: Tensor,
    uniform: Sequence[int],
    wanted: Sequence[bool],
    table_rows: int,
    table_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden rows, weight, bias and table; those that are not wanted are empty."""
    visual = Visual(hidden_VK=hidden_VK, weight_DK=weight_DK, bias_D=bias_D)
    maps = Maps(
        vis_dst_V=vis_dst_V,
        txt_id_S=txt_id_S,
        txt_dst_S=txt_dst_S,
        seg_order_S=seg_order_S,
        seg_start=seg_start,
        seg_uid=seg_uid,
        shape=grad_BTD.shape[:2],
        uniform=uniform,
    )
    hidden, weight, bias, table = wanted
    asked = Wanted(hidden=hidden, weight=weight, bias=bias, table=table, table_rows=table_rows, table_dtype=table_dtype)
    with torch.autocast(hidden_VK.device.type, enabled=False):
        backend = DISPATCHER.backend(DISPATCHER.picked(visual, grad_BTD.dtype, bool(uniform)), grad_BTD.device)
        gradients = backend.backward(grad_BTD.flatten(0, 1), visual, maps, asked)
    d_hidden, d_weight, d_bias, d_table = (hidden_VK.new_empty(0) if one is None else one for one in gradients)
    return d_hidden, d_weight, d_bias, d_table


@_project_and_splice_backward.register_fake
def _(
    grad_BTD: Tensor,
    hidden_VK: Tensor,
    weight_DK: Tensor | None,
    bias_D: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, table_rows, table_dtype = rest[-3:]
    operands = (hidden_VK, weight_DK, bias_D)
    d_hidden, d_weight, d_bias = (
        hidden_VK.new_empty(one.shape if needed and one is not None else (0,))
        for one, needed in zip(operands, wanted, strict=False)
    )
    size = (table_rows, grad_BTD.shape[-1]) if wanted[3] else (0,)
    return d_hidden, d_weight, d_bias, grad_BTD.new_empty(size, dtype=table_dtype if wanted[3] else hidden_VK.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_VK, weight_DK, bias_D, table, *maps, _shape, uniform, _dtype = inputs
    ctx.save_for_backward(hidden_VK, weight_DK, bias_D, *maps)
    ctx.uniform, ctx.table_rows, ctx.table_dtype = uniform, table.shape[0], table.dtype


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _project_and_splice_backward(
        grad_BTD, *ctx.saved_tensors, ctx.uniform, wanted, ctx.table_rows, ctx.table_dtype
    )
    return (*(one if needed else None for one, needed in zip(gradients, wanted, strict=True)), *[None] * 9)


_project_and_splice.register_autograd(_backward, setup_context=_setup_context)
