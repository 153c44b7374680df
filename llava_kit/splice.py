"""The one operation between vision and language: project visual rows and put them among the text rows.

Shapes: V visual rows, S text rows, K connector width, D language model width, R rows of the output (B·T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_kit.contracts import SplicePlan


def project_and_splice(hidden_VK: Tensor, final: nn.Module | None, table: Tensor, plan: SplicePlan) -> Tensor:
    """The language model's input, ``[B, T, D]``: text rows looked up in ``table``, visual rows projected by ``final``.

    Args:
        hidden_VK: what the connector gives before its last layer, all images of the batch.
        final: the connector's last layer; ``None`` where ``hidden_VK`` is projected already.
        table: ``[vocabulary, D]``; rows keep its dtype and its values bit for bit.
        plan: where every row goes.
    """
    weight_DK: Tensor | None = None
    bias_D: Tensor | None = None
    if isinstance(final, nn.Linear) and is_plain_linear(final):
        weight_DK, bias_D = final.weight, final.bias
    elif final is not None:
        hidden_VK = final(hidden_VK)
    out_RD = _splice_reference(hidden_VK, weight_DK, bias_D, table, plan)
    return out_RD.view(*plan.mask_BT.shape, -1)


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


def _splice_reference(
    hidden_VK: Tensor, weight_DK: Tensor | None, bias_D: Tensor | None, table: Tensor, plan: SplicePlan
) -> Tensor:
    """The meaning of the operation in plain PyTorch, with gradients to all four tensors."""
    visual_VD = hidden_VK if weight_DK is None else F.linear(hidden_VK, weight_DK, bias_D)
    # One row more than the output has: dropped rows land there, so that nothing depends on their number.
    out_RD = table.new_zeros(plan.rows + 1, table.shape[1])
    out_RD = out_RD.index_copy_(0, _destination(plan.vis_dst_V, plan.rows), visual_VD.to(table.dtype))
    is_text_S = plan.txt_id_S >= 0
    text_SD = F.embedding(plan.txt_id_S.clamp(min=0), table) * is_text_S[:, None]
    return out_RD.index_copy_(0, _destination(plan.txt_dst_S, plan.rows), text_SD)[: plan.rows]


def _destination(rows: Tensor, drop: int) -> Tensor:
    return torch.where(rows < 0, drop, rows).long()
